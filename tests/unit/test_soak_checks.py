"""The checks of ``benchmarks/soak.py`` can fail: they are given answers, streams and counters that are wrong."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from soaking.asking import Request
from soaking.checks import Check, check_answers
from soaking.client import Choice, Outcome, send
from soaking.counters import Counters
from soaking.memory import MIB, Sample, growth
from soaking.server_checks import check_counters, check_memory
from soaking.specs import COMPLETIONS, Spec, pool

# ---- answers

GOOD = Spec("greedy", COMPLETIONS, {"model": "demo", "max_tokens": 8, "prompt": "a"})
BAD = Spec("bad", COMPLETIONS, {"model": "demo", "max_tokens": -1, "prompt": "a"}, bad=True)


def failures(checks: list[Check]) -> list[Check]:
    return [check for check in checks if not check.ok]


def answer(number: int = 0, *, stream: bool = False) -> Outcome:
    request = Request(f"soak-{number}", GOOD, stream=stream)
    choice = Choice(" b c", "length", [" b", " c"], [-0.5, -0.25])
    return Outcome(request, "answered", 200, {0: choice}, 2, {"completion_tokens": 2})


def left(number: int = 1) -> Outcome:
    request = Request(f"soak-{number}", GOOD, stream=True, leave_after_events=1)
    return Outcome(request, "left", 200, {0: Choice(" b")}, 1)


def refusal(number: int = 2) -> Outcome:
    return Outcome(Request(f"soak-{number}", BAD), "refused", 400, message="max_tokens must not be negative")


STOCK = {GOOD: answer(), BAD: refusal()}


def judged(outcomes: list[Outcome], sent: int = 3) -> list[str]:
    """Names of the checks that complain about outcomes of the requests 0, 1, 2."""
    requests = [o.request for o in (answer(), left(), refusal())][:sent]
    return [check.name for check in failures(check_answers(requests, outcomes, STOCK))]


def test_what_is_right_passes() -> None:
    assert judged([answer(), left(), refusal()]) == []


def test_lost_and_doubled_answers_are_noticed() -> None:
    assert judged([answer(), refusal()]) == ["each request has one outcome"]
    assert judged([answer(), left(), refusal(), answer()]) == ["each request has one outcome"]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda o: setattr(o.choices[0], "text", " b d"), "answers equal stock's"),
        (lambda o: setattr(o.choices[0], "finish_reason", "stop"), "answers equal stock's"),
        (lambda o: o.choices.update({1: Choice(" b c", "length")}), "answers equal stock's"),
        (lambda o: o.usage.update(completion_tokens=3), "answers equal stock's"),
        (lambda o: vars(o).update(ending="refused", status=400), "answers equal stock's"),
        (lambda o: vars(o).update(ending="failed", status=500), "none failed"),
        (lambda o: o.problems.append("choice 0 ends twice"), "nothing doubled, cut or swapped"),
        (lambda o: o.choices[0].logprobs.__setitem__(1, -0.3), "log-probabilities near stock's"),
        (lambda o: o.choices[0].tokens.__setitem__(1, " d"), "log-probabilities near stock's"),
    ],
)
def test_a_changed_answer_is_noticed(spoil: Callable[[Outcome], object], complaint: str) -> None:
    changed = copy.deepcopy(answer())
    changed.request = answer().request
    spoil(changed)
    assert complaint in judged([changed, left(), refusal()])


def test_other_wrong_ends_are_noticed() -> None:
    other = left()
    other.choices[0].text = " x"
    assert judged([answer(), other, refusal()]) == ["abandoned answers began like stock's"]
    served = refusal()
    served.ending, served.status = "answered", 200
    assert "bad requests are refused as stock does" in judged([answer(), left(), served])
    stranger = refusal()
    stranger.status = 422
    assert judged([answer(), left(), stranger]) == ["bad requests are refused as stock does"]


# ---- what a client sees


def piece(text: str, finish_reason: str | None = None, index: int = 0, name: str = "cmpl-soak-0") -> dict[str, Any]:
    return {"id": name, "choices": [{"index": index, "text": text, "finish_reason": finish_reason}]}


USAGE: dict[str, Any] = {"id": "cmpl-soak-0", "choices": [], "usage": {"completion_tokens": 2}}
ERROR: dict[str, Any] = {"error": {"message": "EngineCore encountered an issue.", "code": 500}}
WHOLE = [piece(" b"), piece(" c", "length"), USAGE, "[DONE]"]


def received(events: list[Any], *, stream: bool = True, **options: Any) -> Outcome:
    """The outcome of a request that a server answers with these events, or with this body."""

    def serve(request: httpx.Request) -> httpx.Response:
        if not stream:
            return httpx.Response(200, json=events[0])
        lines = [f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events]
        return httpx.Response(200, text="".join(lines))

    async def ask() -> Outcome:
        async with httpx.AsyncClient(transport=httpx.MockTransport(serve), base_url="http://server") as client:
            return await send(client, replace(answer(stream=stream).request, **options))

    return asyncio.run(ask())


def test_a_whole_stream() -> None:
    outcome = received(WHOLE)
    assert (outcome.ending, outcome.problems, outcome.texts) == ("answered", [], [(" b c", "length")])
    assert received(WHOLE, leave_after_events=1).ending == "left"


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        ([piece(" b c", "length"), piece("", "length"), USAGE, "[DONE]"], "choice 0 ends twice"),
        ([piece(" b", "length"), piece(" c"), USAGE, "[DONE]"], "choice 0 goes on after its end"),
        ([piece(" b c"), USAGE, "[DONE]"], "choice 0 has no end"),
        ([*WHOLE[:3], USAGE, "[DONE]"], "the usage comes twice"),
        ([*WHOLE[:2], "[DONE]"], "has no usage"),
        ([*WHOLE, "[DONE]"], "the stream goes on after [DONE]: data: [DONE]"),
        ([piece(" b c", "length", 1), *WHOLE], "has the choices [0, 1], not [0]"),
        ([piece(" b", name="cmpl-soak-7"), *WHOLE[1:]], "answered as cmpl-soak-7"),
    ],
)
def test_streams_in_bad_form(events: list[Any], problem: str) -> None:
    assert problem in received(events).problems


@pytest.mark.parametrize(
    ("events", "message"),
    [(WHOLE[:2], "the stream ends without [DONE]"), ([*WHOLE[:1], ERROR, "[DONE]"], "EngineCore")],
)
def test_streams_that_break_off(events: list[Any], message: str) -> None:
    outcome = received(events)
    assert outcome.ending == "failed"
    assert message in outcome.message


def test_answers_in_bad_form() -> None:
    choice = piece(" b c", "length")["choices"][0]
    body = {**USAGE, "choices": [choice]}
    assert received([body], stream=False).problems == []
    assert received([{**body, "choices": [choice, choice]}], stream=False).problems[0] == "choice 0 comes twice"


# ---- the server


def counters(**changes: float) -> Counters:
    """What a server counts that answered ``answer()`` with two tokens, one of them guessed."""
    drafted, accepted = "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"
    values: dict[str, float] = {"stop": 0, "length": 1, "abort": 0, "generated": 2, "drafted": 3, "accepted": 1}
    values |= {"per_pos": 1, "drafted_by_source": 3, "accepted_by_source": 1, **changes}
    model = ("model_name", "demo")
    success = {
        ("vllm:request_success_total", frozenset({model, ("finished_reason", reason)})): values[reason]
        for reason in ("stop", "length", "abort")
    }
    one = {
        ("vllm:generation_tokens_total", frozenset({model})): values["generated"],
        (f"{drafted}_total", frozenset({model})): values["drafted"],
        (f"{accepted}_total", frozenset({model})): values["accepted"],
        (f"{accepted}_per_pos_total", frozenset({model, ("position", "0")})): values["per_pos"],
        (f"{drafted}_by_source_total", frozenset({model, ("source", "context")})): values["drafted_by_source"],
        (f"{accepted}_by_source_total", frozenset({model, ("source", "context")})): values["accepted_by_source"],
    }
    return Counters({**success, **one})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, None),
        ({"length": 2}, "requests counted by reason"),
        ({"length": 0, "stop": 1}, "requests counted by reason"),
        ({"abort": 1}, "requests counted by reason"),
        ({"generated": 3}, "generated tokens counted"),
        ({"generated": 1}, "generated tokens counted"),
        ({"accepted": 4, "per_pos": 4, "accepted_by_source": 4}, "draft tokens counted"),
        ({"per_pos": 2}, "draft tokens counted"),
        ({"accepted_by_source": 0}, "draft tokens counted"),
        ({"drafted_by_source": 4}, "draft tokens counted"),
    ],
)
def test_counters_that_do_not_fit(changes: dict[str, float], complaint: str | None) -> None:
    complaints = [check.name for check in failures(check_counters(counters(**changes), [answer()], 48))]
    assert complaints == ([] if complaint is None else [complaint])


def test_abandoned_requests_may_be_counted_or_not() -> None:
    outcomes = [answer(), left()]
    for extra in ({"generated": 3}, {"generated": 10, "stop": 1, "drafted_by_source": 20}):
        assert failures(check_counters(counters(**extra), outcomes, 48)) == []
    assert failures(check_counters(counters(generated=11), outcomes, 48)) != []
    assert failures(check_counters(counters(generated=3, stop=2), outcomes, 48)) != []


def test_memory_that_grows() -> None:
    def samples(per_request: int) -> list[Sample]:
        return [Sample(n, {1: 100 * MIB + n * per_request, 2: 50 * MIB}) for n in range(0, 1001, 10)]

    warm = [Sample(n, {1: n * MIB}) for n in range(0, 150, 10)]
    assert check_memory(growth([*warm, *samples(0)[15:]]), 1).ok
    assert not check_memory(growth(samples(10_000)), 1).ok
    assert not check_memory(growth(samples(0)[:2]), 1).ok


# ---- what is asked


def test_the_pool_has_every_kind_and_depends_on_its_seed_alone() -> None:
    specs = pool(3, 100, 1024)
    assert {spec.kind for spec in specs} == {spec.kind for spec in pool(4, 100, 1024)}
    assert [spec.body for spec in specs] == [spec.body for spec in pool(3, 100, 1024)]
    assert [spec.body for spec in specs] != [spec.body for spec in pool(4, 100, 1024)]
    assert len({repr((spec.path, spec.body)) for spec in specs}) == 100
