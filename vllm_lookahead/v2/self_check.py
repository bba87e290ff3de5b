"""Before trees are served on a device, its kernels are tried there: random trees next to the versions on the host.

A tenth of a second that nobody notices, against wrong tokens that nobody notices either. The reference for attention is
a dense one in float32; walk, positions, masks and KV commit have to be equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.logger import init_logger

from proposers import DraftTree
from vllm_lookahead.attention.packing import DeviceTrees, TreePacker
from vllm_lookahead.trees.kv import moves
from vllm_lookahead.trees.rows import TreeRows
from vllm_lookahead.trees.step import StepTrees, Walks, walk_all
from vllm_lookahead.v2.kernels.commit import KVCommit
from vllm_lookahead.v2.kernels.place import place, place_tokens
from vllm_lookahead.v2.kernels.walk import walk

logger = init_logger(f"vllm.{__name__}")

TOLERANCE = {torch.float32: 1e-4, torch.float16: 6e-3, torch.bfloat16: 4e-2}
"""Of attention's outputs, whose values are about 1: some units in the last place."""
TOKENS = 4
"""So few different tokens that walks go deep."""


class _Batch(NamedTuple):
    """A random step.

    Attributes:
        step: trees, a chain, and a row without drafts.
        query_start: int32 [rows + 1].
        seq_lens: int32 [rows].
        rows: the branched rows.
    """

    step: StepTrees
    query_start: NDArray[np.int32]
    seq_lens: NDArray[np.int32]
    rows: TreeRows


def problem(layers: Sequence[Any], dtype: torch.dtype) -> str | None:
    """What is wrong with trees on this device, as the end of a sentence; None if everything agrees.

    Args:
        layers: the model's attention layers, with their KV caches.
        dtype: the model's.
    """
    try:
        return _problem(layers, dtype)
    except Exception as error:
        logger.exception("The kernels for draft trees can't be run on this device.")
        first_line = next(iter(str(error).splitlines()), "")
        return f"its kernels can't be run on this device ({type(error).__name__}: {first_line})"


def _problem(layers: Sequence[Any], dtype: torch.dtype) -> str | None:
    rng = np.random.default_rng(0)
    device = layers[0].kv_cache.device
    kinds = {(layer.impl.num_heads, *_layout(layer.kv_cache)): layer for layer in layers}
    for nodes in (5, 40):
        batch = _random_batch(rng, nodes)
        packer = TreePacker(device, int(batch.query_start[-1]), batch.step.num_rows, nodes)
        trees = packer(batch.step, batch.query_start, batch.seq_lens)
        if not _places(batch, trees, device):
            return "positions or ancestor masks differ from the host's"
        sampled = rng.integers(0, TOKENS, len(batch.step.tokens) + batch.step.num_rows)
        walks = walk_all(batch.step, sampled)
        on_device = walk(torch.from_numpy(sampled).to(device), trees, nodes + 1)
        if not _same_walks(walks, on_device):
            return "walks differ from the host's"
        for layer in kinds.values():
            if not _commits(batch, trees, walks, on_device, layer.kv_cache):
                return "the KV commit differs from the host's"
            difference = _attention_difference(batch, trees, layer, dtype, rng)
            if not difference <= TOLERANCE[dtype]:
                return f"tree attention is off by {difference:.2g}, next to dense attention in float32"
    return None


def _layout(cache: torch.Tensor) -> tuple[Any, ...]:
    return *cache.shape[1:], *cache.stride()


