"""The step's trees: what the scheduler may do to them, and the vectorised walk next to the plain one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proposers import DraftTree
from vllm_lookahead.trees.step import PLACEHOLDER, Descent, StepTrees, walk_all
from vllm_lookahead.v1.runner import LookaheadRunnerMixin

ROOT = -1
TREE = DraftTree.from_parents([7, 8, 9, 7, 5], [ROOT, ROOT, 0, 2, 1])
tokens = st.integers(0, 3)


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 12) -> DraftTree:
    """Any valid tree of few different tokens; siblings may carry the same one, as they do in a comb."""
    n = draw(st.integers(1, max_nodes))
    return DraftTree.from_parents(
        [draw(tokens) for _ in range(n)], [draw(st.integers(ROOT, node - 1)) for node in range(n)]
    )


def parents_of(step: StepTrees, row: int) -> list[int]:
    return step.parents[step.starts[row] : step.starts[row + 1]].tolist()


def test_rows_without_drafts_have_a_root_and_nothing_else() -> None:
    step = StepTrees.build(["a", "b"], {}, {"a": TREE})
    assert step.num_rows == 2
    assert [step.num_nodes(row) for row in range(2)] == [0, 0]
    assert step.trees == [None, None]
    assert not step.branched.any()
    assert step.root_logits_rows().tolist() == [0, 1]
    walks = walk_all(step, np.array([5, 6]))
    assert walks.tokens.tolist() == [[5], [6]]
    assert walks.lengths.tolist() == [1, 1]


def test_trees_lie_one_after_the_other() -> None:
    chain = DraftTree.chain([1, 2])
    step = StepTrees.build(
        ["a", "b", "c"], {"a": [7, 8, 9, 7, 5], "c": [1, 2]}, {"a": TREE, "b": TREE, "c": chain, "gone": TREE}
    )
    assert step.starts.tolist() == [0, 5, 5, 7]
    assert step.tokens.tolist() == [7, 8, 9, 7, 5, 1, 2]
    assert step.branched.tolist() == [True, False, False], "a chain needs no ancestor mask"
    assert step.root_logits_rows().tolist() == [0, 6, 7]
    assert step.trees[0] is TREE
    assert step.trees[1] is None
    assert step.trees[2] is chain
    descent = Descent(step, np.array([False, False, False]))
    assert descent.active.tolist() == [0, 1, 2]
    assert descent.logits_rows.tolist() == [0, 6, 7]
    descent.follow(np.array([8, 8, 1], np.int32))
    assert descent.active.tolist() == [0, 2], "b has no tree"
    assert descent.logits_rows.tolist() == [2, 6, 8]
    descent.follow(np.array([5, 2], np.int32))
    assert descent.logits_rows.tolist() == [5, 6, 9]
    descent.follow(np.array([7, 2], np.int32))
    assert descent.active.tolist() == []
    walks = descent.walks()
    assert walks.tokens.tolist() == [[8, 5, 7], [8, PLACEHOLDER, PLACEHOLDER], [1, 2, 2]]
    assert [walks.path(row).tolist() for row in range(3)] == [[1, 4], [], [0, 1]]


def test_the_scheduler_may_cut_a_tree() -> None:
    for n in range(1, 6):
        step = StepTrees.build(["a"], {"a": TREE.token_ids[:n].tolist()}, {"a": TREE})
        assert parents_of(step, 0) == TREE.parents[:n].tolist()
        assert step.trees[0] is TREE
        assert step.branched[0] == (n > 1), "its first node alone is a chain"


def test_drafts_that_are_not_a_prefix_of_the_proposed_tree_are_a_chain() -> None:
    for scheduled in ([7, 8, 9, 7, 5, PLACEHOLDER], [7, 8, PLACEHOLDER], [8, 7], [1]):
        step = StepTrees.build(["a"], {"a": scheduled}, {"a": TREE})
        assert step.tokens.tolist() == scheduled
        assert parents_of(step, 0) == list(range(-1, len(scheduled) - 1))
        assert step.trees[0] is None, "the proposer must not be told about a tree that is not its own"
        assert not step.branched[0]


def test_drafts_of_an_earlier_step_are_a_chain() -> None:
    step = StepTrees.build(["a"], {"a": [7, 8]}, {})
    assert parents_of(step, 0) == [-1, 0]
    assert step.trees == [None]


@settings(max_examples=200)
@given(st.lists(st.tuples(trees(), st.integers(0, 12)), min_size=1, max_size=6), st.data())
def test_walks_are_those_of_the_plain_walk(rows: list[tuple[DraftTree, int]], data: st.DataObject) -> None:
    scheduled = {str(i): tree.token_ids[:n].tolist() for i, (tree, n) in enumerate(rows)}
    proposed = {str(i): tree for i, (tree, _) in enumerate(rows)}
    step = StepTrees.build(list(scheduled), scheduled, proposed)
    size = len(step.tokens) + len(rows)
    sampled = np.array(data.draw(st.lists(tokens, min_size=size, max_size=size)), np.int64)
    walks = walk_all(step, sampled)
    assert walks.tokens.shape == walks.paths.shape == (len(rows), walks.lengths.max())
    for row, (tree, _) in enumerate(rows):
        first = int(step.root_logits_rows()[row])
        said = sampled[first : first + step.num_nodes(row) + 1]
        path = tree.walk(said)
        assert walks.path(row).tolist() == path.tolist()
        emitted = [*tree.token_ids[path].tolist(), said[path[-1] + 1 if len(path) else 0]]
        padding = [PLACEHOLDER] * (walks.tokens.shape[1] - len(emitted))
        assert walks.tokens[row].tolist() == emitted + padding
    descent = Descent(step, np.zeros(len(rows), np.bool_))
    while len(descent.active):
        descent.follow(sampled[descent.logits_rows[descent.active]].astype(np.int32))
    assert descent.walks().tokens.tolist() == walks.tokens.tolist()
    assert descent.walks().paths.tolist() == walks.paths.tolist()


def test_a_batch_without_rows() -> None:
    step = StepTrees.build([], {}, {})
    assert step.num_rows == 0
    assert walk_all(step, np.zeros(0, np.int64)).lengths.tolist() == []


@pytest.mark.parametrize(
    ("budget", "rows", "nodes"), [("auto", 1, 30), ("auto", 8, 7), (12, 1, 12), (12, 8, 7), (0, 1, 0), ("auto", 99, 0)]
)
def test_most_nodes_per_request(budget: Any, rows: int, nodes: int) -> None:
    """A budget counts every node, the window's too: it is what proposers may put into a tree, not only the guesses."""
    runner: Any = SimpleNamespace(
        num_spec_tokens=30,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64),
        drafter=SimpleNamespace(config=SimpleNamespace(budget=budget)),
    )
    assert LookaheadRunnerMixin.node_limit(runner, rows) == nodes
