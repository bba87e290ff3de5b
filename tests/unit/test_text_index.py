"""The index over a text: what followed, how often, and where; exactly the text's, however it grew."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from proposers.text_index import (
    FOLLOWERS,
    LONG,
    MAX_COMPARED,
    MOST,
    ROW,
    SLOTS,
    TOKEN_BITS,
    TOKEN_MASK,
    allocate,
    extend,
    extend_key,
    find_places,
    find_row,
    first_key,
    row_key,
)

ORDER = 4


def index(text: list[int], capacity: int = 4096) -> np.ndarray:
    state = allocate(capacity, ORDER, own_tokens=False)
    extend(state, np.array(text, np.int32), len(text) - 1)
    return state


@njit
def row_of(state: np.ndarray, ngram: np.ndarray, owner: int) -> int:
    key = first_key(owner)
    for i in range(1, len(ngram) + 1):
        key = extend_key(key, ngram[-i])
    return find_row(state, row_key(key, len(ngram)), owner)


def followers(state: np.ndarray, ngram: list[int], owner: int = 0) -> list[tuple[int, int]]:
    """(token, count) of what followed an n-gram, as the row has them."""
    row = row_of(state, np.array(ngram, np.int32), owner)
    if row < 0:
        return []
    values = [int(value) for value in state[row + FOLLOWERS : row + ROW] if value]
    return [(value & TOKEN_MASK, value >> TOKEN_BITS) for value in values]


def places(state: np.ndarray, text: list[int], most: int = 8, steps: int = 100) -> list[tuple[int, int]]:
    """(place, agreement), as they are found."""
    found, matches = np.empty(most, np.int32), np.empty(most, np.int32)
    context = np.array(text, np.int32)
    count = find_places(state, context, context, 0, steps, found, matches)
    return list(zip(found[:count].tolist(), matches[:count].tolist(), strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_followers_are_counted_as_they_came(seed: int) -> None:
    text = np.random.default_rng(seed).integers(0, 4, 80).tolist()
    state = index(text)
    for n in range(1, ORDER):
        counted: dict[tuple[int, ...], Counter[int]] = {}
        for at in range(n, len(text)):
            counted.setdefault(tuple(text[at - n : at]), Counter())[text[at]] += 1
        for ngram, expected in counted.items():
            found = followers(state, list(ngram))
            assert dict(found) == expected
            assert [count for _, count in found] == sorted(expected.values(), reverse=True)


def test_among_equally_frequent_followers_the_last_seen_comes_first() -> None:
    assert followers(index([1, 10, 1, 20, 1, 30, 1]), [1]) == [(30, 1), (20, 1), (10, 1)]


def test_a_full_row_keeps_the_frequent_and_the_recent() -> None:
    text = [1, 7, 1, 7] + [token for i in range(SLOTS + 5) for token in (1, 100 + i)]
    found = followers(index(text), [1])
    assert len(found) == SLOTS
    assert found[0] == (7, 2)
    assert found[1] == (100 + SLOTS + 4, 1)


def test_counts_stop_growing() -> None:
    found = followers(index([1, 2] * (MOST + 10) + [1, 3], capacity=8192), [1])
    assert found[0][0] == 2
    assert MOST // 2 <= found[0][1] <= MOST


def test_tokens_that_a_row_has_no_room_for_are_left_out() -> None:
    assert followers(index([1, TOKEN_MASK + 1, 2, 3]), [1]) == []


@given(st.lists(st.integers(0, 2), min_size=1, max_size=100), st.integers(1, 8))
def test_places_agree_as_far_as_is_said(text: list[int], most: int) -> None:
    found = places(index(text), text, most)
    assert [length for _, length in found] == sorted((length for _, length in found), reverse=True)
    expected = []
    for place in range(len(text) - 1):
        length = 0
        while length <= place and text[place - length] == text[-1 - length] and length < MAX_COMPARED:
            length += 1
        if length >= ORDER:
            expected.append((place, length))
    assert set(found) <= set(expected)
    assert len(found) == min(most, len(expected))
    if expected:
        assert max(length for _, length in found) == max(length for _, length in expected)


def test_the_longest_agreement_is_found_among_many_short_ones() -> None:
    rng = np.random.default_rng(0)
    short = [50, 51, 52, 53]
    long = [*rng.integers(100, 200, LONG).tolist(), *short]
    text = [*long, 1, 2, *(token for i in range(200) for token in (*short, 300 + i)), *long]
    found = places(index(text), text, most=4, steps=16)
    assert found[0] == (len(long) - 1, len(long))


@given(st.lists(st.integers(0, 3), min_size=2, max_size=120), st.data())
def test_an_index_that_grew_equals_one_made_at_once(text: list[int], data: st.DataObject) -> None:
    array = np.array(text, np.int32)
    grown = allocate(4096, ORDER, own_tokens=False)
    end = 0
    while end < len(text) - 1:
        end = data.draw(st.integers(end + 1, len(text) - 1))
        extend(grown, array, end)
    assert (grown == index(text))[: grown[5]].all()
    assert places(grown, text) == places(index(text), text)
