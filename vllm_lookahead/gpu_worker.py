"""vLLM's GPU worker with our model runner."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from vllm_lookahead.gpu_runner import LookaheadGPURunner
from vllm_lookahead.worker import LookaheadWorkerMixin


class GPULookaheadWorker(LookaheadWorkerMixin, Worker):
    """vLLM's GPU worker, whose runner drafts with our proposers."""

    runner_class = LookaheadGPURunner
