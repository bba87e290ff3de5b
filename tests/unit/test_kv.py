"""KV commit: what moves where, and the copy in the CPU's block layout, next to a dictionary of slots."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proposers import DraftTree
from vllm_lookahead.attention import cpu_commit
from vllm_lookahead.attention.cpu_commit import CPUCommit
from vllm_lookahead.attention.cpu_trees import CPUTrees
from vllm_lookahead.trees import kv, step
from vllm_lookahead.trees.kv import moves
from vllm_lookahead.trees.step import Descent, StepTrees, walk_all

ROOT = -1
HEADS, HEAD_SIZE = 2, 3


def slots_of(rng: np.random.Generator, lengths: list[int], block_size: int) -> tuple[list[np.ndarray], int]:
    """For each row the KV slots of its positions, in blocks that lie anywhere; and how many blocks there are."""
    per_row = [-(-length // block_size) for length in lengths]
    blocks = rng.permutation(sum(per_row) + 2)
    slots = []
    for length, count in zip(lengths, per_row, strict=True):
        mine, blocks = blocks[:count], blocks[count:]
        positions = np.arange(length)
        slots.append(mine[positions // block_size] * block_size + positions % block_size)
    return slots, sum(per_row) + 2


def random_step(rng: np.random.Generator, rows: int) -> StepTrees:
    """Trees, chains and rows without drafts; few tokens, so that walks go deep."""
    scheduled: dict[str, list[int]] = {}
    proposed: dict[str, DraftTree] = {}
    for row in range(rows):
        n = int(rng.integers(0, 14))
        parents = np.array([rng.integers(max(ROOT, node - 4), node) for node in range(n)], np.int32)
        tree = DraftTree.from_parents(rng.integers(0, 2, n), parents if rng.random() < 0.8 else np.arange(-1, n - 1))
        scheduled[str(row)], proposed[str(row)] = tree.token_ids.tolist(), tree
    return StepTrees.build([str(row) for row in range(rows)], scheduled, proposed)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 8]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_after_the_commit_every_accepted_position_has_its_own_kv(
    seed: int, block_size: int, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 6))
    step = random_step(rng, rows)
    walks = walk_all(step, rng.integers(0, 2, len(step.tokens) + rows))

    # Each row: a prefix in the cache; this step's tokens are some of a prompt or just the root, then the nodes.
    prefixes = rng.integers(0, 9, rows)
    queries = np.array([step.num_nodes(row) + 1 for row in range(rows)])
    slots, num_blocks = slots_of(rng, (prefixes + queries).tolist(), block_size)
    query_start = np.concatenate(([0], np.cumsum(queries))).astype(np.int32)
    flat = np.concatenate([slots[row][prefixes[row] :] for row in range(rows)]).astype(np.int64)

    layers = [
        torch.from_numpy(rng.normal(size=(num_blocks, HEADS, block_size, 2 * HEAD_SIZE)).astype(np.float32)).to(dtype)
        for _ in range(2)
    ]
    before = [read_slots(cache) for cache in layers]
    CPUCommit(layers)(*moves(step, walks, query_start, flat))
    after = [read_slots(cache) for cache in layers]

    for row in range(rows):
        path = walks.path(row)
        root = prefixes[row]
        for old, new in zip(before, after, strict=True):
            for position in range(root + 1):
                np.testing.assert_array_equal(new[slots[row][position]], old[slots[row][position]])
            for depth, node in enumerate(path, start=1):
                np.testing.assert_array_equal(new[slots[row][root + depth]], old[slots[row][root + 1 + node]])
    used = set(np.concatenate(slots).tolist())
    for slot in set(range(num_blocks * block_size)) - used:
        np.testing.assert_array_equal(after[0][slot], before[0][slot], err_msg="a slot of nobody's was written")


def read_slots(cache: torch.Tensor) -> dict[int, np.ndarray]:
    """Keys and values of every slot: K of a block is [head size, block size], V after it [block size, head size]."""
    num_blocks, heads, block_size, twice = cache.shape
    found = {}
    for block in range(num_blocks):
        for offset in range(block_size):
            parts = []
            for head in range(heads):
                flat = cache[block, head].flatten().float().numpy()
                keys = flat[: len(flat) // 2].reshape(twice // 2, block_size)
                values = flat[len(flat) // 2 :].reshape(block_size, twice // 2)
                parts += [keys[:, offset], values[offset]]
            found[block * block_size + offset] = np.stack(parts)
    return found


def test_a_chain_never_moves() -> None:
    step = StepTrees.build(["a"], {"a": [1, 2, 3]}, {"a": DraftTree.chain([1, 2, 3])})
    walks = walk_all(step, np.array([1, 2, 3, 4]))
    assert walks.lengths.tolist() == [4]
    src, dst = moves(step, walks, np.array([0, 4], np.int32), np.arange(4))
    assert len(src) == len(dst) == 0


def test_only_what_is_out_of_place_moves() -> None:
    tree = DraftTree.from_parents([1, 5, 2, 3], [ROOT, ROOT, 0, 2])
    step = StepTrees.build(["a"], {"a": tree.token_ids.tolist()}, {"a": tree})
    walks = walk_all(step, np.array([1, 2, 0, 3, 9]))
    assert walks.path(0).tolist() == [0, 2, 3]
    src, dst = moves(step, walks, np.array([0, 5], np.int32), np.array([40, 41, 42, 43, 44]))
    assert list(zip(src.tolist(), dst.tolist(), strict=True)) == [(43, 42), (44, 43)]


@pytest.mark.parametrize("prompt_tokens", [0, 3])
def test_a_rows_nodes_are_its_last_tokens(prompt_tokens: int) -> None:
    """A row that comes back after a preemption computes earlier tokens, root and nodes in one step."""
    tree = DraftTree.from_parents([1, 2], [ROOT, ROOT])
    step = StepTrees.build(["a"], {"a": [1, 2]}, {"a": tree})
    walks = walk_all(step, np.array([2, 0, 0]))
    slots = np.arange(100, 100 + prompt_tokens + 3)
    src, dst = moves(step, walks, np.array([0, prompt_tokens + 3], np.int32), slots)
    assert (src.tolist(), dst.tolist()) == ([slots[-1]], [slots[-2]])


def test_warm_up_compiles_what_a_commit_of_any_number_of_rows_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    called_with: dict[str, set[Any]] = {}

    def recording(function: Any) -> Any:
        def call(*args: Any) -> Any:
            called_with.setdefault(function.__name__, set()).add(tuple(numba.typeof(arg) for arg in args))
            return function(*args)

        return call

    for module, name in ((kv, "_moves"), (cpu_commit, "_copy_slots"), (step, "_walk_all"), (step, "_follow")):
        monkeypatch.setattr(module, name, recording(getattr(module, name)))
    caches = [torch.zeros(3, HEADS, 8, 2 * 32)]
    impl = SimpleNamespace(num_heads=HEADS, head_size=32, scale=1.0)
    trees = object.__new__(CPUTrees)
    vars(trees).update(_kv_caches=caches, _impls=[impl], _dtype=torch.float32)
    step.warm_up()
    trees.warm_up()
    warm = {name: set(types) for name, types in called_with.items()}
    assert {name: len(types) for name, types in warm.items()} == dict.fromkeys(called_with, 1)
    assert len(warm) == 4

    tree = DraftTree.from_parents([1, 2, 3], [ROOT, ROOT, 1])
    commit = CPUCommit(caches)
    for rows in (1, 2, 5):
        names = [str(row) for row in range(rows)]
        trees = StepTrees.build(names, {name: [1, 2, 3] for name in names}, dict.fromkeys(names, tree))
        query_start, slots = np.arange(rows + 1, dtype=np.int32) * 4, np.arange(4 * rows)
        walks = walk_all(trees, np.tile([2, 0, 3, 0], rows))
        assert walks.lengths.tolist() == [3] * rows
        commit(*moves(trees, walks, query_start, slots))
        descent = Descent(trees, np.zeros(rows, np.bool_))
        descent.follow(np.full(rows, 2, np.int32))
        moves(trees, descent.walks(), query_start, slots)
    assert called_with == warm
