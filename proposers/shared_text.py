"""What all requests said: one bounded text that the requests of an engine write to, each in its own lines.

The text lies in blocks of ``text_index.BLOCK`` tokens. A request fills one block after the other; when all are in use
the oldest is written over, whoever it belonged to. So memory is bounded, and the oldest is forgotten first.

Requests of different namespaces share memory, nothing else: every place and every row bears its owner's number and is
found by this owner alone.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numba import njit

from proposers.numba_cache import CACHE
from proposers.text_index import (
    AFTER,
    BEFORE,
    BLOCK,
    BLOCK_HEADER,
    BLOCKS,
    CAPACITY,
    FILLED,
    HORIZON,
    NOBODY,
    NOW,
    TOKENS,
    WHOSE,
    allocate,
    count_token,
    link_place,
)
from proposers.tree import IntArray

WRITER = 4
CURRENT, BORN, WRITTEN, START = 0, 1, 2, 3
"""A writer: its block, when that was begun, up to where its request's text is written, and where that began."""


class SharedText:
    """The text of one engine's requests.

    Args:
        capacity: tokens to remember, at least one block's; rounded up to whole blocks.
        order: see ``text_index.allocate``.

    Attributes:
        state: int32, flat; see ``text_index.allocate``.
    """

    def __init__(self, capacity: int, order: int) -> None:
        blocks = max(2, -(-capacity // BLOCK))
        self.state = allocate(blocks * BLOCK, order, own_tokens=True, blocks=True)
        self.state[HORIZON] = blocks
        headers = self.state[self.state[BLOCKS] :].reshape(-1, BLOCK_HEADER)
        headers[:] = (-1, -1, 0, NOBODY)
        self._owners: OrderedDict[str, tuple[int, int]] = OrderedDict()  # namespace: its number, when it was last used
        self._next_owner = 1  # 0 is the owner of texts that nobody shares

    def owner(self, namespace: str) -> int:
        """The number of a namespace. Namespaces of which nothing is remembered any more are forgotten, too."""
        now = int(self.state[NOW])
        number, _ = self._owners.pop(namespace, (self._next_owner, now))
        if number == self._next_owner:
            self._next_owner += 1
        self._owners[namespace] = number, now
        while self._owners:
            oldest, (_, used) = next(iter(self._owners.items()))
            # twice: a request that began then may have written for a while
            if now - used <= 2 * self.state[HORIZON]:
                break
            del self._owners[oldest]
        return number

    @staticmethod
    def writer(start: int) -> IntArray:
        """Where a request stands that has written nothing: int32 [``WRITER``].

        Args:
            start: where in the request's text begins what it shares.
        """
        return np.array([-1, 0, start, start], np.int32)


@njit(cache=CACHE)
def write(state: IntArray, writer: IntArray, owner: int, text: IntArray) -> None:
    """Add what a request's text (int32 [t]) has gained since its last call."""
    headers = np.int64(state[BLOCKS])
    blocks = np.int64(state[CAPACITY]) // BLOCK
    tokens = np.int64(state[TOKENS])
    start = int(writer[START])
    block = int(writer[CURRENT])
    for at in range(writer[WRITTEN], len(text)):
        lost = ((np.int64(state[NOW]) - np.int64(writer[BORN])) & 0x7FFFFFFF) >= blocks
        if block >= 0 and lost:  # others were so busy that this request's block has been written over
            block = -1
            start = at
        if block < 0 or state[headers + block * BLOCK_HEADER + FILLED] == BLOCK:
            fresh = int(state[NOW]) % int(blocks)
            writer[BORN] = state[NOW]
            state[NOW] = (np.int64(state[NOW]) + 1) & 0x7FFFFFFF
            header = headers + fresh * BLOCK_HEADER
            state[header + BEFORE] = block
            state[header + AFTER] = -1
            state[header + FILLED] = 0
            state[header + WHOSE] = owner
            if block >= 0:
                state[headers + block * BLOCK_HEADER + AFTER] = fresh
            block = fresh
        header = headers + block * BLOCK_HEADER
        place = block * BLOCK + np.int64(state[header + FILLED])
        state[tokens + place] = text[at]
        state[header + FILLED] += 1
        link_place(state, text, start, at + 1, place, owner)
        count_token(state, text, 0, at, owner)
    writer[CURRENT] = block
    writer[WRITTEN] = len(text)
    writer[START] = start
