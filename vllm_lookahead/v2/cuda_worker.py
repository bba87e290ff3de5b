"""vLLM's CUDA worker with our model runner."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_worker import Worker

from vllm_lookahead.attention.registry import backend_override
from vllm_lookahead.contract import UnsupportedVLLMError, check_contract
from vllm_lookahead.drafting.report import ReportsDrafting

BACKEND = "vllm_lookahead.attention.flash.TreeFlashAttentionBackend"


class CUDALookaheadWorker(ReportsDrafting, Worker):
    """vLLM's GPU worker, whose V2 runner drafts with our proposers and verifies draft trees."""

    def _make_model_runner(self) -> Any:
        """Our model runner; vLLM's hook for other platforms' runners."""
        check_contract("v2")
        if not self.use_v2_model_runner:
            raise UnsupportedVLLMError(
                "vLLM takes Model Runner V1 for this configuration, and on CUDA vllm-lookahead needs Model Runner V2"
            )
        from vllm_lookahead.v2.cuda_runner import LookaheadCUDARunner

        return LookaheadCUDARunner(self.vllm_config, self.device)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, with tree attention where vLLM would take ``FLASH_ATTN``."""
        with backend_override(AttentionBackendEnum.FLASH_ATTN, BACKEND):
            super().load_model(*args, **kwargs)

    def _maybe_activate_jit_monitor(self) -> None:
        """As vLLM's, after what drafting has to compile: from here on vLLM reports every compilation."""
        self.model_runner.prepare_drafting()
        super()._maybe_activate_jit_monitor()
