"""Tree attention for vLLM's CPU backend.

Rows without a branched tree keep vLLM's kernel and cost what they cost without us. For a tree row that kernel is told
that the row has no context (its output is overwritten), and masked attention over the same paged cache takes its place:
every node sees the prefix, its ancestors and itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

READABLE_ISAS = ("vec", "vec16")
"""Kernels whose cache layout we can read: K transposed, V plain (see ``vllm_lookahead.kv.CPUCommit``)."""


@dataclass(slots=True, frozen=True)
class TreeRow:
    """One batch row that is verified as a branched tree.

    Attributes:
        row: index in the batch.
        start: first token of the root and its nodes in the flattened batch.
        length: nodes + 1.
        prefix: tokens before the root, whose KV is in the cache.
        mask: bool [length, length], who sees whom among the root (index 0) and the nodes.
    """

    row: int
    start: int
    length: int
    prefix: int
    mask: NDArray[np.bool_]


@dataclass
class TreeCPUAttentionMetadata(CPUAttentionMetadata):
    """vLLM's metadata, and what the tree rows need.

    Attributes:
        tree_groups: the tree rows in groups of equal padded shape, one attention call each.
    """

    tree_groups: Sequence[TreeGroup] = ()


@dataclass(slots=True)
class TreeGroup:
    """Tree rows that are computed together, padded to a common number of nodes and cache blocks.

    Attributes:
        tokens: int64 [rows, length], positions of each row's root and nodes in the flattened batch; padding repeats
            the root.
        blocks: int64 [rows, blocks], the cache blocks that hold each row's prefix, root and nodes.
        bias: float32 [rows, 1, length, blocks * block_size], 0 where a query sees a key, -inf elsewhere.
        real: int64 [tokens], which entries of ``tokens`` (flattened) aren't padding; None if there is none.
    """

    tokens: torch.Tensor
    blocks: torch.Tensor
    bias: torch.Tensor
    real: torch.Tensor | None

    @classmethod
    def build(cls, rows: Sequence[TreeRow], block_table: torch.Tensor, block_size: int) -> TreeGroup:
        """Lay out one group.

        Args:
            rows: the tree rows.
            block_table: int32 [batch, max_blocks].
            block_size: tokens per cache block.
        """
        length = max(row.length for row in rows)
        num_blocks = max(-(-(row.prefix + row.length) // block_size) for row in rows)
        tokens = np.empty((len(rows), length), np.int64)
        bias = np.full((len(rows), 1, length, num_blocks * block_size), -np.inf, np.float32)
        padded = False
        for i, row in enumerate(rows):
            tokens[i] = row.start
            tokens[i, : row.length] += np.arange(row.length)
            bias[i, 0, :, : row.prefix + 1] = 0.0
            inside = bias[i, 0, : row.length, row.prefix : row.prefix + row.length]
            inside[...] = np.where(row.mask, np.float32(0.0), np.float32(-np.inf))
            padded |= row.length < length
        real = None
        if padded:
            used = np.arange(length) < np.array([row.length for row in rows])[:, None]
            real = torch.from_numpy(np.flatnonzero(used))
        index = torch.tensor([row.row for row in rows])
        blocks = block_table[index, :num_blocks].long()
        return cls(torch.from_numpy(tokens), blocks, torch.from_numpy(bias), real)


class TreeCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """vLLM's builder, which also takes the step's trees.

    The runner sets ``tree_rows`` before vLLM builds the step's metadata.
    """

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.tree_rows: Sequence[TreeRow] = ()
        if self.isa == "amx":
            # amx packs the cache in tiles that only its own kernel reads
            self.isa = "vec"
            self._set_isa_to_layers(layer_names)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        """vLLM's metadata; with tree rows, those are made as cheap as can be for vLLM's kernel and get a plan of ours."""
        if not self.tree_rows:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        seq_lens = common_attn_metadata.seq_lens.clone()
        for row in self.tree_rows:
            seq_lens[row.row] = row.length
        common = replace(common_attn_metadata, seq_lens=seq_lens)
        stock = super().build(common_prefix_len, common, fast_build)
        group = TreeGroup.build(self.tree_rows, common_attn_metadata.block_table_tensor, self.block_size)
        values = {field.name: getattr(stock, field.name) for field in fields(CPUAttentionMetadata)}
        return TreeCPUAttentionMetadata(**values, tree_groups=(group,))


class TreeCPUAttentionImpl(CPUAttentionBackendImpl):
    """vLLM's CPU attention for the whole batch, then masked attention for the tree rows."""

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As vLLM's ``CPUAttentionBackendImpl.forward``; shapes there."""
        result = super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )
        if isinstance(attn_metadata, TreeCPUAttentionMetadata):
            for group in attn_metadata.tree_groups:
                tree_attention(query, kv_cache, group, self.scale, output)
        return result


