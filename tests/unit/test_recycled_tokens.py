"""The table of recycled tokens: what was written last is found, by its owner alone, in a fixed amount of memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from proposers.recycled_tokens import MOST_NAMESPACES, TOP, WAYS, RecycledTokens, find_recycled, note, recycle

K = 3


@njit
def row_of(state: np.ndarray, owner: int, token: int) -> int:
    return find_recycled(state, owner, token)


def said(state: np.ndarray, owner: int, token: int) -> list[int] | None:
    row = row_of(state, owner, token)
    return None if row < 0 else state[row, TOP:].tolist()


def write(state: np.ndarray, owner: int, rows: dict[int, list[int]]) -> None:
    recycle(state, owner, np.array(list(rows), np.int32), np.array(list(rows.values()), np.int32).reshape(-1, K))


entries = st.tuples(st.integers(0, 2), st.integers(0, 200_000), st.lists(st.integers(0, 9), min_size=K, max_size=K))


@given(st.lists(entries, max_size=60))
def test_what_was_written_last_is_found_and_nothing_else(written: list[tuple[int, int, list[int]]]) -> None:
    state = RecycledTokens(K, rows=1024).state
    known: dict[tuple[int, int], list[int]] = {}
    for owner, token, top in written:
        write(state, owner, {token: top})
        known[owner, token] = top
        assert said(state, owner, token) == top
    kept = {key: said(state, *key) for key in known}
    assert all(top in (None, known[key]) for key, top in kept.items())
    # of two rows in a hundred buckets, five have to meet before one is lost
    assert len(known) < WAYS or sum(top is not None for top in kept.values()) >= len(known) * 0.9
    assert said(state, 3, written[0][1] if written else 0) is None


def test_the_row_that_was_not_written_for_longest_gives_way() -> None:
    table = RecycledTokens(K, rows=WAYS)  # all tokens beside each other
    for token in (10, 20, 30, 40, 10, 50):
        write(table.state, 0, {token: [token] * K})
    assert said(table.state, 0, 20) is None
    assert [said(table.state, 0, token) for token in (30, 40, 10, 50)] == [[token] * K for token in (30, 40, 10, 50)]


def test_of_a_token_that_comes_twice_the_last_counts() -> None:
    state = RecycledTokens(K).state
    recycle(state, 0, np.array([7, 8, 7], np.int32), np.arange(9, dtype=np.int32).reshape(3, K))
    assert said(state, 0, 7) == [6, 7, 8]
    assert said(state, 0, 8) == [3, 4, 5]


def test_a_namespace_keeps_its_number_and_nobody_else_gets_it() -> None:
    table = RecycledTokens(K)
    numbers = [table.owner(name) for name in ("", "a", None, "", "a", None)]
    assert numbers[0] == numbers[3]
    assert numbers[1] == numbers[4]
    assert len(set(numbers)) == 4


def test_any_number_of_namespaces_leaves_memory_flat() -> None:
    table = RecycledTokens(K, rows=1024)
    size, first = table.state.nbytes, table.owner("first")
    for i in range(2 * MOST_NAMESPACES):
        write(table.state, table.owner(str(i)), {5: [1, 2, 3]})
    assert table.state.nbytes == size
    assert len(table._owners) == MOST_NAMESPACES
    assert table.owner("first") > first, "forgotten, and never given to another"


def noted(count: int, nodes: list[int], path: list[int], room: int = 8) -> tuple[list[int], list[int]]:
    tokens, top = np.zeros(room, np.int32), np.zeros((room, 1), np.int32)
    arrays = [np.array(values, np.int32) for values in (nodes, [[100 + i] for i in range(len(nodes) + 1)], path)]
    end = note(tokens, top, count, 9, arrays[0], len(arrays[0]), *arrays[1:])
    return tokens[:end].tolist(), top[:end, 0].tolist()


def test_accepted_nodes_are_noted_after_guesses_and_each_with_what_was_said_after_it() -> None:
    assert noted(0, [1, 2, 3, 4], [0, 2]) == ([4, 2, 9, 1, 3], [104, 102, 100, 101, 103])
    assert noted(0, [], []) == ([9], [100])


@pytest.mark.parametrize(("count", "kept"), [(5, 8), (6, 3)])
def test_where_there_is_no_room_the_older_is_dropped(count: int, kept: int) -> None:
    assert len(noted(count, [1, 2], [])[0]) == kept
