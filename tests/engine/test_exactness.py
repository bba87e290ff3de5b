"""Token for token what stock vLLM gives, for every sampling option, alone and in mixed batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from vllm import LLM, RequestOutput

from .cases import CASES, Case, Encode
from .engines import Request, TreeSpy, assert_same, ended_inside_a_path, run

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


@pytest.mark.parametrize("seed", [0])
def test_all_cases_mixed_with_random_arrival(
    seed: int, ours: LLM, reference: Reference, everything: list[tuple[Case, Request]]
) -> None:
    expected = [output for case in CASES for output in reference(case)]
    with TreeSpy.on(ours) as spy:
        got = run(ours, [request for _, request in everything], in_flight=16, seed=seed)
    assert_same(expected, got, [f"{case.name}: {request.params}" for case, request in everything])
    spy.assert_trees_were_used(500)
