"""A layer's attention of tree rows on random input, next to a dense one in float32."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_lookahead.attention.packing import GraphSize, PackedTrees
from vllm_lookahead.trees.rows import TreeRows
from vllm_lookahead.trees.step import StepTrees


class Batch(NamedTuple):
    """A step.

    Attributes:
        step: its trees.
        query_start: int32 [rows + 1].
        seq_lens: int32 [rows].
        trees: the tree rows.
    """

    step: StepTrees
    query_start: NDArray[np.int32]
    seq_lens: NDArray[np.int32]
    trees: TreeRows


class AttentionCheck:
    """Queries, keys, values, a cache and an output that stay where they are, for steps of up to a given size.

    Args:
        layer: an attention layer with its KV cache.
        builder: its metadata builder.
        dtype: the model's.
        size: most rows, tokens, and tokens before a root.
        rng: where numbers come from.

    Attributes:
        output: [tokens, num_heads, head_size], what ``attend`` writes to.
    """

    def __init__(self, layer: Any, builder: Any, dtype: torch.dtype, size: GraphSize, rng: np.random.Generator) -> None:
        impl, device = layer.impl, layer.kv_cache.device
        self._impl, self._builder, self._size, self._device = impl, builder, size, device
        width = -(-size.longest_prefix // layer.kv_cache.shape[2])
        self._cache = cache_like(layer.kv_cache, size.rows * width)
        table = rng.permutation(len(self._cache)).reshape(size.rows, width).astype(np.int32)
        self._table = torch.from_numpy(table).to(device)
        heads = [impl.num_heads, impl.num_kv_heads, impl.num_kv_heads]
        product = torch.randn(size.tokens, sum(heads), impl.head_size, device=device).to(dtype)
        self._query, self._key, self._value = product.split(heads, dim=1)
        self.output = torch.zeros(self._query.shape, dtype=dtype, device=device)

    def metadata(self, batch: Batch, trees: PackedTrees) -> Any:
        """What the builder makes of a step."""
        rows, tokens = (len(trees.rows), trees.num_tokens) if trees.captured else (batch.step.num_rows, None)
        total = int(batch.query_start[-1])
        starts, seq_lens = np.full(rows + 1, total, np.int32), np.zeros(rows, np.int32)
        starts[: len(batch.query_start)], seq_lens[: len(batch.seq_lens)] = batch.query_start, batch.seq_lens
        self._builder.trees = trees
        return self._builder.build(
            0,
            CommonAttentionMetadata(
                query_start_loc=torch.from_numpy(starts).to(self._device),
                query_start_loc_cpu=torch.from_numpy(starts),
                seq_lens=torch.from_numpy(seq_lens).to(self._device),
                num_reqs=rows,
                num_actual_tokens=total if tokens is None else tokens,
                max_query_len=int(np.diff(starts).max()),
                max_seq_len=int(seq_lens.max()),
                block_table_tensor=self._table[:rows],
                slot_mapping=torch.zeros(self._size.tokens, dtype=torch.int64, device=self._device),
            ),
        )

    def attend(self, metadata: Any) -> None:
        """Attention of the tree rows."""
        self._impl.attend_trees(self._query, self._key, self._value, self._cache, metadata, self.output)

    def difference(self, batch: Batch) -> float:
        """The largest difference of what ``attend`` has written for a step from dense attention."""
        impl, trees, worst = self._impl, batch.trees, 0.0
        for row, prefix in enumerate(trees.prefixes.tolist()):
            here = torch.from_numpy(trees.tokens[trees.offsets[row] : trees.offsets[row + 1]]).to(self._device)
            before = torch.arange(prefix, device=self._device)
            size = self._cache.shape[2]
            cached = self._cache[self._table[int(trees.rows[row])][before // size].long(), :, before % size].float()
            keys = torch.cat((cached[..., : impl.head_size], self._key[here].float()))
            values = torch.cat((cached[..., impl.head_size :], self._value[here].float()))
            seen = torch.from_numpy(seen_by(trees, row)).to(self._device)
            seen = torch.cat((torch.ones(len(here), prefix, dtype=torch.bool, device=self._device), seen), dim=1)
            expected = _dense(self._query[here].float(), keys, values, seen, impl.scale)
            off = (self.output[here].float() - expected).abs().max().nan_to_num(nan=torch.inf)
            worst = max(worst, float(off))
        return worst


def seen_by(trees: TreeRows, row: int) -> NDArray[np.bool_]:
    """bool [length, length]: which of a row's root and nodes each of them sees."""
    length = int(trees.lengths[row])
    return trees.mask[trees.mask_offsets[row] : trees.mask_offsets[row + 1]].reshape(length, length)


def cache_like(kv_cache: torch.Tensor, blocks: int) -> torch.Tensor:
    """A small KV cache of the same shape and strides, with random entries."""
    shape = (blocks, *kv_cache.shape[1:])
    cache = torch.empty_strided(shape, kv_cache.stride(), dtype=kv_cache.dtype, device=kv_cache.device)
    return cache.copy_(torch.randn(shape, device=kv_cache.device))


def _dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, scale: float
) -> torch.Tensor:
    """Masked attention, float32 [queries, heads, head_size].

    Args:
        query: [queries, heads, head_size].
        key: [keys, kv_heads, head_size].
        value: [keys, kv_heads, head_size].
        seen: bool [queries, keys].
        scale: factor of the scores.
    """
    per_kv = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(per_kv, 1), value.repeat_interleave(per_kv, 1)
    scores = torch.einsum("ihd,jhd->hij", query, key) * scale
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)
