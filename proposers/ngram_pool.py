"""The n-gram pool of lookahead decoding: for a token, the last few n-grams that were seen to begin with it.

At most G n-grams are kept per first token; seeing one again makes it the newest, and the oldest gives way. These are
the rules of ``update_token_map`` in hao-ai-lab/LookaheadDecoding (lade/decoding.py), here over one flat array.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from proposers.numba_cache import CACHE
from proposers.tree import IntArray

# The state: HEADER entries, then the hash table [2 ** bits] of row numbers (-1: free; linear probing, at most half
# full), then the rows: first token, number of n-grams, and the n-grams' other tokens, oldest n-gram first.
HEADER = 6
ROWS, CAPACITY, BITS, GUESSES, LENGTH, INDEXED = 0, 1, 2, 3, 4, 5
ROW_HEADER = 2


class NgramPool:
    """The pool of one request.

    Args:
        ngram_size: N, at least 2; the key is the first token, so N - 1 are stored.
        guess_set_size: G, at least 0; with 0 the pool stays empty.

    Attributes:
        state: int32, flat. ``2 + G * (N - 1)`` integers for each distinct first token, so memory is bounded by the
            number of different tokens that the request saw.
    """

    def __init__(self, ngram_size: int, guess_set_size: int) -> None:
        self._row = ROW_HEADER + guess_set_size * (ngram_size - 1)
        self.state = self._allocate(64)
        self.state[GUESSES] = guess_set_size
        self.state[LENGTH] = ngram_size - 1

    def reserve(self, keys: int) -> None:
        """Make room for that many more first tokens. The kernels rely on it."""
        rows = int(self.state[ROWS])
        if rows + keys <= self.state[CAPACITY]:
            return
        old = self.state
        self.state = self._allocate(2 * (rows + keys))
        for name in (ROWS, GUESSES, LENGTH, INDEXED):
            self.state[name] = old[name]
        source = _first_row(old)
        target = _first_row(self.state)
        self.state[target : target + rows * self._row] = old[source : source + rows * self._row]
        _rehash(self.state)

    def extend(self, context: IntArray) -> None:
        """Add all n-grams of ``context`` (int32 [t]) that were not added before; it must go on where it ended."""
        block = 1024
        while (start := int(self.state[INDEXED])) < len(context):
            end = min(start + block, len(context))
            self.reserve(end - start)
            extend(self.state, context[:end])

    def contents(self) -> dict[int, list[tuple[int, ...]]]:
        """First token to its n-grams' other tokens, oldest first (for tests and for looking inside)."""
        guesses, length = int(self.state[GUESSES]), int(self.state[LENGTH])
        start = _first_row(self.state)
        rows = self.state[start : start + int(self.state[ROWS]) * self._row].reshape(-1, self._row)
        return {
            int(row[0]): [tuple(g.tolist()) for g in row[ROW_HEADER:].reshape(guesses, length)[: row[1]]]
            for row in rows
            if row[1] > 0
        }

    def _allocate(self, capacity: int) -> IntArray:
        bits = int(2 * capacity - 1).bit_length()
        state = np.empty(HEADER + (1 << bits) + capacity * self._row, np.int32)
        state[:HEADER] = (0, capacity, bits, 0, 0, 0)
        state[HEADER : HEADER + (1 << bits)] = -1
        return state


@njit(cache=CACHE)
def _first_row(state: IntArray) -> int:
    return HEADER + (1 << state[BITS])


@njit(cache=CACHE)
def _slot(state: IntArray, key: int) -> int:
    """Index in ``state`` of the hash table's entry for ``key``: its row number, or -1 where it would go."""
    bits = state[BITS]
    size = ROW_HEADER + state[GUESSES] * state[LENGTH]
    rows = _first_row(state)
    slot = np.int64((np.uint64(key + 1) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - bits))
    while True:
        row = state[HEADER + slot]
        if row < 0 or state[rows + row * size] == key:
            return int(HEADER + slot)
        slot = (slot + 1) & ((1 << bits) - 1)


@njit(cache=CACHE)
def _rehash(state: IntArray) -> None:
    size = ROW_HEADER + state[GUESSES] * state[LENGTH]
    for row in range(state[ROWS]):
        state[_slot(state, state[_first_row(state) + row * size])] = row


@njit(cache=CACHE)
def add(state: IntArray, key: int, gram: IntArray) -> None:
    """Make ``gram`` (int32 [N - 1]) the newest n-gram of ``key``. There must be room for one more key."""
    guesses = state[GUESSES]
    if guesses == 0:
        return
    length = state[LENGTH]
    size = ROW_HEADER + guesses * length
    slot = _slot(state, key)
    if state[slot] < 0:
        state[slot] = state[ROWS]
        state[ROWS] += 1
        fresh = _first_row(state) + state[slot] * size
        state[fresh] = key
        state[fresh + 1] = 0
    row = _first_row(state) + state[slot] * size
    count = state[row + 1]
    first = row + ROW_HEADER
    same = 0
    while same < count:
        k = 0
        while k < length and state[first + same * length + k] == gram[k]:
            k += 1
        if k == length:
            break
        same += 1
    if same == count and count < guesses:
        state[row + 1] = count + 1
        end = first + count * length
    else:
        # Close the gap that the n-gram leaves, or the oldest one (number 0) if it is new.
        gap = same if same < count else 0
        end = first + (count - 1) * length
        for at in range(first + gap * length, end):
            state[at] = state[at + length]
    for k in range(length):
        state[end + k] = gram[k]


@njit(cache=CACHE)
def extend(state: IntArray, context: IntArray) -> None:
    """Add the n-grams of ``context`` that end at or after the position where the last call stopped."""
    length = state[LENGTH]
    for end in range(max(state[INDEXED], length), len(context)):
        add(state, context[end - length], context[end - length + 1 : end + 1])
    state[INDEXED] = len(context)


@njit(cache=CACHE)
def gather_guesses(state: IntArray, key: int, tokens: IntArray) -> int:
    """Write the n-grams of ``key``, newest first, to ``tokens`` (int32 [g, >= N - 1]); returns how many, at most g."""
    row_number = state[_slot(state, key)]
    if row_number < 0:
        return 0
    length = state[LENGTH]
    row = _first_row(state) + row_number * (ROW_HEADER + state[GUESSES] * length)
    count = state[row + 1]
    taken = min(count, len(tokens))
    for i in range(taken):
        start = row + ROW_HEADER + (count - 1 - i) * length
        for k in range(length):
            tokens[i, k] = state[start + k]
    return taken
