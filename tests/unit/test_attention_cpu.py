"""Tree attention on the CPU next to a dense float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from proposers import DraftTree
from vllm_lookahead.attention.cpu import (
    TreeCPUAttentionImpl,
    TreeCPUAttentionMetadataBuilder,
    cells_of,
    make_plan,
    tree_attention,
    unsupported_reason,
)
from vllm_lookahead.trees.rows import TreeRows
from vllm_lookahead.trees.step import StepTrees

ROOT = -1


def random_tree(rng: np.random.Generator, n: int) -> DraftTree:
    """A tree with at least one branch."""
    parents = [ROOT, ROOT, *(int(rng.integers(max(ROOT, node - 6), node)) for node in range(2, n))]
    return DraftTree.from_parents(rng.integers(0, 9, n), parents)


def reference(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, tree: DraftTree, prefix: int, scale: float
) -> np.ndarray:
    """Root and nodes of one row: every one sees the prefix, the root, its ancestors and itself. All in float64."""
    n, heads, _ = query.shape
    per_kv = heads // keys.shape[1]
    out = np.zeros(query.shape)
    for i in range(n):
        sees = [*range(prefix + 1)]
        node = i - 1
        while node != ROOT:
            sees.append(prefix + 1 + node)
            node = int(tree.parents[node])
        for head in range(heads):
            scores = keys[sees, head // per_kv] @ query[i, head] * scale
            weights = np.exp(scores - scores.max())
            out[i, head] = weights / weights.sum() @ values[sees, head // per_kv]
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_size", "block_size"), [(4, 2, 64, 32), (2, 2, 32, 16), (6, 1, 40, 128), (8, 4, 8, 48)]
)
@pytest.mark.parametrize("seed", range(3))
def test_tree_attention(
    seed: int, heads: int, kv_heads: int, head_size: int, block_size: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Ragged rows: trees of different sizes on prefixes of different lengths, between rows that have no tree."""
    rng = np.random.default_rng(seed)
    rows = 7
    trees = [random_tree(rng, int(rng.integers(2, 40))) if row % 3 else None for row in range(rows)]
    drafts = {str(row): tree.token_ids.tolist() for row, tree in enumerate(trees) if tree is not None}
    proposed = {str(row): tree for row, tree in enumerate(trees) if tree is not None}
    step = StepTrees.build([str(row) for row in range(rows)], drafts, proposed)
    prefixes = rng.choice([0, 1, block_size - 1, block_size, 3 * block_size + 5, 200], rows)
    lengths = np.array([step.num_nodes(row) + 1 for row in range(rows)])
    # A row may begin with tokens before its root: of its prompt, or computed again after a preemption.
    before = np.where(prefixes > 0, rng.integers(0, 2, rows), 0)
    query_start = np.concatenate(([0], np.cumsum(before + lengths))).astype(np.int32)
    tree_rows = TreeRows.of(step, query_start, (prefixes + lengths).astype(np.int32))
    assert tree_rows is not None

    # Every row's blocks lie anywhere in the cache; what no row has written is NaN.
    most = int(-(-(prefixes + lengths).max() // block_size))
    table = rng.permutation(rows * most).reshape(rows, most).astype(np.int32)
    cache = torch.full((rows * most, kv_heads, block_size, 2 * head_size), torch.nan).to(dtype)
    flat = cache.flatten(2)
    kv: list[tuple[np.ndarray, np.ndarray]] = []
    for row in range(rows):
        total = int(prefixes[row] + lengths[row])
        keys, values = (torch.from_numpy(rng.normal(size=(total, kv_heads, head_size))).to(dtype) for _ in range(2))
        for position in range(total):
            block = flat[table[row, position // block_size]]
            offset = position % block_size
            block[:, offset : head_size * block_size : block_size] = keys[position]
            start = head_size * block_size + offset * head_size
            block[:, start : start + head_size] = values[position]
        kv.append((keys.double().numpy(), values.double().numpy()))

    query = torch.from_numpy(rng.normal(size=(query_start[-1], heads, head_size))).to(dtype)
    output = torch.full_like(query, 7.0)
    used = -(-int((tree_rows.prefixes + tree_rows.lengths).max()) // block_size)
    plan = make_plan(tree_rows, table[tree_rows.rows, :used], len(query))
    tree_attention(query, cells_of(cache), plan, head_size**-0.5, output)

    for row, tree in enumerate(trees):
        first, end = query_start[row] + before[row], query_start[row + 1]
        untouched = output[query_start[row] : end if tree is None else first]
        assert (untouched == 7.0).all(), "only tree rows are written"
        if tree is not None:
            packed = query[first:end].double().numpy()
            expected = reference(packed, *kv[row], tree, int(prefixes[row]), head_size**-0.5)
            np.testing.assert_allclose(output[first:end].double().numpy(), expected, rtol=0, atol=tolerance)


def test_positions_follow_the_depth_and_masks_the_ancestors() -> None:
    tree = DraftTree.from_parents([1, 2, 3, 4], [ROOT, ROOT, 1, 0])
    step = StepTrees.build(["a", "b"], {"b": tree.token_ids.tolist()}, {"b": tree})
    rows = TreeRows.of(step, np.array([0, 3, 10], np.int32), np.array([3, 17], np.int32))
    assert rows is not None
    assert rows.rows.tolist() == [1]
    assert rows.prefixes.tolist() == [12]
    assert rows.tokens.tolist() == [5, 6, 7, 8, 9], "the row's last tokens"
    assert rows.positions.tolist() == [12, 13, 13, 14, 14]
    assert rows.mask.reshape(5, 5).astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_a_step_of_chains_has_no_tree_rows() -> None:
    step = StepTrees.build(["a"], {"a": [1, 2]}, {"a": DraftTree.chain([1, 2])})
    assert TreeRows.of(step, np.array([0, 3], np.int32), np.array([9], np.int32)) is None


def test_a_cache_in_amx_tiles_is_left_to_vllms_kernel() -> None:
    impl, builder = (kind.__new__(kind) for kind in (TreeCPUAttentionImpl, TreeCPUAttentionMetadataBuilder))
    impl.sliding_window, impl.alibi_slopes, impl.logits_soft_cap, impl.sinks = -1, None, 0.0, None
    impl.is_fp8_kv_cache, impl.head_size, builder.dtype = False, 64, torch.bfloat16
    for isa, reason in (("vec", None), ("amx", "the KV cache layout of the 'amx' kernel")):
        builder.isa = isa
        assert unsupported_reason(impl, builder) == reason
