"""Before trees are served on a device, its kernels are tried there: random trees next to the versions on the host.

A tenth of a second that nobody notices, against wrong tokens that nobody notices either. The reference for attention is
a dense one in float32 (``attention_check``); walk, positions, masks and KV commit have to be equal. Attention is also
tried in a CUDA graph, before vLLM captures any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.logger import init_logger

from proposers import DraftTree
from vllm_lookahead.attention.packing import DeviceTrees, GraphSize, TreePacker
from vllm_lookahead.trees.kv import moves
from vllm_lookahead.trees.rows import TreeRows
from vllm_lookahead.trees.step import StepTrees, Walks, walk_all
from vllm_lookahead.v2.attention_check import AttentionCheck, Batch, cache_like, seen_by
from vllm_lookahead.v2.kernels.commit import KVCommit
from vllm_lookahead.v2.kernels.place import place, place_tokens
from vllm_lookahead.v2.kernels.walk import walk

logger = init_logger(f"vllm.{__name__}")

TOLERANCE = {torch.float32: 1e-4, torch.float16: 6e-3, torch.bfloat16: 4e-2}
"""Of attention's outputs, whose values are about 1: some units in the last place."""
TOKENS = 4
"""So few different tokens that siblings share some."""


MOST_PREFIX = 150

Layers = Sequence[tuple[Any, Any]]
"""Attention layers with their KV caches, each with its metadata builder."""


def problem(layers: Layers, dtype: torch.dtype, tile_queries: int) -> str | None:
    """What is wrong with trees on this device, as the end of a sentence; None if everything agrees.

    Args:
        layers: the model's.
        dtype: the model's.
        tile_queries: of the model's ``TreePacker``.
    """
    try:
        return _problem(_kinds(layers), dtype, tile_queries)
    except Exception as error:
        logger.exception("The kernels for draft trees can't be run on this device.")
        return f"its kernels can't be run on this device ({_first_line(error)})"


def graph_problem(layers: Layers, dtype: torch.dtype, tile_queries: int, seed: int = 0) -> str | None:
    """What is wrong with trees in full CUDA graphs on this device; None if replays are right for other trees, too.

    Args:
        layers: the model's.
        dtype: the model's.
        tile_queries: of the model's ``TreePacker``.
        seed: of the trees.
    """
    try:
        return _graph_problem(_kinds(layers), dtype, tile_queries, seed)
    except Exception as error:
        logger.exception("Attention of draft trees can't be captured on this device.")
        return f"it can't be captured on this device ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _kinds(layers: Layers) -> Layers:
    """One layer of each kind."""
    kinds = {
        (layer.impl.num_heads, *layer.kv_cache.shape[1:], *layer.kv_cache.stride()): (layer, builder)
        for layer, builder in layers
    }
    return list(kinds.values())


def _problem(layers: Layers, dtype: torch.dtype, tile_queries: int) -> str | None:
    rng = np.random.default_rng(0)
    device = layers[0][0].kv_cache.device
    for nodes in (5, 40):
        batch = _random_batch(rng, nodes)
        packer = TreePacker(device, int(batch.query_start[-1]), batch.step.num_rows, nodes, tile_queries)
        trees = packer(batch.step, batch.query_start, batch.seq_lens)
        if not _places(batch, trees, device):
            return "positions or ancestor masks differ from the host's"
        sampled = _samples(rng, batch.step)
        walks = walk_all(batch.step, sampled)
        on_device = walk(torch.from_numpy(sampled).to(device), trees, nodes + 1)
        if not _same_walks(walks, on_device):
            return "walks differ from the host's"
        for layer, builder in layers:
            if not _commits(batch, trees, walks, on_device, layer.kv_cache):
                return "the KV commit differs from the host's"
            assert trees.packed is not None
            size = GraphSize(batch.step.num_rows, int(batch.query_start[-1]), MOST_PREFIX)
            check = AttentionCheck(layer, builder, dtype, size, rng)
            check.attend(check.metadata(batch, trees.packed))
            if not (difference := check.difference(batch)) <= TOLERANCE[dtype]:
                return f"tree attention is off by {difference:.2g}, next to dense attention in float32"
    return None


def _graph_problem(layers: Layers, dtype: torch.dtype, tile_queries: int, seed: int) -> str | None:
    """Captured with one step's trees, replayed with others', which have fewer rows and tokens, and more again."""
    rng = np.random.default_rng(seed)
    device = layers[0][0].kv_cache.device
    batches = [_all_trees(_random_batch(rng, nodes, rows)) for nodes, rows in ((9, 5), (33, 2), (2, 1))]
    size = GraphSize(6, max(int(batch.query_start[-1]) for batch in batches) + 7, MOST_PREFIX)
    packer = TreePacker(device, size.tokens, size.rows, 33, tile_queries)
    for layer, builder in layers:
        check, replay = AttentionCheck(layer, builder, dtype, size, rng), None
        for batch in batches:
            trees = packer(batch.step, batch.query_start, batch.seq_lens, size)
            place(trees, torch.from_numpy(batch.seq_lens).to(device), torch.zeros(size.tokens).long().to(device))
            assert trees.packed is not None
            metadata = check.metadata(batch, trees.packed)
            if replay is None:
                replay = recorded(lambda check=check, metadata=metadata: check.attend(metadata))  # type: ignore[misc]
            check.output.zero_()
            replay()
            if not (difference := check.difference(batch)) <= TOLERANCE[dtype]:
                return f"a replay is off by {difference:.2g}, next to dense attention in float32"
    return None


