"""What we refuse at start-up: engine features under which our output would be wrong, each with one sentence.

What merely can't verify trees (a model's attention, a request's structured output) isn't refused: the worker falls
back to chains there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vllm_lookahead.config import ConfigError, LookaheadConfig

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms.interface import Platform


class Setup(NamedTuple):
    """What is known of the engine when its speculative config is made.

    Attributes:
        args: the engine's arguments.
        model: the target model's config.
        parallel: the engine's parallel config.
        platform: what it runs on.
        options: our method's options.
        own_worker: whether our worker serves it, not one that the user insists on.
    """

    args: EngineArgs
    model: ModelConfig
    parallel: ParallelConfig
    platform: Platform
    options: Mapping[str, Any] = {}
    own_worker: bool = True

    @property
    def device(self) -> str:
        """The kind of device that we have a worker for: "cpu", "cuda", or "" for any other."""
        if self.platform.is_cpu():
            return "cpu"
        return "cuda" if self.platform.is_cuda() else ""

    @property
    def runner(self) -> Literal["v1", "v2"]:
        """The generation of vLLM's model runner that will run: "v2" wherever vLLM itself would take it, else "v1"."""
        from vllm import envs
        from vllm.triton_utils import HAS_TRITON

        if not self.own_worker:
            return "v1"  # the only one that asks a proposer for chains
        asked_for = envs.VLLM_USE_V2_MODEL_RUNNER
        return "v2" if (HAS_TRITON if asked_for is None else asked_for) else "v1"

    def arg(self, name: str) -> Any:
        """An engine argument, or None if this vLLM has no such argument."""
        return getattr(self.args, name, None)


class Refusal(NamedTuple):
    """One row of the table.

    Attributes:
        feature: a short name, also used in docs/compatibility.md.
        applies: whether the setup uses the feature.
        message: what the user should know and do; follows "[method] ".
    """

    feature: str
    applies: Callable[[Setup], Any]
    message: str


REFUSALS: tuple[Refusal, ...] = (
    Refusal("other devices", lambda s: not s.device, "runs on CPUs and CUDA devices only"),
    Refusal(
        "pooling models",
        lambda s: s.model.runner_type != "generate",
        "drafts tokens, and this model generates none (--runner pooling)",
    ),
    Refusal(
        "encoder-decoder models",
        lambda s: s.model.is_encoder_decoder,
        "can't serve encoder-decoder models",
    ),
    Refusal(
        "diffusion models",
        lambda s: getattr(s.model, "is_diffusion", False),
        "can't serve diffusion models: they don't generate one token after the other",
    ),
    Refusal(
        "models with a recurrent state",
        lambda s: s.model.has_inner_state,
        "can't serve models with a recurrent state (Mamba, linear attention, short convolutions): it can't take back "
        "rejected drafts",
    ),
    Refusal(
        "MLA on CPUs",
        lambda s: s.device == "cpu" and s.model.use_mla,
        "can't serve models with MLA on CPUs: vLLM computes several tokens of a request by other kernels there than "
        "one, with other results",
    ),
    Refusal(
        "Model Runner V1 on CUDA",
        lambda s: s.device == "cuda" and s.own_worker and s.runner == "v1",
        "runs on vLLM's Model Runner V2 on CUDA; leave out VLLM_USE_V2_MODEL_RUNNER=0",
    ),
    Refusal(
        "trace replay, returned sampling masks, returned routed experts",
        lambda s: any(map(s.arg, ("enable_trace_replay", "return_sampling_mask", "enable_return_routed_experts"))),
        "can't tell for draft trees what --enable-trace-replay, --return-sampling-mask and "
        "--enable-return-routed-experts ask for; leave them out",
    ),
    Refusal(
        "batch-sharded sampling",
        lambda s: s.arg("enable_batch_sharded_sampling"),
        "walks a step's draft trees together; leave out --enable-batch-sharded-sampling",
    ),
    Refusal(
        "pipeline parallelism",
        lambda s: s.parallel.pipeline_parallel_size > 1,
        "can't run with pipeline parallelism: only the last stage knows the draft tree; "
        "use --tensor-parallel-size instead of --pipeline-parallel-size",
    ),
    Refusal(
        "data parallelism of mixture-of-experts models",
        lambda s: s.parallel.data_parallel_size > 1 and s.model.is_moe,
        "can't run mixture-of-experts models with data parallelism, whose ranks have to run every forward pass "
        "together; leave out --data-parallel-size",
    ),
    Refusal(
        "context parallelism",
        lambda s: s.parallel.decode_context_parallel_size > 1 or s.parallel.prefill_context_parallel_size > 1,
        "can't run with context parallelism: a draft tree's KV must lie on one device; "
        "leave out --decode-context-parallel-size and --prefill-context-parallel-size",
    ),
    Refusal(
        "dual batch overlap",
        lambda s: s.device == "cuda" and s.arg("enable_dbo"),
        "can't run with --enable-dbo: it would cut draft trees in two",
    ),
    Refusal(
        "KV transfer",
        lambda s: s.arg("kv_transfer_config") is not None or s.arg("kv_offloading_size") is not None,
        "can't run with KV connectors or KV offloading, which may read slots before the accepted drafts' KV is in "
        "place; leave out --kv-transfer-config and --kv-offloading-size",
    ),
    Refusal(
        "encoder cache transfer",
        lambda s: s.arg("ec_transfer_config") is not None,
        "can't run with encoder cache connectors; leave out --ec-transfer-config",
    ),
    Refusal(
        "fast prefill with KV sharing",
        lambda s: s.arg("kv_sharing_fast_prefill"),
        "can't run with --kv-sharing-fast-prefill, which skips layers that draft trees need",
    ),
    Refusal(
        "prompt embeddings",
        lambda s: s.arg("enable_prompt_embeds"),
        "drafts from token ids, which prompt embeddings don't have; leave out --enable-prompt-embeds",
    ),
    Refusal(
        "watermarking",
        lambda s: s.arg("watermark_config") is not None,
        "can't watermark the tokens of a draft tree; leave out --watermark-config",
    ),
    Refusal(
        "asynchronous scheduling on V1",
        lambda s: s.runner == "v1" and s.arg("async_scheduling"),
        "needs Model Runner V2 for asynchronous scheduling; leave out --async-scheduling",
    ),
    Refusal(
        "LoRA with `branch: separate`",
        lambda s: s.arg("enable_lora") and s.options.get("branch") == "separate",
        'branch = "separate": must be "fused" with --enable-lora, because a forward pass of its own knows no adapters',
    ),
    Refusal(
        "`branch: separate` on Model Runner V2",
        lambda s: s.runner == "v2" and s.options.get("branch") == "separate",
        'branch = "separate": must be "fused" on Model Runner V2; a forward pass of its own needs '
        "VLLM_USE_V2_MODEL_RUNNER=0 and a CPU",
    ),
)
"""Checked in this order; the first that applies is reported."""


