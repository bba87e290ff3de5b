"""vLLM's workers with our model runners. The plugin selects them when one of our methods is asked for."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_lookahead.attention.registry import backend_override
from vllm_lookahead.contract import check_contract
from vllm_lookahead.cpu_runner import LookaheadCPURunner
from vllm_lookahead.hidden import hidden


class CPULookaheadWorker(CPUWorker):
    """vLLM's CPU worker, whose runner verifies draft trees."""

    def init_device(self) -> None:
        """As vLLM's, then our runner in place of the stock one, which has loaded nothing yet."""
        check_contract()
        # vLLM names its runner class inside init_device. Without a speculative config it builds one that is cheap and
        # doesn't complain about options that our runner supports.
        with hidden(self.vllm_config, "speculative_config"), hidden(self.model_config, "logits_processors"):
            super().init_device()
        self.model_runner = LookaheadCPURunner(self.vllm_config, self.device)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's, with tree attention where vLLM would take ``CPU_ATTN``."""
        backend = "vllm_lookahead.attention.cpu.TreeCPUAttentionBackend"
        with backend_override(AttentionBackendEnum.CPU_ATTN, backend):
            super().load_model(*args, **kwargs)
