"""What the CUDA kernels have to compute: random ragged batches of trees, and checks next to the versions on the host.

Attention's is in float64. They run under TRITON_INTERPRET=1 on a CPU, and as they are on a GPU. No vLLM here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial as partial_call
from typing import NamedTuple

import numpy as np
import torch

from proposers import DraftTree
from vllm_lookahead.attention import triton_tree
from vllm_lookahead.attention.packing import DeviceTrees, GraphSize, PackedTrees, TreePacker
from vllm_lookahead.attention.triton_tree import Prefix, tile_queries, tree_attention
from vllm_lookahead.trees.kv import moves
from vllm_lookahead.trees.rows import TreeRows
from vllm_lookahead.trees.step import PLACEHOLDER, StepTrees, Walks, walk_all
from vllm_lookahead.v2.kernels.commit import KVCommit
from vllm_lookahead.v2.kernels.place import place, place_tokens
from vllm_lookahead.v2.kernels.walk import walk

ROOT = -1
UNTOUCHED = 7.0
TOLERANCE = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Of outputs, whose values are about 1: a few units in the last place."""

LSE_TOLERANCE = {"cpu": 1e-5, "cuda": 2e-4}
"""Scores are float32 whatever the type; a GPU's exponentials are approximations."""

TOKENS = 5

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_SIZES = (64, 80, 96, 128, 256)
GROUPS = ((2, 2), (4, 2), (8, 2), (7, 1), (12, 2))
"""Heads and kv heads: 1, 2, 4, 7 and 6 query heads share a kv head."""


class Batch(NamedTuple):
    """A random step.

    Attributes:
        step: trees, chains and rows without drafts.
        query_start: int32 [rows + 1].
        prefixes: int64 [rows], tokens before each root, of which the last ``before`` are computed in this step.
        trees: the tree rows.
    """

    step: StepTrees
    query_start: np.ndarray
    prefixes: np.ndarray
    trees: TreeRows


def random_tree(rng: np.random.Generator, nodes: int, reach: int = 6) -> DraftTree:
    """A tree of at least two nodes with at least one branch; few tokens, so that some siblings have the same.

    The parent of node i is one of the ``reach`` before it: the more, the flatter the tree.
    """
    parents = [ROOT, ROOT, *(int(rng.integers(max(ROOT, node - reach), node)) for node in range(2, nodes))]
    return DraftTree.from_parents(rng.integers(0, TOKENS, nodes), parents)


def random_batch(
    rng: np.random.Generator,
    rows: int,
    most_nodes: int,
    *,
    mixed: bool = True,
    most_prefix: int = 70,
    reach: int = 6,
) -> Batch:
    """Rows with trees of any size; ``mixed``: between rows of a chain, a prompt, or a single token."""
    proposed, lengths = {}, np.ones(rows, np.int64)
    tree_row = int(rng.integers(rows))
    for row in range(rows):
        kind = rng.integers(4) if mixed and row != tree_row else 0
        if kind < 2:
            tree = random_tree(rng, int(rng.integers(2, most_nodes + 1)), reach)
            proposed[str(row)] = tree
            lengths[row] += len(tree)
        elif kind == 2:
            lengths[row] = rng.integers(1, 9)
    # a row may also compute tokens before its root
    before = np.where(rng.random(rows) < 0.2, 3, 0) if mixed else np.zeros(rows, np.int64)
    prefixes = before + rng.integers(0, most_prefix, rows)
    step = StepTrees.build(
        [str(row) for row in range(rows)], {key: tree.token_ids.tolist() for key, tree in proposed.items()}, proposed
    )
    query_start = np.concatenate(([0], np.cumsum(before + lengths))).astype(np.int32)
    trees = TreeRows.of(step, query_start, (prefixes + lengths).astype(np.int32))
    assert trees is not None
    return Batch(step, query_start, prefixes, trees)


def decoding_batch(rng: np.random.Generator, rows: int, most_nodes: int, *, most_prefix: int = 70) -> Batch:
    """A step that a full CUDA graph may stand for: trees, chains and rows without drafts, all of them tree rows."""
    proposed = {}
    for row in range(rows):
        kind, nodes = rng.integers(3), int(rng.integers(2, most_nodes + 1))
        if kind < 2:
            proposed[str(row)] = random_tree(rng, nodes) if kind else DraftTree.chain(rng.integers(0, TOKENS, nodes))
    names = [str(row) for row in range(rows)]
    step = StepTrees.build(names, {key: tree.token_ids.tolist() for key, tree in proposed.items()}, proposed)
    lengths, prefixes = np.diff(step.starts) + 1, rng.integers(0, most_prefix, rows) * (rng.random(rows) < 0.7)
    query_start = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    every_row = replace(step, branched=np.ones(rows, np.bool_))
    trees = TreeRows.of(every_row, query_start, (prefixes + lengths).astype(np.int32))
    assert trees is not None
    return Batch(step, query_start, prefixes, trees)


