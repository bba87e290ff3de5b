"""The budget controller: how many draft nodes each request gets in each step, down to none.

A step that verifies nodes costs more than one that does not, and a node is worth only the chance that it is accepted.
Both sides are measured: ``StepCost`` knows what a step costs by the number of tokens it computes, and the proposers
learn what their guesses are worth (``proposers.calibration``; ``Confidence`` stands in for those that don't say).
``StepCost.allocate`` takes the nodes that raise expected tokens per second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from proposers.numba_cache import CACHE

FloatArray = NDArray[np.float64]

GAIN = 1.05
"""Drafting must promise at least this factor over plain decoding: estimates are noisy, and slower is worst."""
REFIT_EVERY = 8
"""Timed steps between two fits."""
FORGET = 0.98
PRIOR_WEIGHT = 4.0

# overhead, drafting and node in seconds, scale as a factor: first guesses, and what a fit may find
START = (1e-3, 1.0, 3e-4, 0.0)
OVERHEAD, FORWARD, DRAFTING, NODES = range(4)
LIMITS = (0.0, 0.2, 0.0, 0.0), (1.0, 20.0, 0.1, 0.01)
TYPICAL_NODES = 8.0
NO_CHANCES = np.empty(0, np.float32)


class StepCost:
    """Seconds per step: ``overhead + scale * forward(tokens)``, plus ``drafting + node * nodes`` with drafts.

    The shape of ``forward`` is measured once, at start-up (flat where memory bandwidth rules, rising where arithmetic
    does). The four numbers are fitted to the steps that are really observed, as weighted least squares over buckets
    of similar size that forget old observations, drawn towards the start-up values where little was observed.

    Args:
        sizes: numbers of tokens at which the forward pass was timed, ascending.
        seconds: the times, same length.

    Attributes:
        overhead: seconds per step outside of the forward pass.
        scale: a real step's forward pass against the one at start-up, which has no context to attend to.
        drafting: seconds that a step with drafts costs beyond what its tokens cost: sampling at nodes, the walk, the
            KV commit, vLLM's bookkeeping.
        node: seconds that each node costs beyond that: its attention to the context, its logits.
    """

    def __init__(self, sizes: Sequence[int], seconds: Sequence[float]) -> None:
        self._sizes = np.asarray(sizes, np.float64)
        # fewer tokens never cost more: what looks like it is noise, which only ever adds time
        self._forward = np.minimum.accumulate(np.asarray(seconds, np.float64)[::-1])[::-1]
        self._table = np.interp(np.arange(sizes[-1] + 1), self._sizes, self._forward)
        self.overhead, self.scale, self.drafting, self.node = START
        buckets = (2, 64)  # without and with drafts
        self._weight = np.zeros(buckets)
        # the means of what overhead, scale, drafting and node are multiplied with, and of the seconds
        self._features = np.zeros((*buckets, len(START)))
        self._features[:, :, OVERHEAD] = self._features[1, :, DRAFTING] = 1.0
        self._mean_seconds = np.zeros(buckets)
        self._observed = 0
        # compiled or loaded here, not while the first request waits
        self.seconds(1, 1)
        self.allocate([np.ones(1, np.float32)], 1)
        self.fit()

    def __str__(self) -> str:
        times = ", ".join(f"{size}: {seconds * 1e3:.2f}" for size, seconds in self.measured)
        return f"a forward pass in ms by tokens: {times}"

    @property
    def measured(self) -> list[tuple[int, float]]:
        """Number of tokens and seconds of each forward pass that was timed at start-up."""
        return [(int(size), float(seconds)) for size, seconds in zip(self._sizes, self._forward, strict=True)]

    def forward(self, tokens: int) -> float:
        """Start-up estimate of a forward pass over so many tokens, in seconds; beyond what was timed, in proportion."""
        return float(_forward(self._table, tokens))

    def seconds(self, tokens: int, nodes: int = 0) -> float:
        """Estimated seconds of a whole step that computes so many tokens, so many of them draft nodes."""
        return float(_seconds(self._table, self._fitted(), tokens, nodes))

    def observe(self, tokens: int, nodes: int, seconds: float) -> None:
        """Take one step's wall time into account; outliers (a pause, a compilation) are cut to 3 times the estimate."""
        forward = self.forward(tokens)
        if self._observed > REFIT_EVERY:
            seconds = min(seconds, 3.0 * self.seconds(tokens, nodes))
        at = int(nodes > 0), min(self._weight.shape[1] - 1, int(4 * math.log2(tokens)) if tokens > 0 else 0)
        self._weight *= FORGET ** (1 / REFIT_EVERY)
        weight = self._weight[at] + 1.0
        # a bucket follows its recent past, however long it has existed
        step = max(1.0 / weight, 0.05)
        means = self._features[at]
        means[FORWARD] += step * (forward - means[FORWARD])
        means[NODES] += step * (nodes - means[NODES])
        self._mean_seconds[at] += step * (seconds - self._mean_seconds[at])
        self._weight[at] = min(weight, 50.0)
        self._observed += 1

    def allocate(self, values: Sequence[NDArray[np.float32]], tokens: int) -> Allocation:
        """Choose how many nodes of each request's tree are verified, so that expected tokens per second are highest.

        Args:
            values: per request the chance of each node to be accepted, in tree order, falling.
            tokens: what the step computes without any drafts: one per decoding request.

        Returns:
            The choice; no node at all if that promises less than ``GAIN`` over no drafts.
        """
        counts = np.zeros(len(values), np.int64)
        ends = np.array([*accumulate(map(len, values))], np.int64)  # for a few rows faster than numpy's
        chances = values[0] if len(values) == 1 else np.concatenate([NO_CHANCES, *values])
        rate = _allocate(chances, ends, tokens, self._table, self._fitted(), counts)
        return Allocation(counts.tolist(), rate)

    def fit(self) -> tuple[float, ...]:
        """Overhead, scale, drafting and node that explain the observations best; ``adopt`` puts them to use."""
        # the normal equations of the observations and, with a weight of their own, of the starting values
        w, y = self._weight.ravel(), self._mean_seconds.ravel()
        x = self._features.reshape(len(w), len(START))
        forwards = x[w > 0.0, FORWARD]
        typical = forwards.mean() if len(forwards) else self.forward(1)
        prior = PRIOR_WEIGHT * np.array([1.0, typical, 1.0, TYPICAL_NODES]) ** 2
        weighted = x.T * w
        fitted = np.linalg.solve(weighted @ x + np.diag(prior), weighted @ y + prior * START)
        return tuple(min(max(value, low), high) for value, low, high in zip(fitted.tolist(), *LIMITS, strict=True))

    def adopt(self, fitted: tuple[float, ...]) -> None:
        """Estimate with these from now on (in a tensor-parallel group: those of its first rank)."""
        self.overhead, self.scale, self.drafting, self.node = fitted

    def _fitted(self) -> tuple[float, float, float, float]:
        return self.overhead, self.scale, self.drafting, self.node


