"""CUDA graphs on a machine without a GPU: what is captured is kept as a function, and a replay calls it again.

The function holds the metadata of its capture. So a replay knows nothing of its own step but what is in the memory that
this metadata points at, as a CUDA graph does: whatever is not written there in every step makes outputs wrong.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import flash_on_cpu
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager, ModelCudaGraphManager

from vllm_lookahead.v2 import self_check
from vllm_lookahead.v2.cuda_graphs import TreeGraphManager

CAPTURE_SIZES = [1, 2, 4, 8, 16, 32, 48]


class _Functions(CudaGraphManager):
    """Functions in the place of graphs."""

    replays: Counter[BatchExecutionDescriptor]

    @torch.inference_mode()
    def capture(self, create_forward_fn: Any, progress_bar_desc: str = "") -> None:
        """As vLLM's."""
        self.replays = Counter()
        for desc in self._capture_descs.get(CUDAGraphMode.FULL, []):
            create_forward_fn(desc, warmup=True)(CUDAGraphMode.NONE)
            self.graphs[desc] = create_forward_fn(desc, warmup=False)
            self.graphs[desc](CUDAGraphMode.NONE)
        self._graphs_captured = True

    def run_fullgraph(self, desc: BatchExecutionDescriptor) -> None:
        """As vLLM's."""
        self.replays[desc] += 1
        self.graphs[desc](CUDAGraphMode.NONE)


class StockManager(ModelCudaGraphManager, _Functions):
    """vLLM's manager over functions."""


class Manager(TreeGraphManager, _Functions):
    """Ours over functions."""


class Runner(flash_on_cpu.Runner):
    """CUDA's runner with functions for graphs. Prompts, and what is too large, run as they are."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        self.compilation_config.cudagraph_capture_sizes = CAPTURE_SIZES
        self.compilation_config.max_cudagraph_capture_size = CAPTURE_SIZES[-1]

    def prepare_drafting(self) -> None:
        """As CUDA's, after what vLLM's worker does there."""
        self.cudagraph_manager.capture(
            self.model,
            self.model_state,
            self.input_buffers,
            self.intermediate_tensors,
            self.block_tables,
            self.attn_groups,
            self.kv_cache_config,
        )
        super().prepare_drafting()


class Worker(flash_on_cpu.Worker):
    """``Runner`` in a CPU worker."""

    runner_class = Runner


def use(patch: Any) -> None:
    """Have this process's engines run CUDA's runner with graphs and FlashAttention 3, as far as ``flash_on_cpu`` goes.

    Args:
        patch: a pytest.MonkeyPatch.
    """
    patch.setattr(flash_on_cpu, "FA_VERSION", 3)
    patch.setattr(type(model_runner.current_platform), "_global_graph_pool", (0, 0))
    patch.setattr(model_runner, "ModelCudaGraphManager", StockManager)
    patch.setattr("vllm_lookahead.v2.cuda_runner.TreeGraphManager", Manager)
    patch.setattr(self_check, "recorded", recorded)
    patch.setitem(flash_on_cpu.plugin.WORKERS, ("cpu", "v2"), f"{__name__}.Worker")


def recorded(run: Any) -> Any:
    """In the place of ``self_check.recorded``."""
    run()
    return run
