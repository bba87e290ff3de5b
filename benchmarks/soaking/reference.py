"""What stock vLLM makes of each spec."""

from __future__ import annotations

from collections.abc import Sequence

from soaking.asking import Request
from soaking.client import Outcome
from soaking.load import Finished, ask
from soaking.specs import Spec

MANY_TOKENS = 300
"""Longer prompts are asked for one at a time: stock vLLM fails on a CPU when a request with a seed is prefilled in
several steps, as it may be beside others."""


async def answers_of(url: str, specs: Sequence[Spec], finished: Finished = lambda outcome: None) -> dict[Spec, Outcome]:
    """Ask for each spec that always has the same answer, once, and not streaming.

    Args:
        url: a server of stock vLLM's.
        specs: what is asked for.
        finished: is told of each outcome.

    Raises:
        RuntimeError: stock vLLM itself fails on one.
    """
    wanted = [spec for spec in specs if spec.repeatable]
    small = [Request(f"stock-{i}", spec) for i, spec in enumerate(wanted) if spec.tokens <= MANY_TOKENS]
    large = [Request(f"stock-{i}", spec) for i, spec in enumerate(wanted) if spec.tokens > MANY_TOKENS]
    outcomes = [*await ask(url, small, 4, finished), *await ask(url, large, 1, finished)]
    for outcome in outcomes:
        if outcome.ending == "failed" or outcome.problems or outcome.request.spec.bad != (outcome.ending == "refused"):
            raise RuntimeError(f"stock: {outcome}")
    return {outcome.request.spec: outcome for outcome in outcomes}


def texts_of(stock: dict[Spec, Outcome]) -> dict[Spec, str]:
    """What may be predicted: the first text of each answer."""
    return {spec: outcome.choices[0].text for spec, outcome in stock.items() if outcome.ending == "answered"}
