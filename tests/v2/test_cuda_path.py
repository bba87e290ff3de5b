"""CUDA's V2 runner in a real engine: kernels, packing, metadata, attention and commit, over torch instead of CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine.cases import Encode, either, greedy
from engine.engines import Request, TreeSpy, assert_same, engine, run, runner_of
from engine.prompts import PROMPTS
from vllm import LLM

from vllm_lookahead.v2 import self_check
from vllm_lookahead.v2.cuda_runner import LookaheadCUDARunner
from vllm_lookahead.v2.kernels.walk import DeviceWalks

from .conftest import SMALL
from .test_exactness import TREES

pytestmark = pytest.mark.usefixtures("cuda_runner")


@pytest.fixture(scope="module")
def over_torch(demo_model: str, cuda_runner: None) -> Iterator[LLM]:
    with engine(demo_model, TREES, **SMALL) as llm:
        assert isinstance(runner_of(llm), LookaheadCUDARunner)
        assert runner_of(llm).trees_verifiable
        yield llm


def requests_of(encode: Encode, count: int, tokens: int) -> list[Request]:
    return [
        Request(tuple(encode(p))[:32], either(i, max_tokens=tokens, logprobs=2)) for i, p in enumerate(PROMPTS[:count])
    ]


def test_its_output_is_stock_vllms(over_torch: LLM, stock: LLM, encode: Encode) -> None:
    requests = requests_of(encode, 5, 14)
    with TreeSpy.on(over_torch) as spy:
        got = run(over_torch, requests, in_flight=4)
    assert_same(run(stock, requests, in_flight=4), got, ["over torch"] * len(requests))
    assert spy.verified >= 5
    assert spy.moved >= 1, "the KV commit had something to do"


def test_without_asynchronous_scheduling(demo_model: str, stock: LLM, encode: Encode) -> None:
    requests = requests_of(encode, 5, 12)
    with engine(demo_model, TREES, async_scheduling=False, **SMALL) as ours, TreeSpy.on(ours) as spy:
        got = run(ours, requests, in_flight=3)
    assert_same(run(stock, requests, in_flight=3), got, ["over torch"] * len(requests))
    assert spy.verified >= 1


# ---- the check at start-up


def found_in(llm: LLM) -> str | None:
    """What the check says of an engine's layers."""
    runner = runner_of(llm)
    return self_check.problem(runner._with_builders, torch.float32, runner._packer.tile_queries)


def test_nothing_is_found_where_nothing_is_wrong(over_torch: LLM) -> None:
    assert found_in(over_torch) is None


def short_walk(*arguments: Any) -> DeviceWalks:
    """Walks that end too early."""
    from vllm_lookahead.v2.kernels.walk import walk

    walks = walk(*arguments)
    walks.lengths.clamp_(max=2)
    return walks


@pytest.mark.parametrize(
    ("place", "wrong", "found"),
    [
        ((self_check, "walk"), short_walk, "walks differ"),
        ((self_check, "place"), lambda trees, seq_lens, positions: None, "positions or ancestor masks differ"),
        ((self_check, "place_tokens"), lambda trees, starts, ids: None, "positions or ancestor masks differ"),
        ((self_check.KVCommit, "__call__"), lambda self, *arguments: None, "the KV commit differs"),
    ],
    ids=["walk", "place", "tokens", "commit"],
)
def test_a_wrong_kernel_is_found(
    place: tuple[Any, str], wrong: Any, found: str, over_torch: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*place, wrong)
    assert found in str(found_in(over_torch))


def test_a_kernel_that_fails_is_found(over_torch: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("no such instruction\nin line 7")

    monkeypatch.setattr(self_check, "walk", fail)
    assert found_in(over_torch) == "its kernels can't be run on this device (RuntimeError: no such instruction)"


def test_where_attention_is_wrong_drafts_are_chains(
    demo_model: str, stock: LLM, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the output is still stock vLLM's."""
    attend = "vllm_lookahead.attention.flash.TreeFlashAttentionImpl.attend_trees"
    monkeypatch.setattr(attend, lambda self, query, key, value, cache, metadata, output: output.fill_(1.0))
    requests = [Request(tuple(encode(p))[:24], greedy(max_tokens=10)) for p in PROMPTS[:3]]
    with engine(demo_model, TREES, **SMALL) as ours, TreeSpy.on(ours) as spy:
        assert not runner_of(ours).trees_verifiable
        got = run(ours, requests, in_flight=3)
    assert_same(run(stock, requests, in_flight=3), got, ["chains"] * len(requests))
    assert spy.verified == 0
    assert spy.drafts_accepted > 0
