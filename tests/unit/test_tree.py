"""DraftTree: what the engine may rely on, whatever a proposer guesses."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proposers.tree import ROOT, DraftTree, TrieBuilder, merge

tokens = st.integers(0, 3)
guesses = st.lists(st.lists(tokens, max_size=6), max_size=12)


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 40) -> DraftTree:
    """Any valid tree; siblings may carry the same token, as they do in a comb."""
    n = draw(st.integers(0, max_nodes))
    parents = [draw(st.integers(ROOT, node - 1)) for node in range(n)]
    return DraftTree.from_parents([draw(tokens) for _ in range(n)], parents)


def ancestors(tree: DraftTree, node: int) -> set[int]:
    found = set()
    while node != ROOT:
        found.add(node)
        node = int(tree.parents[node])
    return found


def paths(tree: DraftTree) -> set[tuple[int, ...]]:
    """The token sequences from the root to every node."""
    return {tuple(int(tree.token_ids[a]) for a in sorted(ancestors(tree, node))) for node in range(len(tree))}


def test_empty_and_chain() -> None:
    assert len(DraftTree.empty()) == 0
    DraftTree.empty().validate()
    chain = DraftTree.chain([7, 8, 9])
    chain.validate()
    assert chain.parents.tolist() == [ROOT, 0, 1]
    assert chain.depths.tolist() == [1, 2, 3]
    assert chain.ancestor_mask().tolist() == np.tri(3, dtype=bool).tolist()


@settings(deadline=None)  # the first call compiles
@given(trees(), st.integers(0, 50))
def test_every_prefix_is_a_valid_tree(tree: DraftTree, n: int) -> None:
    tree.prefix(n).validate()
    assert len(tree.prefix(n)) == min(n, len(tree))


@settings(deadline=None)  # the first call compiles
@given(trees())
def test_ancestor_mask_is_what_climbing_the_parents_finds(tree: DraftTree) -> None:
    mask = tree.ancestor_mask()
    assert mask.shape == (len(tree), len(tree))
    for node in range(len(tree)):
        assert set(np.flatnonzero(mask[node]).tolist()) == ancestors(tree, node)
        assert mask[node].sum() == tree.depths[node]


@settings(deadline=None)  # the first call compiles
@given(trees())
def test_first_path_takes_the_first_child_everywhere(tree: DraftTree) -> None:
    path, here = [], ROOT
    while (children := np.flatnonzero(tree.parents == here)).size:
        here = int(children[0])
        path.append(here)
    assert tree.first_path().tolist() == path
    chain = tree.as_chain()
    chain.validate()
    assert chain.token_ids.tolist() == [tree.token_ids[node] for node in path]


@settings(deadline=None)  # the first call compiles
@given(trees(), st.data())
def test_walk_goes_to_the_first_child_that_carries_the_sampled_token(tree: DraftTree, data: st.DataObject) -> None:
    verified = data.draw(st.integers(0, len(tree)))
    sampled = data.draw(st.lists(tokens, min_size=verified + 1, max_size=verified + 1))
    path, here = [], ROOT
    while True:
        matching = [
            child
            for child in range(verified)
            if tree.parents[child] == here and tree.token_ids[child] == sampled[here + 1]
        ]
        if not matching:
            break
        here = matching[0]
        path.append(here)
    assert tree.walk(sampled).tolist() == path


def test_walk_of_a_comb_prefers_the_earlier_twin() -> None:
    tree = DraftTree.from_parents([5, 5, 6], [ROOT, ROOT, 1])
    assert tree.walk([5, 6, 6, 0]).tolist() == [0], "the first child wins, although its twin would go on"


@settings(deadline=None)  # the first call compiles
@given(guesses)
def test_merge_has_every_guess_as_a_path_when_the_budget_allows(guesses: list[list[int]]) -> None:
    tree = merge(guesses, budget=sum(map(len, guesses)))
    tree.validate(unique_siblings=True)
    assert paths(tree) == {tuple(guess[:n]) for guess in guesses for n in range(1, len(guess) + 1)}


@settings(deadline=None)  # the first call compiles
@given(guesses, st.integers(0, 20))
def test_merge_keeps_to_its_budget_and_fills_it_in_order(guesses: list[list[int]], budget: int) -> None:
    tree = merge(guesses, budget)
    tree.validate(unique_siblings=True)
    everything = merge(guesses, budget=1000)
    assert len(tree) == min(budget, len(everything))
    assert tree.token_ids.tolist() == everything.prefix(budget).token_ids.tolist(), "deterministic, best guess first"
    assert tree.parents.tolist() == everything.prefix(budget).parents.tolist()


@settings(deadline=None)
@given(guesses, st.integers(0, 10), st.integers(0, 60), st.booleans())
def test_guesses_can_be_cut_without_losing_the_branch(
    guesses: list[list[int]], branch: int, kept: int, keep_branch: bool
) -> None:
    trie = merge(guesses, 1000)
    n = len(trie)
    tree = DraftTree(
        np.append(trie.token_ids, np.full(branch, 9)).astype(np.int32),
        np.append(trie.parents, [ROOT if i == 0 else n + i - 1 for i in range(branch)]).astype(np.int32),
        np.append(trie.depths, np.arange(1, branch + 1)).astype(np.int32),
        branch,
        np.linspace(1, 0, n, dtype=np.float32),
    )
    tree.validate()
    trimmed = tree.trimmed(kept, keep_branch=keep_branch)
    trimmed.validate()
    assert trimmed.num_guesses == min(kept, n)
    assert trimmed.num_branch == (branch if keep_branch else 0)
    assert trimmed.token_ids[: trimmed.num_guesses].tolist() == trie.token_ids[:kept].tolist()
    assert trimmed.token_ids[trimmed.num_guesses :].tolist() == [9] * trimmed.num_branch
    for prefix in range(len(tree) + 1):
        tree.prefix(prefix).validate()
    assert 9 not in tree.as_chain().token_ids, "a chain is made of guesses"


@settings(deadline=None)
@given(trees(), st.integers(0, 6), st.integers(1, 12))
def test_guesses_can_be_cut_by_depth(guessed: DraftTree, branch: int, depth: int) -> None:
    comb = DraftTree.chain([9] * branch)
    n = len(guessed)
    tree = DraftTree(
        np.append(guessed.token_ids, comb.token_ids),
        np.append(guessed.parents, np.where(comb.parents == ROOT, ROOT, comb.parents + n)).astype(np.int32),
        np.append(guessed.depths, comb.depths),
        branch,
        np.linspace(1, 0, n, dtype=np.float32),
    )
    cut = tree.up_to(depth)
    cut.validate()
    assert cut.num_branch == branch
    assert cut.token_ids[cut.num_guesses :].tolist() == [9] * branch
    guesses = cut.prefix(cut.num_guesses)
    assert paths(guesses) == {path for path in paths(guessed) if len(path) <= depth}


def test_trie_builder_tells_how_many_nodes_are_new() -> None:
    builder = TrieBuilder(budget=4)
    assert builder.add([1, 2]) == 2
    assert builder.add([1, 2]) == 0
    assert builder.add([1, 3]) == 1
    assert builder.add([4, 5, 6]) == 1, "cut off where the budget ends"
    assert builder.build().token_ids.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("token_ids", "parents", "depths", "message"),
    [
        ([1, 1], [ROOT, 1], [1, 2], "node 1 has parent 1"),
        ([1, 1], [ROOT, -2], [1, 2], "node 1 has parent -2"),
        ([1, 1], [ROOT, 0], [1, 1], "node 1 has depth 1, expected 2"),
        ([-1], [ROOT], [1], "node 0 has token -1"),
        ([1, 1], [ROOT, ROOT], [1, 1], "node 1 repeats token 1 among the children of -1"),
        ([1], [ROOT, 0], [1, 2], "parents is int32"),
    ],
)
def test_validate_names_what_is_wrong(
    token_ids: list[int], parents: list[int], depths: list[int], message: str
) -> None:
    tree = DraftTree(np.array(token_ids, np.int32), np.array(parents, np.int32), np.array(depths, np.int32))
    with pytest.raises(ValueError, match=message):
        tree.validate(unique_siblings=True)


@settings(deadline=None)  # the first call compiles
@given(trees())
def test_check_accepts_whatever_is_valid(tree: DraftTree) -> None:
    tree.check(vocab_size=4)
    chances = np.linspace(1.0, 0.0, len(tree), dtype=np.float32)
    replace(tree, chances=chances, sources=np.zeros(len(tree), np.uint8)).check(4, num_sources=1)


SOUND = DraftTree.from_parents([1, 2, 3], [ROOT, 0, 0])
CHANCES = np.array([0.5, 0.25, 0.25], np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": np.array([1, 2, 4], np.int32)}, "token 4 is not of the vocabulary, which has 4"),
        ({"token_ids": np.array([1, -2, 3], np.int32)}, "node 1 has token -2"),
        ({"token_ids": np.array([1, 2, 3])}, "token_ids is int64"),
        ({"token_ids": np.array([1.0, 2.0, 3.0])}, "token_ids is float64"),
        ({"token_ids": [1, 2, 3]}, "token_ids is a list"),
        ({"parents": np.array([ROOT, 2, 1], np.int32)}, "node 1 has parent 2"),
        ({"parents": np.array([0, 0, 0], np.int32)}, "node 0 has parent 0"),
        ({"parents": np.array([ROOT, -7, 0], np.int32)}, "node 1 has parent -7"),
        ({"parents": np.array([ROOT, 0], np.int32)}, r"parents is int32 \(2,\)"),
        ({"depths": np.array([1, 2, 3], np.int32)}, "node 2 has depth 3"),
        ({"depths": np.array([[1, 2, 2]], np.int32)}, r"depths is int32 \(1, 3\)"),
        ({"chances": CHANCES * np.float32(np.nan)}, "not between 0 and 1"),
        ({"chances": CHANCES * np.float32(np.inf)}, "not between 0 and 1"),
        ({"chances": -CHANCES}, "not between 0 and 1"),
        ({"chances": CHANCES * np.float32(3)}, "not between 0 and 1"),
        ({"chances": CHANCES[::-1].copy()}, "chances rise"),
        ({"chances": CHANCES[:2]}, "chances is float32"),
        ({"chances": CHANCES.astype(np.float64)}, "chances is float64"),
        ({"chances": CHANCES.tolist()}, "chances is a list"),
        ({"sources": np.array([0, 1, 2], np.uint8)}, "source 2: there are 2"),
        ({"sources": np.array([0, 1], np.uint8)}, "sources is uint8"),
        ({"num_branch": 4}, "num_branch is 4"),
        ({"num_branch": -1}, "num_branch is -1"),
    ],
)
def test_check_names_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    SOUND.check(4, 2)
    with pytest.raises(ValueError, match=message):
        replace(SOUND, **changes).check(4, 2)