def place_in(size: GraphSize, packer: TreePacker, batch: Batch, device: str) -> PackedTrees:
    """A batch's trees on a device, complete, for a graph of this size."""
    seq_lens = (batch.trees.prefixes + batch.trees.lengths).astype(np.int32)
    trees = packer(batch.step, batch.query_start, seq_lens, size)
    padded = np.zeros(size.rows, np.int32)
    padded[: len(seq_lens)] = seq_lens
    place(trees, torch.from_numpy(padded).to(device), torch.zeros(size.tokens, dtype=torch.int64, device=device))
    assert trees.packed is not None
    return trees.packed


def send(batch: Batch, device: torch.device) -> DeviceTrees:
    """A batch's trees on a device, as they are before ``place``."""
    nodes = np.diff(batch.step.starts)
    packer = TreePacker(device, int(batch.query_start[-1]), len(nodes), int(nodes.max()))
    seq_lens = np.zeros(len(nodes), np.int32)
    seq_lens[batch.trees.rows] = batch.trees.prefixes + batch.trees.lengths
    return packer(batch.step, batch.query_start, seq_lens)


def pack(batch: Batch, device: torch.device) -> PackedTrees:
    """The tree rows on a device, where ``place``'s part is the host version's: ``batch.trees``."""
    packed, trees = send(batch, device).packed, batch.trees
    assert packed is not None
    bits = np.zeros((len(trees.tokens), packed.mask.shape[1] * 32), np.bool_)
    for row, length in enumerate(trees.lengths):
        bits[trees.offsets[row] : trees.offsets[row + 1], :length] = tree_mask(trees, row)
    packed.mask.copy_(torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view(np.int32)))
    packed.prefixes.copy_(torch.from_numpy(trees.prefixes))
    packed.tokens.copy_(torch.from_numpy(trees.tokens))
    whole = batch.query_start[trees.rows] == trees.tokens[trees.offsets[:-1]]
    packed.stock_lens.copy_(torch.from_numpy(trees.lengths + np.where(whole, 0, trees.prefixes)))
    return packed


def random_samples(rng: np.random.Generator, step: StepTrees) -> np.ndarray:
    """int64 [nodes + rows]: a token for each root and node, mostly that of a child, so that walks go deep."""
    sampled = rng.integers(0, TOKENS, len(step.tokens) + step.num_rows)
    for row in range(step.num_rows):
        nodes = slice(int(step.starts[row]), int(step.starts[row + 1]))
        tokens, parents = step.tokens[nodes], step.parents[nodes]
        agreed = rng.permutation(len(tokens))[: int(0.8 * len(tokens))].tolist()
        node = len(tokens) - 1
        while node >= 0 and rng.random() < 0.99:
            agreed.append(node)
            node = int(parents[node])
        for node in agreed:
            sampled[nodes.start + row + 1 + parents[node]] = tokens[node]
    return sampled


def random_qkv(
    generator: torch.Generator, tokens: int, heads: int, kv_heads: int, head_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values as a model makes them: views of one product."""
    size = [heads, kv_heads, kv_heads]
    product = torch.randn(tokens, sum(size), head_size, generator=generator).to(dtype)
    return product.split(size, dim=1)  # type: ignore[return-value]


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sees: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked attention in float64.

    Args:
        query: [queries, heads, head_size].
        key: [keys, kv_heads, head_size].
        value: [keys, kv_heads, head_size].
        sees: bool [queries, keys].
        scale: factor of the scores.

    Returns:
        [queries, heads, head_size], and the log-sum-exp [heads, queries].
    """
    per_kv = query.shape[1] // key.shape[1]
    k, v = (part.double().repeat_interleave(per_kv, 1) for part in (key, value))
    scores = torch.einsum("ihd,jhd->hij", query.double(), k) * scale
    scores = scores.masked_fill(~sees, -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1).nan_to_num(), v), scores.logsumexp(-1)


def tree_mask(trees: TreeRows, row: int) -> torch.Tensor:
    """bool [length, length]: what the row's tokens see of each other."""
    length = int(trees.lengths[row])
    return torch.from_numpy(trees.mask[trees.mask_offsets[row] : trees.mask_offsets[row + 1]].reshape(length, length))


