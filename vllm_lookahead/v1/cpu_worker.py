"""vLLM's CPU worker with our model runner."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_lookahead.attention.registry import backend_override
from vllm_lookahead.v1.cpu_runner import LookaheadCPURunner
from vllm_lookahead.v1.worker import LookaheadWorkerMixin


class CPULookaheadWorker(LookaheadWorkerMixin, CPUWorker):
    """vLLM's CPU worker, whose runner verifies draft trees."""

    runner_class = LookaheadCPURunner

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, with tree attention where vLLM would take ``CPU_ATTN``."""
        backend = "vllm_lookahead.attention.cpu.TreeCPUAttentionBackend"
        with backend_override(AttentionBackendEnum.CPU_ATTN, backend):
            super().load_model(*args, **kwargs)
