"""What we rely on inside vLLM, as a list that is checked at start-up.

vLLM promises no stability for the classes that our worker derives from. A version that differs is refused with one
clear sentence, instead of failing in the middle of a request. Extend ``CONTRACT`` with whatever else gets relied on.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

OLDEST = (0, 26)
BEFORE = (0, 34)
SUPPORTED = "0.26 to 0.33"


class UnsupportedVLLMError(RuntimeError):
    """The installed vLLM is not one that this plugin was written for."""


@dataclass(frozen=True)
class Function:
    """A function or method that we call, wrap or override.

    Attributes:
        path: "module:Class.method".
        parameters: names that it must take (without ``self``).
        exactly: whether it may take no others: set where an override names every parameter.
        device: "cpu" or "cuda" if it matters only there.
    """

    path: str
    parameters: tuple[str, ...] = ()
    exactly: bool = False
    device: str | None = None

    def problem(self) -> str | None:
        """What is wrong with it, or None."""
        function, missing = _resolve(self.path)
        if missing:
            return missing
        try:
            found = [name for name in inspect.signature(function).parameters if name != "self"]
        except (TypeError, ValueError):
            return None  # compiled code tells nothing
        takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
        lacking = [name for name in self.parameters if name not in found]
        if (lacking and not takes_any) or (self.exactly and len(found) != len(self.parameters)):
            return f"{_dotted(self.path)} takes ({', '.join(found)}), expected ({', '.join(self.parameters)})"
        return None


@dataclass(frozen=True)
class Attributes:
    """Attributes of a class or of its instances that we read or set.

    Attributes:
        path: "module:Class".
        names: found as class attributes, annotations, dataclass fields, or assigned to ``self`` in the class's source.
        device: "cpu" or "cuda" if it matters only there.
    """

    path: str
    names: tuple[str, ...]
    device: str | None = None

    def problem(self) -> str | None:
        """What is wrong with it, or None."""
        owner, missing = _resolve(self.path)
        if missing:
            return missing
        known = frozenset().union(*map(_declared, inspect.getmro(owner)))
        lacking = [name for name in self.names if name not in known and not hasattr(owner, name)]
        return f"{_dotted(self.path)} has no {', '.join(lacking)}" if lacking else None


RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
SAMPLER = "vllm.v1.sample.sampler:Sampler"
CPU_ATTN = "vllm.v1.attention.backends.cpu_attn"

CONTRACT: tuple[Function | Attributes, ...] = (
    # plugin
    Function(
        "vllm.engine.arg_utils:EngineArgs.create_speculative_config", ("target_model_config", "target_parallel_config")
    ),
    Function("vllm.engine.arg_utils:AsyncEngineArgs.add_cli_args", ("parser",)),
    Function(
        "vllm.engine.arg_utils:EngineArgs._set_default_max_num_seqs_and_batched_tokens_args",
        ("usage_context", "model_config", "parallel_config"),
        exactly=True,
    ),
    Attributes("vllm.usage.usage_lib:UsageContext", ("LLM_CLASS", "OPENAI_API_SERVER")),
    Attributes(
        "vllm.engine.arg_utils:EngineArgs",
        (
            "additional_config",
            "enable_lora",
            "max_num_batched_tokens",
            "max_num_seqs",
            "spec_method",
            "spec_model",
            "spec_tokens",
            "speculative_config",
            "worker_cls",
        ),
    ),
    Attributes("vllm.config:CompilationConfig", ("static_forward_context",)),
    Attributes(
        "vllm.config:ModelConfig",
        ("has_inner_state", "is_encoder_decoder", "is_moe", "logits_processors", "runner_type", "use_mla"),
    ),
    Attributes(
        "vllm.config:ParallelConfig",
        (
            "data_parallel_size",
            "decode_context_parallel_size",
            "pipeline_parallel_size",
            "prefill_context_parallel_size",
            "worker_cls",
        ),
    ),
    Attributes("vllm.config:SchedulerConfig", ("max_num_batched_tokens", "max_num_seqs")),
    Attributes("vllm.config:SpeculativeConfig", ("method", "model", "num_speculative_tokens")),
    Attributes("vllm.config:VllmConfig", ("additional_config", "model_config", "speculative_config")),
    Attributes("vllm.platforms.interface:Platform", ("device_type", "is_cpu", "is_cuda")),
    Function("vllm.sampling_params:SamplingParams._validate_spec_decode", ("speculative_config",), exactly=True),
    Attributes("vllm.sampling_params:SamplingParams", ("structured_outputs",)),
    Function("vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer", ("vllm_config",)),
    # worker
    Function("vllm.v1.worker.cpu_worker:CPUWorker.init_device", (), exactly=True, device="cpu"),
    Function("vllm.v1.worker.cpu_worker:CPUWorker.load_model", (), device="cpu"),
    Function("vllm.v1.worker.cpu_worker:CPUWorker.compile_or_warm_up_model", (), exactly=True, device="cpu"),
    Function("vllm.v1.worker.gpu_worker:Worker.init_device", (), exactly=True, device="cuda"),
    Function("vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model", (), exactly=True, device="cuda"),
    Attributes("vllm.v1.worker.worker_base:WorkerBase", ("device", "model_config", "model_runner", "vllm_config")),
    # model runner
    Function(f"{RUNNER}.__init__", ("vllm_config", "device"), exactly=True),
    Function(f"{RUNNER}.initialize_kv_cache", ("kv_cache_config",)),
    Function(f"{RUNNER}.execute_model", ("scheduler_output", "intermediate_tensors"), exactly=True),
    Function(f"{RUNNER}.sample_tokens", ("grammar_output",), exactly=True),
    Function(f"{RUNNER}._update_states", ("scheduler_output",), exactly=True),
    Function(f"{RUNNER}._prepare_inputs", ("scheduler_output", "num_scheduled_tokens"), exactly=True),
    Function(f"{RUNNER}._calc_spec_decode_metadata", ("num_draft_tokens", "cu_num_scheduled_tokens"), exactly=True),
    Function(f"{RUNNER}._build_attention_metadata", ("num_tokens", "num_reqs", "max_query_len")),
    Function(f"{RUNNER}._sample", ("logits", "spec_decode_metadata"), exactly=True),
    Function(f"{RUNNER}._bookkeeping_sync", ("scheduler_output", "sampler_output", "logits")),
    Function(f"{RUNNER}._input_fits_in_drafter", ("common_attn_metadata",), exactly=True),
    Function(
        f"{RUNNER}.propose_draft_token_ids",
        (
            "scheduler_output",
            "sampled_token_ids",
            "sampling_metadata",
            "hidden_states",
            "sample_hidden_states",
            "aux_hidden_states",
            "spec_decode_metadata",
            "common_attn_metadata",
            "slot_mappings",
        ),
        exactly=True,
    ),
    Function(f"{RUNNER}.take_draft_token_ids", (), exactly=True),
    Function(f"{RUNNER}._attn_group_iterator", (), exactly=True),
    Function(f"{RUNNER}._dummy_run", ("num_tokens",)),
    Function(f"{RUNNER}._model_forward", ("input_ids", "positions")),
    Attributes(
        RUNNER,
        (
            "_draft_token_ids",
            "compilation_config",
            "device",
            "discard_request_mask",
            "drafter",
            "dtype",
            "execute_model_state",
            "input_batch",
            "is_pooling_model",
            "kv_cache_config",
            "kv_caches",
            "max_model_len",
            "model",
            "model_config",
            "num_spec_tokens",
            "optimistic_seq_lens_cpu",
            "positions",
            "query_start_loc",
            "requests",
            "sampler",
            "scheduler_config",
            "uses_mrope",
            "vllm_config",
        ),
    ),
    Attributes("vllm.v1.worker.cpu_model_runner:CPUModelRunner", (), device="cpu"),
    Function("vllm.v1.worker.utils:AttentionGroup.get_metadata_builder", ("ubatch_id",)),
    Attributes("vllm.v1.worker.utils:AttentionGroup", ("layer_names",)),
    Attributes(
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        (
            "block_table",
            "generators",
            "logitsprocs",
            "logitsprocs_need_output_token_ids",
            "num_prompt_tokens",
            "num_tokens_no_spec",
            "req_id_to_index",
            "req_ids",
            "req_output_token_ids",
            "sampling_metadata",
            "thinking_budget_state_holder",
            "token_ids_cpu",
        ),
    ),
    Attributes("vllm.v1.worker.gpu_input_batch:CachedRequestState", ("sampling_params",)),
    Attributes(
        "vllm.v1.worker.block_table:BlockTable", ("block_size", "block_table", "num_blocks_per_row", "slot_mapping")
    ),
    Function("vllm.v1.worker.block_table:MultiGroupBlockTable.__getitem__", ("idx",)),
    Attributes("vllm.v1.utils:CpuGpuBuffer", ("gpu", "np")),
    Attributes(
        "vllm.v1.core.sched.output:SchedulerOutput",
        (
            "finished_req_ids",
            "num_scheduled_tokens",
            "scheduled_spec_decode_tokens",
            "total_num_scheduled_tokens",
        ),
    ),
    Attributes("vllm.v1.kv_cache_interface:KVCacheConfig", ("kv_cache_groups",)),
    Function(
        "vllm.v1.spec_decode.metadata:SpecDecodeMetadata.__init__",
        (
            "draft_token_ids",
            "num_draft_tokens",
            "cu_num_draft_tokens",
            "cu_num_sampled_tokens",
            "target_logits_indices",
            "bonus_logits_indices",
            "logits_indices",
        ),
        exactly=True,
    ),
    Function("vllm.distributed.parallel_state:get_tp_group", (), exactly=True),
    Function("vllm.distributed.parallel_state:GroupCoordinator.broadcast_object", ("obj", "src")),
    Attributes("vllm.distributed.parallel_state:GroupCoordinator", ("world_size",)),
    Function(
        "vllm.forward_context:set_forward_context", ("attn_metadata", "vllm_config", "num_tokens", "slot_mapping")
    ),
    # sampling
    Function(f"{SAMPLER}.forward", ("logits", "sampling_metadata")),
    Function(f"{SAMPLER}.greedy_sample", ("logits",)),
    Attributes(
        "vllm.v1.sample.metadata:SamplingMetadata",
        (
            "all_greedy",
            "allowed_token_ids_mask",
            "bad_words_token_ids",
            "generators",
            "logitsprocs",
            "logprob_token_ids",
            "max_num_logprobs",
            "no_penalties",
            "output_token_ids",
            "spec_token_ids",
            "temperature",
            "thinking_budget_state_holder",
            "top_k",
            "top_p",
        ),
    ),
    Function("vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder.has_tracked_requests", (), exactly=True),
    Attributes("vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder", ("in_spec_mode",)),
    Function(
        "vllm.v1.sample.logits_processor:build_logitsprocs",
        ("vllm_config", "device", "is_pin_memory", "is_pooling_model"),
    ),
    Attributes("vllm.v1.sample.logits_processor:LogitsProcessors", ("all",)),
    Function("vllm.v1.sample.logits_processor:LogitsProcessor.update_state", ("batch_update",), exactly=True),
    Attributes("vllm.v1.sample.logits_processor.builtin:LogitBiasLogitsProcessor", ("biases",)),
    Attributes("vllm.v1.sample.logits_processor.builtin:MinPLogitsProcessor", ("min_p_count",)),
    Attributes("vllm.v1.sample.logits_processor.builtin:MinTokensLogitsProcessor", ("min_toks",)),
    Attributes("vllm.v1.outputs:DraftTokenIds", ("req_ids", "draft_token_ids")),
    Attributes("vllm.v1.outputs:SamplerOutput", ("sampled_token_ids", "logprobs_tensors")),
    Attributes("vllm.v1.outputs:LogprobsTensors", ("logprob_token_ids", "logprobs", "selected_token_ranks")),
    # attention
    Function("vllm.v1.attention.backends.registry:register_backend", ("backend", "class_path")),
    Attributes(
        "vllm.v1.attention.backends.registry:AttentionBackendEnum",
        ("CPU_ATTN", "FLASH_ATTN", "clear_override", "get_path", "is_overridden"),
    ),
    Function("vllm.v1.attention.selector:_cached_get_attn_backend.cache_clear"),
    Attributes(
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        (
            "block_table_tensor",
            "is_prefilling",
            "max_query_len",
            "max_seq_len",
            "num_actual_tokens",
            "num_reqs",
            "positions",
            "query_start_loc",
            "query_start_loc_cpu",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
            "slot_mapping",
        ),
    ),
    # attention on the CPU
    Attributes(f"{CPU_ATTN}:CPUAttentionBackend", ("get_builder_cls", "get_impl_cls"), device="cpu"),
    Attributes(f"{CPU_ATTN}:CPUAttentionMetadata", (), device="cpu"),
    Function(
        f"{CPU_ATTN}:CPUAttentionMetadataBuilder.__init__",
        ("kv_cache_spec", "layer_names", "vllm_config", "device"),
        exactly=True,
        device="cpu",
    ),
    Function(
        f"{CPU_ATTN}:CPUAttentionMetadataBuilder.build",
        ("common_prefix_len", "common_attn_metadata", "fast_build"),
        exactly=True,
        device="cpu",
    ),
    Attributes(f"{CPU_ATTN}:CPUAttentionMetadataBuilder", ("block_size", "dtype", "isa"), device="cpu"),
    Function(
        f"{CPU_ATTN}:CPUAttentionBackendImpl.forward",
        (
            "layer",
            "query",
            "key",
            "value",
            "kv_cache",
            "attn_metadata",
            "output",
            "output_scale",
            "output_block_scale",
        ),
        exactly=True,
        device="cpu",
    ),
    Attributes(
        f"{CPU_ATTN}:CPUAttentionBackendImpl",
        (
            "alibi_slopes",
            "head_size",
            "is_fp8_kv_cache",
            "logits_soft_cap",
            "num_heads",
            "scale",
            "sinks",
            "sliding_window",
        ),
        device="cpu",
    ),
)
"""Where two devices differ, each has parts of its own; trees on CUDA rely on ``gpu_worker.CONTRACT`` too."""


def check_contract(
    *, version: str | None = None, device: str | None = None, contract: Iterable[Function | Attributes] = CONTRACT
) -> None:
    """Refuse a vLLM that this plugin doesn't fit.

    Args:
        version: vLLM's version (default: the installed one's). A development version without a number passes the
            version check; what counts then is the rest.
        device: "cpu" or "cuda" (default: the current platform's).
        contract: what to check.

    Raises:
        UnsupportedVLLMError: names the installed version, the first mismatch, and the supported range.
    """
    if version is None:
        version = _installed_version()
    if device is None:
        device = _current_device()
    numbers = re.match(r"(\d+)\.(\d+)", version)
    release = (int(numbers[1]), int(numbers[2])) if numbers else None
    if release not in (None, (0, 0)) and not OLDEST <= release < BEFORE:
        raise UnsupportedVLLMError(f"vllm-lookahead supports vLLM {SUPPORTED}; vLLM {version} is installed")
    for part in contract:
        problem = part.problem() if part.device in (None, device) else None
        if problem is not None:
            raise UnsupportedVLLMError(
                f"vllm-lookahead doesn't fit the installed vLLM {version}: {problem}; supported is vLLM {SUPPORTED}"
            )


def _installed_version() -> str:
    import vllm

    return str(vllm.__version__)


def _current_device() -> str:
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def _resolve(path: str) -> tuple[Any, str | None]:
    """The object at "module:a.b", or what is missing on the way."""
    module_name, _, names = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        return None, f"{module_name} can't be imported ({error})"
    done = module_name
    for name in names.split("."):
        if not hasattr(found, name):
            return None, f"{done} has no {name}"
        found = getattr(found, name)
        done = f"{done}.{name}"
    return found, None


@functools.cache  # reading a large class takes a moment, and all processes of an engine pay for it
def _declared(cls: type) -> frozenset[str]:
    """Names that a class annotates or that its methods assign to ``self``."""
    names = set(vars(cls).get("__annotations__", ()))
    with contextlib.suppress(OSError, TypeError):  # no source at hand: the annotations have to do
        names.update(re.findall(r"\bself\.(\w+)\b(?=[^=\n]*(?<![=!<>])=(?!=))", inspect.getsource(cls)))
    return frozenset(names)


def _dotted(path: str) -> str:
    return path.replace(":", ".")
