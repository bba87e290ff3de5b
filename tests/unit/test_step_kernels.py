"""Walk, positions, mask and KV commit on the device, next to what the host says about the same steps."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from kernel_runs import (
    DEVICE,
    compiled,
    compiles,
    launched_nowhere,
    run_under_interpreter,
    runs_kernels,
    starts_interpreter,
)

from proposers import DraftTree
from vllm_lookahead.attention.packing import ALIGNMENT, TreePacker
from vllm_lookahead.trees.step import StepTrees

ROOT = -1
seeds = st.integers(0, 2**32 - 1)


@starts_interpreter
def test_kernels_under_the_interpreter() -> None:
    run_under_interpreter(__file__)


@pytest.fixture
def checks() -> Any:
    import kernel_checks

    return kernel_checks


# ---- the walk


@runs_kernels
@settings(max_examples=60)
@given(seeds, st.booleans(), st.integers(1, 6), st.integers(2, 70), st.integers(0, 40))
def test_a_walk_is_the_hosts(seed: int, refuses: bool, rows: int, nodes: int, wider: int) -> None:
    from kernel_checks import check_walk

    check_walk(seed, DEVICE, refuses=refuses, rows=rows, nodes=nodes, wider=wider)


@runs_kernels
@pytest.mark.parametrize("refuses", [False, True])
def test_a_walk_down_the_largest_tree(refuses: bool, checks: Any) -> None:
    assert max(checks.check_walk(seed, DEVICE, refuses=refuses, rows=2, nodes=1024) for seed in range(3)) > 5


@runs_kernels
def test_of_siblings_with_the_same_token_the_first_is_taken() -> None:
    from vllm_lookahead.v2.kernels.walk import walk

    tree = DraftTree.from_parents([7, 7, 8, 8, 8], [ROOT, ROOT, 1, 0, 0])
    step = StepTrees.build(["a"], {"a": tree.token_ids.tolist()}, {"a": tree})
    trees = TreePacker(torch.device(DEVICE), 6, 1, 5)(step, np.array([0, 6], np.int32), np.array([9], np.int32))
    sampled = torch.tensor([7, 8, 8, 0, 5, 6], device=DEVICE)
    walks = walk(sampled, trees, 6)
    assert walks.paths[0].tolist() == [0, 3, -1, -1, -1, -1]
    assert walks.tokens[0].tolist() == [7, 8, 5, -1, -1, -1]
    assert walks.order.tolist() == [0, 1, 4, 2, 3, 5]
    refused = torch.tensor([True, True, False, False, False, False], device=DEVICE)
    walks = walk(sampled, trees, 6, refused)
    assert walks.paths[0].tolist() == [1, 2, -1, -1, -1, -1], "the root can't be refused, its first child can"
    assert walks.lengths.tolist() == [3]


@runs_kernels
def test_the_smallest_walk() -> None:
    from vllm_lookahead.v2.kernels.walk import walk

    packer = TreePacker(torch.device(DEVICE), 4, 2, 1)
    step = StepTrees.build(["a", "b"], {"a": [5]}, {"a": DraftTree.chain([5])})
    trees = packer(step, np.array([0, 2, 3], np.int32), np.array([9, 9], np.int32))
    assert walk(torch.tensor([5, 6, 7], device=DEVICE), trees, 2).tokens.tolist() == [[5, 6], [7, -1]]
    assert walk(torch.tensor([4, 6, 7], device=DEVICE), trees, 2).tokens.tolist() == [[4, -1], [7, -1]]
    trees = packer(StepTrees.build(["a", "b"], {}, {}), np.array([0, 1, 2], np.int32), np.array([9, 9], np.int32))
    assert walk(torch.tensor([4, 6], device=DEVICE), trees, 2).paths.tolist() == [[-1, -1], [-1, -1]]


@runs_kernels
def test_these_checks_see_a_wrong_walk(checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Controls: what is refused gets accepted; logits rows stay in the order of the nodes."""
    with monkeypatch.context() as patch:
        patch.setattr(checks, "walk", lambda *args, walk=checks.walk: walk(*args[:3]))
        with pytest.raises(AssertionError, match="differ"):
            [checks.check_walk(seed, DEVICE, refuses=True) for seed in range(9)]
    monkeypatch.setattr(checks, "walked_first", lambda step, walks: np.arange(len(step.tokens) + step.num_rows))
    with pytest.raises(AssertionError, match="out of order"):
        [checks.check_walk(seed, DEVICE, refuses=False) for seed in range(9)]


