"""vLLM's CPU worker with our Model Runner V2."""

from __future__ import annotations

from typing import Any, ClassVar

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_lookahead.attention.registry import backend_override
from vllm_lookahead.contract import UnsupportedVLLMError, check_contract
from vllm_lookahead.drafting.report import ReportsDrafting
from vllm_lookahead.temporary import replaced
from vllm_lookahead.v2.cpu_runner import LookaheadV2CPURunner
from vllm_lookahead.v2.runner import LookaheadV2RunnerMixin


class CPULookaheadV2Worker(ReportsDrafting, CPUWorker):
    """vLLM's CPU worker, whose V2 runner verifies draft trees."""

    runner_class: ClassVar[type[LookaheadV2RunnerMixin]] = LookaheadV2CPURunner
    backend: ClassVar[str] = "vllm_lookahead.attention.cpu.TreeCPUAttentionBackend"

    def init_device(self) -> None:
        """As vLLM's, then our runner in place of the stock one, which has loaded nothing yet."""
        check_contract("v2")
        if not self.use_v2_model_runner:
            raise UnsupportedVLLMError("vLLM takes Model Runner V1 where Model Runner V2 was expected")
        with replaced(self.vllm_config, "speculative_config", None):
            super().init_device()
        self.model_runner = self.runner_class(self.vllm_config, self.device)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, with tree attention where vLLM would take ``CPU_ATTN``."""
        with backend_override(AttentionBackendEnum.CPU_ATTN, self.backend):
            super().load_model(*args, **kwargs)

    def compile_or_warm_up_model(self) -> Any:
        """As vLLM's, then what drafting needs."""
        result = super().compile_or_warm_up_model()
        self.model_runner.prepare_drafting()
        return result
