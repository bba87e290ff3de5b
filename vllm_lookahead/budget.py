"""The budget controller: how many draft nodes each request gets in each step, down to none.

A step that verifies nodes costs more than one that does not, and a node is worth only the chance that it is accepted.
Both sides are measured: ``StepCost`` knows what a step costs by the number of tokens it computes, ``Confidence`` how
far a request's proposer can be trusted. ``allocate`` then takes the nodes that raise expected tokens per second.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

GAIN = 1.02
"""Drafting must promise at least this factor over plain decoding: estimates are noisy, and slower is worst."""
REFIT_EVERY = 16
FORGET = 0.98
PRIOR_WEIGHT = 4.0


class StepCost:
    """Seconds per step by tokens computed: ``overhead + scale * forward(tokens)``.

    The shape of ``forward`` is measured once, at start-up (flat where memory bandwidth rules, rising where arithmetic
    does). Overhead and scale are fitted to the steps that are really observed, as weighted least squares over buckets
    of similar size that forget old observations, drawn towards the start-up values where little was observed.

    Args:
        sizes: numbers of tokens at which the forward pass was timed, ascending.
        seconds: the times, same length.
        overhead: seconds per step outside of the forward pass, a first guess.
    """

    def __init__(self, sizes: Sequence[int], seconds: Sequence[float], overhead: float = 1e-3) -> None:
        self._sizes = np.asarray(sizes, np.float64)
        # more tokens never cost less: what looks like it is noise
        self._forward = np.maximum.accumulate(np.asarray(seconds, np.float64))
        self._start = (overhead, 1.0)
        self.overhead, self.scale = self._start
        buckets = 64
        self._weight = np.zeros(buckets)
        self._mean_forward = np.zeros(buckets)
        self._mean_seconds = np.zeros(buckets)
        self._observed = 0

    def __str__(self) -> str:
        times = ", ".join(f"{int(n)}: {t * 1e3:.2f}" for n, t in zip(self._sizes, self._forward, strict=True))
        return f"a forward pass in ms by tokens: {times}"

    def forward(self, tokens: FloatArray | float) -> FloatArray:
        """Start-up estimate of the forward pass, seconds, for numbers of tokens."""
        tokens = np.asarray(tokens, np.float64)
        inside = np.interp(tokens, self._sizes, self._forward)
        beyond = self._forward[-1] * tokens / self._sizes[-1]
        return np.where(tokens > self._sizes[-1], beyond, inside)

    def seconds(self, tokens: FloatArray | float) -> FloatArray:
        """Estimated seconds of a whole step that computes so many tokens."""
        return self.overhead + self.scale * self.forward(tokens)

    def observe(self, tokens: int, seconds: float) -> None:
        """Take one step's wall time into account; outliers (a pause, a compilation) are cut to 3 times the estimate."""
        forward = float(self.forward(float(tokens)))
        if self._observed > REFIT_EVERY:
            seconds = min(seconds, 3.0 * float(self.seconds(float(tokens))))
        bucket = min(len(self._weight) - 1, int(4 * np.log2(tokens)) if tokens > 0 else 0)
        self._weight *= FORGET ** (1 / REFIT_EVERY)
        weight = self._weight[bucket] + 1.0
        # a bucket follows its recent past, however long it has existed
        step = max(1.0 / weight, 0.05)
        self._mean_forward[bucket] += step * (forward - self._mean_forward[bucket])
        self._mean_seconds[bucket] += step * (seconds - self._mean_seconds[bucket])
        self._weight[bucket] = min(weight, 50.0)
        self._observed += 1

    def fit(self) -> tuple[float, float]:
        """Overhead and scale that explain the observations best; ``adopt`` puts them to use."""
        used = self._weight > 0.01
        w, x, y = self._weight[used], self._mean_forward[used], self._mean_seconds[used]
        typical = max(float(np.mean(x)), 1e-9)
        overhead0, scale0 = self._start
        # rows: observations, then the two priors, each in seconds
        a = np.concatenate(
            [
                np.stack([np.ones_like(x), x], 1) * np.sqrt(w)[:, None],
                np.sqrt(PRIOR_WEIGHT) * np.array([[1, 0], [0, typical]]),
            ]
        )
        b = np.concatenate([y * np.sqrt(w), np.sqrt(PRIOR_WEIGHT) * np.array([overhead0, scale0 * typical])])
        (overhead, scale), *_ = np.linalg.lstsq(a, b, rcond=None)
        return float(np.clip(overhead, 0.0, 1.0)), float(np.clip(scale, 0.2, 20.0))

    def adopt(self, fitted: tuple[float, float]) -> None:
        """Estimate with this overhead and scale from now on (in a tensor-parallel group: those of its first rank)."""
        self.overhead, self.scale = fitted


class Confidence:
    """How often one request's guesses hold, against what its proposer promised.

    At every node that a walk visits, the proposer has promised some probability that one of the node's children is
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


def allocate(values: Sequence[NDArray[np.float32]], cost: StepCost, tokens: int) -> list[int]:
    """Choose how many nodes of each request's tree are verified.

    Args:
        values: per request the chance of each node to be accepted, in tree order, falling.
        cost: what a step costs.
        tokens: what the step computes without any drafts: one per decoding request.

    Returns:
        Per request, the length of the tree's prefix to verify, so that expected tokens per second are highest; all
        zero if that promises less than ``GAIN`` over no drafts.
    """
    counts = [0] * len(values)
    sizes = [len(v) for v in values]
    if not any(sizes):
        return counts
    chances = np.concatenate([np.minimum.accumulate(v) for v in values if len(v)]).astype(np.float64)
    owner = np.repeat(np.arange(len(values)), sizes)
    order = np.argsort(-chances, kind="stable")
    expected = tokens + np.concatenate(([0.0], np.cumsum(chances[order])))
    rate = expected / cost.seconds(tokens + np.arange(len(expected), dtype=np.float64))
    best = int(np.argmax(rate))
    if rate[best] < GAIN * rate[0]:
        return counts
    for row, count in zip(*np.unique(owner[order[:best]], return_counts=True), strict=True):
        counts[row] = int(count)
    return counts
