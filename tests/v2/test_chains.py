"""Trees laid out as chains, for vLLM's penalties and bad words: the real kernels, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
import vllm.v1.worker.cpu.shm  # noqa: F401 - vLLM on a CPU needs it before its V2 modules
from hypothesis import given, settings
from vllm.v1.worker.gpu.sample.bad_words import apply_bad_words
from vllm.v1.worker.gpu.sample.penalties import apply_penalties

from proposers import DraftTree
from vllm_lookahead.trees.step import StepTrees
from vllm_lookahead.v2.chains import paths_as_chains

VOCABULARY, SLOTS = 32, 3
Apply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


@st.composite
def steps(draw: st.DrawFn) -> StepTrees:
    """Three rows with small trees; few tokens, so that paths meet the words."""
    drafts, trees = {}, {}
    for row in range(SLOTS):
        size = draw(st.integers(1, 8))
        parents = [draw(st.integers(-1, i - 1)) for i in range(size)]
        tree = DraftTree.from_parents([draw(st.integers(0, 4)) for _ in range(size)], parents)
        trees[str(row)], drafts[str(row)] = tree, tree.token_ids.tolist()
    return StepTrees.build([str(row) for row in range(SLOTS)], drafts, trees)


def path_of(step: StepTrees, row: int, node: int) -> list[int]:
    """The logits rows from the root to a node (-1: the root itself)."""
    first = int(step.starts[row]) + row
    path = []
    while node >= 0:
        path.append(first + 1 + node)
        node = int(step.parents[step.starts[row] + node])
    return [first, *reversed(path)]


def everywhere(step: StepTrees) -> list[tuple[int, int]]:
    return [(row, node) for row in range(SLOTS) for node in range(-1, step.num_nodes(row))]


@given(steps(), st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS))
def test_every_path_is_there(step: StepTrees, in_order: list[bool]) -> None:
    chains = paths_as_chains(step, np.array(in_order))
    for row, node in everywhere(step):
        path = path_of(step, row, node)
        at = int(chains.back[path[-1]])
        assert chains.rows[at] == path[-1]
        if in_order[row]:
            assert chains.depths[at] == len(path) - 1
            assert chains.rows[at - len(path) + 1 : at + 1].tolist() == path
        assert at < chains.ends[row]
        assert at >= (chains.ends[row - 1] if row else 0)
    assert chains.ends[-1] == len(chains.rows)


def processors() -> dict[str, Apply]:
    """vLLM's penalties and bad words, with random state."""
    rng = np.random.default_rng(0)
    counts = torch.from_numpy(rng.integers(0, 3, (SLOTS, VOCABULARY)).astype(np.int32))
    words = [[1, 2], [3, 1, 4], [2, 2]]
    flat = torch.tensor([[token for word in words for token in word]] * SLOTS, dtype=torch.int32)
    offsets = torch.tensor([[0, 2, 5, 7]] * SLOTS, dtype=torch.int32)
    number = torch.full((SLOTS,), len(words), dtype=torch.int32)

    def penalties(logits: Any, slots: Any, ids: Any, depths: Any) -> None:
        strengths = ([1.2, 1.0, 0.9], [0.3, -0.2, 0.0], [0.0, 0.5, 0.7])
        prompt = torch.tensor([[5], [9], [0]], dtype=torch.int32)
        apply_penalties(logits, slots, ids, depths, *(torch.tensor(part) for part in strengths), prompt, counts)

    def bad_words(logits: Any, slots: Any, ids: Any, depths: Any) -> None:
        lengths = torch.full((SLOTS,), 5, dtype=torch.int32), torch.full((SLOTS,), 12, dtype=torch.int32)
        apply_bad_words(logits, slots, flat, offsets, number, TEXT, *lengths, ids, depths, len(words))

    return {"penalties": penalties, "bad_words": bad_words}


TEXT = torch.from_numpy(np.random.default_rng(1).integers(0, 5, (SLOTS, 20)).astype(np.int32))


@settings(max_examples=8)
@given(steps())
def test_each_node_is_sampled_as_at_the_end_of_its_own_path(step: StepTrees) -> None:
    rows = len(step.tokens) + SLOTS
    logits = torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(2))
    ids, slots = torch.zeros(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int64)
    for row, node in everywhere(step):
        at = path_of(step, row, node)[-1]
        slots[at] = row
        ids[at] = int(step.tokens[step.starts[row] + node]) if node >= 0 else TEXT[row, 11]
    chains = paths_as_chains(step, np.ones(SLOTS, np.bool_))
    order, back, depths = (torch.from_numpy(part) for part in (chains.rows, chains.back, chains.depths))
    for name, apply in processors().items():
        ours = logits[order]
        apply(ours, slots[order], ids[order], depths)
        for row, node in everywhere(step):
            path = torch.tensor(path_of(step, row, node))
            alone = logits[path]
            apply(alone, slots[path], ids[path], torch.arange(len(path), dtype=torch.int32))
            assert torch.equal(alone[-1], ours[back[path[-1]]]), (name, row, node)


def test_control() -> None:
    """In the order of the nodes they would see another path's tokens: that is what the chains are for."""
    tree = DraftTree.from_parents([1, 3, 2], [-1, -1, 1])
    step = StepTrees.build(["0", "1", "2"], {"0": [1, 3, 2]}, {"0": tree})
    ids = torch.tensor([int(TEXT[0, 11]), 1, 3, 2, 0, 0], dtype=torch.int32)
    slots = torch.tensor([0, 0, 0, 0, 1, 2])
    flat = torch.tensor([0, 1, 2, 3, 0, 0], dtype=torch.int32)
    logits = torch.randn(6, VOCABULARY)
    in_node_order, at_its_end = logits.clone(), logits[[0, 2, 3]]
    processors()["penalties"](in_node_order, slots, ids, flat)
    processors()["penalties"](at_its_end, slots[:3], ids[[0, 2, 3]], flat[:3])
    assert not torch.equal(in_node_order[3], at_its_end[-1])
    assert step.branched[0]
