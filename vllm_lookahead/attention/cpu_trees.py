"""A model's layers on the CPU, as far as draft trees concern them: who takes the masks, and the KV commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from proposers import DraftTree
from vllm_lookahead.attention.cpu import (
    TreeCPUAttentionImpl,
    TreeCPUAttentionMetadataBuilder,
    cells_of,
    make_plan,
    tree_attention,
    unsupported_reason,
)
from vllm_lookahead.attention.cpu_commit import CPUCommit
from vllm_lookahead.trees.kv import SlotArray, moves
from vllm_lookahead.trees.rows import TreeRows
from vllm_lookahead.trees.step import StepTrees, Walks, walk_all


class UnsupportedModelError(ValueError):
    """A model's attention can't verify trees; the message says why, as the end of a sentence."""


class CPUTrees:
    """Hands a step's trees to the attention, and moves what was accepted into place.

    Args:
        groups: vLLM's attention groups (``v1/worker/utils.py``).
        layers: vLLM's layers by name (``CompilationConfig.static_forward_context``).
        kv_caches: every layer's cache.
        dtype: the model's.

    Raises:
        UnsupportedModelError: a layer's attention can't be masked by ancestors.
    """

    def __init__(
        self, groups: Sequence[Any], layers: Mapping[str, Any], kv_caches: list[torch.Tensor], dtype: torch.dtype
    ) -> None:
        self._builders: list[TreeCPUAttentionMetadataBuilder] = []
        self._impls: list[TreeCPUAttentionImpl] = []
        for group in groups:
            builder = group.get_metadata_builder(0)
            for name in group.layer_names:
                impl = getattr(layers[name], "impl", None)
                if impl is None:
                    raise UnsupportedModelError(f"its {type(layers[name]).__name__} layers keep a recurrent state")
                reason = unsupported_reason(impl, builder)
                if reason is not None:
                    raise UnsupportedModelError(reason)
                self._impls.append(impl)
            self._builders.append(builder)
        self._kv_caches = kv_caches
        self._dtype = dtype
        self._commit = CPUCommit(kv_caches)
        self._serving = False

    def serve(self, trees: TreeRows | None) -> None:
        """The next forward passes verify these trees; None: they have none."""
        if trees is None and not self._serving:
            return
        for builder in self._builders:
            builder.trees = trees
        if self._serving != (trees is not None):
            self._serving = trees is not None
            for impl in self._impls:
                impl.serve_trees(self._serving)

    def commit(self, step: StepTrees, walks: Walks, query_start: NDArray[np.int32], slots: SlotArray) -> None:
        """Move the accepted nodes' keys and values to the contiguous slots after the root; see ``trees.kv.moves``."""
        self._commit(*moves(step, walks, query_start, slots))

    def warm_up(self) -> None:
        """Compile what a step with trees calls: one small tree through every kernel, on a cache of its own."""
        tree = DraftTree.from_parents([1, 2, 3], [-1, -1, 0])
        step = StepTrees.build(["warm-up"], {"warm-up": [1, 2, 3]}, {"warm-up": tree})
        walks = walk_all(step, np.array([2, 0, 0, 0], np.int64))
        query_start, slots = np.array([0, 4], np.int32), np.arange(4)
        trees = TreeRows.of(step, query_start, np.array([4], np.int32))
        assert trees is not None
        cache = torch.zeros_like(self._kv_caches[0][:1])
        CPUCommit([cache])(*moves(step, walks, query_start, slots))
        impl = self._impls[0]
        query = torch.zeros(4, impl.num_heads, impl.head_size, dtype=self._dtype)
        plan = make_plan(trees, np.zeros((1, 1), np.int32), 4)
        tree_attention(query, cells_of(cache), plan, impl.scale, torch.zeros_like(query))
