"""CUDA's V2 runner in a real engine: kernels, packing, metadata, attention and commit, over torch instead of CUDA."""

from __future__ import annotations

import flash_on_cpu
import numpy as np
import pytest
import torch
from engine.cases import Encode, either, greedy
from engine.engines import Request, TreeSpy, assert_same, engine, run, runner_of
from engine.prompts import PROMPTS
from vllm import LLM
from vllm.v1.attention.backends import fa_utils, flash_attn

from vllm_lookahead import plugin
from vllm_lookahead.v2 import self_check
from vllm_lookahead.v2.cuda_runner import LookaheadCUDARunner
from vllm_lookahead.v2.kernels import walk

from .conftest import SMALL
from .test_exactness import TREES


@pytest.fixture(autouse=True)
def cuda_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's runner where the CPU's would run."""
    for module in (fa_utils, flash_attn):
        for name in flash_on_cpu.STAND_INS:
            monkeypatch.setattr(module, name, None, raising=False)
    monkeypatch.setitem(plugin.WORKERS, ("cpu", "v2"), "")
    flash_on_cpu.use()


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_its_output_is_stock_vllms(async_scheduling: bool, demo_model: str, stock: LLM, encode: Encode) -> None:
    requests = [Request(tuple(encode(p))[:32], either(i, max_tokens=14, logprobs=2)) for i, p in enumerate(PROMPTS[:5])]
    with engine(demo_model, TREES, async_scheduling=async_scheduling, **SMALL) as ours, TreeSpy.on(ours) as spy:
        assert isinstance(runner_of(ours), LookaheadCUDARunner)
        assert runner_of(ours).trees_verifiable
        got = run(ours, requests, in_flight=4)
    assert_same(run(stock, requests, in_flight=4), got, ["over torch"] * len(requests))
    assert spy.verified >= 5
    assert spy.moved >= 1, "the KV commit had something to do"


@pytest.mark.parametrize("part", ["walk", "place", "commit", "attention"])
def test_a_kernel_that_is_wrong_on_this_device_means_chains(
    part: str, demo_model: str, stock: LLM, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check at start-up finds it, says so, and the output is still stock vLLM's."""
    if part == "walk":
        right = walk.walk

        def short(*arguments: object) -> walk.DeviceWalks:
            walks = right(*arguments)
            walks.lengths.clamp_(max=2)
            return walks

        monkeypatch.setattr(self_check, "walk", short)
    elif part == "place":
        monkeypatch.setattr(self_check, "place", lambda trees, seq_lens, positions: None)
    elif part == "commit":
        monkeypatch.setattr(self_check.KVCommit, "__call__", lambda self, *arguments: None)
    else:
        attend = "vllm_lookahead.attention.flash.TreeFlashAttentionImpl.attend_trees"
        monkeypatch.setattr(attend, lambda self, query, key, value, cache, trees, blocks, output: output.fill_(1.0))
    requests = [Request(tuple(encode(p))[:24], greedy(max_tokens=10)) for p in PROMPTS[:3]]
    with engine(demo_model, TREES, **SMALL) as ours, TreeSpy.on(ours) as spy:
        assert not runner_of(ours).trees_verifiable
        got = run(ours, requests, in_flight=3)
    assert_same(run(stock, requests, in_flight=3), got, ["chains"] * len(requests))
    assert spy.verified == 0
    assert spy.drafts_accepted > 0


def test_the_check_finds_nothing_where_nothing_is_wrong(demo_model: str) -> None:
    with engine(demo_model, TREES, **SMALL) as ours:
        runner = runner_of(ours)
        assert self_check.problem(runner._layers, torch.float32) is None
        assert np.isfinite(self_check.TOLERANCE[runner.dtype])
