"""Model Runner V2 on the CPU, where its kernels run in Triton's interpreter: how V2 is tested without a GPU."""

from __future__ import annotations

import numpy as np
import torch
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_lookahead.attention.cpu_trees import CPUTrees, UnsupportedModelError
from vllm_lookahead.trees.rows import TreeRows
from vllm_lookahead.trees.step import StepTrees, Walks, logits_indices, walk_all
from vllm_lookahead.v2.runner import LookaheadV2RunnerMixin
from vllm_lookahead.v2.verifier import WalkedTokens


class LookaheadV2CPURunner(LookaheadV2RunnerMixin, CPUModelRunner):
    """The CPU's attention, walk and commit for ``LookaheadV2RunnerMixin``."""

    _query_start: np.ndarray
    _walks: Walks

    def tree_support(self) -> str | None:
        """See ``LookaheadV2RunnerMixin.tree_support``."""
        if self.model_config.uses_mrope:
            return "multi-dimensional RoPE positions (M-RoPE)"
        if len(self.kv_cache_config.kv_cache_groups) != 1:
            return "its layers keep different kinds of KV cache"
        groups = [group for groups in self.attn_groups for group in groups]
        layers = self.compilation_config.static_forward_context
        try:
            self._trees = CPUTrees(groups, layers, self.kv_caches, self.dtype)
        except UnsupportedModelError as error:
            return str(error)
        return None

    def place_drafts(self, step: StepTrees, batch: InputBatch) -> None:
        """See ``LookaheadV2RunnerMixin.place_drafts``."""
        self._query_start = batch.query_start_loc_np[: step.num_rows + 1]
        places = logits_indices(np.diff(step.starts), self._query_start[1:])
        nodes = np.ones(len(places), np.bool_)
        nodes[step.root_logits_rows()] = False
        # a placeholder of a grammar's chain is no token, and never accepted
        batch.input_ids.numpy()[places[nodes]] = np.maximum(step.tokens, 0)

    def serve_trees(self, step: StepTrees | None, batch: InputBatch | None) -> None:
        """See ``LookaheadV2RunnerMixin.serve_trees``."""
        if step is None or batch is None:
            self._trees.serve(None)
            return
        trees = TreeRows.of(step, self._query_start, self.seq_lens(step, batch))
        assert trees is not None
        self._trees.serve(trees)
        batch.positions.numpy()[trees.tokens] = trees.positions

    def walk(self, sampled: torch.Tensor, forbidden: torch.Tensor | None) -> WalkedTokens:
        """See ``LookaheadV2RunnerMixin.walk``."""
        step = self.step
        assert step is not None
        if forbidden is not None:
            nodes = np.ones(len(sampled), np.bool_)
            nodes[step.root_logits_rows()] = False
            step.tokens[forbidden.numpy()[nodes]] = -1
        walks = self._walks = walk_all(step, sampled.numpy())
        tokens = np.full((step.num_rows, self.num_speculative_steps + 1), -1, np.int64)
        tokens[:, : walks.tokens.shape[1]] = walks.tokens
        order = torch.from_numpy(accepted_first(step, walks))
        return WalkedTokens(torch.from_numpy(tokens), torch.from_numpy(walks.lengths.copy()), order)

    def commit_kv(self, slots: torch.Tensor) -> None:
        """See ``LookaheadV2RunnerMixin.commit_kv``."""
        assert self.step is not None
        self._trees.commit(self.step, self._walks, self._query_start, slots.numpy())

    def warm_up_trees(self) -> None:
        """See ``LookaheadV2RunnerMixin.warm_up_trees``."""
        self._trees.warm_up()


def accepted_first(step: StepTrees, walks: Walks) -> np.ndarray:
    """int64 [nodes + rows]: the logits rows, each request's root and accepted nodes before its other nodes."""
    order = np.arange(len(step.tokens) + step.num_rows)
    for row in range(step.num_rows):
        first = int(step.starts[row]) + row
        path = walks.path(row)
        others = np.setdiff1d(np.arange(step.num_nodes(row)), path)
        order[first + 1 : first + 1 + step.num_nodes(row)] = first + 1 + np.concatenate((path, others))
    return order
