"""Tree attention for vLLM's FlashAttention backend.

A batch without tree rows takes vLLM's path and metadata untouched. A tree row is computed in two parts: what lies
before its root with FlashAttention over the paged cache, without a causal mask, and root and nodes among themselves
with our Triton kernel, which also merges the two. (vLLM's ``merge_attn_states`` does the same merge, but as one more
launch per layer, with the tree's part rounded on the way, and into packed rows that would have to be scattered after.)

What about the other rows of the same batch? Splitting the batch would mean gathering their queries and scattering
their output in every layer, so the whole batch goes through vLLM's call as it is. For that call a tree row is one
that has no context, which makes it cheap; our kernel overwrites its output. (If it also computes tokens before its
root, it needs its context for them.) In a batch of nothing but tree rows, the usual case for few users, that call is
left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from vllm import envs
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from vllm_lookahead.attention.packing import PackedTrees
from vllm_lookahead.attention.triton_tree import HEAD_SIZES, Prefix, tree_attention


@dataclass
class TreeFlashAttentionMetadata(FlashAttentionMetadata):
    """vLLM's metadata, and what the tree rows need.

    Attributes:
        trees: the step's tree rows.
        tree_blocks: int32 [tree rows, blocks], their cache blocks.
        tree_schedule: int32 [n], FlashAttention 3's schedule for what is before their roots; None: it makes its own.
        tree_splits: into how many parts it may split a row's keys; 0: as it likes.
        only_trees: every token of the batch belongs to a tree row's root or nodes.
    """

    trees: PackedTrees | None = None
    tree_blocks: torch.Tensor | None = None
    tree_schedule: torch.Tensor | None = None
    tree_splits: int = 0
    only_trees: bool = False


class TreeFlashAttentionMetadataBuilder(FlashAttentionMetadataBuilder):
    """vLLM's builder, which also takes a step's trees.

    The runner sets ``trees`` before vLLM builds the step's metadata; they are good for that one time, so that a dummy
    run never meets the trees of a step that is over.

    Attributes:
        trees: the step's.
        dummy_trees: what stands for trees in a dummy run with a graph of trees, its capture above all; None if there
            are no such graphs.
    """

    # A full CUDA graph replays attention as it was captured. vLLM's are those of one token per request (the runner sees
    # to that size), and never stand for a step with trees; those of trees are ``v2.cuda_graphs``' matter.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trees: PackedTrees | None = None
        self.dummy_trees: Callable[[CommonAttentionMetadata], PackedTrees] | None = None

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> FlashAttentionMetadata:
        """As vLLM's; a graph for more than one token per request is one of trees."""
        if common_attn_metadata.max_query_len > 1 and self.dummy_trees is not None:
            self.trees = self.dummy_trees(common_attn_metadata)
        return super().build_for_cudagraph_capture(common_attn_metadata)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashAttentionMetadata:
        """vLLM's metadata; for a batch with tree rows without cascade attention, and with what our part needs."""
        trees, self.trees = self.trees, None
        if trees is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        common = common_attn_metadata
        only_trees = trees.num_tokens == common.num_actual_tokens
        if not only_trees:
            common = replace(common, seq_lens=common.seq_lens.index_copy(0, trees.rows, trees.stock_lens))
        # nothing to schedule for a call that won't be made
        stock = super().build(0, common, fast_build or only_trees)
        used = -(-max(1, trees.longest_prefix) // self.block_size)
        blocks = common.block_table_tensor[:, :used]
        if len(trees.rows) != common.num_reqs:
            blocks = blocks.index_select(0, trees.rows)
        splits = self.max_num_splits if trees.captured else 0
        return TreeFlashAttentionMetadata(
            **{field.name: getattr(stock, field.name) for field in fields(FlashAttentionMetadata)},
            trees=trees,
            tree_blocks=blocks,
            tree_schedule=self._tree_schedule(trees, splits),
            tree_splits=splits,
            only_trees=only_trees,
        )

    def _tree_schedule(self, trees: PackedTrees, splits: int) -> torch.Tensor | None:
        """See ``TreeFlashAttentionMetadata.tree_schedule``; for a graph at the address that it reads."""
        if trees.longest_prefix == 0:
            return None
        schedule = self._get_scheduler_metadata(
            aot_schedule=self.aot_schedule,
            batch_size=len(trees.rows),
            cu_query_lens=trees.offsets,
            max_query_len=trees.longest,
            seqlens=trees.prefixes,
            max_seq_len=trees.longest_prefix,
            causal=False,
            max_num_splits=splits,
        )
        # vLLM's own place is free: no graph holds both calls
        return self._store_scheduler_metadata(schedule) if trees.captured else schedule


class TreeFlashAttentionImpl(FlashAttentionImpl):
    """FlashAttention for the whole batch, then both parts of the tree rows."""

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashAttentionMetadata,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As vLLM's ``FlashAttentionImpl.forward``; shapes there."""
        trees = attn_metadata.trees if isinstance(attn_metadata, TreeFlashAttentionMetadata) else None
        if trees is None or not attn_metadata.only_trees or output_scale is not None or output_block_scale is not None:
            output = super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if trees is not None:
            self.attend_trees(query, key, value, kv_cache, attn_metadata, output)
        return output

    def attend_trees(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: TreeFlashAttentionMetadata,
        output: torch.Tensor,
    ) -> None:
        """Attention of the tree rows' roots and nodes; the rest of ``output`` is left alone.

        Args:
            query: [tokens, num_heads, head_size], the flattened batch.
            key: [tokens, num_kv_heads, head_size].
            value: [tokens, num_kv_heads, head_size].
            kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size].
            metadata: with tree rows.
            output: [tokens, num_heads, head_size], written.
        """
        trees = metadata.trees
        assert trees is not None
        prefix = self._attend_prefix(trees.gather(query), kv_cache, trees, metadata)
        tree_attention(query, key, value, trees, self.scale, output, prefix)

    def _attend_prefix(
        self, query: torch.Tensor, kv_cache: torch.Tensor, trees: PackedTrees, metadata: TreeFlashAttentionMetadata
    ) -> Prefix | None:
        """FlashAttention of the packed queries over what lies before their root; None if nothing does.

        Args:
            query: [packed, num_heads, head_size].
            kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size].
            trees: the tree rows.
            metadata: theirs.
        """
        if trees.longest_prefix == 0:
            return None
        # there is no such function without a GPU
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        output, lse = flash_attn_varlen_func(
            q=query,
            k=canonicalize_singleton_dim_strides(key_cache),
            v=canonicalize_singleton_dim_strides(value_cache),
            cu_seqlens_q=trees.offsets,
            max_seqlen_q=trees.longest,
            seqused_k=trees.prefixes,
            max_seqlen_k=trees.longest_prefix,
            softmax_scale=self.scale,
            causal=False,
            block_table=metadata.tree_blocks,
            return_softmax_lse=True,
            scheduler_metadata=metadata.tree_schedule,
            num_splits=metadata.tree_splits,
            fa_version=self.vllm_flash_attn_version,
        )
        return Prefix(output, lse)


class TreeFlashAttentionBackend(FlashAttentionBackend):
    """``FLASH_ATTN`` with tree rows. Registered over vLLM's only in a worker that serves one of our methods."""

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """The attention implementation."""
        return TreeFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """The metadata builder."""
        return TreeFlashAttentionMetadataBuilder


def unsupported_reason(impl: Any, builder: Any, kv_cache: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why a layer can't verify trees, or None if it can.

    Args:
        impl: the layer's attention.
        builder: its metadata builder.
        kv_cache: its cache.
        dtype: the model's.
    """
    if not isinstance(impl, TreeFlashAttentionImpl) or not isinstance(builder, TreeFlashAttentionMetadataBuilder):
        return (
            f"its attention ({type(impl).__name__}) takes no ancestor mask; on CUDA only FlashAttention does, for "
            "float16 and bfloat16 (--attention-backend FLASH_ATTN)"
        )
    if envs.VLLM_BATCH_INVARIANT:
        return "batch-invariant mode (VLLM_BATCH_INVARIANT), which chains keep and trees would not"
    if impl.attn_type != AttentionType.DECODER:
        return f"{impl.attn_type} attention"
    if impl.sliding_window != (-1, -1):
        return "sliding-window attention"
    if impl.alibi_slopes is not None:
        return "ALiBi positions"
    if impl.logits_soft_cap:
        return "soft-capped attention scores"
    if impl.sinks is not None:
        return "attention sinks"
    if impl.kv_sharing_target_layer_name is not None:
        return "layers that share a KV cache"
    if impl.head_size not in HEAD_SIZES:
        return f"a head size of {impl.head_size}, not a multiple of 16 up to {HEAD_SIZES[-1]}"
    if impl.vllm_flash_attn_version not in (2, 3):
        # FlashAttention 4 compiles a kernel for each kind of call, and vLLM has none compiled for ours before requests
        # come: the first ones would wait for that
        return f"FlashAttention version {impl.vllm_flash_attn_version}"
    if impl.total_cp_world_size > 1:
        return "context parallelism"
    if builder.rswa_window is not None:
        return "reference sliding-window attention"
    if getattr(builder.model_config, "is_mm_prefix_lm", False):
        return "attention in both directions within images"
    if kv_cache.dtype != dtype:
        # the cache's entries would differ from the keys and values that the tree part takes as they are computed
        return f"a KV cache of type {impl.kv_cache_dtype}"
    return None
