"""vLLM's GPU worker with our model runner."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_worker import Worker

from vllm_lookahead.attention.registry import backend_override
from vllm_lookahead.v1.gpu_runner import LookaheadGPURunner, trees_are_off
from vllm_lookahead.v1.worker import LookaheadWorkerMixin

BACKEND = "vllm_lookahead.attention.flash.TreeFlashAttentionBackend"


class GPULookaheadWorker(LookaheadWorkerMixin, Worker):
    """vLLM's GPU worker, whose runner drafts with our proposers and, if asked to, verifies draft trees."""

    runner_class = LookaheadGPURunner

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, with tree attention where vLLM would take ``FLASH_ATTN``."""
        if trees_are_off() is not None:
            super().load_model(*args, **kwargs)
            return
        with backend_override(AttentionBackendEnum.FLASH_ATTN, BACKEND):
            super().load_model(*args, **kwargs)
