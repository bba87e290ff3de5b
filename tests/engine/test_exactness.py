"""Token for token what stock vLLM gives, for every sampling option, alone and in mixed batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, RequestOutput

from vllm_lookahead.metrics import COUNTERS

from .cases import CASES, Case, Encode, either, ids
from .engines import METHODS, Request, TreeSpy, assert_same, ended_inside_a_path, engine, predicting, run
from .likeliest import TopSpy
from .prompts import PROMPTS

Reference = Callable[[Case], list[RequestOutput]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_alone(case: Case, ours: LLM, reference: Reference, encode: Encode) -> None:
    expected = reference(case)
    with TreeSpy.on(ours) as spy:
        got = run(ours, case.requests(encode))
    assert_same(expected, got, case.prompts)
    spy.assert_trees_were_used()
    if case.ends_inside_paths:
        assert ended_inside_a_path(got, spy) >= 3, "the case has to end requests in the middle of an accepted path"


def test_no_guess_reaches_beyond_max_tokens(
    ours: LLM, method: dict[str, Any], reference: Reference, encode: Encode
) -> None:
    """Where a path ends with the request itself, not in its middle; only a walk through the window may go further."""
    case = next(case for case in CASES if case.name == "max_tokens")
    with TreeSpy.on(ours) as spy:
        got = run(ours, case.requests(encode))
    assert_same(reference(case), got, case.prompts)
    assert spy.drafts_accepted >= 40
    beyond = ended_inside_a_path(got, spy)
    assert beyond == 0 if method["method"] == "prompt_lookup" else beyond <= 2


def test_all_cases_mixed_with_random_arrival(
    ours: LLM, reference: Reference, everything: list[tuple[Case, Request]]
) -> None:
    expected = [output for case in CASES for output in reference(case)]
    with TreeSpy.on(ours) as spy:
        got = run(ours, [request for _, request in everything], in_flight=16, seed=0)
    assert_same(expected, got, [f"{case.name}: {request.params}" for case, request in everything])
    spy.assert_trees_were_used(500)


def test_logprob_token_ids(ours: LLM, stock: LLM, encode: Encode) -> None:
    """Not among the cases, because vLLM gives other requests of the batch these tokens' log-probabilities too."""
    tokens = ids(encode, "\n", " ", "x")
    case = Case("logprob_token_ids", lambda i, _: either(i, logprob_token_ids=tokens), PROMPTS[20:36])
    with TreeSpy.on(ours) as spy:
        got = run(ours, case.requests(encode), in_flight=8, seed=19)
    assert_same(run(stock, case.requests(encode)), got, case.prompts)
    spy.assert_trees_were_used()
    assert all(set(tokens) <= set(position) for output in got for position in output.outputs[0].logprobs or [{}])


def test_every_source_at_once(
    demo_model: str, reference: Reference, encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other requests, predictions that are right and wrong, a corpus and recycled tokens beside the own text."""
    cases = [case for case in CASES if case.name in ("greedy", "seeded sampling", "penalties")]
    expected = [output for case in cases for output in reference(case)]
    requests = [request for case in cases for request in case.requests(encode)]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(output.outputs[0].text for output in expected[2::3]))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    with engine(demo_model, {**METHODS["lookahead"], "corpus": str(corpus), "recycled_tokens": 8}) as ours:
        got = run(ours, predicting(requests, expected), in_flight=8, seed=23)
        name = COUNTERS[1][0]
        accepted = {m.labels["source"]: m.value for m in ours.get_metrics() if m.name == name}
    assert_same(expected, got, [prompt for case in cases for prompt in case.prompts])
    for source in ("context", "requests", "prediction", "corpus", "recycling"):
        assert accepted[source] >= 10, accepted


VARIANTS: dict[str, dict[str, Any]] = {
    # nothing but the method's name: the budget follows the measured gain, so it differs from run to run
    "prompt_lookup, defaults": {"method": "prompt_lookup"},
    "lookahead, defaults": {"method": "lookahead"},
    "the window in a forward of its own": {**METHODS["lookahead"], "branch": "separate"},
    "the window alone, every second step": {**METHODS["lookahead"], "prompt_lookup": False, "branch_every": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_options_of_our_methods(variant: str, demo_model: str, reference: Reference, encode: Encode) -> None:
    cases = [case for case in CASES if case.name in ("greedy", "seeded sampling")]
    expected = [output for case in cases for output in reference(case)]
    requests = [request for case in cases for request in case.requests(encode)]
    with engine(demo_model, VARIANTS[variant]) as ours:
        got = run(ours, requests, in_flight=8, seed=17)
    assert_same(expected, got, [prompt for case in cases for prompt in case.prompts])


def test_token_recycling(demo_model: str, reference: Reference, encode: Encode) -> None:
    """Alone and in a batch; and what it is told is what the model says, before penalties."""
    config = {"method": "token_recycling", "num_speculative_tokens": 16, "budget": 16}
    with engine(demo_model, config) as ours:
        for name in ("greedy", "seeded sampling", "penalties"):
            case = next(case for case in CASES if case.name == name)
            with TreeSpy.on(ours) as spy:
                got = run(ours, case.requests(encode), in_flight=8, seed=23)
            assert_same(reference(case), got, case.prompts)
            spy.assert_trees_were_used()
        with TopSpy.on(ours) as top:
            run(ours, case.requests(encode)[:4], in_flight=2)
        top.assert_it_is_the_models(demo_model, at_least=200)
