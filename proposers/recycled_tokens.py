"""Which tokens the target model found likely after a token when it saw it last (token recycling, Luo et al.,
arXiv 2408.08696): every verified node says so for its token, whether the node was accepted or not.

The paper keeps a row for every token of the vocabulary. Here rows are found by a hash of owner and token, in one table
of fixed size for all requests of an engine: so memory doesn't grow with the vocabulary nor with the number of
namespaces, and no row is reserved for a token or a tenant that is never seen. Requests of one namespace share a number,
a request without a namespace has one of its own, and a row is found by its owner alone: nobody learns from another
namespace. What gives way to a new row is the oldest of the ``WAYS`` rows beside it.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numba import njit

from proposers.numba_cache import CACHE
from proposers.text_index import extend_key, first_key
from proposers.tree import IntArray

ROWS = 1 << 16
"""Rows of a table: each takes 8 bytes and 4 for each token that it holds."""
WAYS = 4
"""A token's row is one of so many beside each other, the last written first."""
OWNER, TOKEN, TOP = 0, 1, 2
"""Columns of a row: whose it is, after which token, and the likeliest tokens, likeliest first, -1 where unknown."""
MOST_NAMESPACES = 4096
"""How many are told apart; the one that was longest without a new request begins anew."""


class RecycledTokens:
    """What the requests of one engine remember.

    Args:
        k: how many tokens are kept for each.
        rows: how many tokens at most, a power of 2.

    Attributes:
        state: int32 [rows, ``TOP`` + k].
    """

    def __init__(self, k: int, rows: int = ROWS) -> None:
        self.state = np.full((rows, TOP + k), -1, np.int32)
        self._owners: OrderedDict[str, int] = OrderedDict()
        self._next_owner = 0

    def owner(self, namespace: str | None) -> int:
        """The number of a namespace; of None a new one, for a request that shares with nobody."""
        known = None if namespace is None else self._owners.pop(namespace, None)
        number = self._next_owner if known is None else known
        if known is None:
            self._next_owner += 1
        if namespace is not None:
            self._owners[namespace] = number
            if len(self._owners) > MOST_NAMESPACES:
                self._owners.popitem(last=False)
        return number


@njit(cache=CACHE, inline="always")
def _first_way(state: IntArray, owner: int, token: int) -> int:
    mask = np.uint64(state.shape[0] // WAYS - 1)
    return int(WAYS * np.int64((extend_key(first_key(owner), token) >> np.uint64(32)) & mask))


@njit(cache=CACHE, inline="always")
def find_recycled(state: IntArray, owner: int, token: int) -> int:
    """The row of a token, or -1."""
    first = _first_way(state, owner, token)
    for row in range(first, first + WAYS):
        if state[row, TOKEN] == token and state[row, OWNER] == owner:
            return row
    return -1


@njit(cache=CACHE)
def recycle(state: IntArray, owner: int, tokens: IntArray, top: IntArray) -> None:
    """Write what the target model found likely; of a token that comes twice, the last counts.

    Args:
        state: see ``RecycledTokens``.
        owner: whose it is.
        tokens: int32 [n], where it was asked.
        top: int32 [n, k], what it said there.
    """
    for i in range(len(tokens)):
        first = _first_way(state, owner, tokens[i])
        row = first
        while row < first + WAYS - 1 and not (state[row, TOKEN] == tokens[i] and state[row, OWNER] == owner):
            row += 1
        # loops, not slices: these are so short that a slice takes longer
        while row > first:
            for column in range(state.shape[1]):
                state[row, column] = state[row - 1, column]
            row -= 1
        state[first, OWNER] = owner
        state[first, TOKEN] = tokens[i]
        for rank in range(top.shape[1]):
            state[first, TOP + rank] = top[i, rank]


@njit(cache=CACHE)
def note(
    tokens: IntArray,
    top: IntArray,
    count: int,
    root: int,
    nodes: IntArray,
    verified: int,
    said: IntArray,
    path: IntArray,
) -> int:
    """Keep what a step said until ``recycle`` may have it: its accepted nodes last, because they are no guesses.

    Args:
        tokens: int32 [room], receives the tokens.
        top: int32 [room, k], receives what was said after each.
        count: how many are kept already; if there is no room for more, these are dropped.
        root: the root's token.
        nodes: int32 [>= m], the nodes' tokens.
        verified: m, how many of them count.
        said: int32 [>= m + 1, k], the likeliest tokens after the root (entry 0) and after node i (entry i + 1).
        path: int32 [a], the accepted nodes, from the root down; those beyond m are left out.

    Returns:
        How many are kept now.
    """
    if count + verified + 1 > len(tokens):
        count = 0
    accepted = len(path) - 1
    while accepted >= 0 and path[accepted] >= verified:
        accepted -= 1
    last = accepted
    for i in range(verified - 1, -1, -1):
        if accepted >= 0 and path[accepted] == i:
            accepted -= 1
        else:
            count = _keep(tokens, top, count, nodes[i], said[i + 1])
    count = _keep(tokens, top, count, root, said[0])
    for i in path[: last + 1]:
        count = _keep(tokens, top, count, nodes[i], said[i + 1])
    return count


@njit(cache=CACHE)
def _keep(tokens: IntArray, top: IntArray, count: int, token: int, said: IntArray) -> int:
    tokens[count] = token
    for rank in range(len(said)):
        top[count, rank] = said[rank]
    return count + 1
