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
    Attributes("vllm.engine.arg_utils:EngineArgs", ("speculative_config", "additional_config", "worker_cls")),
    Attributes("vllm.config:ParallelConfig", ("worker_cls",)),
    Attributes("vllm.config:SpeculativeConfig", ("method", "model", "num_speculative_tokens")),
    Function("vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer", ("vllm_config",)),
    # worker
    Function("vllm.v1.worker.cpu_worker:CPUWorker.init_device", (), exactly=True, device="cpu"),
    Function("vllm.v1.worker.gpu_worker:Worker.init_device", (), exactly=True, device="cuda"),
    # model runner
    Function(f"{RUNNER}.__init__", ("vllm_config", "device"), exactly=True),
    Function(f"{RUNNER}.initialize_kv_cache", ("kv_cache_config",)),
    Function(f"{RUNNER}._update_states", ("scheduler_output",), exactly=True),
    Function(f"{RUNNER}._prepare_inputs", ("scheduler_output", "num_scheduled_tokens"), exactly=True),
    Function(f"{RUNNER}._build_attention_metadata", ("num_tokens", "num_reqs", "max_query_len")),
    Function(f"{RUNNER}._sample", ("logits", "spec_decode_metadata"), exactly=True),
    Function(f"{RUNNER}._bookkeeping_sync", ("scheduler_output", "sampler_output", "logits")),
    Function(f"{RUNNER}._input_fits_in_drafter", ("common_attn_metadata",), exactly=True),
    Function(
        f"{RUNNER}.propose_draft_token_ids",
        ("scheduler_output", "sampled_token_ids", "sampling_metadata", "hidden_states", "spec_decode_metadata"),
    ),
    Function(f"{RUNNER}.take_draft_token_ids", (), exactly=True),
    Attributes(
        RUNNER,
        (
            "compilation_config",
            "discard_request_mask",
            "drafter",
            "input_batch",
            "is_pooling_model",
            "kv_cache_config",
            "kv_caches",
            "max_model_len",
            "num_spec_tokens",
            "optimistic_seq_lens_cpu",
            "positions",
            "query_start_loc",
            "requests",
            "sampler",
            "scheduler_config",
            "uses_mrope",
        ),
    ),
    Attributes(
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        (
            "block_table",
            "generators",
            "logitsprocs",
            "logitsprocs_need_output_token_ids",
            "num_prompt_tokens",
            "num_tokens_no_spec",
            "req_ids",
            "req_output_token_ids",
            "sampling_metadata",
            "token_ids_cpu",
        ),
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
            "max_num_logprobs",
            "no_penalties",
            "output_token_ids",
            "spec_token_ids",
            "temperature",
            "top_k",
            "top_p",
        ),
    ),
    Function(
        "vllm.v1.sample.logits_processor:build_logitsprocs",
        ("vllm_config", "device", "is_pin_memory", "is_pooling_model"),
    ),
    Attributes("vllm.v1.outputs:SamplerOutput", ("sampled_token_ids", "logprobs_tensors")),
    Attributes("vllm.v1.outputs:LogprobsTensors", ("logprob_token_ids", "logprobs", "selected_token_ranks")),
    # attention on the CPU
    Function("vllm.v1.attention.backends.registry:register_backend", ("backend", "class_path")),
    Function(
        f"{CPU_ATTN}:CPUAttentionMetadataBuilder.build",
        ("common_prefix_len", "common_attn_metadata", "fast_build"),
        exactly=True,
        device="cpu",
    ),
    Attributes(f"{CPU_ATTN}:CPUAttentionMetadataBuilder", ("isa", "block_size"), device="cpu"),
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
)


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
