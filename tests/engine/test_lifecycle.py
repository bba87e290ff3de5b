"""Requests come and go in every way, proposers fail: nothing is left behind, nothing is lost."""

from __future__ import annotations

import ctypes
import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
from vllm import LLM, RequestOutput, TokensPrompt
from vllm.sampling_params import RequestOutputKind

from proposers import (
    NO_INFO,
    DraftTree,
    PromptLookup,
    RequestInfo,
    RequestProposer,
    Verified,
    registry,
)

from .cases import CASES, Case, Encode, greedy
from .engines import assert_same, engine, run, runner_of, token_ids


def run_with_aborts(
    llm: LLM, prompts: list[list[int]], count: int, seed: int
) -> tuple[dict[int, RequestOutput], set[int]]:
    """Run ``count`` short greedy requests, at most 32 at a time, and abort about a fifth of them at random moments.

    Request i has prompt i modulo their number, and 1 to 12 output tokens.

    Returns:
        The outputs of the requests that ended by themselves, and the numbers of the aborted ones.
    """
    core, rng = llm.llm_engine, np.random.default_rng(seed)
    outputs: dict[int, RequestOutput] = {}
    aborted: set[int] = set()
    running: set[int] = set()
    added = 0
    while added < count or running:
        while added < count and len(running) < 32 and (not running or rng.random() < 0.8):
            params = greedy(max_tokens=1 + added % 12, detokenize=False)
            params.output_kind = RequestOutputKind.FINAL_ONLY
            core.add_request(str(added), TokensPrompt(prompt_token_ids=prompts[added % len(prompts)]), params)
            running.add(added)
            added += 1
        if running and rng.random() < 0.5:
            victim = int(rng.choice(sorted(running)))
            core.abort_request([str(victim)])
            running.remove(victim)
            aborted.add(victim)
        for output in core.step():
            outputs[int(output.request_id)] = output
            running.remove(int(output.request_id))
    # The engine core hears of the last requests' end in one more step.
    core.step()
    return outputs, aborted


def memory() -> int:
    """Bytes that this process really uses. They grow at first: kernels are kept for every batch size that was met."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def test_1500_requests_with_random_aborts(
    ours: LLM, reference: Callable[[Case], list[RequestOutput]], encode: Encode
) -> None:
    case = CASES[0]
    assert case.name == "greedy"
    short = [i for i, prompt in enumerate(case.prompts) if len(encode(prompt)) < 64]
    expected = [token_ids(reference(case))[i] for i in short]
    prompts = [encode(case.prompts[i]) for i in short]
    runner = runner_of(ours)
    memories = []
    num_aborted = 0
    for part in range(6):
        outputs, aborted = run_with_aborts(ours, prompts, 250, seed=part)
        assert outputs.keys() == set(range(250)) - aborted, "a request got lost"
        for i, output in outputs.items():
            assert list(output.outputs[0].token_ids) == expected[i % len(prompts)][: 1 + i % 12], f"request {i}"
        assert len(runner.drafter) == 0, "a request's state outlives it"
        assert not runner.requests
        assert not runner.input_batch.req_ids
        num_aborted += len(aborted)
        memories.append(memory())
    assert num_aborted > 100
    grown = memories[5] - memories[3]
    assert grown < 8 << 20, f"memory grew by {grown >> 10} KiB in 500 requests"


BUGS: dict[str, Callable[[], object]] = {
    "a cycle": lambda: DraftTree(*np.array([[1, 2], [1, 0], [1, 2]], np.int32)),
    "a token outside of the vocabulary": lambda: DraftTree.chain([1, 1 << 30]),
    "a negative token": lambda: DraftTree.chain([-5]),
    "a chance that is no number": lambda: replace(DraftTree.chain([1]), chances=np.array([np.nan], np.float32)),
    "too many nodes": lambda: DraftTree.chain([1] * 500),
    "lists": lambda: DraftTree([1], [-1], [1]),  # type: ignore[arg-type]
    "no tree": lambda: [1, 2],
}
"""What a proposal may be by mistake."""


class FailingProposer(PromptLookup):
    """Prompt lookup with another bug in every request: see ``KINDS``."""

    KINDS = ("start", "propose", "observe", "finish", "hang", *BUGS)
    time_limit = 2.0
    started: ClassVar[Counter[str]] = Counter()
    asked_again: ClassVar[Counter[str]] = Counter()

    def warm_up(self) -> None:
        """It only fails when there are requests."""

    def start(self, request_id: str, prompt: Any, info: RequestInfo = NO_INFO) -> RequestProposer:
        kind = self.KINDS[self.started.total() % len(self.KINDS)]
        self.started[kind] += 1
        if kind == "start":
            raise RuntimeError("a bug in start")
        return FailingRequest(kind, super().start(request_id, prompt, info))


class FailingRequest(RequestProposer):
    """Fails in the 3rd proposal or in the 2nd ``observe``, and counts who asks it again."""

    def __init__(self, kind: str, inner: RequestProposer) -> None:
        self.kind, self.inner = kind, inner
        self.proposed = self.observed = 0
        self.failed = False

    def propose(self, context: Any, budget: int) -> DraftTree:
        FailingProposer.asked_again[self.kind] += self.failed
        self.proposed += 1
        if self.kind in ("propose", "hang", *BUGS) and self.proposed == 3:
            self.failed = True
            if self.kind == "propose":
                raise RuntimeError("a bug in propose")
            while self.kind == "hang":
                pass
            return BUGS[self.kind]()  # type: ignore[return-value]
        return self.inner.propose(context, budget)

    def observe(self, tree: DraftTree, verified: Verified) -> None:
        self.observed += 1
        if self.kind == "observe" and self.observed == 2:
            self.failed = True
            raise RuntimeError("a bug in observe")
        self.inner.observe(tree, verified)

    def finish(self) -> None:
        if self.kind == "finish":
            raise RuntimeError("a bug in finish")
        self.inner.finish()


@pytest.fixture
def failing() -> Iterator[str]:
    """The name under which the failing proposer is registered."""
    name = "failing_in_tests"
    registry.register(name)(FailingProposer)
    yield name
    del registry._registered[name]


def test_a_failing_proposer_is_logged_once_and_costs_nothing_but_drafts(
    failing: str,
    demo_model: str,
    reference: Callable[[Case], list[RequestOutput]],
    encode: Encode,
    caplog: pytest.LogCaptureFixture,
) -> None:
    case = CASES[0]
    requests = case.requests(encode)[:24]
    with engine(demo_model, {"method": failing}) as llm:
        got = run(llm, requests, in_flight=16, seed=14)
        llm.llm_engine.step()
        assert len(runner_of(llm).drafter) == 0
    assert_same(reference(case)[:24], got, case.prompts[:24])
    assert FailingProposer.started.keys() == set(FailingProposer.KINDS), "a kind of bug was left out"
    assert not +FailingProposer.asked_again, "a proposer that failed was asked again"
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1, [record.getMessage() for record in errors]
    assert failing in errors[0].getMessage()
    assert errors[0].exc_info is not None
    assert "a bug in start" in str(errors[0].exc_info[1])
