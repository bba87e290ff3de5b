"""Token for token what stock V2 gives: every sampling option, both ways of scheduling, whatever the engine does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.cases import CASES, Encode, either, greedy, seeded
from engine.engines import METHODS, Request, TreeSpy, assert_same, engine, predicting, run, runner_of, token_ids
from engine.likeliest import TopSpy
from engine.prompts import PROMPTS, REPETITIVE
from vllm import LLM, RequestOutput
from vllm.sampling_params import StructuredOutputsParams

from vllm_lookahead.metrics import COUNTERS

from .conftest import NODES, SMALL

TREES: dict[str, Any] = {**METHODS["prompt_lookup"], "num_speculative_tokens": NODES, "budget": NODES}


def shortened(request: Request, tokens: int = 12) -> Request:
    """The same request with less of everything: a token takes the interpreter a second."""
    params = request.params.clone()
    params.max_tokens = min(tokens, params.max_tokens or tokens)
    params.min_tokens = min(params.min_tokens, params.max_tokens)
    if params.allowed_token_ids:
        params.allowed_token_ids = params.allowed_token_ids[:1024]  # more of them end stock V2's engine
    return Request(request.prompt[:48], params)


def requests_of_all_cases(encode: Encode) -> tuple[list[Request], list[str]]:
    """One request of every case of the V1 suite, greedy and sampled in turn, and what to call them."""
    return [shortened(case.requests(encode)[i % 2]) for i, case in enumerate(CASES)], [case.name for case in CASES]


@pytest.fixture(scope="module")
def all_cases(stock: LLM, encode: Encode) -> tuple[list[Request], list[str], list[RequestOutput]]:
    requests, names = requests_of_all_cases(encode)
    return requests, names, run(stock, requests, in_flight=6)


def test_every_sampling_option(all_cases: tuple[list[Request], list[str], list[RequestOutput]], ours: LLM) -> None:
    requests, names, expected = all_cases
    with TreeSpy.on(ours) as spy:
        got = run(ours, requests, in_flight=6)
    assert_same(expected, got, names)
    spy.assert_trees_were_used(10)


def test_without_asynchronous_scheduling(
    demo_model: str, all_cases: tuple[list[Request], list[str], list[RequestOutput]]
) -> None:
    requests, names, expected = (part[::3] for part in all_cases)
    with engine(demo_model, TREES, async_scheduling=False, **SMALL) as ours, TreeSpy.on(ours) as spy:
        assert not ours.llm_engine.vllm_config.scheduler_config.async_scheduling
        got = run(ours, requests, in_flight=6, seed=1)
    assert_same(expected, got, names)
    spy.assert_trees_were_used()


def test_every_source_at_once(
    demo_model: str,
    all_cases: tuple[list[Request], list[str], list[RequestOutput]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """See the V1 suite's test of this name."""
    requests, names, expected = (part[2::3] for part in all_cases)
    (tmp_path / "corpus.txt").write_text("\n".join(output.outputs[0].text for output in expected))
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    with engine(demo_model, {**TREES, "corpus": str(tmp_path)}, **SMALL) as ours:
        got = run(ours, predicting(requests, expected), in_flight=6, seed=4)
        accepted = {m.labels["source"]: m.value for m in ours.get_metrics() if m.name == COUNTERS[1][0]}
    assert_same(expected, got, names)
    assert accepted["prediction"] >= 5, accepted
    assert accepted["corpus"] >= 1, accepted


def test_lookahead(demo_model: str, all_cases: tuple[list[Request], list[str], list[RequestOutput]]) -> None:
    """The Jacobi window is part of the trees, and reads the argmax at its tips."""
    requests, names, expected = (part[1::4] for part in all_cases)
    config = {"method": "lookahead", "window_size": 2, "ngram_size": 3, "guess_set_size": 3, "budget": 8}
    with engine(demo_model, {**config, "num_speculative_tokens": 8}, **SMALL) as ours, TreeSpy.on(ours) as spy:
        got = run(ours, requests, in_flight=6, seed=2)
        assert runner_of(ours).drafter.proposer.needs_argmax
    assert_same(expected, got, names)
    assert spy.verified >= 10
    assert spy.accepted >= 1


