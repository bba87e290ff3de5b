"""Where did the last tokens of the context occur before? An index that grows with the context and never rescans it.

For every n-gram size there is a hash table from the n-gram to the last position where it ended, and an array that links
each position to the one before with the same hash: the matches of a suffix are a walk along such a chain, most recent
first, bounded in length. Hash collisions are sorted out by comparing tokens with the context itself.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from proposers.tree import IntArray

# The state is one flat int32 array, so that a kernel call has one argument for it: HEADER entries, then per n-gram
# size the links [capacity] and then per n-gram size the heads [2 ** bits].
HEADER = 4
INDEXED, CAPACITY, BITS = 0, 1, 2


class ContextIndex:
    """The index over one request's context.

    Args:
        min_ngram: smallest n-gram that is looked up.
        max_ngram: largest n-gram that is looked up.

    Attributes:
        state: int32, flat; grown by ``reserve``. Memory is about ``2 * (max_ngram - min_ngram + 1)`` integers for each
            token, and up to three times as much while the context has just outgrown the last reservation.
    """

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        self.sizes = max_ngram - min_ngram + 1
        self.state = self._allocate(0)

    def reserve(self, length: int) -> None:
        """Make room for a context of ``length`` tokens. Outgrown tables are dropped and filled again by ``extend``."""
        if length > self.state[CAPACITY]:
            self.state = self._allocate(length)

    def _allocate(self, length: int) -> IntArray:
        capacity = length + length // 2 + 256
        bits = int(capacity - 1).bit_length()
        state = np.empty(HEADER + self.sizes * (capacity + (1 << bits)), np.int32)
        state[:HEADER] = 0
        state[CAPACITY] = capacity
        state[BITS] = bits
        state[HEADER + self.sizes * capacity :] = -1
        return state


@njit(cache=True, inline="always")
def _step(key: np.uint64, token: int) -> np.uint64:
    return (key ^ np.uint64(token + 1)) * np.uint64(0x9E3779B97F4A7C15)


@njit(cache=True)
def extend(state: IntArray, context: IntArray, end: int, min_ngram: int, max_ngram: int) -> None:
    """Index the n-grams that end before position ``end`` and are not indexed yet."""
    capacity = state[CAPACITY]
    bits = state[BITS]
    shift = np.uint64(64 - bits)
    heads = HEADER + (max_ngram - min_ngram + 1) * capacity
    for position in range(state[INDEXED], end):
        key = np.uint64(0)
        for n in range(1, min(max_ngram, position + 1) + 1):
            key = _step(key, context[position + 1 - n])
            if n >= min_ngram:
                row = n - min_ngram
                head = heads + (row << bits) + np.int64(key >> shift)
                state[HEADER + row * capacity + position] = state[head]
                state[head] = position
    if end > state[INDEXED]:
        state[INDEXED] = end


@njit(cache=True)
def find(
    state: IntArray,
    context: IntArray,
    min_ngram: int,
    max_ngram: int,
    max_match: int,
    steps: int,
    positions: IntArray,
    matches: IntArray,
) -> int:
    """Earlier positions whose tokens up to there equal the end of the context, longest match first, then most recent.

    Args:
        state: the index, extended to all positions but the last.
        context: int32 [t].
        min_ngram: as the index was made with.
        max_ngram: as the index was made with.
        max_match: how far to compare; longer matches count as this long.
        steps: longest walk along one chain.
        positions: int32 [m], receives the position of each match's last token.
        matches: int32 [m], receives its length.

    Returns:
        The number of matches, at most m. Within one n-gram size, lengths beyond ``max_ngram`` are not ordered.
    """
    capacity = state[CAPACITY]
    bits = state[BITS]
    shift = np.uint64(64 - bits)
    heads = HEADER + (max_ngram - min_ngram + 1) * capacity
    last = len(context) - 1
    start = np.empty(max_ngram + 1, np.int64)
    key = np.uint64(0)
    largest = min(max_ngram, last + 1)
    for n in range(1, largest + 1):
        key = _step(key, context[last + 1 - n])
        if n >= min_ngram:
            start[n] = state[heads + ((n - min_ngram) << bits) + np.int64(key >> shift)]
    found = 0
    for n in range(largest, min_ngram - 1, -1):
        links = HEADER + (n - min_ngram) * capacity
        position = start[n]
        walked = 0
        while position >= 0 and walked < steps and found < len(positions):
            walked += 1
            length = 0
            limit = min(max_match, position + 1)
            while length < limit and context[position - length] == context[last - length]:
                length += 1
            # Shorter: a hash collision. Longer: a larger n-gram's chain had it.
            if length == n or (length > n and n == largest):
                positions[found] = position
                matches[found] = length
                found += 1
            position = state[links + position]
    return found