class Confidence:
    """How often one request's guesses hold, against what was assumed of a proposer that gives no chances.

    At every node that a walk visits, the tree has promised some probability that one of the node's children is
    right. ``factor`` is the ratio of what came true to what was promised, recent steps counting most; a new request
    starts from the engine's running average.
    """

    __slots__ = ("_came_true", "_promised")

    def __init__(self, prior: float = 1.0, weight: float = 3.0) -> None:
        self._promised = weight
        self._came_true = prior * weight

    @property
    def factor(self) -> float:
        """Between 0.02 and 1.5."""
        return min(1.5, max(0.02, self._came_true / self._promised))

    def observe(self, promised: float, came_true: float) -> None:
        """Count one walk: the promises at the nodes it visited, and how many held."""
        keep = 0.94
        self._promised = self._promised * keep + promised
        self._came_true = self._came_true * keep + came_true


class Allocation(NamedTuple):
    """What ``StepCost.allocate`` chose.

    Attributes:
        counts: per request, the length of the tree's prefix to verify.
        rate: expected tokens per second of the step.
    """

    counts: list[int]
    rate: float


@njit(cache=CACHE)
def _forward(table: FloatArray, tokens: int) -> float:
    last = len(table) - 1
    return table[tokens] if tokens <= last else table[last] * tokens / last


@njit(cache=CACHE)
def _seconds(table: FloatArray, fitted: tuple[float, float, float, float], tokens: int, nodes: int) -> float:
    overhead, scale, drafting, node = fitted
    seconds = overhead + scale * _forward(table, tokens)
    return seconds + drafting + node * nodes if nodes > 0 else seconds


@njit(cache=CACHE)
def _allocate(
    chances: NDArray[np.float32],
    ends: NDArray[np.int64],
    tokens: int,
    table: FloatArray,
    fitted: tuple[float, float, float, float],
    counts: NDArray[np.int64],
) -> float:
    falling = chances.astype(np.float64)
    owner = np.empty(len(chances), np.int64)
    start = 0
    for row in range(len(ends)):
        for i in range(start, ends[row]):
            owner[i] = row
            if i > start:
                falling[i] = min(falling[i], falling[i - 1])
        start = ends[row]
    order = np.argsort(-falling, kind="mergesort")
    expected = float(tokens)
    plain = expected / _seconds(table, fitted, tokens, 0)
    best, best_rate = 0, plain
    for i in range(len(order)):
        expected += falling[order[i]]
        rate = expected / _seconds(table, fitted, tokens + i + 1, i + 1)
        if rate > best_rate:
            best, best_rate = i + 1, rate
    if best_rate < GAIN * plain:
        return plain
    for i in range(best):
        counts[owner[order[i]]] += 1
    return best_rate
