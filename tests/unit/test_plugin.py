"""The plugin inside vLLM: every way to ask for our methods, and nothing changed where nobody asks."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from command_line import engine_args
from vllm import LLM, envs
from vllm.config.speculative import NgramGPUTypes
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.platforms.cpu import CpuPlatform
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

from vllm_lookahead import plugin, support, wrappers
from vllm_lookahead.config import KEY, ConfigError, LookaheadConfig

WORKER = plugin.WORKERS["cpu", "v1"]


@pytest.fixture
def without_plugin() -> Iterator[None]:
    """Stock vLLM for the length of a test."""
    wrappers.restore_all()
    yield
    plugin.register()


def vllm_config(model: str, **kwargs: Any) -> Any:
    return EngineArgs(model=model, skip_tokenizer_init=True, **kwargs).create_engine_config()


def from_command_line(parser: FlexibleArgumentParser, model: str, *arguments: str) -> Any:
    return engine_args(parser, model, "--skip-tokenizer-init", *arguments).create_engine_config()


def heard_warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The list that warnings go to from here on."""
    warnings: list[str] = []

    def warning(self: Any, message: str, *args: Any, **kwargs: Any) -> None:
        warnings.append(message % args)

    monkeypatch.setattr("logging.Logger.warning", warning)
    return warnings


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


@pytest.mark.usefixtures("offline")
def test_a_user_who_needs_our_place_in_additional_config_is_told(model: str) -> None:
    for mine in ({"a": 1}, 5, None, []):
        with pytest.raises(ConfigError, match=r"additional_config\['lookahead'\] is where"):
            vllm_config(model, speculative_config={"method": "prompt_lookup"}, additional_config={KEY: mine})
        assert vllm_config(model, additional_config={KEY: mine}).additional_config == {KEY: mine}


def test_the_same_arguments_may_come_again_with_another_method(model: str) -> None:
    args = EngineArgs(model=model, skip_tokenizer_init=True, speculative_config={"method": "prompt_lookup"})
    assert_ours(args.create_engine_config())
    args.speculative_config = {"method": "lookahead"}
    assert_ours(args.create_engine_config(), "lookahead")


