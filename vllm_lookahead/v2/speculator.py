"""What stands where V2 wants a speculator: our trees are made on the host, once the sampled tokens are there."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator


class HostSpeculator(BaseSpeculator):
    """Proposes nothing on the device.

    Args:
        num_rows: most requests of a step.
        num_nodes: most draft tokens of a request.
        device: where vLLM's own drafts would be.
    """

    supports_mm_inputs = False
    draft_logits = None
    pcp_manager = None

    def __init__(self, num_rows: int, num_nodes: int, device: torch.device) -> None:
        self._nothing = torch.zeros(num_rows, num_nodes, dtype=torch.int64, device=device)

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """There is nothing to capture."""

    def capture(self) -> None:
        """There is nothing to capture."""

    def propose(self, input_batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """int64 [rows, nodes]: what vLLM writes to its drafts; nobody reads it (see ``BaseSpeculator.propose``)."""
        return self._nothing[: input_batch.num_reqs]
