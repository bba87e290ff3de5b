"""Small statistics: spreads, percentiles, ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np


@dataclass(frozen=True)
class Spread:
    """What several rounds gave."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(min(values), median(values), max(values))

    def show(self, form: str) -> str:
        """The median, and the range in brackets unless there is only one value."""
        middle = format(self.median, form)
        if self.min == self.max:
            return middle
        return f"{middle} ({self.min:{form}} - {self.max:{form}})"


def percentile(values: Sequence[float], weights: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of the total weight does not exceed; 0 if there are none."""
    if not len(values):
        return 0.0
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(np.asarray(weights, np.float64)[order])
    at = int(np.searchsorted(reached, percent / 100.0 * reached[-1]))
    return float(np.asarray(values, np.float64)[order[min(at, len(order) - 1)]])


def ratios(ours: dict[int, float], baseline: dict[int, float]) -> list[float]:
    """Round by round, ours over the baseline's, for the rounds that both have."""
    return [ours[number] / baseline[number] for number in sorted(ours) if baseline.get(number)]


@dataclass(frozen=True)
class Latency:
    """Milliseconds between tokens.

    A step that emits k tokens after a pause of d is k tokens that took d / k each.
    """

    itl_p50: float
    itl_p99: float
    pause_p50: float
    pause_p99: float

    @classmethod
    def of(cls, pauses: Sequence[tuple[float, int]]) -> Latency:
        """From pauses in seconds and the number of tokens that came after each."""
        gaps = [1e3 * pause for pause, _ in pauses]
        tokens = [float(count) for _, count in pauses]
        per_token = [gap / count for gap, count in zip(gaps, tokens, strict=True)]
        ones = [1.0] * len(gaps)
        return cls(
            itl_p50=percentile(per_token, tokens, 50),
            itl_p99=percentile(per_token, tokens, 99),
            pause_p50=percentile(gaps, ones, 50),
            pause_p99=percentile(gaps, ones, 99),
        )
