"""Model Runner V2 on CUDA with draft trees: nothing between the forward pass and the copy of its tokens waits.

The walk, the positions, the ancestor masks and the KV commit are kernels (``v2.kernels``) over what one small copy
brings to the device (``attention.packing``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from proposers import DraftTree
from vllm_lookahead.attention.flash import unsupported_reason
from vllm_lookahead.attention.packing import DeviceTrees, TreePacker
from vllm_lookahead.temporary import replaced
from vllm_lookahead.trees.step import StepTrees
from vllm_lookahead.v2 import self_check
from vllm_lookahead.v2.kernels.commit import KVCommit
from vllm_lookahead.v2.kernels.place import place, place_tokens
from vllm_lookahead.v2.kernels.walk import DeviceWalks, walk
from vllm_lookahead.v2.runner import LookaheadV2RunnerMixin
from vllm_lookahead.v2.verifier import WalkedTokens

MOST_LOGITS = 4096
"""Most tokens of a step with drafts: each has its logits, and those of 4096 take 1 GiB for a vocabulary of 128k."""


class LookaheadCUDARunner(LookaheadV2RunnerMixin, GPUModelRunner):
    """CUDA's attention, walk and commit for ``LookaheadV2RunnerMixin``."""

    _trees: DeviceTrees
    _walks: DeviceWalks

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        # chains need it, too: their walk is a kernel as well
        self._packer = TreePacker(device, self.max_num_tokens, self.max_num_reqs, self.num_speculative_steps)

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; full CUDA graphs are captured for steps without drafts, one token per request.

        Steps with drafts differ in size and run piecewise.
        """
        with replaced(self, "decode_query_len", 1):
            super().initialize_kv_cache(kv_cache_config, *args, **kwargs)

    def node_limit(self, num_rows: int) -> int:
        """As ``LookaheadV2RunnerMixin.node_limit``; the logits have to fit, too."""
        return min(super().node_limit(num_rows), max(0, MOST_LOGITS // num_rows - 1))

    def _dummy_sampler_run(self, hidden_states: torch.Tensor) -> None:
        """As vLLM's; then with as many logits as drafts can ask for, so that the KV cache leaves room for them."""
        super()._dummy_sampler_run(hidden_states)
        drafts = self.max_num_reqs * self.node_limit(self.max_num_reqs)
        most = min(MOST_LOGITS, self.max_num_tokens, self.max_num_reqs + max(drafts, self.num_speculative_steps))
        with torch.inference_mode():
            self.model.compute_logits(torch.rand_like(hidden_states[:1]).repeat(most, 1)).argmax(dim=-1)

    def tree_support(self) -> str | None:
        """See ``LookaheadV2RunnerMixin.tree_support``. What can be masked is also tried, on every rank's device."""
        reasons: list[str | None] = [self._tree_support()]
        group = get_tp_group()
        if group.world_size > 1:
            mine, reasons = reasons[0], [None] * group.world_size
            torch.distributed.all_gather_object(reasons, mine, group=group.cpu_group)
        return next((reason for reason in reasons if reason is not None), None)

    def _tree_support(self) -> str | None:
        if self.model_config.uses_mrope:
            return "multi-dimensional RoPE positions (M-RoPE)"
        if len(self.kv_cache_config.kv_cache_groups) != 1:
            return "its layers keep different kinds of KV cache"
        groups = [group for groups in self.attn_groups for group in groups]
        layers = self.compilation_config.static_forward_context
        self._layers = [layers[name] for group in groups for name in group.layer_names]
        self._builders = [group.get_metadata_builder(0) for group in groups]
        for group, builder in zip(groups, self._builders, strict=True):
            for layer in (layers[name] for name in group.layer_names):
                reason = unsupported_reason(layer.impl, builder, layer.kv_cache, self.dtype)
                if reason is not None:
                    return reason
        try:
            self._commit = KVCommit([layer.kv_cache for layer in self._layers])
        except ValueError as error:
            return str(error)
        return self_check.problem(self._layers, self.dtype)

    def place_drafts(self, step: StepTrees, batch: InputBatch) -> None:
        """See ``LookaheadV2RunnerMixin.place_drafts``."""
        query_start = batch.query_start_loc_np[: step.num_rows + 1]
        self._trees = self._packer(step, query_start, self.seq_lens(step, batch))
        place_tokens(self._trees, batch.query_start_loc, batch.input_ids)

    def serve_trees(self, step: StepTrees | None, batch: InputBatch | None) -> None:
        """See ``LookaheadV2RunnerMixin.serve_trees``."""
        packed = None
        if step is not None and batch is not None:
            place(self._trees, batch.seq_lens, batch.positions)
            packed = self._trees.packed
        for builder in self._builders:
            builder.trees = packed

    def walk(self, sampled: torch.Tensor, forbidden: torch.Tensor | None) -> WalkedTokens:
        """See ``LookaheadV2RunnerMixin.walk``."""
        walks = self._walks = walk(sampled, self._trees, self.num_speculative_steps + 1, forbidden)
        return WalkedTokens(walks.tokens, walks.lengths, walks.order)

    def commit_kv(self, slots: torch.Tensor) -> None:
        """See ``LookaheadV2RunnerMixin.commit_kv``."""
        assert self._trees.packed is not None
        self._commit(self._trees.packed, self._walks.paths, self._walks.lengths, slots)

    def prepare_drafting(self) -> None:
        """As ``LookaheadV2RunnerMixin.prepare_drafting``; the walk is a kernel for chains, too."""
        chain = StepTrees.build(["warm-up"], {"warm-up": [0]}, {})
        self._trees = self._packer(chain, np.array([0, 2], np.int32), np.array([2], np.int32))
        starts = torch.tensor([0, 2], dtype=torch.int32, device=self.device)
        place_tokens(self._trees, starts, self.input_buffers.input_ids)
        sampled = torch.zeros(2, dtype=torch.int64, device=self.device)
        for forbidden in (None, torch.zeros(2, dtype=torch.bool, device=self.device)):
            self.walk(sampled, forbidden)
        super().prepare_drafting()

    def warm_up_trees(self) -> None:
        """See ``LookaheadV2RunnerMixin.warm_up_trees``.

        ``tree_support`` has compiled what doesn't depend on the size of the largest tree; the mask's words do.
        """
        if self.num_speculative_steps < 2:
            return  # one node is a chain
        tree = DraftTree.from_parents([0, 0], [-1, -1])
        step = StepTrees.build(["warm-up"], {"warm-up": [0, 0]}, {"warm-up": tree})
        self._trees = self._packer(step, np.array([0, 3], np.int32), np.array([3], np.int32))
        place(self._trees, torch.tensor([3], dtype=torch.int32, device=self.device), self.input_buffers.positions)