def _random_batch(rng: np.random.Generator, nodes: int) -> _Batch:
    sizes = (nodes, 0, 3, nodes // 2 + 1, 2)
    proposed: dict[str, DraftTree] = {}
    for row, size in enumerate(sizes):
        reach = 1 if row == 2 else 4  # a chain, or a tree
        parents = [int(rng.integers(max(-1, i - reach), i)) for i in range(size)]
        if row != 2:
            parents[:2] = [-1, -1][:size]
        if size:
            proposed[str(row)] = DraftTree.from_parents(rng.integers(0, TOKENS, size, np.int32), parents)
    names = [str(row) for row in range(len(sizes))]
    step = StepTrees.build(names, {name: tree.token_ids.tolist() for name, tree in proposed.items()}, proposed)
    lengths = np.array(sizes) + 1
    query_start = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    seq_lens = (rng.integers(1, 150, len(sizes)) + lengths).astype(np.int32)
    rows = TreeRows.of(step, query_start, seq_lens)
    assert rows is not None
    return _Batch(step, query_start, seq_lens, rows)


def _places(batch: _Batch, trees: DeviceTrees, device: torch.device) -> bool:
    """Whether positions, ancestor masks and the nodes' tokens are what the host makes of them."""
    count = int(batch.query_start[-1])
    positions = torch.full((count,), -1, dtype=torch.int64, device=device)
    place(trees, torch.from_numpy(batch.seq_lens).to(device), positions)
    input_ids = torch.full((count,), -1, dtype=torch.int32, device=device)
    place_tokens(trees, torch.from_numpy(batch.query_start).to(device), input_ids)
    expected = np.full(count, -1)
    expected[batch.rows.tokens] = batch.rows.positions
    ids = np.full(count, -1)
    for row in range(batch.step.num_rows):
        here = batch.step.tokens[batch.step.starts[row] : batch.step.starts[row + 1]]
        ids[batch.query_start[row + 1] - len(here) : batch.query_start[row + 1]] = here
    assert trees.packed is not None
    words = trees.packed.mask.cpu().numpy()
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").astype(np.bool_)
    masks = [
        np.array_equal(bits[batch.rows.offsets[row] : batch.rows.offsets[row + 1], :length], _mask(batch.rows, row))
        for row, length in enumerate(batch.rows.lengths)
    ]
    return (
        all(masks)
        and np.array_equal(positions.cpu().numpy(), expected)
        and np.array_equal(input_ids.cpu().numpy(), ids)
        and np.array_equal(trees.packed.prefixes.cpu().numpy(), batch.rows.prefixes)
    )


def _mask(rows: TreeRows, row: int) -> NDArray[np.bool_]:
    length = int(rows.lengths[row])
    return rows.mask[rows.mask_offsets[row] : rows.mask_offsets[row + 1]].reshape(length, length)


def _same_walks(walks: Walks, on_device: Any) -> bool:
    longest = walks.tokens.shape[1]
    return (
        np.array_equal(walks.lengths, on_device.lengths.cpu().numpy())
        and np.array_equal(walks.tokens, on_device.tokens[:, :longest].cpu().numpy())
        and np.array_equal(walks.paths, on_device.paths[:, :longest].cpu().numpy())
    )


def _commits(batch: _Batch, trees: DeviceTrees, walks: Walks, on_device: Any, kv_cache: torch.Tensor) -> bool:
    """Whether the commit moves in a cache like this one what the host says that it has to move."""
    count, block_size = int(batch.query_start[-1]), kv_cache.shape[2]
    blocks = -(-count // block_size) + 1
    cache = _cache_like(kv_cache, blocks)
    expected = cache.clone()
    slots = torch.randperm(len(cache) * block_size)[:count]
    for source, target in zip(*moves(batch.step, walks, batch.query_start, slots.numpy()), strict=True):
        expected[target // block_size, :, target % block_size] = expected[source // block_size, :, source % block_size]
    assert trees.packed is not None
    KVCommit([cache])(trees.packed, on_device.paths, on_device.lengths, slots.to(cache.device))
    return bool((cache == expected).all())


def _cache_like(kv_cache: torch.Tensor, blocks: int) -> torch.Tensor:
    """A small KV cache of the same shape and strides, with random entries."""
    shape = (blocks, *kv_cache.shape[1:])
    cache = torch.empty_strided(shape, kv_cache.stride(), dtype=kv_cache.dtype, device=kv_cache.device)
    return cache.copy_(torch.randn(shape, device=kv_cache.device))


def _attention_difference(
    batch: _Batch, trees: DeviceTrees, layer: Any, dtype: torch.dtype, rng: np.random.Generator
) -> float:
    """The largest difference of a layer's attention of the tree rows from a dense one in float32."""
    impl, kv_cache, packed = layer.impl, layer.kv_cache, trees.packed
    assert packed is not None
    device, block_size = kv_cache.device, kv_cache.shape[2]
    width = -(-int(batch.rows.prefixes.max()) // block_size)
    cache = _cache_like(kv_cache, packed.num_rows * width)
    table = rng.permutation(len(cache)).reshape(packed.num_rows, width).astype(np.int32)
    heads = [impl.num_heads, impl.num_kv_heads, impl.num_kv_heads]
    product = torch.randn(int(batch.query_start[-1]), sum(heads), impl.head_size, device=device).to(dtype)
    query, key, value = product.split(heads, dim=1)
    output = torch.zeros(query.shape, dtype=dtype, device=device)
    impl.attend_trees(query, key, value, cache, packed, torch.from_numpy(table).to(device), output)
    worst = 0.0
    for row, prefix in enumerate(batch.rows.prefixes):
        here = torch.from_numpy(batch.rows.tokens[batch.rows.offsets[row] : batch.rows.offsets[row + 1]]).to(device)
        before = torch.arange(int(prefix), device=device)
        blocks = torch.from_numpy(table[row]).to(device)[before // block_size].long()
        cached = cache[blocks, :, before % block_size].float()
        keys = torch.cat((cached[..., : impl.head_size], key[here].float()))
        values = torch.cat((cached[..., impl.head_size :], value[here].float()))
        seen = torch.from_numpy(_mask(batch.rows, row)).to(device)
        seen = torch.cat((torch.ones(len(here), int(prefix), dtype=torch.bool, device=device), seen), dim=1)
        expected = _dense(query[here].float(), keys, values, seen, impl.scale)
        worst = max(worst, float((output[here].float() - expected).abs().max().nan_to_num(nan=torch.inf)))
    return worst


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