def check_tree(
    seed: int,
    device: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_size: int,
    rows: int = 3,
    nodes: int = 40,
) -> None:
    """The kernel without a prefix: output, log-sum-exp, and nothing written that isn't a tree row's."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    batch = random_batch(rng, rows, nodes)
    trees, total, scale = batch.trees, int(batch.query_start[-1]), head_size**-0.5
    query, key, value = random_qkv(generator, total + 3, heads, kv_heads, head_size, dtype)
    output = torch.full((total + 3, heads, head_size), UNTOUCHED, dtype=dtype, device=device)
    lse = torch.empty(heads, len(trees.tokens), device=device)
    on_device = (part.to(device) for part in (query, key, value))
    tree_attention(*on_device, pack(batch, torch.device(device)), scale, output, lse=lse)
    output, lse = output.cpu(), lse.cpu()
    for row in range(len(trees.rows)):
        packed = slice(int(trees.offsets[row]), int(trees.offsets[row + 1]))
        tokens = torch.from_numpy(trees.tokens[packed])
        expected, expected_lse = dense(query[tokens], key[tokens], value[tokens], tree_mask(trees, row), scale)
        assert_close(output[tokens], expected, TOLERANCE[dtype], "output")
        assert_close(lse[:, packed], expected_lse, LSE_TOLERANCE[device], "log-sum-exp")
    others = np.setdiff1d(np.arange(total + 3), trees.tokens)
    assert bool((output[others] == UNTOUCHED).all()), "another row's output was written"


def check_merge(
    seed: int,
    device: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_size: int,
    rows: int = 3,
    nodes: int = 40,
) -> None:
    """A prefix's part handed in, as FlashAttention gives it, makes the output attention over prefix and tree."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    batch = random_batch(rng, rows, nodes)
    batch.trees.prefixes[0] = 0  # what FlashAttention says about nothing: nobody knows
    trees, total, scale = batch.trees, int(batch.query_start[-1]), head_size**-0.5
    query, key, value = random_qkv(generator, total, heads, kv_heads, head_size, dtype)
    partial = torch.full((len(trees.tokens), heads, head_size), torch.nan, dtype=dtype)
    lse = torch.full((heads, len(trees.tokens)), (torch.inf, -torch.inf, torch.nan)[seed % 3])
    expected = []
    for row, prefix in enumerate(trees.prefixes.tolist()):
        packed = slice(int(trees.offsets[row]), int(trees.offsets[row + 1]))
        tokens = torch.from_numpy(trees.tokens[packed])
        before = random_qkv(generator, prefix, heads, kv_heads, head_size, dtype)[1:]
        everything = torch.ones(len(tokens), prefix, dtype=torch.bool)
        if prefix:
            part, part_lse = dense(query[tokens], *before, everything, scale)
            partial[packed], lse[:, packed] = part.to(dtype), part_lse.float()
        keys, values = torch.cat((before[0], key[tokens])), torch.cat((before[1], value[tokens]))
        expected.append(
            (tokens, dense(query[tokens], keys, values, torch.cat((everything, tree_mask(trees, row)), 1), scale))
        )
    output = torch.full((total, heads, head_size), UNTOUCHED, dtype=dtype, device=device)
    merged_lse = torch.empty(heads, len(trees.tokens), device=device)
    on_device = (part.to(device) for part in (query, key, value))
    prefix_part = Prefix(partial.to(device), lse.to(device))
    tree_attention(*on_device, pack(batch, torch.device(device)), scale, output, prefix_part, merged_lse)
    for row, (tokens, (part, part_lse)) in enumerate(expected):
        assert_close(output.cpu()[tokens], part, TOLERANCE[dtype], "output")
        packed = slice(int(trees.offsets[row]), int(trees.offsets[row + 1]))
        assert_close(merged_lse.cpu()[:, packed], part_lse, LSE_TOLERANCE[device], "log-sum-exp")


def recorded(run: Callable[[], None], device: str) -> Callable[[], None]:
    """Run something that launches the kernel of tree attention once, and return what launches that again: a CUDA graph.

    Without a GPU the same grid, numbers and addresses are handed to the kernel.
    """
    if device == "cuda":
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay
    kernel, launches = triton_tree.tree_kernel, []

    class Launcher:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **kwargs: launches.append((grid, args, kwargs))

    triton_tree.tree_kernel = Launcher()
    try:
        run()
    finally:
        triton_tree.tree_kernel = kernel
    ((grid, args, kwargs),) = launches
    return lambda: kernel[grid](*args, **kwargs)


