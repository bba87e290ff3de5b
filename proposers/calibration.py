"""How often guesses hold, learnt while requests run, by what they rest on.

What is known about the next token is sorted into *levels* (``best_first``), the most trusted first: copies of long
stretches, then the followers of ever shorter n-grams. A level promises that the next token is one of those that it adds
to the levels before it. How often that comes true depends on the model, the text and the temperature; so it is counted,
for each kind of level, at every node that the text really visits. It is learnt from the text alone: at the next call
the new tokens say how the last tree would have fared, whether it was verified or not.

This is how PPM compressors estimate their escapes ("secondary escape estimation", Shkarin, "PPM: one step to
practicality", 2002); a tree's chances are such a compressor's probabilities.

All arithmetic is plain IEEE in a fixed order: every tensor-parallel rank learns the same.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from proposers.numba_cache import CACHE
from proposers.tree import IntArray

Float64Array = NDArray[np.float64]

LOCAL, SHARED, PREDICTION, CORPUS, POOL, RECYCLED = range(6)
"""Sources. The first four are texts with an index, the fifth are n-grams, the sixth single tokens."""
SOURCES = ("context", "requests", "prediction", "corpus", "pool", "recycling")
"""Their names, in that order."""
TEXTS = 4

# Kinds of levels. Rows of followers: by the n-gram's length (1, 2, 3 or more), the source, how much this source knows
# and how much the best of the others does (KNOWLEDGE). Copies: by source, agreement in tokens, and whether there are
# several and these say the same. Recycled tokens: by their rank.
LENGTHS = 3
KNOWLEDGE = 7
AGREEMENTS = 14
COPIES = TEXTS * LENGTHS * KNOWLEDGE * KNOWLEDGE
RANKS = COPIES + (TEXTS + 1) * AGREEMENTS * 3
MOST_RANKS = 16
LEVELS = RANKS + MOST_RANKS

HELD, SEEN = 0, 1
"""Rows of a state: how often a kind of level held and was seen, fading."""

# How much of what was learnt one new observation of the same kind leaves, and what the start counts for. What a request
# learns for itself weighs little: right guesses come in runs, which say less than they seem to.
ENGINE_KEEP = 0.998
ENGINE_WEIGHT = 8.0
REQUEST_KEEP = 0.995
REQUEST_WEIGHT = 64.0
MOST = 0.995
"""No level is ever surer than this."""


@njit(cache=CACHE, inline="always")
def knowledge(count: int, kinds: int) -> int:
    """How much a row knows that has seen ``count`` followers of so many kinds: 0 (nothing) to ``KNOWLEDGE`` - 1."""
    # no branches: they would go either way, and a wrong guess takes a processor longer than all of this
    one = 2 + (count > 3)
    several = 4 + (count > 4) + (count > 16)
    some = one if kinds == 1 else several
    return some if count > 1 else count


@njit(cache=CACHE, inline="always")
def row_level(n: int, source: int, own: int, others: int) -> int:
    """The kind of level that a row after ``n`` tokens is; ``own`` and ``others`` by ``knowledge``."""
    return ((min(n, LENGTHS) - 1) * TEXTS + source) * KNOWLEDGE * KNOWLEDGE + own * KNOWLEDGE + others


@njit(cache=CACHE, inline="always")
def agreement_class(agreement: int) -> int:
    """0 to ``AGREEMENTS`` - 1, by how many tokens before a copy agree."""
    if agreement <= 4:
        return max(agreement, 0)
    if agreement <= 6:
        return 5
    if agreement <= 8:
        return 6
    if agreement <= 12:
        return 7
    if agreement <= 16:
        return 8
    if agreement <= 24:
        return 9
    if agreement <= 32:
        return 10
    if agreement <= 64:
        return 11
    return 12 if agreement <= 128 else 13


@njit(cache=CACHE, inline="always")
def copy_level(source: int, agreement: int, several: int) -> int:
    """The kind of level that copies are.

    Args:
        source: where they come from.
        agreement: by ``agreement_class``.
        several: 0 for a single one, 1 if all say the same, else 2.
    """
    return COPIES + (source * AGREEMENTS + agreement) * 3 + several


@njit(cache=CACHE, inline="always")
def source_of(level: int) -> int:
    """The source that a kind of level belongs to."""
    if level >= RANKS:
        return RECYCLED
    if level >= COPIES:
        return (level - COPIES) // (3 * AGREEMENTS)
    return level // (KNOWLEDGE * KNOWLEDGE) % TEXTS


# What is assumed before anything is learnt: measured on outputs of Llama 3 (chat) and of GPT-4 (an agent's steps).
# Rows by length of the n-gram, columns by knowledge, from 1 on; and by agreement.
OWN_ROWS = ((0.26, 0.5, 0.65, 0.23, 0.3, 0.4), (0.42, 0.72, 0.9, 0.28, 0.4, 0.58), (0.6, 0.87, 0.97, 0.42, 0.6, 0.75))
ROWS_OF_OTHERS = (
    (0.16, 0.28, 0.5, 0.16, 0.2, 0.2),
    (0.2, 0.43, 0.78, 0.18, 0.22, 0.3),
    (0.35, 0.68, 0.9, 0.27, 0.36, 0.5),
)
OWN_COPIES = (0.1, 0.25, 0.42, 0.52, 0.58, 0.65, 0.72, 0.78, 0.85, 0.9, 0.92, 0.94, 0.96, 0.97)
COPIES_OF_OTHERS = (0.1, 0.16, 0.22, 0.27, 0.31, 0.4, 0.5, 0.62, 0.72, 0.8, 0.85, 0.88, 0.9, 0.92)
POOLED = 0.3
RANKED = (0.25, 0.15, 0.1, 0.07, 0.05, 0.04, 0.03)
UNANIMOUS, DIVIDED = 0.6, 0.6
"""Several copies that agree leave so much of the doubt; several that don't keep so much of the trust."""


