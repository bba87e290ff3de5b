"""Tree attention for vLLM's CPU backend.

Rows without a branched tree keep vLLM's kernel and cost what they cost without us. For a tree row that kernel is told
that the row has no context (its output is overwritten), and masked attention over the same paged cache takes its place:
every node sees the prefix, its ancestors and itself. A step of nothing but tree rows leaves vLLM's kernel out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

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

from vllm_lookahead.attention.cpu_kernels import attend
from vllm_lookahead.trees.rows import TreeRows

READABLE_ISAS = ("vec", "vec16")
"""Kernels whose cache layout we can read: K transposed, V plain (see ``cpu_commit.CPUCommit``). Not "amx", whose tiles
only it can read: what it saves on prompts is not ours to give up."""


class Plan(NamedTuple):
    """What ``tree_attention`` is told about the tree rows, the same in every layer.

    Attributes:
        tokens: int64 [packed], the tree rows' tokens; None if the step has no others.
        rows: what ``attend`` takes: lengths, prefixes, offsets, blocks, mask and mask offsets (see there).
    """

    tokens: torch.Tensor | None
    rows: tuple[NDArray[np.generic], ...]


@dataclass(kw_only=True)
class TreeCPUAttentionMetadata(CPUAttentionMetadata):
    """vLLM's metadata, and what the tree rows need."""

    tree_plan: Plan


class TreeCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """vLLM's builder, which also takes the step's trees.

    The runner sets ``trees`` before vLLM builds the step's metadata.
    """

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.trees: TreeRows | None = None
        self.isa: str

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        """vLLM's metadata; tree rows are made as cheap as can be for vLLM's kernel and get a plan of ours."""
        trees = self.trees
        if trees is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        common = common_attn_metadata
        if len(trees.tokens) < common.num_actual_tokens:  # else vLLM's kernel has no rows
            seq_lens = common.seq_lens.clone()
            seq_lens[torch.from_numpy(trees.rows)] = torch.from_numpy(trees.lengths).to(seq_lens.dtype)
            common = replace(common, seq_lens=seq_lens)
        stock = super().build(common_prefix_len, common, fast_build)
        tree_plan = make_plan(trees, common.block_table_tensor.numpy()[trees.rows], common.num_actual_tokens)
        return TreeCPUAttentionMetadata(**vars(stock), tree_plan=tree_plan)


class TreeCPUAttentionImpl(CPUAttentionBackendImpl):
    """vLLM's CPU attention for the whole batch, then masked attention for the tree rows."""

    _cache: torch.Tensor | None = None
    _cells: NDArray[np.generic]

    def serve_trees(self, trees: bool) -> None:
        """From now on the steps have tree rows, or not: then ``forward`` is vLLM's.

        One more Python call per layer would cost a small model about one percent of its step.
        """
        if trees:
            self.forward = self.forward_trees  # type: ignore[method-assign]
        else:
            self.__dict__.pop("forward", None)

    def forward_trees(
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
        if not isinstance(attn_metadata, TreeCPUAttentionMetadata):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        plan = attn_metadata.tree_plan
        if plan.tokens is not None:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        if kv_cache is not self._cache:  # always the same in a layer
            self._cache, self._cells = kv_cache, cells_of(kv_cache)
        tree_attention(query, self._cells, plan, self.scale, output)
        return output


def make_plan(trees: TreeRows, blocks: NDArray[np.int32], num_tokens: int) -> Plan:
    """Prepare ``tree_attention`` for one step.

    Args:
        trees: the tree rows.
        blocks: int32 [tree rows, most blocks], their cache blocks.
        num_tokens: of the step.
    """
    tokens = None if len(trees.tokens) == num_tokens else torch.from_numpy(trees.tokens)
    return Plan(tokens, (trees.lengths, trees.prefixes, trees.offsets, blocks, trees.mask, trees.mask_offsets))


def cells_of(kv_cache: torch.Tensor) -> NDArray[np.generic]:
    """A layer's cache as ``attend`` takes it.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], K of a block transposed (see ``CPUCommit``).
    """
    flat = kv_cache.flatten(2)
    return flat.numpy() if flat.dtype == torch.float32 else flat.view(torch.uint16).numpy()


def tree_attention(
    query: torch.Tensor, cells: NDArray[np.generic], plan: Plan, scale: float, output: torch.Tensor
) -> None:
    """Masked attention for the tree rows over the paged cache, computed in float32.

    Args:
        query: [tokens, num_heads, head_size], float32 or bfloat16.
        cells: see ``cells_of``.
        plan: see ``make_plan``.
        scale: factor of the scores.
        output: [tokens, num_heads, head_size], contiguous; the tree rows' part is written in place.
    """
    if plan.tokens is None and query.dtype == torch.float32:
        attend(query.contiguous().numpy(), output.numpy(), cells, *plan.rows, scale)
        return
    index = slice(None) if plan.tokens is None else plan.tokens
    packed = query[index].to(torch.float32, memory_format=torch.contiguous_format)
    attend(packed.numpy(), packed.numpy(), cells, *plan.rows, scale)
    output[index] = packed.to(output.dtype)


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
    if builder.dtype not in (torch.float32, torch.bfloat16):
        return f"a {str(builder.dtype).removeprefix('torch.')} KV cache"
    if impl.head_size % 8:
        return f"a head size of {impl.head_size}, not a multiple of 8"
    if builder.isa not in READABLE_ISAS:
        return f"the KV cache layout of the '{builder.isa}' kernel"
    return None