# ---- positions and masks


@runs_kernels
@settings(max_examples=40)
@given(seeds, st.integers(1, 4), st.integers(2, 100))
def test_placed_as_on_the_host(seed: int, rows: int, nodes: int) -> None:
    from kernel_checks import check_place

    check_place(seed, DEVICE, rows, nodes)


@runs_kernels
def test_the_largest_trees_are_placed(checks: Any) -> None:
    assert checks.check_place(39, DEVICE, rows=1, nodes=1024, reach=1024) > 992, "a mask of 32 words is not the widest"


@runs_kernels
def test_a_step_of_chains_has_nothing_to_place() -> None:
    from vllm_lookahead.v2.kernels.place import place

    step = StepTrees.build(["a"], {"a": [1, 2]}, {"a": DraftTree.chain([1, 2])})
    trees = TreePacker(torch.device(DEVICE), 3, 1, 2)(step, np.array([0, 3], np.int32), np.array([9], np.int32))
    assert trees.packed is None
    positions = torch.arange(6, 9, device=DEVICE)
    place(trees, torch.tensor([9], dtype=torch.int32, device=DEVICE), positions)
    assert positions.tolist() == [6, 7, 8]


@runs_kernels
def test_these_checks_see_a_wrong_mask(checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a node hangs elsewhere on the device."""

    def send(batch: Any, device: torch.device, send: Any = checks.send) -> Any:
        trees = send(batch, device)
        parents = batch.step.parents
        row = int(batch.trees.rows[0])
        node = int(batch.step.starts[row]) + 1  # the second node of a tree
        trees.parents[node] = ROOT if parents[node] == 0 else 0
        return trees

    monkeypatch.setattr(checks, "send", send)
    with pytest.raises(AssertionError, match="mask differ"):
        checks.check_place(0, DEVICE)


@runs_kernels
def test_a_place_without_a_token_gets_token_0() -> None:
    """A grammar's requests keep places that no draft takes; an embedding has no row -1."""
    from vllm_lookahead.v2.kernels.place import place_tokens

    step = StepTrees.build(["a", "b"], {"a": [7, -1, -1], "b": [5]}, {})
    trees = TreePacker(torch.device(DEVICE), 6, 2, 3)(step, np.array([0, 4, 6], np.int32), np.array([9, 9], np.int32))
    input_ids = torch.full((7,), 3, dtype=torch.int32, device=DEVICE)
    place_tokens(trees, torch.tensor([0, 4, 6], dtype=torch.int32, device=DEVICE), input_ids)
    assert input_ids.tolist() == [3, 7, 0, 0, 3, 5, 3]


# ---- the KV commit


@runs_kernels
@settings(max_examples=25)
@given(seeds, st.sampled_from(["float32", "float16", "bfloat16", "uint8"]), st.booleans(), st.integers(1, 5))
def test_a_commit_moves_what_the_host_would(seed: int, dtype: str, slots_first: bool, rows: int) -> None:
    from kernel_checks import check_commit

    check_commit(seed, DEVICE, getattr(torch, dtype), slots_first=slots_first, rows=rows)


@runs_kernels
def test_long_paths_move_block_by_block(checks: Any) -> None:
    from vllm_lookahead.v2.kernels.commit import MOVES

    moved = [checks.check_commit(seed, DEVICE, torch.float16, slots_first=True, rows=1, nodes=99) for seed in range(8)]
    assert max(moved) > 2 * MOVES, moved


@runs_kernels
def test_a_row_without_output_moves_nothing(checks: Any) -> None:
    """vLLM sets the lengths of rows that are still in their prompt to 0, on the device."""
    from vllm_lookahead.v2.kernels.commit import KVCommit

    packed = checks.send(checks.random_batch(np.random.default_rng(0), 2, 9, mixed=False), torch.device(DEVICE)).packed
    cache = torch.randn(8, 2, 16, 8, device=DEVICE)
    before, slots = cache.clone(), torch.arange(128, device=DEVICE)
    paths = torch.tensor([[1, 2], [1, 2]], dtype=torch.int32, device=DEVICE)
    for lengths, moved in (([0, 0], False), ([1, 1], False), ([0, 2], True)):
        KVCommit([cache])(packed, paths, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), slots)
        assert torch.equal(cache, before) != moved


