"""How ``vllm serve`` starts: from a YAML preset, and not at all if an option is wrong."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from openai import OpenAI
from serving import COMPARABLE, PROMPTS, VLLM, client, complete, serving, texts

CONFIGS = Path(__file__).parents[2] / "configs"


def test_preset_with_defaults(demo_model: str, logs: Path) -> None:
    """As docs/options.md says: nothing but the preset, so compiled and in the model's own dtype."""
    preset = str(CONFIGS / "lookahead-cpu.yaml")
    with serving(demo_model, logs / "preset.log", "--config", preset) as server:
        server.wait_until_ready()
        ours = client(server)
        for options in ({}, {"temperature": 0.8, "seed": 1}):
            answer = complete(ours, PROMPTS, extra_body={"ignore_eos": True}, **options)
            assert answer.usage.completion_tokens == 64 * len(PROMPTS)
            assert [choice.finish_reason for choice in answer.choices] == ["length"] * len(PROMPTS)
        assert server.metrics()["vllm:spec_decode_num_accepted_tokens_total"] > 0


def test_data_parallelism(stock: OpenAI, demo_model: str, logs: Path) -> None:
    """Two engines, each with trees of its own, behind two API servers, as vLLM starts them then."""
    arguments = (*COMPARABLE, "--data-parallel-size", "2", "--speculative-model", "[prompt_lookup]")
    with serving(demo_model, logs / "data-parallel.log", *arguments) as server:
        server.wait_until_ready()
        prompts = PROMPTS * 4
        assert texts(complete(client(server), prompts)) == texts(complete(stock, prompts))
        metrics = server.metrics()
        assert metrics["vllm:spec_decode_num_accepted_tokens_total"] > 0
        for name in ("vllm:spec_decode_num_accepted_tokens", "vllm:spec_decode_num_draft_tokens"):
            assert metrics[f"{name}_by_source_total"] == metrics[f"{name}_total"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--speculative-config", '{"method": "prompt_lookup", "max_ngram": 0}'],
            "error: [prompt_lookup]: max_ngram = 0: must be an integer from 1 to",
        ),
        (["--speculative-model", "[prompt_lookupp]"], "error: unknown speculative method 'prompt_lookupp'"),
    ],
    ids=["option", "method"],
)
def test_mistake_ends_with_one_message(demo_model: str, arguments: list[str], message: str) -> None:
    start = time.monotonic()
    result = subprocess.run(
        [VLLM, "serve", demo_model, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert "EngineCore" not in result.stdout + result.stderr
    assert time.monotonic() - start < 90
