"""Engines in this process, ways to drive them, and what is compared between them."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm import LLM, RequestOutput, SamplingParams, TokensPrompt
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind

from vllm_lookahead.predictions import PREDICTION
from vllm_lookahead.trees.step import retrace

METHODS: dict[str, dict[str, Any]] = {
    "prompt_lookup": {"method": "prompt_lookup", "num_speculative_tokens": 16, "budget": 16},
    "lookahead": {
        "method": "lookahead",
        "window_size": 3,
        "ngram_size": 4,
        "guess_set_size": 4,
        "num_speculative_tokens": 20,
        "budget": 20,
    },
}
"""Speculative configs under test. The node budget is a number, not "auto": what a test drafts must not depend on how
busy the machine is."""

TOLERANCE = 1e-4
"""How far a log-probability may be from stock vLLM's."""


@dataclass(frozen=True)
class Request:
    """One request: a prompt as token ids, and how to sample."""

    prompt: tuple[int, ...]
    params: SamplingParams


def start_engine(model: str, speculative_config: dict[str, Any] | None, **overrides: Any) -> LLM:
    """Start an engine in this process. Small blocks, so that trees cross block boundaries all the time."""
    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
        "block_size": 32,
        "kv_cache_memory_bytes": 256 << 20,
        "disable_log_stats": False,
        # a small model in JSON may go on with white space for ever
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "seed": 0,
    }
    settings.update(overrides)
    return LLM(model, speculative_config=speculative_config, **settings)


def stop_engine(llm: LLM) -> None:
    """Free an engine's memory. vLLM's shutdown would also end the process group of the other engines in here."""
    llm.llm_engine.engine_core._finalizer.detach()
    llm.__dict__.clear()
    gc.unfreeze()  # vLLM freezes the heap when it has started
    gc.collect()


@contextlib.contextmanager
def engine(model: str, speculative_config: dict[str, Any] | None, **overrides: Any) -> Iterator[LLM]:
    """An engine for one block of code."""
    llm = start_engine(model, speculative_config, **overrides)
    try:
        yield llm
    finally:
        stop_engine(llm)


def core_of(llm: LLM) -> Any:
    """The engine core: scheduler, KV cache manager and executor."""
    return llm.llm_engine.engine_core.engine_core


def runner_of(llm: LLM) -> Any:
    """The model runner of the only worker."""
    return core_of(llm).model_executor.driver_worker.worker.model_runner


def metric(llm: LLM, name: str) -> float:
    """A counter of vLLM's own metrics. Only the engine that was started last has any."""
    values = [m.value for m in llm.get_metrics() if m.name == name]
    assert values, f"vLLM has no metric {name}"
    return sum(values)


def run(
    llm: LLM, requests: Sequence[Request], *, in_flight: int = 1, seed: int | None = None, **add: Any
) -> list[RequestOutput]:
    """Run requests to the end and return their outputs in the order of ``requests``.

    Args:
        llm: the engine.
        requests: what to run.
        in_flight: how many requests are in the engine at most. 1: each runs alone.
        seed: with a number, requests arrive in random order and at random moments.
        add: further arguments of ``LLMEngine.add_request``.
    """
    engine = llm.llm_engine
    rng = np.random.default_rng(seed)
    waiting = list(range(len(requests)))
    if seed is not None:
        rng.shuffle(waiting)
    waiting.reverse()
    outputs: dict[int, RequestOutput] = {}
    running = 0
    try:
        while waiting or running:
            while waiting and running < in_flight and (not running or seed is None or rng.random() < 0.6):
                index = waiting.pop()
                params = requests[index].params.clone()
                params.output_kind = RequestOutputKind.FINAL_ONLY
                prompt = TokensPrompt(prompt_token_ids=list(requests[index].prompt))
                engine.add_request(str(index), prompt, params, **add)
                running += 1
            for output in engine.step():
                assert output.finished
                assert int(output.request_id) not in outputs, "a request ends once"
                outputs[int(output.request_id)] = output
                running -= 1
        assert not engine.has_unfinished_requests()
    finally:
        # a failure must not leave requests to the engine's next user
        engine.abort_request([str(index) for index in range(len(requests)) if index not in outputs])
    return [outputs[index] for index in range(len(requests))]


