"""What we refuse at start-up: engine features under which our output would be wrong, each with one sentence.

What merely can't verify trees (a model's attention, a request's structured output) isn't refused: the worker falls
back to chains there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_lookahead.config import ConfigError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms.interface import Platform


class Setup(NamedTuple):
    """What is known of the engine when its speculative config is made."""

    args: EngineArgs
    model: ModelConfig
    parallel: ParallelConfig
    platform: Platform

    @property
    def device(self) -> str:
        """The kind of device that we have a worker for: "cpu", "cuda", or "" for any other."""
        if self.platform.is_cpu():
            return "cpu"
        return "cuda" if self.platform.is_cuda() else ""

    def arg(self, name: str) -> Any:
        """An engine argument, or None if this vLLM has no such argument."""
        return getattr(self.args, name, None)


class Refusal(NamedTuple):
    """One row of the table.

    Attributes:
        feature: a short name, also used by the README's table.
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
        "pipeline parallelism",
        lambda s: s.parallel.pipeline_parallel_size > 1,
        "can't run with pipeline parallelism: only the last stage knows the draft tree; "
        "use --tensor-parallel-size instead of --pipeline-parallel-size",
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
        "asynchronous scheduling",
        lambda s: s.arg("async_scheduling"),
        "needs a step's tokens before it can draft the next; leave out --async-scheduling",
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
