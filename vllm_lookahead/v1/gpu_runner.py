"""vLLM's GPU model runner with draft trees."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from proposers import DraftTree
from vllm_lookahead.trees.rows import TreeRows
from vllm_lookahead.trees.step import StepTrees, Walks, walk_all
from vllm_lookahead.v1.branch import BranchRow, run_branches
from vllm_lookahead.v1.runner import LookaheadRunnerMixin

if TYPE_CHECKING:
    from vllm_lookahead.attention.packing import DeviceTrees

TREES_VARIABLE = "VLLM_LOOKAHEAD_CUDA_TREES"
"""Has to be 1 for trees on CUDA: nobody has seen them on a GPU yet."""

MOST_LOGITS = 4096
"""Most tokens of a step with drafts: each has its logits, and those of 4096 take 1 GiB for a vocabulary of 128k."""


def trees_are_off() -> str | None:
    """Why no layer of this process gets tree attention, whatever the model; None if they may."""
    if os.environ.get(TREES_VARIABLE) == "1":
        return None
    return f"draft trees on CUDA are new and have to be asked for ({TREES_VARIABLE}=1)"


class LookaheadGPURunner(LookaheadRunnerMixin, GPUModelRunner):
    """CUDA's attention and KV commit for ``LookaheadRunnerMixin``."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self._trees: DeviceTrees | None = None
        if trees_are_off() is None:
            # Steps with drafts differ in size and run piecewise. Those without are the uniform ones: one token per
            # request, for which full graphs are captured, as without speculation.
            self.uniform_decode_query_len = 1
            self.cudagraph_dispatcher.uniform_decode_query_len = 1

    def _node_limit(self, num_rows: int) -> int:
        return min(super()._node_limit(num_rows), max(0, MOST_LOGITS // num_rows - 1))

    def _dummy_sampler_run(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As vLLM's; then with as many logits as drafts can ask for, so that the KV cache leaves room for them."""
        result = super()._dummy_sampler_run(hidden_states)
        most = min(MOST_LOGITS, self.max_num_tokens, self.max_num_reqs * (1 + self.num_spec_tokens))
        with torch.inference_mode():
            self.tree_sampler.argmax(self.model.compute_logits(torch.rand_like(hidden_states[:1]).repeat(most, 1)))
        return result

    def tree_support(self) -> str | None:
        """See ``LookaheadRunnerMixin.tree_support``."""
        reason = trees_are_off()
        if reason is not None:
            return reason
        from vllm_lookahead.attention.flash import unsupported_reason

        if self.uses_mrope or getattr(self, "uses_xdrope_dim", 0):
            return "multi-dimensional RoPE positions (M-RoPE)"
        if len(self.kv_cache_config.kv_cache_groups) != 1:
            return "its layers keep different kinds of KV cache"
        groups = list(self._attn_group_iterator())
        layers = self.compilation_config.static_forward_context
        self._layers = [layers[name] for group in groups for name in group.layer_names]
        self._builders = [group.get_metadata_builder(0) for group in groups]
        for group, builder in zip(groups, self._builders, strict=True):
            for layer in (layers[name] for name in group.layer_names):
                reason = unsupported_reason(layer.impl, builder, layer.kv_cache, self.dtype)
                if reason is not None:
                    return reason
        return None

    def warm_up_trees(self) -> None:
        """See ``LookaheadRunnerMixin.warm_up_trees``: one small tree through every kernel, for each kind of layer.

        It touches vLLM's null block, which no request owns.
        """
        from vllm_lookahead.attention.packing import TreePacker
        from vllm_lookahead.v2.kernels.commit import KVCommit
        from vllm_lookahead.v2.kernels.place import place

        most = self.scheduler_config.max_num_batched_tokens
        self._packer = TreePacker(self.device, most, self.scheduler_config.max_num_seqs, self.num_spec_tokens)
        self._commit = KVCommit([layer.kv_cache for layer in self._layers])

        tree = DraftTree.from_parents([1, 2, 3], [-1, -1, 0])
        step = StepTrees.build(["warm-up"], {"warm-up": [1, 2, 3]}, {"warm-up": tree})
        walks = walk_all(step, np.array([2, 0, 0, 0], np.int64))
        seq_lens = np.array([8], np.int32)
        self._trees = self._packer(step, np.array([0, 4], np.int32), seq_lens)
        packed = self._trees.packed
        assert packed is not None
        place(self._trees, torch.from_numpy(seq_lens).to(self.device), self.positions)
        blocks = torch.zeros((1, 1), dtype=torch.int32, device=self.device)
        kinds: dict[tuple[int, ...], Any] = {}
        for layer in self._layers:
            kinds.setdefault((layer.impl.num_heads, layer.impl.num_kv_heads, layer.impl.head_size), layer)
        for layer in kinds.values():
            layer.impl.warm_up(layer.kv_cache, packed, blocks, self.dtype)
        self._move(walks, torch.zeros(4, dtype=torch.int64, device=self.device))

    def set_trees(self, trees: TreeRows | None) -> None:
        """See ``LookaheadRunnerMixin.set_trees``."""
        self._trees = None
        if trees is not None:
            assert self._step is not None, "separate branches have no trees here"
            query_start, seq_lens = self.query_start_loc.np, self.optimistic_seq_lens_cpu.numpy()
            self._trees = self._packer(self._step, query_start, seq_lens)
        for builder in self._builders:
            builder.trees = None if self._trees is None else self._trees.packed

    def place_tokens(self, trees: TreeRows) -> None:
        """See ``LookaheadRunnerMixin.place_tokens``."""
        from vllm_lookahead.v2.kernels.place import place

        assert self._trees is not None
        place(self._trees, self.seq_lens, self.positions)

    def run_branches(self, rows: list[BranchRow], common: CommonAttentionMetadata) -> list[NDArray[np.int32]]:
        """See ``LookaheadRunnerMixin.run_branches``: in as many passes as the memory for a step's tokens asks for."""
        most = min(MOST_LOGITS, self.max_num_tokens)
        found: list[NDArray[np.int32]] = []
        group: list[BranchRow] = []
        tokens = 0
        for row in rows:
            tokens += len(row.comb) + 1
            if group and tokens > most:
                found += run_branches(self, group, common)
                group, tokens = [], len(row.comb) + 1
            group.append(row)
        return found + run_branches(self, group, common)

    def commit_kv(self, step: StepTrees, walks: Walks) -> None:
        """See ``LookaheadRunnerMixin.commit_kv``."""
        self._move(walks, self.input_batch.block_table[0].slot_mapping.gpu)

    def _move(self, walks: Walks, slots: torch.Tensor) -> None:
        assert self._trees is not None
        assert self._trees.packed is not None
        paths, lengths = (torch.from_numpy(part).to(self.device) for part in (walks.paths, walks.lengths))
        self._commit(self._trees.packed, paths.contiguous(), lengths, slots)