def check_replays(
    seed: int,
    device: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_size: int,
    rows: int = 4,
    nodes: int = 20,
) -> None:
    """The kernel as launched for one step, on what other steps of any size left at its addresses."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    batches = [decoding_batch(rng, int(rng.integers(1, rows + 1)), nodes) for _ in range(3)]
    spare = int(rng.integers(0, 9))
    size = GraphSize(rows, max(int(batch.query_start[-1]) for batch in batches) + spare + rows, 70)
    packer = TreePacker(torch.device(device), size.tokens, rows, nodes, tile_queries(heads // kv_heads))
    scale, replay = head_size**-0.5, None
    product = torch.empty(size.tokens, heads + 2 * kv_heads, head_size, dtype=dtype, device=device)
    query, key, value = product.split([heads, kv_heads, kv_heads], dim=1)
    partial = torch.empty(size.tokens, heads, head_size, dtype=dtype, device=device)
    lse = torch.empty(heads, size.tokens, device=device)
    output = torch.empty_like(partial)
    for batch in batches:
        trees, count = batch.trees, int(batch.query_start[-1])
        product.copy_(torch.randn(product.shape, generator=generator))
        partial.fill_(torch.nan)
        lse.fill_(torch.nan)  # what FlashAttention says about nothing: nobody knows
        expected = torch.empty(count, heads, head_size, dtype=torch.float64)
        for row, prefix in enumerate(trees.prefixes.tolist()):
            here = torch.from_numpy(trees.tokens[trees.offsets[row] : trees.offsets[row + 1]])
            q, k, v = (part.cpu()[here] for part in (query, key, value))
            before = random_qkv(generator, prefix, heads, kv_heads, head_size, dtype)[1:]
            everything = torch.ones(len(here), prefix, dtype=torch.bool)
            if prefix:
                part, part_lse = dense(q, *before, everything, scale)
                partial[here], lse[:, here] = part.to(partial), part_lse.to(lse)
            sees = torch.cat((everything, tree_mask(trees, row)), 1)
            expected[here] = dense(q, torch.cat((before[0], k)), torch.cat((before[1], v)), sees, scale)[0]
        packed = place_in(size, packer, batch, device)
        output.fill_(UNTOUCHED)
        if replay is None:
            run = partial_call(tree_attention, query, key, value, packed, scale, output, Prefix(partial, lse))
            replay = recorded(run, device)
            output.fill_(UNTOUCHED)
        replay()
        assert_close(output.cpu()[:count], expected, TOLERANCE[dtype], "output")
        assert bool((output[count:] == UNTOUCHED).all()), "padding was written"
        eager = TreePacker(torch.device(device), size.tokens, rows, nodes, packer.tile_queries)
        seq_lens = (trees.prefixes + trees.lengths).astype(np.int32)
        alone = eager(replace(batch.step, branched=np.ones(len(trees.rows), np.bool_)), batch.query_start, seq_lens)
        place(alone, torch.from_numpy(seq_lens).to(device), torch.zeros(count, dtype=torch.int64, device=device))
        assert alone.packed is not None
        again = torch.full_like(output, UNTOUCHED)
        tree_attention(query, key, value, alone.packed, scale, again, Prefix(partial, lse))
        assert torch.equal(output, again), "a replay differs from the same step outside of a graph"


def check_walk(seed: int, device: str, *, refuses: bool, rows: int = 4, nodes: int = 24, wider: int = 0) -> int:
    """The walk kernel next to the walk on the host. Returns the longest path."""
    rng = np.random.default_rng(seed)
    batch = random_batch(rng, rows, nodes)
    step, sampled = batch.step, random_samples(rng, batch.step)
    width = int(np.diff(step.starts).max()) + 1 + wider
    roots = step.root_logits_rows()
    refused = rng.random(len(sampled)) < 0.1
    is_node = np.ones(len(sampled), np.bool_)
    is_node[roots] = False
    acceptable = np.where(refused[is_node], PLACEHOLDER, step.tokens).astype(np.int32)
    walks = walk_all(replace(step, tokens=acceptable) if refuses else step, sampled)
    trees = send(batch, torch.device(device))
    found = walk(
        torch.from_numpy(sampled).to(device), trees, width, torch.from_numpy(refused).to(device) if refuses else None
    )
    short = width - walks.tokens.shape[1]
    for name, expected in (("tokens", walks.tokens), ("paths", walks.paths)):
        padded = np.pad(expected, ((0, 0), (0, short)), constant_values=PLACEHOLDER)
        assert np.array_equal(getattr(found, name).cpu().numpy(), padded), f"the walks' {name} differ"
    assert np.array_equal(found.lengths.cpu().numpy(), walks.lengths), "the walks' lengths differ"
    assert np.array_equal(found.order.cpu().numpy(), walked_first(step, walks)), "logits rows are out of order"
    return int(walks.lengths.max()) - 1


def walked_first(step: StepTrees, walks: Walks) -> np.ndarray:
    """int64 [nodes + rows]: each row's logits rows, root and path first."""
    order = []
    for row, root in enumerate(step.root_logits_rows().tolist()):
        path = walks.path(row).tolist()
        rest = sorted(set(range(step.num_nodes(row))) - set(path))
        order += [root, *(root + 1 + node for node in path + rest)]
    return np.array(order, np.int64)