def predicting(requests: Sequence[Request], outputs: Sequence[RequestOutput]) -> list[Request]:
    """Of three requests the first with its output as prediction, the second with that one too, the third without."""
    texts = token_ids(outputs)
    changed = []
    for i, request in enumerate(requests):
        params = request.params.clone()
        if i % 3 < 2:
            params.extra_args = {PREDICTION: texts[i - i % 3]}
        changed.append(Request(request.prompt, params))
    return changed


def token_ids(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    """The tokens of every request's first completion."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def assert_same(expected: Sequence[RequestOutput], got: Sequence[RequestOutput], labels: Sequence[str]) -> None:
    """Two runs gave the same: tokens, text, reasons with ``==``; log-probabilities within ``TOLERANCE``."""
    problems = []
    for label, one, other in zip(labels, expected, got, strict=True):
        pairs = list(zip(one.outputs, other.outputs, strict=True))
        found = [text for number, pair in enumerate(pairs) for text in _differences(*pair, f"completion {number}")]
        found += _logprob_differences(one.prompt_logprobs, other.prompt_logprobs, "prompt_logprobs")
        problems += [f"{label}: {text}" for text in found]
    assert not problems, f"{len(problems)} differences in {len(labels)} requests:\n" + "\n".join(problems[:20])


def _differences(one: CompletionOutput, other: CompletionOutput, where: str) -> Iterator[str]:
    expected, got = list(one.token_ids), list(other.token_ids)
    if expected != got:
        at = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), None)
        at = min(len(expected), len(got)) if at is None else at
        yield (
            f"{where}: tokens differ from position {at} on: expected {expected[at : at + 5]} of {len(expected)}, "
            f"got {got[at : at + 5]} of {len(got)}{_gap(one, at)}"
        )
    else:
        yield from _logprob_differences(one.logprobs, other.logprobs, f"{where}: logprobs")
        if one.cumulative_logprob is not None:
            assert other.cumulative_logprob is not None
            if abs(one.cumulative_logprob - other.cumulative_logprob) > TOLERANCE * max(1, len(expected)):
                yield f"{where}: cumulative_logprob {other.cumulative_logprob}, expected {one.cumulative_logprob}"
    for name in ("text", "finish_reason", "stop_reason"):
        if getattr(one, name) != getattr(other, name):
            yield f"{where}: {name} is {getattr(other, name)!r}, expected {getattr(one, name)!r}"


def _gap(output: CompletionOutput, at: int) -> str:
    """How close the two likeliest tokens were, if the request asked for it: tells a bug from a rounding difference."""
    if not output.logprobs or at >= len(output.logprobs) or len(output.logprobs[at]) < 2:
        return ""
    best = sorted((entry.logprob for entry in output.logprobs[at].values()), reverse=True)
    return f" (gap between the two likeliest: {best[0] - best[1]:.2e})"


def _logprob_differences(expected: Any, got: Any, where: str) -> Iterator[str]:
    if expected is None or got is None:
        if (expected is None) != (got is None):
            yield f"{where}: {type(got)}, expected {type(expected)}"
        return
    if len(expected) != len(got):
        yield f"{where}: {len(got)} positions, expected {len(expected)}"
        return
    for position in range(len(expected)):
        one, other = expected[position], got[position]
        if one is None or other is None:
            if one is not other:
                yield f"{where}[{position}]: {other}, expected {one}"
            continue
        if one.keys() != other.keys():
            yield f"{where}[{position}]: tokens {sorted(other)}, expected {sorted(one)}"
            continue
        for token, entry in one.items():
            twin = other[token]
            if entry.rank != twin.rank or entry.decoded_token != twin.decoded_token:
                yield f"{where}[{position}][{token}]: {twin}, expected {entry}"
            elif not np.isclose(entry.logprob, twin.logprob, rtol=0, atol=TOLERANCE):
                yield f"{where}[{position}][{token}]: {twin.logprob}, expected {entry.logprob}"


@dataclass
class TreeSpy:
    """Watches an engine's steps, so that a test can prove that its output went through branched trees.

    Attributes:
        verified: trees with branches that were verified.
        accepted: nodes of theirs that were accepted.
        left_first_branch: walks that accepted a node off the tree's first path: what no chain could have verified.
        moved: accepted nodes whose KV had to move.
        drafts_accepted: accepted drafts of any kind: trees and chains.
        emitted: tokens that came out of the runner, by external request id; more than the request's output has if it
            ended in the middle of an accepted path.
    """

    verified: int = 0
    accepted: int = 0
    left_first_branch: int = 0
    moved: int = 0
    drafts_accepted: int = 0
    emitted: Counter[str] = field(default_factory=Counter)

    @classmethod
    @contextlib.contextmanager
    def on(cls, llm: LLM) -> Iterator[TreeSpy]:
        """Watch an engine within a block, on either of vLLM's model runners."""
        spy, runner = cls(), runner_of(llm)
        replaced = spy._watch_v2(runner) if hasattr(runner, "walk") else spy._watch_v1(runner)
        vars(runner).update(replaced)
        try:
            yield spy
        finally:
            for name in replaced:
                delattr(runner, name)

    def _watch_v1(self, runner: Any) -> dict[str, Any]:
        commit_kv, sample_tokens = runner.commit_kv, runner.sample_tokens

        def watch_commit(step: Any, walks: Any) -> None:
            self.count(step, walks)
            commit_kv(step, walks)

        def watch_sample(grammar_output: Any) -> Any:
            output = sample_tokens(grammar_output)
            for req_id, sampled in zip(output.req_ids, output.sampled_token_ids, strict=True):
                self.emitted[req_id] += len(sampled)
                self.drafts_accepted += max(len(sampled) - 1, 0)
            return output

        return {"commit_kv": watch_commit, "sample_tokens": watch_sample}

    def _watch_v2(self, runner: Any) -> dict[str, Any]:
        walk = runner.walk

        def watch_walk(sampled: Any, forbidden: Any) -> Any:
            walked = walk(sampled, forbidden)
            self.drafts_accepted += int((walked.lengths - 1).sum())
            self.count(runner.step, retrace(runner.step, walked.tokens.numpy(), walked.lengths.numpy()))
            return walked

        return {"walk": watch_walk}

    def count(self, step: Any, walks: Any) -> None:
        """Add one step."""
        for row in np.flatnonzero(step.branched):
            path = walks.path(row)
            first = step.trees[row].prefix(step.num_nodes(row)).first_path()
            self.verified += 1
            self.accepted += len(path)
            self.left_first_branch += not np.array_equal(path, first[: len(path)])
            self.moved += int(np.sum(path != np.arange(len(path))))

    def assert_trees_were_used(self, at_least: int = 5) -> None:
        """The output that was compared went through trees, in a way that chains could not have."""
        counts = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        assert self.verified >= at_least, counts
        assert self.accepted >= at_least, counts
        assert self.left_first_branch >= at_least, counts
        assert self.moved >= at_least, counts


def ended_inside_a_path(outputs: Sequence[RequestOutput], spy: TreeSpy) -> int:
    """How many requests ended before the last token of their last accepted path."""
    emitted: Counter[str] = Counter()
    for internal, count in spy.emitted.items():
        emitted[internal.rsplit("-", 1)[0]] += count
    return sum(
        emitted[output.request_id] > len(output.outputs[0].token_ids) for output in outputs if len(output.outputs) == 1
    )