def tree_attention(
    query: torch.Tensor, kv_cache: torch.Tensor, group: TreeGroup, scale: float, output: torch.Tensor
) -> None:
    """Masked attention for one group of tree rows over the paged cache, in float32.

    Args:
        query: [tokens, num_heads, head_size].
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], K of a block transposed (see ``kv.CPUCommit``).
        group: the rows.
        scale: of the scores.
        output: [tokens, num_heads, head_size], written in place.
    """
    rows, length = group.tokens.shape
    _, num_kv_heads, block_size, twice = kv_cache.shape
    head_size = twice // 2
    per_kv = query.shape[1] // num_kv_heads
    num_blocks = group.blocks.shape[1]
    keys = num_blocks * block_size

    gathered = kv_cache.flatten(2).index_select(0, group.blocks.flatten()).float()
    gathered = gathered.view(rows, num_blocks, num_kv_heads, 2, head_size * block_size)
    k = gathered[:, :, :, 0].view(rows, num_blocks, num_kv_heads, head_size, block_size)
    k = k.permute(0, 2, 3, 1, 4).reshape(rows * num_kv_heads, head_size, keys)
    v = gathered[:, :, :, 1].view(rows, num_blocks, num_kv_heads, block_size, head_size)
    v = v.permute(0, 2, 1, 3, 4).reshape(rows * num_kv_heads, keys, head_size)

    q = query.index_select(0, group.tokens.flatten()).float().mul_(scale)
    q = q.view(rows, length, num_kv_heads, per_kv, head_size).permute(0, 2, 3, 1, 4)
    q = q.reshape(rows * num_kv_heads, per_kv * length, head_size)

    scores = torch.bmm(q, k).view(rows, num_kv_heads * per_kv, length, keys)
    scores += group.bias
    weights = torch.softmax(scores, dim=-1).view(rows * num_kv_heads, per_kv * length, keys)
    result = torch.bmm(weights, v).view(rows, num_kv_heads, per_kv, length, head_size)
    result = result.permute(0, 3, 1, 2, 4).reshape(rows * length, num_kv_heads * per_kv, head_size)
    tokens = group.tokens.flatten()
    if group.real is not None:
        result, tokens = result[group.real], tokens[group.real]
    output.view(output.shape[0], num_kv_heads * per_kv, head_size).index_copy_(0, tokens, result.to(output.dtype))


class TreeCPUAttentionBackend(CPUAttentionBackend):
    """``CPU_ATTN`` with tree rows. Registered over vLLM's only in a worker that serves one of our methods."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The attention implementation."""
        return TreeCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """The metadata builder."""
        return TreeCPUAttentionMetadataBuilder


def unsupported_reason(impl: object, builder: object) -> str | None:
    """Why a layer can't verify trees, or None if it can."""
    if not isinstance(impl, TreeCPUAttentionImpl) or not isinstance(builder, TreeCPUAttentionMetadataBuilder):
        return f"its attention ({type(impl).__name__}) takes no ancestor mask"
    if impl.sliding_window != -1:
        return "sliding-window attention"
    if impl.alibi_slopes is not None:
        return "ALiBi positions"
    if impl.logits_soft_cap:
        return "soft-capped attention scores"
    if impl.sinks is not None:
        return "attention sinks"
    if impl.is_fp8_kv_cache:
        return "an fp8 KV cache"
    if builder.isa not in READABLE_ISAS:
        return f"the KV cache layout of the '{builder.isa}' kernel"
    return None
