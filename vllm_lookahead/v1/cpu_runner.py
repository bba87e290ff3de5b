"""vLLM's CPU model runner with draft trees."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

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
from vllm_lookahead.trees.kv import moves
from vllm_lookahead.trees.rows import TreeRows
from vllm_lookahead.trees.step import StepTrees, Walks, walk_all
from vllm_lookahead.v1.branch import BranchRow, run_branches
from vllm_lookahead.v1.runner import LookaheadRunnerMixin


class LookaheadCPURunner(LookaheadRunnerMixin, CPUModelRunner):
    """The CPU's attention, KV layout and commit for ``LookaheadRunnerMixin``."""

    def tree_support(self) -> str | None:
        """See ``LookaheadRunnerMixin.tree_support``."""
        if self.uses_mrope:
            return "multi-dimensional RoPE positions (M-RoPE)"
        if len(self.kv_cache_config.kv_cache_groups) != 1:
            return "its layers keep different kinds of KV cache"
        groups = list(self._attn_group_iterator())
        impls: list[TreeCPUAttentionImpl] = []
        layers = self.compilation_config.static_forward_context
        for group in groups:
            for name in group.layer_names:
                impl = getattr(layers[name], "impl", None)
                if impl is None:
                    return f"its {type(layers[name]).__name__} layers keep a recurrent state"
                reason = unsupported_reason(impl, group.get_metadata_builder(0))
                if reason is not None:
                    return reason
                impls.append(impl)
        self._impls = impls
        # as ``unsupported_reason`` has just checked
        self._builders = cast(list[TreeCPUAttentionMetadataBuilder], [g.get_metadata_builder(0) for g in groups])
        self._serves_trees = False
        self._commit = CPUCommit(self.kv_caches)
        return None

    def set_trees(self, trees: TreeRows | None) -> None:
        """See ``LookaheadRunnerMixin.set_trees``."""
        for builder in self._builders:
            builder.trees = trees
        if self._serves_trees != (trees is not None):
            self._serves_trees = trees is not None
            for impl in self._impls:
                impl.serve_trees(self._serves_trees)

    def place_tokens(self, trees: TreeRows) -> None:
        """See ``LookaheadRunnerMixin.place_tokens``."""
        self.positions.numpy()[trees.tokens] = trees.positions

    def run_branches(self, rows: list[BranchRow], common: CommonAttentionMetadata) -> list[NDArray[np.int32]]:
        """See ``LookaheadRunnerMixin.run_branches``."""
        return run_branches(self, rows, common)

    def warm_up_trees(self) -> None:
        """See ``LookaheadRunnerMixin.warm_up_trees``: one small tree through every kernel, on a cache of its own."""
        tree = DraftTree.from_parents([1, 2, 3], [-1, -1, 0])
        step = StepTrees.build(["warm-up"], {"warm-up": [1, 2, 3]}, {"warm-up": tree})
        walks = walk_all(step, np.array([2, 0, 0, 0], np.int64))
        query_start, slots = np.array([0, 4], np.int32), np.arange(4)
        trees = TreeRows.of(step, query_start, np.array([4], np.int32))
        assert trees is not None
        cache = torch.zeros_like(self.kv_caches[0][:1])
        CPUCommit([cache])(*moves(step, walks, query_start, slots))
        layer = next(iter(self.compilation_config.static_forward_context.values()))
        query = torch.zeros(4, layer.impl.num_heads, layer.impl.head_size, dtype=self.dtype)
        plan = make_plan(trees, np.zeros((1, 1), np.int32), 4)
        tree_attention(query, cells_of(cache), plan, layer.impl.scale, torch.zeros_like(query))

    def commit_kv(self, step: StepTrees, walks: Walks) -> None:
        """See ``LookaheadRunnerMixin.commit_kv``."""
        slots = self.input_batch.block_table[0].slot_mapping.np
        self._commit(*moves(step, walks, self.query_start_loc.np[: step.num_rows + 1], slots))
