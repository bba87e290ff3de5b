"""Every preset in ``configs/`` is something that ``vllm serve --config`` takes as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from command_line import engine_args
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_lookahead import plugin
from vllm_lookahead.config import LookaheadConfig

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = sorted(set(CONFIGS.glob("*.yaml")) - {CONFIGS / "ray-serve.yaml"})  # tests/ray serves that one

PAPER = {"lookahead-7b": (15, 5, 15), "lookahead-13b": (10, 5, 10), "lookahead-34b": (7, 5, 7)}


def load(parser: FlexibleArgumentParser, model: str, preset: Path) -> tuple[LookaheadConfig, AsyncEngineArgs]:
    args = engine_args(parser, model, "--skip-tokenizer-init", "--config", str(preset))
    config = args.create_engine_config()
    assert config.parallel_config.worker_cls == plugin.WORKERS["cpu", "v1"]
    return LookaheadConfig.from_vllm_config(config), args


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset_starts_as_it_is(parser: FlexibleArgumentParser, model: str, preset: Path) -> None:
    written = yaml.safe_load(preset.read_text())["speculative-config"]
    config, args = load(parser, model, preset)
    assert config.method == written.pop("method")
    assert config.budget == written.pop("budget", "auto")
    assert config.options.items() >= written.items()
    # a single request's tree must fit into a step
    assert config.num_speculative_tokens < (args.max_num_batched_tokens or 2048)


@pytest.mark.parametrize("name", PAPER)
def test_paper_windows(parser: FlexibleArgumentParser, model: str, name: str) -> None:
    config, _ = load(parser, model, CONFIGS / f"{name}.yaml")
    sizes = tuple(config.options[option] for option in ("window_size", "ngram_size", "guess_set_size"))
    assert sizes == PAPER[name]


def test_command_line_wins_over_preset(parser: FlexibleArgumentParser, model: str) -> None:
    preset = str(CONFIGS / "lookahead-7b.yaml")
    args = parser.parse_args(["serve", model, "--config", preset, "--max-num-batched-tokens", "4096"])
    assert args.max_num_batched_tokens == 4096


def test_every_preset_says_how_to_use_it() -> None:
    assert len(PRESETS) >= 7
    for preset in PRESETS:
        assert f"--config configs/{preset.name}" in preset.read_text()