def check_support(method: str, setup: Setup) -> None:
    """Refuse what we can't serve exactly.

    Raises:
        ConfigError: the message of the first row of ``REFUSALS`` that applies.
    """
    for refusal in REFUSALS:
        if refusal.applies(setup):
            raise ConfigError(f"[{method}] {refusal.message}")


def fit_lora(config: LookaheadConfig, setup: Setup) -> LookaheadConfig:
    """Where LoRA is on, cut the trees to what vLLM accepts: one place in a step for every node of every request.

    Raises:
        ConfigError: there is no place for any.
    """
    if not setup.arg("enable_lora"):
        return config
    requests, tokens = batch_limits(setup)
    nodes = tokens // requests - 1
    if nodes >= config.num_speculative_tokens:
        return config
    if nodes < 1:
        raise ConfigError(
            f"[{config.method}] has no room for draft tokens: with --enable-lora, --max-num-batched-tokens ({tokens}) "
            f"must be at least twice --max-num-seqs ({requests})"
        )
    _warn(
        "[%s] drafts up to %d tokens per request, not %d: with --enable-lora, --max-num-batched-tokens (%d) must be at "
        "least --max-num-seqs (%d) times (1 + num_speculative_tokens). Raise the one or lower the other for larger "
        "trees.",
        config.method,
        nodes,
        config.num_speculative_tokens,
        tokens,
        requests,
    )
    budget = config.budget if config.budget == "auto" else min(config.budget, nodes)
    return config.model_copy(update={"num_speculative_tokens": nodes, "budget": budget})


def batch_limits(setup: Setup) -> tuple[int, int]:
    """``max_num_seqs`` and ``max_num_batched_tokens``.

    vLLM sets them after the speculative config is made, to defaults that depend on whether ``LLM`` or ``vllm serve``
    asks, which isn't known here: the tighter ones count.
    """
    from vllm.usage.usage_lib import UsageContext

    found = []
    for context in (None, UsageContext.LLM_CLASS, UsageContext.OPENAI_API_SERVER):
        args = copy.copy(setup.args)
        args._set_default_max_num_seqs_and_batched_tokens_args(context, setup.model, setup.parallel)
        assert args.max_num_batched_tokens is not None
        assert args.max_num_seqs is not None
        found.append((args.max_num_seqs, args.max_num_batched_tokens))
    return min(found, key=lambda limits: limits[1] // limits[0])


def _warn(message: str, *arguments: Any) -> None:
    from vllm.logger import init_logger

    init_logger("vllm.vllm_lookahead").warning(message, *arguments)