def check_place(seed: int, device: str, rows: int = 4, nodes: int = 40, reach: int = 6) -> int:
    """What ``place`` writes next to ``TreeRows``, the nodes' tokens, and that nothing else is written.

    Returns the longest row's length.
    """
    batch = random_batch(np.random.default_rng(seed), rows, nodes, reach=reach)
    trees, total = send(batch, torch.device(device)), int(batch.query_start[-1])
    expected, packed = pack(batch, torch.device(device)), trees.packed
    assert packed is not None
    tokens = np.diff(batch.query_start)
    seq_lens = batch.prefixes + np.diff(batch.step.starts) + 1
    before = np.repeat(seq_lens - tokens - batch.query_start[:-1], tokens) + np.arange(total)
    positions = torch.from_numpy(before.astype(np.int64)).to(device)
    place(trees, torch.from_numpy(seq_lens.astype(np.int32)).to(device), positions)
    for name in ("prefixes", "stock_lens", "tokens", "mask"):
        assert torch.equal(getattr(packed, name), getattr(expected, name)), f"{name} differ"
    before[batch.trees.tokens] = batch.trees.positions
    assert np.array_equal(positions.cpu().numpy(), before), "positions differ"

    input_ids = torch.full((total,), 99, dtype=torch.int32, device=device)
    place_tokens(trees, torch.from_numpy(batch.query_start).to(device), input_ids)
    is_node = np.arange(total) >= np.repeat(batch.query_start[1:] - np.diff(batch.step.starts), tokens)
    assert np.array_equal(input_ids.cpu().numpy()[is_node], batch.step.tokens), "nodes' tokens differ"
    assert bool((input_ids.cpu().numpy()[~is_node] == 99).all()), "a token that is no node was written"
    return packed.longest


def check_commit(
    seed: int, device: str, dtype: torch.dtype, *, slots_first: bool, rows: int = 4, nodes: int = 24
) -> int:
    """The commit kernel next to plain copies in the order of the host version. Returns how many entries moved."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    batch = random_batch(rng, rows, nodes)
    step, query_start = batch.step, batch.query_start
    walks = walk_all(step, random_samples(rng, step))
    block_size, heads, head_size, blocks = 16, 2, 32, -(-int(query_start[-1]) // 16) + 2
    shape = (blocks, block_size, heads) if slots_first else (blocks, heads, block_size)
    layers = []
    for _ in range(3):
        cache = torch.randn(*shape, 2 * head_size, generator=generator).to(dtype)
        layers.append(cache.to(device).transpose(1, 2) if slots_first else cache.to(device))
    # every token has a slot of its own, anywhere
    slots = rng.permutation(blocks * block_size)[: query_start[-1]]
    expected = [cache.cpu().clone() for cache in layers]
    sources, targets = moves(step, walks, query_start, slots)
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        for cache in expected:
            cache[target // block_size, :, target % block_size] = cache[source // block_size, :, source % block_size]
    packed = send(batch, torch.device(device)).packed
    assert packed is not None
    on_device = (torch.from_numpy(part).to(device) for part in (walks.paths, walks.lengths, slots))
    KVCommit(layers)(packed, *on_device)
    for after, cache in zip(expected, layers, strict=True):
        assert torch.equal(cache.cpu().view(torch.uint8), after.view(torch.uint8)), "an entry is not where it belongs"
    return len(sources)


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    """Largest difference at most ``tolerance``, or that much of the expected value."""
    worst = ((got.double() - expected).abs() / expected.abs().clamp(min=1.0)).max().item()
    assert worst <= tolerance, f"{what} is off by {worst:.2e}, more than {tolerance:.0e}"