def test_a_number_of_tokens_that_no_tree_can_have_is_said(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings = heard_warnings(monkeypatch)
    settings = {"method": "prompt_lookup", "num_speculative_tokens": 64, "max_draft_tokens": 8}
    assert assert_ours(vllm_config(model, speculative_config=settings)).num_speculative_tokens == 8
    assert [text for text in warnings if "num_speculative_tokens = 64" in text and "at most 8 nodes" in text]
    warnings.clear()
    vllm_config(model, speculative_config={"method": "prompt_lookup", "num_speculative_tokens": 8})
    assert not [text for text in warnings if "num_speculative_tokens" in text]


def test_explicit_worker_class_wins(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings = heard_warnings(monkeypatch)
    stock = "vllm.v1.worker.cpu_worker.CPUWorker"
    config = vllm_config(model, speculative_config={"method": "prompt_lookup"}, worker_cls=stock)
    assert config.parallel_config.worker_cls == stock
    assert [text for text in warnings if "keeps --worker-cls" in text and stock in text]
    assert plugin.is_ours(config.speculative_config)
    with pytest.raises(VLLMValidationError, match="not yet supported with speculative decoding"):
        SamplingParams(min_p=0.1)._validate_spec_decode(config.speculative_config)


@pytest.mark.parametrize(
    ("asked", "processes", "expected"),
    [(None, "1", plugin.EXECUTOR), ("mp", "1", plugin.EXECUTOR), ("mp", "0", plugin.EXECUTOR), ("uni", "0", "uni")],
)
def test_worker_processes_get_our_executor(
    model: str, monkeypatch: pytest.MonkeyPatch, asked: str | None, processes: str, expected: str
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", processes)
    config = vllm_config(model, speculative_config={"method": "prompt_lookup"}, distributed_executor_backend=asked)
    assert config.parallel_config.distributed_executor_backend == expected
    stock = vllm_config(model, distributed_executor_backend=asked)
    assert stock.parallel_config.distributed_executor_backend == ("uni" if expected == "uni" else "mp")


@pytest.mark.parametrize("asked", ["ray", "external_launcher", "their_package.TheirExecutor"])
def test_other_executors_stay(asked: str) -> None:
    assert not plugin._has_worker_processes(SimpleNamespace(distributed_executor_backend=asked))


# ---- other plugins that bring a worker of their own


THEIRS = "their_package.TheirWorker"


@pytest.mark.usefixtures("offline")
def test_worker_class_of_a_plugin_that_comes_first(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as if the user had asked for it."""
    warnings = heard_warnings(monkeypatch)
    create = EngineArgs.create_speculative_config

    def with_worker(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        kwargs["target_parallel_config"].worker_cls = THEIRS
        return create(self, *args, **kwargs)

    monkeypatch.setattr(EngineArgs, "create_speculative_config", with_worker)
    config = vllm_config(model, speculative_config={"method": "prompt_lookup"})
    assert config.parallel_config.worker_cls == THEIRS
    assert config.speculative_config.model == plugin.CHAIN_DRAFTER
    assert [text for text in warnings if "drafts are chains" in text and THEIRS in text]
    plugin.check_worker(config)


@pytest.mark.usefixtures("offline")
def test_worker_class_of_a_platform_that_comes_last(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our method can't run, and must not be lost without a word."""
    update = CpuPlatform.check_and_update_config

    def with_worker(config: Any) -> None:
        update(config)
        config.parallel_config.worker_cls = THEIRS

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(with_worker))
    message = re.escape(f"replaced its worker class by {THEIRS}")
    with pytest.raises(ConfigError, match=message):
        LLM(model, speculative_config={"method": "prompt_lookup"}, skip_tokenizer_init=True)
    monkeypatch.setattr(plugin, "_command_line", True)
    with pytest.raises(SystemExit):
        LLM(model, speculative_config={"method": "prompt_lookup"}, skip_tokenizer_init=True)
    stock = vllm_config(model, speculative_config={"method": "ngram", "num_speculative_tokens": 3})
    plugin.check_worker(stock)


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
    with pytest.raises(RuntimeError, match=r"supports vLLM 0\.26 to 0\.33 .*; vLLM 0\.99\.0 is installed"):
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
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, "context parallelism"),
        ({"enable_trace_replay": True}, "--enable-trace-replay"),
        ({"return_sampling_mask": True}, "--return-sampling-mask"),
        ({"enable_return_routed_experts": True}, "--enable-return-routed-experts"),
    ],
)
def test_refused(model: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vllm_config(model, speculative_config={"method": "prompt_lookup"}, **arguments)


MODELS = {
    "recurrent state": {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "num_heads": 4, "head_dim": 32},
    "MLA on CPUs": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 2,
    },
}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("message", MODELS)
def test_refused_model(make_model: Callable[..., str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vllm_config(make_model(**MODELS[message]), speculative_config={"method": "prompt_lookup"})


@pytest.mark.usefixtures("offline")
def test_mixture_of_experts_with_data_parallelism_is_refused(make_model: Callable[..., str]) -> None:
    experts = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 2}
    folder = make_model(**experts, num_experts_per_tok=1)
    config = {"speculative_config": {"method": "prompt_lookup"}}
    vllm_config(folder, **config)
    with pytest.raises(ConfigError, match="mixture-of-experts models with data parallelism"):
        vllm_config(folder, **config, data_parallel_size=2)


# ---- which of vLLM's model runners


def setup_for(model: str) -> support.Setup:
    args = EngineArgs(model=model, skip_tokenizer_init=True, max_num_seqs=64, max_num_batched_tokens=4096)
    config = args.create_engine_config()
    return support.Setup(args, config.model_config, config.parallel_config, CpuPlatform())


@pytest.mark.usefixtures("offline")
def test_the_runner_is_the_one_that_vllm_would_take(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_for(model)
    # not setenv: vLLM caches its variables once an engine has started in this process
    for asked_for, triton, expected in (
        (None, False, "v1"),
        (None, True, "v2"),
        (False, True, "v1"),
        (True, False, "v2"),
    ):
        monkeypatch.setitem(vars(envs), "VLLM_USE_V2_MODEL_RUNNER", asked_for)
        monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", triton)
        assert setup.runner == expected
        assert setup._replace(own_worker=False).runner == "v1", "only V1 asks a proposer for chains"


@pytest.mark.usefixtures("offline")
def test_model_runner_v2_without_triton_is_vllms_to_refuse(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(envs), "VLLM_USE_V2_MODEL_RUNNER", True)
    with pytest.raises(ValueError, match="Model Runner V2 requires Triton"):
        vllm_config(model, speculative_config={"method": "prompt_lookup"})


@pytest.mark.usefixtures("offline")
def test_on_v2_the_config_keeps_asynchronous_scheduling(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method without a draft model that vLLM schedules asynchronously, and fewer drafts in larger batches."""
    setup = setup_for(model)
    monkeypatch.setitem(vars(envs), "VLLM_USE_V2_MODEL_RUNNER", True)
    carrier = plugin._carrier(LookaheadConfig.parse("prompt_lookup", {}), setup)
    assert carrier["method"] in get_args(NgramGPUTypes)
    assert plugin.is_ours(SimpleNamespace(**carrier))
    lookup = build_dynamic_sd_schedule_lookup(carrier["num_speculative_tokens_per_batch_size"], 64, 48)
    assert lookup[1] == 48
    assert lookup[64] == 4096 // 4 // 64 - 1
    assert all(requests * (1 + lookup[requests]) <= max(requests, 1024) for requests in range(1, 65))


@pytest.mark.usefixtures("offline")
def test_model_runner_v1_is_refused_on_cuda(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(envs), "VLLM_USE_V2_MODEL_RUNNER", False)
    cuda = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True)
    setup = setup_for(model)._replace(platform=cuda)
    with pytest.raises(ConfigError, match="leave out VLLM_USE_V2_MODEL_RUNNER=0"):
        support.check_support("prompt_lookup", setup)
    support.check_support("prompt_lookup", setup._replace(own_worker=False))
    monkeypatch.setitem(vars(envs), "VLLM_USE_V2_MODEL_RUNNER", True)
    support.check_support("prompt_lookup", setup)
    with pytest.raises(ConfigError, match='branch = "separate": must be "fused" on Model Runner V2'):
        support.check_support("lookahead", setup._replace(options={"branch": "separate"}))


# ---- LoRA


@pytest.mark.usefixtures("offline")
def test_separate_branch_is_refused_with_lora(model: str) -> None:
    separate = {"method": "lookahead", "branch": "separate"}
    with pytest.raises(ConfigError, match=r'branch = "separate": must be "fused" with --enable-lora'):
        vllm_config(model, speculative_config=separate, enable_lora=True)
    assert_ours(vllm_config(model, speculative_config=separate), "lookahead", branch="separate")


@pytest.mark.parametrize("context", [None, *UsageContext])
@pytest.mark.parametrize("method", ["prompt_lookup", "lookahead"])
def test_default_trees_fit_vllms_limit_for_lora(model: str, method: str, context: UsageContext | None) -> None:
    args = EngineArgs(model=model, skip_tokenizer_init=True, speculative_config={"method": method}, enable_lora=True)
    config = args.create_engine_config(usage_context=context)
    ours = assert_ours(config, method)
    limits = config.scheduler_config
    assert 1 <= ours.num_speculative_tokens <= limits.max_num_batched_tokens // limits.max_num_seqs - 1


def test_trees_are_cut_where_lora_asks_for_it(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings = heard_warnings(monkeypatch)
    batch = {"max_num_seqs": 16, "max_num_batched_tokens": 256}
    given = {"method": "prompt_lookup", "num_speculative_tokens": 40, "budget": 30}
    assert assert_ours(vllm_config(model, speculative_config=given, **batch)).num_speculative_tokens == 40
    assert not [text for text in warnings if "drafts up to" in text]
    ours = assert_ours(vllm_config(model, speculative_config=given, enable_lora=True, **batch))
    assert (ours.num_speculative_tokens, ours.budget) == (15, 15)
    assert (
        len([text for text in warnings if "drafts up to 15 tokens per request, not 40: with --enable-lora" in text])
        == 1
    )
    warnings.clear()
    given["num_speculative_tokens"] = given["budget"] = 15
    assert assert_ours(vllm_config(model, speculative_config=given, enable_lora=True, **batch)).budget == 15
    assert not [text for text in warnings if "drafts up to" in text]


@pytest.mark.usefixtures("offline")
def test_no_room_for_drafts_beside_lora(model: str) -> None:
    batch = {"max_num_seqs": 16, "max_num_batched_tokens": 31}
    with pytest.raises(
        ConfigError, match=r"--max-num-batched-tokens \(31\) must be at least twice --max-num-seqs \(16\)"
    ):
        vllm_config(model, speculative_config={"method": "prompt_lookup"}, enable_lora=True, **batch)


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
    found = [".".join(name.split(".")[-2:]) for name in wrappers.wrapped()]
    front_end = ["InputProcessor.__init__", "InputProcessor.process_inputs"]
    assert sorted({*found, *front_end}) == sorted([*names, *front_end])
    assert len(set(found)) == len(found)
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
