"""The 2-D window of lookahead decoding: a few Jacobi iterations' guesses for the positions after the root.

From "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding" (Fu et al., arXiv 2402.02057); how the
window is filled and moved follows ``jacobi_greedy_search_multilevel`` in hao-ai-lab/LookaheadDecoding
(lade/decoding.py).

Level 0 holds the tokens guessed for the W - 1 positions after the root. Levels 1 to N - 2 are later Jacobi iterations
over W columns: column 0 stands on the root, column c on token c - 1 of level 0; the token of level l in column c is a
guess for position root + c + l. As a draft tree the window is a comb: level 0 is the trunk, a column's upper levels are
the tooth on its trunk node. What the model says after a column's last token (the *tip*) is the column's next level, and
trunk node, tooth and tip together are an n-gram for the pool.

At first there is only level 0, W + N - 3 tokens of the context drawn at random. Each step adds a level and uses up a
token of level 0, until all N - 1 levels are there.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numba import njit

from proposers import ngram_pool
from proposers.numba_cache import CACHE
from proposers.tree import IntArray

# The state: HEADER entries, then the levels and the tips, ``stride`` entries each.
HEADER = 8
WINDOW, NGRAM, TOP, ALIGNED, KNOWN, SEED, DRAWS, STEPS = range(8)


class JacobiWindow:
    """The window of one request.

    Args:
        window_size: W, at least 1.
        ngram_size: N, at least 2.
        request_id: the only source of randomness, so that all tensor-parallel ranks draw alike.

    Attributes:
        state: int32, flat. ``TOP`` is the highest level that is filled, ``ALIGNED`` the length of the context whose
            last token the window stands on (0 before the first), ``KNOWN`` how many columns' tips are known,
            ``DRAWS`` how many random tokens were drawn, ``STEPS`` how often the root moved.
    """

    def __init__(self, window_size: int, ngram_size: int, request_id: str) -> None:
        self.state = np.zeros(HEADER + ngram_size * _stride(window_size, ngram_size), np.int32)
        self.state[WINDOW] = window_size
        self.state[NGRAM] = ngram_size
        self.state[SEED] = np.frombuffer(blake2b(request_id.encode(), digest_size=4).digest(), "<i4")[0]

    def contents(self) -> list[list[int]]:
        """The tokens of each filled level, level 0 first (for tests and for looking inside)."""
        window, ngram, top = (int(self.state[i]) for i in (WINDOW, NGRAM, TOP))
        stride = _stride(window, ngram)
        trunk = window + ngram - 3 - top
        starts = [HEADER + level * stride for level in range(top + 1)]
        return [self.state[start : start + trunk + (level > 0)].tolist() for level, start in enumerate(starts)]


def largest_comb(window_size: int, ngram_size: int) -> int:
    """Most nodes that the comb can have. W (N - 1) - 1 once the window is filled; a narrow one has more before."""
    trunks = ((window_size + ngram_size - 3 - top, top) for top in range(ngram_size - 1))
    return max(trunk + (trunk + 1) * top for trunk, top in trunks)


@njit(cache=CACHE)
def comb_size(state: IntArray) -> int:
    """Number of nodes of the whole comb now."""
    trunk = state[WINDOW] + state[NGRAM] - 3 - state[TOP]
    return trunk + (trunk + 1) * state[TOP]


@njit(cache=CACHE)
def _stride(window: int, ngram: int) -> int:
    return window + ngram - 2


@njit(cache=CACHE)
def _draw(state: IntArray, context: IntArray) -> int:
    """A random token of the context: splitmix64 (Steele et al. 2014) in counter mode."""
    seed = np.uint64(np.uint32(state[SEED])) << np.uint64(32)
    x = (seed + np.uint64(state[DRAWS]) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    state[DRAWS] += 1
    return context[np.int64(x % np.uint64(len(context)))]


@njit(cache=CACHE)
def advance(state: IntArray, pool: IntArray, context: IntArray, forward_one: bool) -> None:
    """Bring the window from the root that it stands on to the end of ``context``; nothing if it is there.

    If the tips are known, their n-grams go to the pool and the tips become the top level. A column whose tip is not
    known (its nodes were not verified) keeps its tokens, moved along with the positions that they were guessed for.
    Places that nothing moves into get random tokens of the context: level by level from level 0, left to right.

    Args:
        state: the window.
        pool: the n-gram pool, with room for W more keys.
        context: int32 [t], at least one token.
        forward_one: move by one column however many tokens were accepted (the paper code's ALWAYS_FWD_ONE).
    """
    window, ngram, top, known = state[WINDOW], state[NGRAM], state[TOP], state[KNOWN]
    stride = _stride(window, ngram)
    trunk = window + ngram - 3 - top  # length of level 0; the levels above have trunk + 1 columns
    if state[ALIGNED] == 0:
        for i in range(trunk):
            state[HEADER + i] = _draw(state, context)
        state[ALIGNED] = len(context)
        return
    moved = len(context) - state[ALIGNED]
    if moved <= 0:
        return
    full = top == ngram - 2
    if full:
        _collect(state, pool, context[state[ALIGNED] - 1])
    if forward_one:
        moved = 1
    if full or known == 0:
        # Level l + 1 becomes level l. A tip is a level of its own, above the top one.
        for level in range(top + 1):
            row = HEADER + level * stride
            above = row + stride if level < top else HEADER + (ngram - 1) * stride
            ahead = moved if level == 0 else moved - 1  # level 0 has no column for the root
            for i in range(trunk if level == 0 else trunk + 1):
                if i + ahead < known:
                    state[row + i] = state[above + i + ahead]
                elif i + moved < (trunk if level == 0 else trunk + 1):
                    state[row + i] = state[row + i + moved]
                else:
                    state[row + i] = _draw(state, context)
    else:
        # Filling up: the tips become a new level, and every level gives up the positions that are past.
        for level in range(top + 2):
            row = HEADER + level * stride
            source = row if level <= top else HEADER + (ngram - 1) * stride
            have = trunk if level == 0 else trunk + 1 if level <= top else known
            for i in range(trunk - 1 if level == 0 else trunk):
                state[row + i] = state[source + i + moved] if i + moved < have else _draw(state, context)
        state[TOP] = top + 1
    state[KNOWN] = 0
    state[ALIGNED] = len(context)
    state[STEPS] += 1


@njit(cache=CACHE)
def _collect(state: IntArray, pool: IntArray, root: int) -> None:
    """Put the n-grams of the columns with known tips into the pool, column 0 first."""
    ngram = state[NGRAM]
    stride = _stride(state[WINDOW], ngram)
    gram = np.empty(ngram - 1, np.int32)
    for column in range(state[KNOWN]):
        for level in range(1, ngram):  # the last one is the tip
            gram[level - 1] = state[HEADER + level * stride + column]
        ngram_pool.add(pool, root if column == 0 else state[HEADER + column - 1], gram)


@njit(cache=CACHE)
def write_comb(state: IntArray, offset: int, budget: int, nodes: IntArray) -> int:
    """Write the comb as draft tree nodes, column by column, as many whole columns as ``budget`` nodes allow.

    Column by column means that a truncated tree loses whole columns from the end, and each column that is left
    still gives its n-gram.

    Args:
        state: the window.
        offset: index of the comb's first node in the tree.
        budget: most nodes.
        nodes: int32 [3, >= offset + budget], receives tokens, parents and depths.

    Returns:
        The number of nodes.
    """
    ngram, top = state[NGRAM], state[TOP]
    stride = _stride(state[WINDOW], ngram)
    columns = state[WINDOW] + ngram - 2 - top
    size = 0
    stem = -1  # the node that the column stands on: the root, then the trunk's
    for column in range(columns):
        if size + top + (column > 0) > budget:
            break
        if column > 0:
            nodes[0, offset + size] = state[HEADER + column - 1]
            nodes[1, offset + size] = stem
            nodes[2, offset + size] = column
            stem = offset + size
            size += 1
        parent = stem
        for level in range(1, top + 1):
            nodes[0, offset + size] = state[HEADER + level * stride + column]
            nodes[1, offset + size] = parent
            nodes[2, offset + size] = column + level
            parent = offset + size
            size += 1
    return size


@njit(cache=CACHE)
def store_tips(state: IntArray, argmax: IntArray, offset: int, size: int) -> None:
    """Remember what the model said at the tips; ``advance`` will use it.

    Args:
        state: the window, as it was when the comb was written.
        argmax: int32 [>= 1 + offset + size], the model's argmax after the root and after each node.
        offset: index of the comb's first node in the tree.
        size: how many of the comb's nodes were verified.
    """
    top = state[TOP]
    tips = HEADER + (state[NGRAM] - 1) * _stride(state[WINDOW], state[NGRAM])
    if size < top:
        state[KNOWN] = 0
        return
    columns = 1 + (size - top) // (top + 1)
    for column in range(columns):
        state[tips + column] = argmax[offset + top + column * (top + 1)]
    if top == 0:
        state[tips] = argmax[0]  # without teeth, column 0's tip is the root itself
    state[KNOWN] = columns