def test_token_recycling(demo_model: str, stock: LLM, encode: Encode) -> None:
    """Steps without trees tell it of the roots; what it is told is what the model says."""
    config = {"method": "token_recycling", "recycled_tokens": 4, "num_speculative_tokens": NODES, "budget": NODES}
    requests = [Request(tuple(encode(p))[:24], either(i, max_tokens=16)) for i, p in enumerate(REPETITIVE[:4])]
    with (
        engine(demo_model, config, **SMALL) as ours,
        TreeSpy.on(ours) as spy,
        TopSpy.on(ours) as top,
    ):
        got = run(ours, requests, in_flight=4)
    assert_same(run(stock, requests, in_flight=4), got, ["recycling"] * len(requests))
    assert spy.verified >= 5
    assert top.without_tree >= 2
    top.assert_it_is_the_models(demo_model, at_least=50)


def test_grammars_beside_trees(stock: LLM, ours: LLM, encode: Encode) -> None:
    """A grammar follows one path: its drafts are chains, and what it forbids is never accepted."""
    regexes = (r"(def [a-z]+\(self\): pass, )+", r"([0-9][0-9], )+")
    requests = []
    for i, prompt in enumerate(PROMPTS[:4]):
        regex = StructuredOutputsParams(regex=regexes[i // 2])
        tokens = tuple(encode(prompt))[:40]
        requests.append(Request(tokens, either(i, max_tokens=20)))
        requests.append(Request(tokens, either(i, max_tokens=24, structured_outputs=regex)))
    with TreeSpy.on(ours) as spy:
        got = run(ours, requests, in_flight=6)
    assert_same(
        run(stock, requests, in_flight=6), got, [str(request.params.structured_outputs) for request in requests]
    )
    assert spy.verified
    assert spy.drafts_accepted > spy.accepted, "chains were accepted, too"


def test_prefix_caching_serves_what_trees_have_written(stock: LLM, ours: LLM, encode: Encode) -> None:
    first = [
        Request(tuple(encode(p))[:32], either(i, max_tokens=40, ignore_eos=True)) for i, p in enumerate(PROMPTS[:4])
    ]
    ours.llm_engine.reset_prefix_cache()
    answers = run(ours, first, in_flight=4)
    assert_same(run(stock, first, in_flight=4), answers, ["first turn"] * 4)
    second = [
        Request((*request.prompt, *answer, *encode("\nAnd")), either(i + 1, max_tokens=12))
        for i, (request, answer) in enumerate(zip(first, token_ids(answers), strict=True))
    ]
    got = run(ours, second, in_flight=4)
    assert all(output.num_cached_tokens and output.num_cached_tokens > 32 for output in got)
    stock.llm_engine.reset_prefix_cache()
    assert_same(run(stock, second, in_flight=4), got, ["second turn"] * 4)


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_preemption_and_chunked_prefill(async_scheduling: bool, demo_model: str, stock: LLM, encode: Encode) -> None:
    """A KV cache for about two requests, and prompts in pieces of at most 48 tokens beside rows that verify trees."""
    requests = [
        Request(tuple(encode(p + p))[:60], either(i, max_tokens=60, ignore_eos=True)) for i, p in enumerate(PROMPTS[:6])
    ]
    tiny = {**SMALL, "num_gpu_blocks_override": 10, "max_num_batched_tokens": 48, "max_model_len": 160}
    with engine(demo_model, TREES, async_scheduling=async_scheduling, **tiny) as ours, TreeSpy.on(ours) as spy:
        preempted = 0
        finish = runner_of(ours).finish_requests

        def count(scheduler_output: Any) -> None:
            nonlocal preempted
            preempted += len(scheduler_output.preempted_req_ids or ())
            finish(scheduler_output)

        runner_of(ours).finish_requests = count
        got = run(ours, requests, in_flight=6)
        del runner_of(ours).finish_requests
    assert preempted >= 3
    assert_same(run(stock, requests, in_flight=6), got, ["preempted"] * len(requests))
    assert spy.verified >= 5


def test_the_end_of_the_context(demo_model: str, stock: LLM, encode: Encode) -> None:
    tokens = tuple(encode(REPETITIVE[0] * 8))
    requests = [Request(tokens[: 256 - left], greedy(max_tokens=64, ignore_eos=True)) for left in (1, 2, 3, 6, 9)]
    with engine(demo_model, TREES, **SMALL) as ours:
        got = run(ours, requests, in_flight=5)
    assert_same(run(stock, requests, in_flight=5), got, ["end of the context"] * len(requests))


def test_aborts_leave_nothing_behind(stock: LLM, ours: LLM, encode: Encode) -> None:
    core, rng = ours.llm_engine, np.random.default_rng(0)
    prompts = [tuple(encode(p))[:24] for p in PROMPTS[:8]]
    expected = token_ids(run(stock, [Request(p, greedy(max_tokens=8)) for p in prompts], in_flight=6))
    running, ended, added = set(), {}, 0
    while added < 40 or running:
        if added < 40 and len(running) < 8:
            core.add_request(str(added), {"prompt_token_ids": list(prompts[added % 8])}, greedy(max_tokens=8))
            running.add(added)
            added += 1
        if running and rng.random() < 0.3:
            victim = int(rng.choice(sorted(running)))
            core.abort_request([str(victim)])
            running.remove(victim)
        for output in core.step():
            if output.finished:
                ended[int(output.request_id)] = list(output.outputs[0].token_ids)
                running.remove(int(output.request_id))
    core.step()
    core.step()
    assert 5 < len(ended) < 40
    assert all(tokens == expected[i % 8] for i, tokens in ended.items())
    runner = runner_of(ours)
    assert len(runner.drafter) == 0
    assert not runner._texts
    assert not runner.planner.proposed


def test_budget_auto(demo_model: str, stock: LLM, encode: Encode) -> None:
    requests = [Request(tuple(encode(p))[:32], either(i, max_tokens=24)) for i, p in enumerate(PROMPTS[:4])]
    with engine(demo_model, {"method": "prompt_lookup", "num_speculative_tokens": NODES}, **SMALL) as ours:
        got = run(ours, requests, in_flight=4)
    assert_same(run(stock, requests, in_flight=4), got, ["auto"] * len(requests))


# ---- what has to go wrong if a part is missing


@pytest.fixture
def control(stock: LLM, encode: Encode) -> tuple[list[Request], list[list[int]]]:
    requests = [Request(tuple(encode(p))[:32], greedy(max_tokens=30, ignore_eos=True)) for p in PROMPTS[:4]]
    return requests, token_ids(run(stock, requests, in_flight=4))


@pytest.mark.parametrize("part", ["commit_kv", "positions"])
def test_control(part: str, ours: LLM, control: tuple[list[Request], list[list[int]]]) -> None:
    """Without the KV commit, or with a chain's positions at a tree's nodes, the comparison above would fail."""
    requests, expected = control
    runner = runner_of(ours)
    ours.llm_engine.reset_prefix_cache()
    if part == "commit_kv":
        runner.commit_kv = lambda slots: None
    else:
        serve = runner.serve_trees

        def flat(step: Any, batch: Any) -> None:
            before = None if batch is None else batch.positions.clone()
            serve(step, batch)
            if batch is not None:
                batch.positions.copy_(before)

        runner.serve_trees = flat
    try:
        got = token_ids(run(ours, requests, in_flight=4))
    finally:
        runner.__dict__.pop("commit_kv", None)
        runner.__dict__.pop("serve_trees", None)
        ours.llm_engine.reset_prefix_cache()
    assert got != expected


def test_unseeded_requests_are_served(ours: LLM, encode: Encode) -> None:
    requests = [Request(tuple(encode(p))[:24], seeded(i, seed=None, max_tokens=8)) for i, p in enumerate(PROMPTS[:3])]
    got = run(ours, requests, in_flight=3)
    assert all(len(output.outputs[0].token_ids) for output in got)
