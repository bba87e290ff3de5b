"""How often guesses hold, learnt while a request runs, by how many tokens of context they rest on.

A guess that rests on a match of one token holds far less often than one that rests on ten, and how often either holds
depends on the model, the text and the temperature. So each request keeps, for every length of match, how often one of
the tree's children was right at the nodes that the text really visited. It learns that from the text alone: at the
next call the new tokens say how the last tree would have fared, whether it was verified or not. A new request starts
from what the engine has seen so far.

All arithmetic is plain IEEE in a fixed order: every tensor-parallel rank learns the same.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from proposers.best_first import MAX_MATCH
from proposers.tree import IntArray

Float64Array = NDArray[np.float64]

# Chance that the next token is among the candidates' when the longest of them matches so many tokens, before anything
# is learnt. Measured on Python source.
HIT = np.array([0.0, 0.42, 0.57, 0.60, 0.66, 0.68, 0.72, 0.74, 0.76, 0.79, 0.81, 0.84, 0.86, 0.88, 0.89, 0.90, 0.95])
# Observations that the starting values count for: HIT in the engine's average, that average in a request.
ENGINE_WEIGHT = 20.0
REQUEST_WEIGHT = 4.0
RATIO_WEIGHT = 8.0
ENGINE_KEEP = 0.998
REQUEST_KEEP = 0.97
"""How much of what was learnt one new observation leaves."""

PRIOR, HELD, SEEN, CHANCE = 0, 1, 2, 3
"""Rows of a state: the chances at the start; what was observed, fading; the chances now. A column per match length."""


class Calibration:
    """What one proposer has learnt from all its requests; ``start`` gives a request its own.

    Attributes:
        state: float64 [4, ``MAX_MATCH`` + 1], rows as the constants above name them.
    """

    def __init__(self) -> None:
        self.state = np.zeros((4, MAX_MATCH + 1))
        self.state[PRIOR] = self.state[CHANCE] = HIT

    def start(self) -> Float64Array:
        """What a new request begins with: float64 [4, ``MAX_MATCH`` + 1], rows as in ``state``."""
        state = np.zeros_like(self.state)
        state[PRIOR] = state[CHANCE] = self.state[CHANCE]
        return state


@njit(cache=True)
def learn(engine: Float64Array, request: Float64Array, nodes: IntArray, size: int, emitted: IntArray) -> None:
    """Compare a tree with the tokens that really came.

    Args:
        engine: ``Calibration.state``, changed in place.
        request: ``Calibration.start``'s, changed in place; row ``CHANCE`` is what ``grow_tree`` takes.
        nodes: int32 [4, >= size], the tree as ``grow_tree`` wrote it.
        size: its number of nodes.
        emitted: int32 [t], the tokens that followed its root.
    """
    here = -1
    learnt = False
    for token in emitted:
        match, child = 0, -1
        for node in range(here + 1, size):
            if nodes[1, node] == here:
                match = nodes[3, node]
                if nodes[0, node] == token:
                    child = node
                    break
        if match == 0:
            break  # a leaf says nothing
        learnt = True
        for state, keep in ((engine, ENGINE_KEEP), (request, REQUEST_KEEP)):
            for m in range(state.shape[1]):
                state[HELD, m] *= keep
                state[SEEN, m] *= keep
            state[SEEN, match] += 1.0
            if child >= 0:
                state[HELD, match] += 1.0
        if child < 0:
            break
        here = child
    if learnt:
        for m in range(1, engine.shape[1]):
            engine[CHANCE, m] = (ENGINE_WEIGHT * engine[PRIOR, m] + engine[HELD, m]) / (ENGINE_WEIGHT + engine[SEEN, m])
        held, expected = RATIO_WEIGHT, RATIO_WEIGHT
        for m in range(1, request.shape[1]):
            held += request[HELD, m]
            expected += request[SEEN, m] * request[PRIOR, m]
        ratio = held / expected
        for m in range(1, request.shape[1]):
            prior = min(0.99, request[PRIOR, m] * ratio)
            request[CHANCE, m] = (REQUEST_WEIGHT * prior + request[HELD, m]) / (REQUEST_WEIGHT + request[SEEN, m])
