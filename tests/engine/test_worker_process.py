"""A worker in a process of its own, as `vllm serve` has it: drafts come with the tokens, not by a call of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from vllm import LLM

from vllm_lookahead.v1.executor import LookaheadExecutor

from .cases import Encode, either
from .engines import METHODS, Request, assert_same, core_of, engine, metric, run
from .prompts import REPETITIVE
from .test_structured_output import CASE as STRUCTURED


@pytest.fixture(scope="module")
def served(demo_model: str) -> Iterator[LLM]:
    with engine(demo_model, METHODS["prompt_lookup"], distributed_executor_backend="mp") as llm:
        executor = core_of(llm).model_executor
        assert isinstance(executor, LookaheadExecutor)
        yield llm
        executor.shutdown()


@pytest.fixture
def calls(served: LLM, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the engine core has called each of the worker's methods."""
    counted: Counter[str] = Counter()
    executor = core_of(served).model_executor
    call = executor.collective_rpc

    def counting(method: Any, *args: Any, **kwargs: Any) -> Any:
        counted[method] += 1
        return call(method, *args, **kwargs)

    monkeypatch.setattr(executor, "collective_rpc", counting)
    return counted


def requests_of(encode: Encode) -> list[Request]:
    return [Request(tuple(encode(prompt)), either(i, max_tokens=48)) for i, prompt in enumerate(REPETITIVE[:8])]


def test_a_step_is_one_call(served: LLM, stock: LLM, encode: Encode, calls: Counter[str]) -> None:
    accepted = metric(served, "vllm:spec_decode_num_accepted_tokens")
    got = run(served, requests_of(encode), in_flight=4)
    assert set(calls) == {"execute_model"}
    assert metric(served, "vllm:spec_decode_num_accepted_tokens") >= accepted + 50
    assert_same(run(stock, requests_of(encode), in_flight=4), got, ["served"] * len(got))


def test_a_grammar_is_asked_between_forward_pass_and_sampling(
    served: LLM, stock: LLM, encode: Encode, calls: Counter[str]
) -> None:
    accepted = metric(served, "vllm:spec_decode_num_accepted_tokens")
    mixed = [*STRUCTURED.requests(encode)[:6], *requests_of(encode)[:6]]
    got = run(served, mixed, in_flight=4, seed=1)
    assert set(calls) == {"execute_model", "sample_tokens"}
    assert calls["sample_tokens"] < calls["execute_model"], "steps without a grammar don't wait for one"
    assert metric(served, "vllm:spec_decode_num_accepted_tokens") >= accepted + 50
    assert_same(run(stock, mixed), got, [f"{request.params.structured_outputs}" for request in mixed])
