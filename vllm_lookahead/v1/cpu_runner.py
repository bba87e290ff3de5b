"""vLLM's CPU model runner with draft trees."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_lookahead.attention.cpu_trees import CPUTrees, UnsupportedModelError
from vllm_lookahead.trees.rows import TreeRows
from vllm_lookahead.trees.step import StepTrees, Walks
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
        layers = self.compilation_config.static_forward_context
        try:
            self._trees = CPUTrees(list(self._attn_group_iterator()), layers, self.kv_caches, self.dtype)
        except UnsupportedModelError as error:
            return str(error)
        return None

    def set_trees(self, trees: TreeRows | None) -> None:
        """See ``LookaheadRunnerMixin.set_trees``."""
        self._trees.serve(trees)

    def place_tokens(self, trees: TreeRows) -> None:
        """See ``LookaheadRunnerMixin.place_tokens``."""
        self.positions.numpy()[trees.tokens] = trees.positions

    def run_branches(self, rows: list[BranchRow], common: CommonAttentionMetadata) -> list[NDArray[np.int32]]:
        """See ``LookaheadRunnerMixin.run_branches``."""
        return run_branches(self, rows, common)

    def warm_up_trees(self) -> None:
        """See ``LookaheadRunnerMixin.warm_up_trees``."""
        self._trees.warm_up()

    def commit_kv(self, step: StepTrees, walks: Walks) -> None:
        """See ``LookaheadRunnerMixin.commit_kv``."""
        slots = self.input_batch.block_table[0].slot_mapping.np
        self._trees.commit(step, walks, self.query_start_loc.np[: step.num_rows + 1], slots)
