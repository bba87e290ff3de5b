"""All sources at once: a step that may stop early says what it would have said had it asked everything."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proposers import DraftTree, PromptLookup, PromptLookupOptions, RequestInfo, Verified
from proposers.corpus import write_index
from proposers.tree import IntArray

TOP = 4
EVERYTHING = 1000


def words(seed: int, length: int) -> IntArray:
    return np.random.default_rng(seed).zipf(1.4, length).astype(np.int32) % 40


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "index"
    write_index(words(0, 400), path, 4)
    return path


def trees(index: Path, seed: int, budgets: list[int], threshold: float) -> list[DraftTree]:
    """The trees of a request's steps, each made from the same knowledge with each of these budgets."""
    proposer = PromptLookup(
        PromptLookupOptions(
            max_draft_tokens=EVERYTHING,
            max_depth=4,
            min_probability=threshold,
            shared_tokens=256,
            recycled_tokens=TOP,
        )
    )
    proposer.use_corpus(index)
    proposer.start("another", words(seed, 1)).propose(words(seed, 100), 8)
    text = np.concatenate((words(seed + 1, 60), words(seed, 40)))
    request = proposer.start("r", text[:50], RequestInfo(prediction=words(seed, 30)))
    rng = np.random.default_rng(seed)
    found = []
    for end in range(52, 80, 3):
        found += [copy.deepcopy(request).propose(text[:end], budget) for budget in budgets]
        tree = request.propose(text[:end], 20)
        top = rng.integers(0, 40, (len(tree) + 1, TOP)).astype(np.int32)
        request.observe(tree, Verified(text[end : end + 3], np.empty(0, np.int32), None, len(tree), top))
    return found


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 80))
def test_a_smaller_budget_gives_a_prefix(index: Path, seed: int, budget: int) -> None:
    pairs = trees(index, seed, [budget, EVERYTHING], 0.0)
    for few, everything in zip(pairs[::2], pairs[1::2], strict=True):
        everything.validate(unique_siblings=True)
        expect_prefix(few, everything, min(budget, len(everything)))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.floats(0.0001, 0.2))
def test_a_threshold_leaves_out_what_is_below_and_nothing_else(index: Path, seed: int, threshold: float) -> None:
    likely, everything = (trees(index, seed, [EVERYTHING], least) for least in (threshold, 0.0))
    # only the first: later ones have learnt from different trees
    chances = everything[0].chances
    assert chances is not None
    least, most = (int((chances > threshold * (1 + doubt)).sum()) for doubt in (1e-6, -1e-6))
    assert least <= len(likely[0]) <= most
    expect_prefix(likely[0], everything[0], len(likely[0]))


def expect_prefix(few: DraftTree, everything: DraftTree, length: int) -> None:
    assert len(few) == length
    if length == 0:
        return
    for name in ("token_ids", "parents", "depths", "chances", "sources"):
        assert np.array_equal(getattr(few, name), getattr(everything, name)[:length]), name
