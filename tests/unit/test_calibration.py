"""What guesses are worth is learnt from the text: by what they rest on, a little by request, for all that follow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proposers import PromptLookup, PromptLookupOptions
from proposers.calibration import (
    AGREEMENTS,
    COPIES,
    CORPUS,
    KNOWLEDGE,
    LENGTHS,
    LEVELS,
    LOCAL,
    MOST,
    POOL,
    RANKS,
    RECYCLED,
    SHARED,
    SOURCES,
    TEXTS,
    Calibration,
    agreement_class,
    chance,
    copy_level,
    knowledge,
    learn,
    prior,
    row_level,
    source_of,
)

COPY = copy_level(LOCAL, agreement_class(9), 0)
ROW = row_level(2, LOCAL, knowledge(5, 2), 0)
TOKENS = np.array([1, 2, 5], np.int32)
KINDS = np.array([COPY, COPY, ROW], np.int32)
"""Copies say 1 or 2, else it may be 5, which was seen after the last two tokens."""


def learnt(token: int, times: int = 2000) -> tuple[float, float]:
    """The chances of both levels when this token has always come."""
    engine, request = Calibration(), Calibration.start()
    for _ in range(times):
        learn(engine.state, request, TOKENS, KINDS, 3, token)
    return chance(engine.state, request, COPY), chance(engine.state, request, ROW)


def test_every_kind_of_level_is_another_one() -> None:
    rows = {
        row_level(n, source, own, others): source
        for n in range(1, LENGTHS + 1)
        for source in range(TEXTS)
        for own in range(KNOWLEDGE)
        for others in range(KNOWLEDGE)
    }
    copies = {
        copy_level(source, agreement, several): source
        for source in (*range(TEXTS), POOL)
        for agreement in range(AGREEMENTS)
        for several in range(3)
    }
    assert sorted(rows) == list(range(COPIES))
    assert sorted(copies) == list(range(COPIES, RANKS))
    assert all(source_of(level) == source for level, source in (rows | copies).items())
    assert source_of(RANKS) == source_of(LEVELS - 1) == RECYCLED == len(SOURCES) - 1
    assert row_level(7, SHARED, 1, 0) == row_level(LENGTHS, SHARED, 1, 0)


def test_longer_agreement_is_never_another_class_than_its_neighbours() -> None:
    classes = [agreement_class(agreement) for agreement in range(300)]
    assert classes == sorted(classes)
    assert set(classes) == set(range(AGREEMENTS))


def test_nothing_seen_nothing_learnt() -> None:
    engine, request = Calibration(), Calibration.start()
    learn(engine.state, request, TOKENS, KINDS, 0, 1)
    assert [chance(engine.state, request, level) for level in range(LEVELS)] == pytest.approx(prior())


def test_what_always_holds_is_trusted_and_what_comes_after_it_is_not_judged() -> None:
    copy, row = learnt(1)
    assert copy > 0.98
    assert row == pytest.approx(prior()[ROW], rel=0.5)


def test_what_never_holds_is_not() -> None:
    copy, row = learnt(9)
    assert copy < 0.02
    assert row < 0.02


def test_each_level_is_judged_by_what_the_ones_before_it_left() -> None:
    copy, row = learnt(5)
    assert copy < 0.02
    assert row > 0.98


def test_a_new_request_starts_from_what_others_taught() -> None:
    engine = Calibration()
    request = engine.start()
    for _ in range(2000):
        learn(engine.state, request, TOKENS, KINDS, 3, 9)
    assert chance(engine.state, engine.start(), COPY) < prior()[COPY] / 10


def test_a_request_in_which_nothing_holds_is_trusted_less_than_others() -> None:
    engine, request = Calibration(), Calibration.start()
    for _ in range(40):
        learn(engine.state, request, TOKENS, KINDS, 3, 9)
        for _ in range(9):  # meanwhile
            learn(engine.state, engine.start(), TOKENS, KINDS, 3, 1)
    assert chance(engine.state, request, COPY) < 0.8 * chance(engine.state, engine.start(), COPY)
    other = copy_level(CORPUS, 5, 0)
    assert chance(engine.state, request, other) == chance(engine.state, engine.start(), other), "of that source only"


@given(st.lists(st.integers(0, 9), max_size=200))
def test_chances_stay_chances(text: list[int]) -> None:
    engine, request = Calibration(), Calibration.start()
    for token in text:
        learn(engine.state, request, TOKENS, KINDS, 3, token)
    for level in range(LEVELS):
        assert 0 <= chance(engine.state, request, level) <= MOST


def test_a_text_that_repeats_itself_is_drafted_with_confidence() -> None:
    proposer = PromptLookup(PromptLookupOptions())
    text = np.tile(np.arange(7, dtype=np.int32), 40)
    request = proposer.start("loops", text[:14])
    first = request.propose(text[:15], 48)
    for end in range(16, 200, 3):
        last = request.propose(text[:end], 48)
    assert first.chances is not None
    assert last.chances is not None
    assert last.chances.sum() > 1.5 * first.chances.sum()
    assert (np.diff(last.chances) <= 0).all()
