"""What guesses are worth is learnt from the text: by length of match, by request, and for the next request."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proposers import PromptLookup, PromptLookupOptions
from proposers.calibration import CHANCE, HIT, Calibration, learn

# a root with the children 1 and 2, which rest on a match of 3 tokens, and below the 1 a child 5, which rests on 4
TREE = np.array([[1, 2, 5], [-1, -1, 0], [1, 1, 2], [3, 3, 4]], np.int32)


def learnt(emitted: list[int], times: int = 200) -> np.ndarray:
    engine = Calibration()
    request = engine.start()
    for _ in range(times):
        learn(engine.state, request, TREE, 3, np.array(emitted, np.int32))
    return request[CHANCE]


def test_nothing_seen_nothing_learnt() -> None:
    assert Calibration().start()[CHANCE] == pytest.approx(HIT)
    assert learnt([]) == pytest.approx(HIT)


def test_what_always_holds_is_trusted() -> None:
    chance = learnt([1, 5])
    assert chance[3] > 0.95
    assert chance[4] > 0.95


def test_what_never_holds_is_not() -> None:
    chance = learnt([9])
    assert chance[3] < 0.1
    assert chance[1] < HIT[1], "and the rest is trusted less, too"


def test_each_length_of_match_is_judged_for_itself() -> None:
    chance = learnt([1, 9])
    assert chance[3] > 0.9
    assert chance[4] < 0.2


def test_a_leaf_says_nothing() -> None:
    """What follows the node 2, which has no child, was not guessed at all."""
    assert learnt([2, 7]) == pytest.approx(learnt([2]))


def test_a_new_request_starts_from_what_others_taught() -> None:
    engine = Calibration()
    request = engine.start()
    for _ in range(500):
        learn(engine.state, request, TREE, 3, np.array([9], np.int32))
    assert engine.start()[CHANCE][3] < HIT[3] / 2


@given(st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=50))
def test_chances_stay_chances(texts: list[list[int]]) -> None:
    engine = Calibration()
    request = engine.start()
    for emitted in texts:
        learn(engine.state, request, TREE, 3, np.array(emitted, np.int32))
    for state in (engine.state, request):
        assert ((state[CHANCE] >= 0) & (state[CHANCE] <= 1)).all()


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
