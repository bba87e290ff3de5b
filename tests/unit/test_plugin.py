"""The plugin inside vLLM: every way to ask for our methods, and nothing changed where nobody asks."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_lookahead import plugin, support, wrappers
from vllm_lookahead.config import KEY, ConfigError, LookaheadConfig

WORKER = plugin.WORKERS["cpu"]


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    """The parser of ``vllm serve``, as vLLM builds it."""
    plugin.register()
    root = FlexibleArgumentParser(prog="vllm")
    make_arg_parser(root.add_subparsers(dest="subparser").add_parser("serve"))
    return root


@pytest.fixture
def without_plugin() -> Iterator[None]:
    """Stock vLLM for the length of a test."""
    wrappers.restore_all()
    yield
    plugin.register()


def vllm_config(model: str, **kwargs: Any) -> Any:
    return EngineArgs(model=model, skip_tokenizer_init=True, **kwargs).create_engine_config()


def from_command_line(parser: FlexibleArgumentParser, model: str, *arguments: str) -> Any:
    args = parser.parse_args(["serve", model, "--skip-tokenizer-init", *arguments])
    args.model = args.model_tag  # as ServeSubcommand.cmd does
    return AsyncEngineArgs.from_cli_args(args).create_engine_config()


def assert_ours(config: Any, method: str = "prompt_lookup", **options: Any) -> LookaheadConfig:
    ours = LookaheadConfig.from_vllm_config(config)
    assert ours.method == method
    assert ours.options.items() >= options.items()
    assert config.speculative_config.method == "custom_class"
    assert config.speculative_config.model == plugin.DRAFTER
    assert config.speculative_config.num_speculative_tokens == ours.num_speculative_tokens
    assert config.parallel_config.worker_cls == WORKER
    assert plugin.is_ours(config.speculative_config)
    return ours


# ---- every way to ask


@pytest.mark.parametrize(
    "arguments",
    [
        ["--speculative-model", "[prompt_lookup]"],
        ["--speculative_model=[prompt_lookup]"],
        ["--spec-model", "[prompt_lookup]"],
        ["--spec-method", "prompt_lookup"],
        ["--spec-method", "prompt_lookup", "--spec-model", "[prompt_lookup]"],
        ["--speculative-config", '{"method": "prompt_lookup"}'],
        ["--speculative-config", '{"model": "[prompt_lookup]"}'],
        ["-sc", '{"model": "[prompt_lookup]"}'],
        ["--speculative-config.method", "prompt_lookup"],
    ],
)
def test_command_line(parser: FlexibleArgumentParser, model: str, arguments: list[str]) -> None:
    assert_ours(from_command_line(parser, model, *arguments))


@pytest.mark.parametrize("flag", ["--spec-tokens", "--num-speculative-tokens"])
def test_command_line_tokens(parser: FlexibleArgumentParser, model: str, flag: str) -> None:
    config = from_command_line(parser, model, "--speculative-model", "[prompt_lookup]", flag, "6")
    assert assert_ours(config).num_speculative_tokens == 6


def test_command_line_options(parser: FlexibleArgumentParser, model: str) -> None:
    config = from_command_line(
        parser, model, "--speculative-config", '{"method": "prompt_lookup", "max-ngram": 3, "budget": 2}'
    )
    assert assert_ours(config, max_ngram=3).budget == 2


def test_flags_and_config_together(parser: FlexibleArgumentParser, model: str) -> None:
    config = from_command_line(parser, model, "--spec-method", "prompt_lookup", "--speculative-config.max_ngram", "3")
    assert_ours(config, max_ngram=3)


def test_yaml(parser: FlexibleArgumentParser, model: str, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("speculative-config:\n  method: prompt_lookup\n  max_ngram: 3\nmax-num-seqs: 4\n")
    assert_ours(from_command_line(parser, model, "--config", str(path)), max_ngram=3)
    path.write_text('speculative-model: "[prompt_lookup]"\n')
    assert_ours(from_command_line(parser, model, "--config", str(path)))


@pytest.mark.parametrize("given", [{"method": "prompt_lookup"}, {"model": "[prompt_lookup]", "max-ngram": 5}])
def test_python(model: str, given: dict[str, Any]) -> None:
    assert_ours(vllm_config(model, speculative_config=given))


# ---- what vLLM does with the arguments


def test_arguments_survive_reuse_copy_and_pickle(model: str) -> None:
    settings = {"method": "prompt_lookup", "max_ngram": 3}
    args = EngineArgs(model=model, skip_tokenizer_init=True, speculative_config=settings, additional_config={"mine": 1})
    for again in (args, args, copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        config = again.create_engine_config()
        assert_ours(config, max_ngram=3)
        assert config.additional_config["mine"] == 1
        assert_ours(pickle.loads(pickle.dumps(config)), max_ngram=3)
    assert settings == {"method": "prompt_lookup", "max_ngram": 3}
    assert args.speculative_config == settings


def test_users_own_dictionaries_are_left_alone(model: str) -> None:
    mine = {"mine": 1}
    vllm_config(model, speculative_config={"method": "prompt_lookup"}, additional_config=mine)
    assert mine == {"mine": 1}


def test_explicit_worker_class_wins(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []

    def warning(self: Any, message: str, *args: Any, **kwargs: Any) -> None:
        warnings.append(message % args)

    monkeypatch.setattr("logging.Logger.warning", warning)
    stock = "vllm.v1.worker.cpu_worker.CPUWorker"
    config = vllm_config(model, speculative_config={"method": "prompt_lookup"}, worker_cls=stock)
    assert config.parallel_config.worker_cls == stock
    assert [text for text in warnings if "keeps --worker-cls" in text and stock in text]


# ---- mistakes


MISTAKES = [
    ({"method": "prompt_lookup", "max_ngram": 0}, "max_ngram = 0: must be an integer from 1 to"),
    ({"method": "prompt_lookup", "max_ngramm": 3}, "unknown option 'max_ngramm'"),
    ({"method": "prompt_lookup", "max_ngram": "3"}, 'max_ngram = "3"'),
    ({"method": "prompt_lookupp", "num_speculative_tokens": 3}, "unknown speculative method 'prompt_lookupp'"),
    ({"method": "prompt_lookup", "model": "some/model"}, "contradict each other"),
]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("given", "message"), MISTAKES)
def test_mistake_in_python(model: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vllm_config(model, speculative_config=given)


@pytest.mark.parametrize(("given", "message"), MISTAKES)
def test_mistake_on_the_command_line(
    parser: FlexibleArgumentParser,
    model: str,
    given: dict[str, Any],
    message: str,
    command_line: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        from_command_line(parser, model, "--speculative-config", json.dumps(given))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_unknown_method_flag(parser: FlexibleArgumentParser, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["serve", "m", "--spec-method", "prompt_lookupp"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "prompt_lookup'" in error
    assert "suffix" in error


@pytest.mark.usefixtures("offline")
def test_flag_and_config_contradict(model: str) -> None:
    with pytest.raises(ConfigError, match=r"--spec-tokens and --speculative-config\['num_speculative_tokens'\]"):
        vllm_config(model, spec_tokens=3, speculative_config={"method": "prompt_lookup", "num_speculative_tokens": 3})


@pytest.mark.usefixtures("offline")
def test_unsupported_vllm_is_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    with pytest.raises(RuntimeError, match=r"supports vLLM 0\.26 to 0\.33; vLLM 0\.99\.0 is installed"):
        vllm_config(model, speculative_config={"method": "prompt_lookup"})
    vllm_config(model)


# ---- what we can't serve


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"kv_offloading_size": 1.0}, "KV connectors"),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
        ({"kv_sharing_fast_prefill": True}, "fast-prefill"),
        ({"async_scheduling": True}, "--async-scheduling"),
        ({"watermark_config": {"key": 1}}, "watermark"),
        ({"runner": "pooling"}, "--runner pooling"),
    ],
)
def test_refused(model: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vllm_config(model, speculative_config={"method": "prompt_lookup"}, **arguments)


@pytest.mark.usefixtures("offline")
def test_kv_connector_is_refused(model: str) -> None:
    from vllm.config import KVTransferConfig

    connector = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    with pytest.raises(ConfigError, match="--kv-transfer-config"):
        vllm_config(model, speculative_config={"method": "prompt_lookup"}, kv_transfer_config=connector)


def test_encoder_decoder_is_refused() -> None:
    model_config = SimpleNamespace(runner_type="generate", is_encoder_decoder=True)
    setup = support.Setup(None, model_config, None, _platform("cpu"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="encoder-decoder"):
        support.check_support("prompt_lookup", setup)


@pytest.mark.parametrize(("kind", "device"), [("cpu", "cpu"), ("cuda", "cuda"), ("tpu", "")])
def test_devices(kind: str, device: str) -> None:
    setup = support.Setup(None, None, None, _platform(kind))  # type: ignore[arg-type]
    assert setup.device == device
    assert bool(support.REFUSALS[0].applies(setup)) == (device == "")


def test_refusals_are_sentences() -> None:
    assert len({row.feature for row in support.REFUSALS}) == len(support.REFUSALS)
    for row in support.REFUSALS:
        assert row.message[0].islower()
        assert not row.message.endswith(".")


def _platform(kind: str) -> Any:
    class Platform:
        def is_cpu(self) -> bool:
            return kind == "cpu"

        def is_cuda(self) -> bool:
            return kind == "cuda"

    return Platform()


# ---- stock vLLM is left alone


STOCK = [
    None,
    {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4},
    {"model": "[ngram]", "num_speculative_tokens": 3},
    {"model": "some_package.SomeProposer", "num_speculative_tokens": 3},
    {"method": "ngram"},
    {"method": "ngram", "num_speculative_tokens": -1},
    {"method": "ngram", "num_speculative_tokens": 3, "no_such_option": 1},
    {"method": "suffix", "num_speculative_tokens": 3},
    {"method": "eagle", "num_speculative_tokens": 3},
    {"num_speculative_tokens": 3},
    {"method": 3},
]


def _outcome(model: str, given: dict[str, Any] | None) -> tuple[str, str]:
    """The whole config, or the error, as text."""
    try:
        config = vllm_config(model, speculative_config=copy.deepcopy(given))
    except Exception as error:
        return type(error).__name__, str(error)
    config.instance_id = ""
    speculative = config.speculative_config
    details = {} if speculative is None else {k: v for k, v in vars(speculative).items() if "config" not in k}
    return str(config), f"{details} {config.parallel_config} {config.additional_config}"


@pytest.mark.parametrize("given", STOCK)
def test_stock_methods_are_untouched(model: str, given: dict[str, Any] | None, without_plugin: None) -> None:
    stock = _outcome(model, given)
    plugin.register()
    assert _outcome(model, given) == stock


@pytest.mark.parametrize(
    "arguments",
    [
        ["--spec-model", "[ngram]", "--spec-tokens", "3"],
        ["--speculative-model", "[ngram]", "--spec-tokens", "3"],
        ["--spec-method", "ngram", "--num-speculative-tokens", "3"],
    ],
)
def test_stock_method_through_every_flag(parser: FlexibleArgumentParser, model: str, arguments: list[str]) -> None:
    config = from_command_line(parser, model, *arguments)
    assert config.speculative_config.method == "ngram"
    assert config.speculative_config.num_speculative_tokens == 3
    assert KEY not in config.additional_config
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"


def test_command_line_without_speculation(parser: FlexibleArgumentParser, model: str) -> None:
    config = from_command_line(parser, model)
    assert config.speculative_config is None
    assert config.additional_config == {}


def test_wrapped_once_and_restored() -> None:
    plugin.register()
    plugin.register()
    names = ["EngineArgs.add_cli_args", "EngineArgs.create_speculative_config", "SamplingParams._validate_spec_decode"]
    assert [".".join(name.split(".")[-2:]) for name in wrappers.wrapped()] == names
    assert EngineArgs.create_speculative_config.__wrapped__.__module__ == EngineArgs.__module__
    wrappers.restore_all()
    try:
        assert wrappers.wrapped() == []
        assert not hasattr(EngineArgs.create_speculative_config, "__wrapped__")
        assert not hasattr(EngineArgs.add_cli_args, "__wrapped__")
    finally:
        plugin.register()


def test_function_that_this_vllm_lacks_is_skipped() -> None:
    assert not wrappers.wrap(EngineArgs, "no_such_function", lambda original: original)


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_vllm_plugins_empty_leaves_vllm_untouched(model: str) -> None:
    code = (
        "import sys\n"
        "from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())\n"
        f"EngineArgs(model={model!r}, skip_tokenizer_init=True).create_engine_config()\n"
        "assert not [m for m in sys.modules if m.startswith(('vllm_lookahead', 'proposers'))]\n"
        "parser.parse_args(['--speculative-model', '[prompt_lookup]'])\n"
    )
    result = _python(code, VLLM_PLUGINS="")
    assert result.returncode == 2, result.stderr
    assert "unrecognized arguments: --speculative-model" in result.stderr


def test_installed_but_not_asked_for_loads_no_proposer(model: str) -> None:
    code = (
        "import sys\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        f"EngineArgs(model={model!r}, skip_tokenizer_init=True).create_engine_config()\n"
        "assert 'vllm_lookahead.plugin' in sys.modules\n"
        "assert not {'proposers', 'numba', 'vllm.v1.worker.gpu_model_runner'} & set(sys.modules)\n"
    )
    result = _python(code)
    assert result.returncode == 0, result.stderr


# ---- sampling parameters


@pytest.mark.parametrize("params", [{"min_p": 0.1}, {"logit_bias": {3: 1.0}}])
def test_min_p_and_logit_bias(model: str, params: dict[str, Any]) -> None:
    sampling = SamplingParams(**params)
    ours = vllm_config(model, speculative_config={"method": "prompt_lookup"}).speculative_config
    stock = vllm_config(model, speculative_config={"method": "ngram", "num_speculative_tokens": 3}).speculative_config
    sampling._validate_spec_decode(ours)
    sampling._validate_spec_decode(None)
    with pytest.raises(VLLMValidationError, match="not yet supported with speculative decoding"):
        sampling._validate_spec_decode(stock)
