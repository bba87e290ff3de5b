"""Model Runner V2 on CUDA with draft trees: nothing between the forward pass and the copy of its tokens waits.

The walk, the positions, the ancestor masks and the KV commit are kernels (``v2.kernels``) over what one small copy
brings to the device (``attention.packing``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from proposers import DraftTree
from vllm_lookahead.attention.flash import unsupported_reason
from vllm_lookahead.attention.packing import DeviceTrees, GraphSize, PackedTrees, TreePacker
from vllm_lookahead.attention.triton_tree import tile_queries
from vllm_lookahead.temporary import replaced
from vllm_lookahead.trees.step import StepTrees
from vllm_lookahead.v2 import self_check
from vllm_lookahead.v2.cuda_graphs import TreeGraphManager, is_tree_graph
from vllm_lookahead.v2.kernels.commit import KVCommit
from vllm_lookahead.v2.kernels.place import place, place_tokens
from vllm_lookahead.v2.kernels.walk import DeviceWalks, walk
from vllm_lookahead.v2.runner import LookaheadV2RunnerMixin
from vllm_lookahead.v2.verifier import WalkedTokens

logger = init_logger(f"vllm.{__name__}")

MOST_LOGITS = 4096
"""Most tokens of a step with drafts: each has its logits, and those of 4096 take 1 GiB for a vocabulary of 128k."""


class LookaheadCUDARunner(LookaheadV2RunnerMixin, GPUModelRunner):
    """CUDA's attention, walk and commit for ``LookaheadV2RunnerMixin``."""

    cudagraph_manager: Any  # vLLM's, or ours in its place
    _trees: DeviceTrees
    _walks: DeviceWalks

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        # of the first layer, should they differ: this is about speed
        heads = self.model_config.get_num_attention_heads(self.parallel_config)
        per_kv = heads // self.model_config.get_num_kv_heads(self.parallel_config)
        # chains need it, too: their walk is a kernel as well
        self._packer = TreePacker(
            device, self.max_num_tokens, self.max_num_reqs, self.num_speculative_steps, tile_queries(per_kv)
        )
        self._graph: GraphSize | None = None  # of trees, which the step that was prepared last replays

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; full CUDA graphs are captured for one token per request, and for trees if they can be.

        Other steps with drafts run piecewise.
        """
        with replaced(self, "decode_query_len", 1):
            super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        if self.trees_verifiable:
            self._capture_trees()

    def _capture_trees(self) -> None:
        """Have vLLM capture graphs of trees, too, if they can be."""
        what = "full CUDA graphs for steps with draft trees"
        reason = self._why_no_tree_graphs()
        if reason is not None:
            logger.info_once("No %s: %s.", what, reason)
            return
        reason = self._agreed(self_check.graph_problem(self._with_builders, self.dtype, self._packer.tile_queries))
        if reason is not None:
            logger.warning_once("No %s: %s.", what, reason)
            return
        for builder in self._builders:
            builder.dummy_trees = self.dummy_trees
        self.cudagraph_manager = TreeGraphManager(
            self.vllm_config,
            self.device,
            self.cudagraph_manager.cudagraph_mode,
            self.lora_capture_cases,
            self.num_speculative_steps,
        )
        logger.info_once("There are %s, of %s tokens.", what, ", ".join(map(str, self.cudagraph_manager.tree_sizes)))

    def _why_no_tree_graphs(self) -> str | None:
        """The same on every rank."""
        mode = self.cudagraph_manager.cudagraph_mode
        if not (mode.has_full_cudagraphs() and mode.separate_routine()):
            return f"vLLM's mode is {mode.name}"
        versions = {layer.impl.vllm_flash_attn_version for layer in self._layers}
        return None if versions == {3} else f"they need FlashAttention 3, not {versions.pop()}"

    def dummy_trees(self, common: CommonAttentionMetadata) -> PackedTrees:
        """Chains in the place of trees, for the capture of a graph and for dummy runs that replay it.

        Args:
            common: vLLM's metadata for a dummy batch.
        """
        most = 1 + self.num_speculative_steps
        lengths = np.minimum(np.diff(common.query_start_loc_cpu.numpy()), most)
        names = [str(row) for row in range(len(lengths))]
        step = StepTrees.build(names, dict(zip(names, ([0] * (n - 1) for n in lengths.tolist()), strict=True)), {})
        starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        size = GraphSize(common.num_reqs, common.num_actual_tokens, self.max_model_len)
        self._trees = self._packer(step, starts, lengths, size)
        place(self._trees, common.seq_lens, self.input_buffers.positions)
        assert self._trees.packed is not None
        return self._trees.packed

    def prepare_inputs(
        self,
        scheduler_output: SchedulerOutput,
        batch_req_state: Any,
        batch_desc: BatchExecutionDescriptor,
        *args: Any,
        **kwargs: Any,
    ) -> InputBatch:
        """As ``LookaheadV2RunnerMixin.prepare_inputs``, for the graph that vLLM chose."""
        self._graph = None
        if is_tree_graph(batch_desc):
            assert batch_desc.num_reqs is not None
            self._graph = GraphSize(batch_desc.num_reqs, batch_desc.num_tokens, self.max_model_len)
        return super().prepare_inputs(scheduler_output, batch_req_state, batch_desc, *args, **kwargs)

    def in_tree_graph(self) -> bool:
        """See ``LookaheadV2RunnerMixin.in_tree_graph``."""
        assert self._graph is None or self.step is not None, "a graph of trees for a step without drafts"
        return self._graph is not None

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
        return self._agreed(self._tree_support())

    def _agreed(self, reason: str | None) -> str | None:
        """The first reason of any rank."""
        reasons: list[str | None] = [reason]
        group = get_tp_group()
        if group.world_size > 1:
            reasons = [None] * group.world_size
            torch.distributed.all_gather_object(reasons, reason, group=group.cpu_group)
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
        builders = [builder for group, builder in zip(groups, self._builders, strict=True) for _ in group.layer_names]
        self._with_builders = list(zip(self._layers, builders, strict=True))
        for layer, builder in self._with_builders:
            reason = unsupported_reason(layer.impl, builder, layer.kv_cache, self.dtype)
            if reason is not None:
                return reason
        try:
            self._commit = KVCommit([layer.kv_cache for layer in self._layers])
        except ValueError as error:
            return str(error)
        return self_check.problem(self._with_builders, self.dtype, self._packer.tile_queries)

    def place_drafts(self, step: StepTrees, batch: InputBatch) -> None:
        """See ``LookaheadV2RunnerMixin.place_drafts``."""
        query_start = batch.query_start_loc_np[: step.num_rows + 1]
        self._trees = self._packer(step, query_start, self.seq_lens(step, batch), self._graph)
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