def recorded(run: Callable[[], None]) -> Callable[[], None]:
    """What replays ``run`` as a CUDA graph. It is run once before, so that nothing is compiled in the graph."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _random_batch(rng: np.random.Generator, nodes: int, rows: int = 5) -> Batch:
    """Trees, a chain and a row without drafts."""
    sizes = (nodes, 0, 3, nodes // 2 + 1, 2)[:rows]
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
    seq_lens = (rng.integers(1, MOST_PREFIX, len(sizes)) + lengths).astype(np.int32)
    trees = TreeRows.of(step, query_start, seq_lens)
    assert trees is not None
    return Batch(step, query_start, seq_lens, trees)


def _samples(rng: np.random.Generator, step: StepTrees) -> NDArray[np.int64]:
    """int64 [nodes + rows]: a token for each root and node, that of a child where there is one: walks go deep."""
    sampled = rng.integers(0, TOKENS, len(step.tokens) + step.num_rows)
    for row in range(step.num_rows):
        nodes = slice(int(step.starts[row]), int(step.starts[row + 1]))
        sampled[nodes.start + row + 1 + step.parents[nodes]] = step.tokens[nodes]
    return sampled


def _all_trees(batch: Batch) -> Batch:
    """The same batch, every row a tree row, as it is in a graph."""
    trees = TreeRows.of(
        replace(batch.step, branched=np.ones_like(batch.step.branched)), batch.query_start, batch.seq_lens
    )
    assert trees is not None
    return batch._replace(trees=trees)


def _places(batch: Batch, trees: DeviceTrees, device: torch.device) -> bool:
    """Whether positions, ancestor masks and the nodes' tokens are what the host makes of them."""
    count = int(batch.query_start[-1])
    positions = torch.full((count,), -1, dtype=torch.int64, device=device)
    place(trees, torch.from_numpy(batch.seq_lens).to(device), positions)
    input_ids = torch.full((count,), -1, dtype=torch.int32, device=device)
    place_tokens(trees, torch.from_numpy(batch.query_start).to(device), input_ids)
    expected = np.full(count, -1)
    expected[batch.trees.tokens] = batch.trees.positions
    ids = np.full(count, -1)
    for row in range(batch.step.num_rows):
        here = batch.step.tokens[batch.step.starts[row] : batch.step.starts[row + 1]]
        ids[batch.query_start[row + 1] - len(here) : batch.query_start[row + 1]] = here
    assert trees.packed is not None
    words = trees.packed.mask.cpu().numpy()
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").astype(np.bool_)
    masks = [
        np.array_equal(
            bits[batch.trees.offsets[row] : batch.trees.offsets[row + 1], :length], seen_by(batch.trees, row)
        )
        for row, length in enumerate(batch.trees.lengths)
    ]
    return (
        all(masks)
        and np.array_equal(positions.cpu().numpy(), expected)
        and np.array_equal(input_ids.cpu().numpy(), ids)
        and np.array_equal(trees.packed.prefixes.cpu().numpy(), batch.trees.prefixes)
    )


def _same_walks(walks: Walks, on_device: Any) -> bool:
    longest = walks.tokens.shape[1]
    return (
        np.array_equal(walks.lengths, on_device.lengths.cpu().numpy())
        and np.array_equal(walks.tokens, on_device.tokens[:, :longest].cpu().numpy())
        and np.array_equal(walks.paths, on_device.paths[:, :longest].cpu().numpy())
    )


def _commits(batch: Batch, trees: DeviceTrees, walks: Walks, on_device: Any, kv_cache: torch.Tensor) -> bool:
    """Whether the commit moves in a cache like this one what the host says that it has to move."""
    count, block_size = int(batch.query_start[-1]), kv_cache.shape[2]
    blocks = -(-count // block_size) + 1
    cache = cache_like(kv_cache, blocks)
    expected = cache.clone()
    slots = torch.randperm(len(cache) * block_size)[:count]
    for source, target in zip(*moves(batch.step, walks, batch.query_start, slots.numpy()), strict=True):
        expected[target // block_size, :, target % block_size] = expected[source // block_size, :, source % block_size]
    assert trees.packed is not None
    KVCommit([cache])(trees.packed, on_device.paths, on_device.lengths, slots.to(cache.device))
    return bool((cache == expected).all())