@runs_kernels
def test_this_check_sees_a_wrong_order(checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the same moves, the last first."""

    def moves(*args: Any, moves: Any = checks.moves) -> Any:
        return [part[::-1] for part in moves(*args)]

    monkeypatch.setattr(checks, "moves", moves)
    with pytest.raises(AssertionError, match="not where it belongs"):
        [checks.check_commit(seed, DEVICE, torch.float32, slots_first=True) for seed in range(9)]


def test_a_cache_that_cannot_be_moved() -> None:
    from vllm_lookahead.v2.kernels.commit import KVCommit

    for cache in (torch.zeros(4, 2, 16, 6, dtype=torch.uint8), torch.zeros(4, 2, 8, 16).transpose(2, 3)):
        with pytest.raises(ValueError, match="can't move entries of a KV cache of shape"):
            KVCommit([cache])


# ---- what is sent


def test_every_step_lies_at_the_same_addresses() -> None:
    """A captured graph reads them again, and Triton compiles for how they are aligned."""
    from kernel_checks import random_batch

    rng = np.random.default_rng(0)
    packer = TreePacker(torch.device("cpu"), 500, 7, 60)
    seen = set()
    for rows in (1, 7, 2):
        batch = random_batch(rng, rows, 60)
        trees = packer(batch.step, batch.query_start, (batch.prefixes + 61).astype(np.int32))
        packed = trees.packed
        assert packed is not None
        assert trees.starts.tolist() == batch.step.starts.tolist()
        assert trees.tokens.tolist() == batch.step.tokens.tolist()
        assert trees.parents.tolist() == batch.step.parents.tolist()
        assert packed.rows.tolist() == batch.trees.rows.tolist()
        assert packed.offsets.tolist() == batch.trees.offsets.tolist()
        assert packed.lengths.tolist() == batch.trees.lengths.tolist()
        assert packed.firsts.tolist() == batch.trees.tokens[batch.trees.offsets[:-1]].tolist()
        assert packed.longest == batch.trees.lengths.max()
        assert packed.longest_prefix >= batch.trees.prefixes.max()
        assert packed.num_tokens == len(batch.trees.tokens)
        assert packed.mask.shape[1] == 2, "60 nodes and the root"
        parts = [trees.starts, trees.tokens, trees.parents, packed.rows, packed.offsets, packed.lengths, packed.firsts]
        parts += [packed.whole, packed.prefixes, packed.stock_lens, packed.tokens, packed.mask]
        assert all(part.data_ptr() % (4 * ALIGNMENT) == 0 for part in parts)
        seen.add(tuple(part.data_ptr() for part in parts))
    assert len(seen) == 1


@runs_kernels
@settings(max_examples=25)
@given(seeds, st.integers(1, 5), st.integers(2, 40), st.integers(1, 9), st.integers(0, 30))
def test_a_graph_finds_every_step_at_its_addresses(seed: int, rows: int, nodes: int, queries: int, spare: int) -> None:
    """Sizes and numbers are the graph's, padding asks for nothing, and nothing is left of earlier steps."""
    from kernel_checks import decoding_batch, place_in, tree_mask

    from vllm_lookahead.attention.packing import GraphSize, most_tiles

    rng = np.random.default_rng(seed)
    batches = [decoding_batch(rng, int(rng.integers(1, rows + 1)), nodes) for _ in range(3)]
    size = GraphSize(rows, max(int(batch.query_start[-1]) for batch in batches) + rows + spare, 70)
    packer = TreePacker(torch.device(DEVICE), size.tokens, rows, nodes, queries)
    seen = set()
    for batch in batches:
        packed, trees, real = place_in(size, packer, batch, DEVICE), batch.trees, len(batch.prefixes)
        values = {field.name: getattr(packed, field.name) for field in fields(packed)}
        assert values.pop("num_rows") == real
        seen.add(tuple((v.data_ptr(), *v.shape) if isinstance(v, torch.Tensor) else repr(v) for v in values.values()))
        count, lengths = len(trees.tokens), trees.lengths.tolist()
        assert packed.offsets.tolist() == trees.offsets.tolist() + [count] * (rows - real)
        assert packed.lengths.tolist() == lengths + [0] * (rows - real)
        assert packed.prefixes.tolist() == trees.prefixes.tolist() + [0] * (rows - real)
        assert packed.firsts[:real].tolist() == trees.offsets[:-1].tolist(), "packed order is the batch's"
        tiles = [(row, start) for row, length in enumerate(lengths) for start in range(0, length, queries)]
        listed = list(zip(packed.tile_rows.tolist(), packed.tile_starts.tolist(), strict=True))
        assert listed == tiles + [(-1, 0)] * (most_tiles(rows, size.tokens, queries) - len(tiles))
        for row, length in enumerate(lengths):
            words = packed.mask[trees.offsets[row] : trees.offsets[row + 1]].cpu().numpy()
            bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").astype(np.bool_)
            assert np.array_equal(bits[:, :length], tree_mask(trees, row).numpy())
        assert packed.longest >= max(lengths)
        assert packed.gather(torch.arange(size.tokens)).tolist() == list(range(size.tokens))
    assert len(seen) == 1


@settings(max_examples=200)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(0, 5), st.integers(0, 30), st.integers(1, 40))
def test_there_is_room_for_all_tiles(lengths: list[int], more_rows: int, more: int, queries: int) -> None:
    from vllm_lookahead.attention.packing import most_tiles

    tiles = sum(-(-length // queries) for length in lengths)
    rows, tokens = len(lengths) + more_rows, sum(lengths) + more
    assert tiles <= most_tiles(rows, tokens, queries) <= tokens
    most = min(rows, tokens)
    worst = [1 + (tokens - most) // queries * queries] + [1] * (most - 1)
    assert most_tiles(rows, tokens, queries) == sum(-(-length // queries) for length in worst), "no more than that"


def test_a_step_that_no_graph_stands_for() -> None:
    from vllm_lookahead.attention.packing import GraphSize

    tree = DraftTree.from_parents([1, 2, 3], [ROOT, ROOT, 0])
    step = StepTrees.build(["a", "b"], {"a": [1, 2, 3]}, {"a": tree})
    packer, seq_lens = TreePacker(torch.device("cpu"), 9, 4, 3), np.array([9, 9], np.int32)
    assert packer(step, np.array([0, 4, 5], np.int32), seq_lens, GraphSize(2, 5, 9)).packed is not None
    for starts, size in (
        ([0, 4, 5], GraphSize(1, 8, 9)),  # too few rows
        ([0, 4, 5], GraphSize(2, 4, 9)),  # too few tokens
        ([0, 4, 7], GraphSize(2, 8, 9)),  # tokens of a prompt
    ):
        with pytest.raises(ValueError, match="in GraphSize"):
            packer(step, np.array(starts, np.int32), seq_lens, size)


def test_neighbours_are_a_span() -> None:
    from kernel_checks import pack, random_batch

    for seed in range(8):
        for mixed in (True, False):
            batch = random_batch(np.random.default_rng(seed), 4, 9, mixed=mixed)
            packed = pack(batch, torch.device("cpu"))
            values = torch.arange(int(batch.query_start[-1]))
            assert packed.gather(values).tolist() == batch.trees.tokens.tolist()
            assert mixed or packed.span is not None


@pytest.mark.parametrize("limits", [(5, 2, 3), (6, 1, 3), (6, 2, 2)])
def test_a_step_larger_than_the_packer(limits: tuple[int, int, int]) -> None:
    """Nothing is written past a buffer's end."""
    tree = DraftTree.from_parents([1, 2, 3], [ROOT, ROOT, 0])
    step = StepTrees.build(["a", "b"], {"a": [1, 2, 3], "b": [1]}, {"a": tree, "b": tree})
    query_start, seq_lens = np.array([0, 4, 6], np.int32), np.array([9, 9], np.int32)
    assert TreePacker(torch.device("cpu"), 6, 2, 3)(step, query_start, seq_lens).packed is not None
    with pytest.raises(ValueError, match=r"a step of \(6, 2, 3\) tokens, rows and nodes"):
        TreePacker(torch.device("cpu"), *limits)(step, query_start, seq_lens)


# ---- compiled


@compiles
@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("width", [9, 65, 125, 1025])
def test_walk_and_place_compile(capability: int, width: int) -> None:
    from kernel_compile import compile_place_kernel, compile_walk_kernel

    for refuses in (False, True):
        asm = compiled(compile_walk_kernel, capability, width, refuses=refuses)
        assert width > 257 or "bar.sync" not in asm["ptx"], "one warp walks without waiting for others"
    assert compiled(compile_place_kernel, capability, width)["ptx"]


@compiles
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_commit_compiles(capability: int) -> None:
    from kernel_compile import compile_commit_kernel

    ptx = compiled(compile_commit_kernel, capability)["ptx"]
    barrier, entries = ptx.index("bar.sync"), "global.b64"
    assert ptx.rindex(f"ld.{entries}", 0, barrier) < barrier < ptx.index(f"st.{entries}"), "all is read, then written"


@compiles
def test_nothing_compiles_while_requests_wait() -> None:
    """After a warm-up with one small tree, steps of any size and at any address find their kernels compiled."""
    from kernel_checks import random_batch, random_qkv, random_samples

    from vllm_lookahead.attention.triton_tree import Prefix, tree_attention
    from vllm_lookahead.v2.kernels.commit import KVCommit
    from vllm_lookahead.v2.kernels.place import place, place_tokens
    from vllm_lookahead.v2.kernels.walk import walk, warm_up

    packer = TreePacker(torch.device("cpu"), 4096, 32, 64)
    commit = KVCommit([torch.zeros(4, 2, 16, 64, dtype=torch.bfloat16)])
    rng = np.random.default_rng(0)

    def step(rows: int, nodes: int, shift: int) -> None:
        """``shift``: by how many elements tensors of vLLM's may begin behind an aligned address."""

        def shifted(size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(size + shift, dtype=dtype)[shift:]

        batch = random_batch(rng, rows, nodes, mixed=rows > 1)
        trees, tokens = packer(batch.step, batch.query_start, np.full(rows, 999, np.int32)), int(batch.query_start[-1])
        assert trees.packed is not None
        place_tokens(trees, shifted(rows + 1, torch.int32), shifted(tokens, torch.int32))
        place(trees, shifted(rows, torch.int32), shifted(tokens, torch.int64))
        query, key, value = random_qkv(torch.Generator(), tokens, 4, 2, 32, torch.bfloat16)
        prefix = Prefix(torch.zeros(trees.packed.num_tokens, 4, 32).bfloat16(), torch.zeros(4, trees.packed.num_tokens))
        tree_attention(query, key, value, trees.packed, 1.0, torch.zeros(tokens, 4, 32).bfloat16(), prefix)
        sampled = shifted(len(batch.step.tokens) + rows, torch.int64)
        sampled.copy_(torch.from_numpy(random_samples(rng, batch.step)))
        walks = walk(sampled, trees, 65)
        walk(sampled, trees, 65, shifted(len(sampled), torch.bool))
        commit(trees.packed, walks.paths, walks.lengths, shifted(tokens, torch.int64))

    with launched_nowhere() as compiled_for:
        step(1, 3, 0)
        warm = {name: set(keys) for name, keys in compiled_for.items()}
        expected = dict.fromkeys(("place_tokens_kernel", "place_kernel", "tree_kernel", "commit_kernel"), 1)
        expected["walk_kernel"] = 2
        assert {name: len(keys) for name, keys in warm.items()} == expected
        for rows, nodes, shift in ((2, 64, 0), (32, 9, 0), (16, 40, 1), (1, 64, 3)):
            step(rows, nodes, shift)
        assert compiled_for == warm
        nothing = packer(StepTrees.build(["a"], {}, {}), np.array([0, 1], np.int32), np.ones(1, np.int32))
        warm_up(nothing, 65)
        assert compiled_for == warm, "a walk's warm-up compiles what a step calls"
        walk(torch.zeros(1, dtype=torch.int32), nothing, 65)
        assert compiled_for != warm, "this test sees a compilation"
