"""Full CUDA graphs of steps with draft trees, beside vLLM's of steps without drafts.

The descriptors are those that vLLM has for decoding with a varying number of tokens per request: a bound on the tokens
of a request is what keeps prompts out. What such a graph reads is the business of ``attention.flash``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager

MOST_TOKENS = 264
"""Steps with more tokens run piecewise: what a graph saves matters less there."""
SPACING = 8
"""A graph is at least one part in so many larger than the next smaller one: that much padding costs less than another
graph's start-up time and memory."""


def tree_graph_sizes(capture_sizes: Iterable[int], most: int) -> list[int]:
    """Which of vLLM's capture sizes get a graph of trees: a few, and the first that holds ``most`` tokens if any does.

    Args:
        capture_sizes: in tokens.
        most: tokens of the largest step.
    """
    sizes: list[int] = []
    for size in sorted(capture_sizes):
        if size >= 2 and (size >= most or not sizes or SPACING * size >= (SPACING + 1) * sizes[-1]):
            sizes.append(size)
        if size >= most:
            break
    return sizes


def is_tree_graph(desc: BatchExecutionDescriptor) -> bool:
    """Whether a step with this descriptor replays a graph of trees."""
    return desc.cg_mode == CUDAGraphMode.FULL and desc.max_query_len is not None


class TreeGraphManager(ModelCudaGraphManager):
    """vLLM's manager for one token per request, which also captures graphs of trees and finds them.

    Args:
        vllm_config: the engine's.
        device: where.
        cudagraph_mode: what vLLM resolved, with full graphs for decoding.
        lora_capture_cases: numbers of active adapters that graphs are captured for.
        most_nodes: of a tree.

    Attributes:
        tree_sizes: tokens of each graph of trees.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        cudagraph_mode: CUDAGraphMode,
        lora_capture_cases: list[int],
        most_nodes: int,
    ) -> None:
        self._most_nodes = most_nodes
        self.tree_sizes: list[int] = []
        super().__init__(vllm_config, device, cudagraph_mode, decode_query_len=1, lora_capture_cases=lora_capture_cases)

    def _init_candidates(self) -> None:
        """As vLLM's, and graphs of trees before whatever else would take their steps."""
        super()._init_candidates()
        most = min(MOST_TOKENS, self.max_num_reqs * (1 + self._most_nodes))
        self.tree_sizes = tree_graph_sizes(self.compilation_config.cudagraph_capture_sizes or (), most)
        descs = self._capture_descs.setdefault(CUDAGraphMode.FULL, [])
        for num_active_loras in self.lora_capture_cases:
            smaller = 0
            for size in self.tree_sizes:
                rows = min(size, self.max_num_reqs)
                desc = BatchExecutionDescriptor(
                    cg_mode=CUDAGraphMode.FULL,
                    num_tokens=size,
                    num_reqs=rows,
                    # vLLM's dummy batch spreads all tokens over these rows
                    max_query_len=max(1 + self._most_nodes, -(-size // rows)),
                    num_active_loras=num_active_loras,
                )
                descs.append(desc)
                for num_tokens in range(smaller + 1, size + 1):
                    self._candidates.setdefault((num_tokens, num_active_loras), []).insert(0, desc)
                smaller = size
        descs.sort(key=lambda desc: desc.num_tokens, reverse=True)  # vLLM captures the largest first

    def dispatch(
        self,
        num_reqs: int,
        num_tokens: int,
        uniform_token_count: int | None,
        num_active_loras: int,
        max_query_len: int | None = None,
        num_ubatches: int = 1,
    ) -> BatchExecutionDescriptor:
        """As vLLM's; a step of one token per request takes no graph of trees."""
        return super().dispatch(
            num_reqs,
            num_tokens,
            uniform_token_count,
            num_active_loras,
            max_query_len=None if uniform_token_count == 1 else max_query_len,
            num_ubatches=num_ubatches,
        )