def prior() -> Float64Array:
    """float64 [``LEVELS``]: what is assumed before anything is learnt."""
    chances = np.zeros(LEVELS)
    for source in range(TEXTS):
        own = source in (LOCAL, PREDICTION)
        for n, row in enumerate(OWN_ROWS if own else ROWS_OF_OTHERS, 1):
            for known, value in enumerate(row, 1):
                for others in range(KNOWLEDGE):
                    chances[row_level(n, source, known, others)] = value
        for agreement, value in enumerate(OWN_COPIES if own else COPIES_OF_OTHERS):
            for several, trust in enumerate((value, 1 - (1 - value) * UNANIMOUS, value * DIVIDED)):
                chances[copy_level(source, agreement, several)] = trust
    for agreement in range(AGREEMENTS):
        for several in range(3):
            chances[copy_level(POOL, agreement, several)] = POOLED
    for rank in range(MOST_RANKS):
        chances[RANKS + rank] = RANKED[min(rank, len(RANKED) - 1)]
    return chances


class Calibration:
    """What one proposer has learnt from all its requests; ``start`` gives a request its own.

    Attributes:
        state: float64 [2, ``LEVELS``], rows ``HELD`` and ``SEEN``, the prior counted in.
    """

    def __init__(self) -> None:
        self.state = np.empty((2, LEVELS))
        self.state[SEEN] = ENGINE_WEIGHT
        self.state[HELD] = ENGINE_WEIGHT * prior()

    @staticmethod
    def start() -> Float64Array:
        """What a new request begins with: float64 [2, sources], how often each source's levels held, and how often
        they should have by what the engine has seen; fading, the prior counted in.
        """
        return np.full((2, len(SOURCES)), REQUEST_WEIGHT)


@njit(cache=CACHE, inline="always")
def chance(engine: Float64Array, request: Float64Array, level: int) -> float:
    """The chance that a level of this kind holds in this request.

    Args:
        engine: ``Calibration.state``.
        request: ``Calibration.start``'s.
        level: the kind.
    """
    source = source_of(level)
    return chance_of(engine, level, request[HELD, source] / request[SEEN, source])


@njit(cache=CACHE, inline="always")
def chance_of(engine: Float64Array, level: int, ratio: float) -> float:
    """``chance`` where it is known how often the levels of this source held, to how often they should have."""
    return min(MOST, engine[HELD, np.uint64(level)] / engine[SEEN, np.uint64(level)] * ratio)


@njit(cache=CACHE)
def learn(
    engine: Float64Array, request: Float64Array, tokens: IntArray, levels: IntArray, count: int, token: int
) -> None:
    """Compare what was known about the next token with the one that came.

    Args:
        engine: ``Calibration.state``, changed in place.
        request: ``Calibration.start``'s, changed in place.
        tokens: int32 [>= count], the expected tokens, level by level.
        levels: int32 [>= count], the kind of each one's level.
        count: how many there are.
        token: the one that came.
    """
    at = 0
    while at < count:
        level = levels[at]
        held = 0.0
        while at < count and levels[at] == level:
            if tokens[at] == token:
                held = 1.0
            at += 1
        source = source_of(level)
        expected = engine[HELD, level] / engine[SEEN, level]
        request[HELD, source] += (1.0 - REQUEST_KEEP) * (REQUEST_WEIGHT - request[HELD, source]) + held
        request[SEEN, source] += (1.0 - REQUEST_KEEP) * (REQUEST_WEIGHT - request[SEEN, source]) + expected
        engine[HELD, level] = engine[HELD, level] * ENGINE_KEEP + held
        engine[SEEN, level] = engine[SEEN, level] * ENGINE_KEEP + 1.0
        if held > 0.0:
            break
