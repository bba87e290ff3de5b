"""What has to be true of the answers: each request has one, in good form, and it is what stock vLLM says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from soaking.asking import Request
from soaking.client import Choice, Outcome
from soaking.specs import Spec

TOLERANCE = 1e-3
"""Log-probabilities differ by rounding: a step over several tokens computes other shapes than one over a single one."""
SHOWN = 3


class Check(NamedTuple):
    """One line of the result.

    Attributes:
        name: what was checked.
        ok: whether it is so.
        details: figures, or what is wrong.
    """

    name: str
    ok: bool
    details: str


def check_answers(
    requests: Sequence[Request], outcomes: Sequence[Outcome], stock: Mapping[Spec, Outcome]
) -> list[Check]:
    """All checks of this file.

    Args:
        requests: what was sent.
        outcomes: what became of them.
        stock: what stock vLLM made of each spec.
    """
    return [
        _one_outcome_each(requests, outcomes),
        _none_failed(outcomes),
        _good_form(outcomes),
        _bad_ones_are_refused(outcomes, stock),
        _equal_to_stock(outcomes, stock),
        _left_ones_began_like_stock(outcomes, stock),
        _logprobs_near_stock(outcomes, stock),
    ]


def _one_outcome_each(requests: Sequence[Request], outcomes: Sequence[Outcome]) -> Check:
    sent = Counter(request.id for request in requests)
    ended = Counter(outcome.request.id for outcome in outcomes)
    wrong = [f"{name} has {ended[name]}" for name in {**sent, **ended} if ended[name] != sent[name]]
    endings = Counter(outcome.ending for outcome in outcomes)
    counts = ", ".join(f"{count} {ending}" for ending, count in endings.most_common())
    return _check("each request has one outcome", wrong, f"{len(requests)} sent: {counts}")


def _none_failed(outcomes: Sequence[Outcome]) -> Check:
    wrong = [f"{_name(o)} ({o.status}): {o.message[:300]}" for o in outcomes if o.ending == "failed"]
    statuses = Counter(outcome.status for outcome in outcomes if outcome.status is not None)
    counts = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    return _check("none failed", wrong, counts)


def _good_form(outcomes: Sequence[Outcome]) -> Check:
    wrong = [f"{_name(o)}: {problem}" for o in outcomes for problem in o.problems]
    whole = sum(o.ending == "answered" and o.request.stream for o in outcomes)
    return _check("nothing doubled, cut or swapped", wrong, f"{whole} streams to the end")


def _bad_ones_are_refused(outcomes: Sequence[Outcome], stock: Mapping[Spec, Outcome]) -> Check:
    wrong, count = [], 0
    for outcome in outcomes:
        expected = stock.get(outcome.request.spec)
        if outcome.request.spec.bad and outcome.ending == "answered":
            wrong.append(f"{_name(outcome)} was answered")
        if outcome.ending == "refused":
            count += 1
            if expected is not None and expected.status != outcome.status:
                wrong.append(f"{_name(outcome)}: status {outcome.status}, stock's {expected.status}: {outcome.message}")
    return _check("bad requests are refused as stock does", wrong, f"{count} refused")


def _equal_to_stock(outcomes: Sequence[Outcome], stock: Mapping[Spec, Outcome]) -> Check:
    wrong, kinds = [], Counter[str]()
    for outcome, expected in _comparable(outcomes, stock):
        if outcome.ending != "answered" and not (outcome.ending == "refused" and expected.ending == "answered"):
            continue
        kinds[outcome.request.spec.kind] += 1
        if outcome.ending != expected.ending:
            wrong.append(f"{_name(outcome)} was {outcome.ending}, stock's {expected.ending}: {outcome.message}")
        elif outcome.texts != expected.texts:
            wrong.append(f"{_name(outcome)}: {outcome.texts!r} is not {expected.texts!r}")
        elif outcome.num_tokens != expected.num_tokens:
            wrong.append(f"{_name(outcome)}: {outcome.num_tokens} tokens, not {expected.num_tokens}")
    counts = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    return _check("answers equal stock's", wrong, f"{kinds.total()} of {len(stock)} specs: {counts}")


def _left_ones_began_like_stock(outcomes: Sequence[Outcome], stock: Mapping[Spec, Outcome]) -> Check:
    wrong, early, late = [], 0, 0
    for outcome, expected in _comparable(outcomes, stock):
        if outcome.ending != "left":
            continue
        early += not outcome.events
        late += bool(outcome.events)
        for index, choice in outcome.choices.items():
            if index not in expected.choices or not expected.choices[index].text.startswith(choice.text):
                wrong.append(f"{_name(outcome)}: choice {index} began with {choice.text!r}")
    details = f"{early} before the first token, {late} in mid-stream"
    return _check("abandoned answers began like stock's", wrong, details)


def _logprobs_near_stock(outcomes: Sequence[Outcome], stock: Mapping[Spec, Outcome]) -> Check:
    wrong, count, most = [], 0, 0.0
    for outcome, expected in _comparable(outcomes, stock):
        if outcome.ending != "answered" or outcome.texts != expected.texts:
            continue
        for index, choice in outcome.choices.items():
            if not (choice.logprobs or choice.prompt_logprobs or expected.choices[index].logprobs):
                continue
            count += 1
            distance = distance_between(choice, expected.choices[index])
            most = max(most, distance)
            if distance > TOLERANCE:
                wrong.append(f"{_name(outcome)}: choice {index} differs by {distance}")
    details = f"{count} answers, at most {most:.1e} apart; {TOLERANCE:g} allowed"
    return _check("log-probabilities near stock's", wrong, details)


def distance_between(one: Choice, other: Choice) -> float:
    """The largest difference between two choices' log-probabilities; infinite if they are not of the same tokens."""
    if one.tokens != other.tokens:
        return math.inf
    return max(_distance(one.logprobs, other.logprobs), _distance(one.prompt_logprobs, other.prompt_logprobs))


def _distance(one: Sequence[float | None], other: Sequence[float | None]) -> float:
    if [value is None for value in one] != [value is None for value in other]:
        return math.inf
    return max((abs(a - b) for a, b in zip(one, other, strict=True) if a is not None and b is not None), default=0.0)


def _comparable(outcomes: Iterable[Outcome], stock: Mapping[Spec, Outcome]) -> list[tuple[Outcome, Outcome]]:
    """Outcomes whose answer is known beforehand, each with stock's."""
    known = [o for o in outcomes if o.request.spec.repeatable and o.request.spec in stock]
    return [(o, stock[o.request.spec]) for o in known]


def _name(outcome: Outcome) -> str:
    return f"{outcome.request.id} ({outcome.request.spec.kind}{', stream' if outcome.request.stream else ''})"


def _check(name: str, wrong: Sequence[str], details: str) -> Check:
    """A line that names the first few things that are wrong."""
    if not wrong:
        return Check(name, True, details)
    more = f" (and {len(wrong) - SHOWN} more)" if len(wrong) > SHOWN else ""
    return Check(name, False, "; ".join(wrong[:SHOWN]) + more)
