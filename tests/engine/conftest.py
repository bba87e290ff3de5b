"""The engines that most tests share: stock vLLM, and one for each of our methods."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vllm import LLM, RequestOutput

from proposers import registry

from .cases import CASES, Case, Encode
from .engines import METHODS, Request, run, start_engine, stop_engine


@pytest.fixture(scope="package", autouse=True)
def in_process() -> Iterator[None]:
    """Run engines in this process. Count where vLLM makes request ids random: proposers take their randomness from
    the ids, and a test should do the same in every run.
    """
    numbers = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setattr("vllm.v1.engine.input_processor.random_uuid", lambda: f"{next(numbers):08x}")
        patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)  # it would override kv_cache_memory_bytes
        yield


@pytest.fixture(scope="package")
def stock(demo_model: str, in_process: None) -> Iterator[LLM]:
    """Stock vLLM: what everything is compared with."""
    llm = start_engine(demo_model, None)
    yield llm
    stop_engine(llm)


@pytest.fixture(scope="package")
def encode(stock: LLM) -> Encode:
    """The demo model's tokenizer."""
    return stock.get_tokenizer().encode


@pytest.fixture(scope="package", params=METHODS)
def method(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The speculative config of each of our methods."""
    if request.param not in registry.names():
        pytest.skip(f"no proposer {request.param} yet")
    return METHODS[request.param]


@pytest.fixture(scope="package")
def ours(demo_model: str, method: dict[str, Any], in_process: None) -> Iterator[LLM]:
    """The engine with draft trees."""
    llm = start_engine(demo_model, method)
    yield llm
    stop_engine(llm)


@pytest.fixture(scope="package")
def reference(stock: LLM, encode: Encode) -> Callable[[Case], list[RequestOutput]]:
    """What stock vLLM makes of a case, eight requests at a time. Each case runs once."""
    known: dict[str, list[RequestOutput]] = {}

    def outputs(case: Case) -> list[RequestOutput]:
        if case.name not in known:
            known[case.name] = run(stock, case.requests(encode), in_flight=8)
        return known[case.name]

    return outputs


@pytest.fixture(scope="package")
def everything(encode: Encode) -> list[tuple[Case, Request]]:
    """Every request of every case."""
    return [(case, request) for case in CASES for request in case.requests(encode)]
