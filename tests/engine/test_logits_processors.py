"""Custom logits processors see, at every node, the output as it would be without drafts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.config.reasoning import ReasoningConfig
from vllm.v1.sample.logits_processor import (
    AdapterLogitsProcessor,
    BatchUpdate,
    LogitsProcessor,
    MoveDirectionality,
    RequestLogitsProcessor,
)

from .cases import Case, Encode, either
from .engines import TreeSpy, assert_same, engine, run, token_ids
from .prompts import CHATS, PROMPTS


@dataclass
class Seen:
    """What a request's tokens were followed by, learned one output token at a time."""

    output: list[int]
    read: int = 0
    followers: dict[int, set[int]] = field(default_factory=dict)


class RareBigrams(LogitsProcessor):
    """Makes every bigram of the output less likely the second time.

    It keeps books in ``update_state`` from the tokens that are new since the last call, so it goes wrong when it is
    shown a token that is taken back, or is not called when a token was added.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.requests: dict[int, Seen] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update:
            for index in batch_update.removed:
                self.requests.pop(index, None)
            for index, params, _, output in batch_update.added:
                self.requests.pop(index, None)
                if params.extra_args and "rare_bigrams" in params.extra_args:
                    self.requests[index] = Seen(output)
            for one, other, direction in batch_update.moved:
                moved, back = self.requests.pop(one, None), self.requests.pop(other, None)
                if moved is not None:
                    self.requests[other] = moved
                if back is not None and direction == MoveDirectionality.SWAP:
                    self.requests[one] = back
        for seen in self.requests.values():
            for at in range(max(seen.read, 1), len(seen.output)):
                seen.followers.setdefault(seen.output[at - 1], set()).add(seen.output[at])
            seen.read = max(seen.read, len(seen.output))

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for index, seen in self.requests.items():
            followers = seen.followers.get(seen.output[-1]) if seen.output else None
            if followers:
                logits[index, sorted(followers)] -= 2.0
        return logits


class Alternate(AdapterLogitsProcessor):
    """A processor per request: odd positions prefer odd tokens, and the prompt's last token never comes again."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> RequestLogitsProcessor | None:
        if not (params.extra_args and "alternate" in params.extra_args):
            return None

        def process(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
            logits[len(output) % 2 :: 2] += 1.5
            logits[prompt[-1]] = float("-inf")
            return logits

        return process


class Sharpen(LogitsProcessor):
    """Changes probabilities, not their order: applied to sampled rows only, after the temperature."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits * 1.25


PROCESSORS = [RareBigrams, Alternate, Sharpen]


def processed(i: int, _: Encode) -> SamplingParams:
    extra = ({"rare_bigrams": True}, {"alternate": True}, {"rare_bigrams": True, "alternate": True}, {})[i % 4]
    other = ({}, {"repetition_penalty": 1.1}, {"logprobs": 2}, {"min_tokens": 4, "stop": ["\n\n"]}, {})[i % 5]
    return either(i, extra_args=extra or None, **other)


CASE = Case("custom logits processors", processed, PROMPTS[:40])


def thinking(i: int, _: Encode) -> SamplingParams:
    return either(i, thinking_token_budget=(3, 8, 20, None)[i % 4], ignore_eos=True)


THINKING = Case("thinking budgets", thinking, CHATS)

SETTINGS: dict[str, Any] = {
    "logits_processors": PROCESSORS,
    "reasoning_config": ReasoningConfig(reasoning_start_str="<|assistant|>", reasoning_end_str="<|end|>"),
}
"""What else a step's sampling may depend on, for the engines of this file."""


@pytest.fixture(scope="module")
def expected(demo_model: str, encode: Encode) -> tuple[list[RequestOutput], list[RequestOutput]]:
    """What stock vLLM gives for ``CASE`` and ``THINKING``; not what it gives without the processors and budgets."""
    with engine(demo_model, None, **SETTINGS) as stock:
        return run(stock, CASE.requests(encode)), run(stock, THINKING.requests(encode))


def test_processors_and_budgets_change_the_output(
    stock: LLM, expected: tuple[list[RequestOutput], list[RequestOutput]], encode: Encode
) -> None:
    unprocessed = run(stock, CASE.requests(encode)[:8])
    changed = [a != b for a, b in zip(token_ids(expected[0]), token_ids(unprocessed), strict=False)]
    assert sum(changed) >= 5, changed
    end = encode("<|end|>")
    for request, output in zip(THINKING.requests(encode), expected[1], strict=True):
        budget = request.params.thinking_token_budget
        assert budget is None or end[0] in output.outputs[0].token_ids[: budget + 2]


def test_custom_logits_processors(
    demo_model: str,
    method: dict[str, Any],
    encode: Encode,
    expected: tuple[list[RequestOutput], list[RequestOutput]],
) -> None:
    """The processors, then thinking budgets: requests that have one get no drafts, their neighbours trees."""
    requests, budgeted = CASE.requests(encode), THINKING.requests(encode)
    labels = [f"{r.params.extra_args}, budget {r.params.thinking_token_budget}" for r in requests + budgeted]
    with engine(demo_model, method, **SETTINGS) as ours:
        with TreeSpy.on(ours) as spy:
            got = run(ours, requests)
        assert_same(expected[0], got, labels[: len(requests)])
        spy.assert_trees_were_used()
        with TreeSpy.on(ours) as spy:
            got = run(ours, requests + budgeted, in_flight=16, seed=3)
        assert_same(expected[0] + expected[1], got, labels)
        spy.assert_trees_were_used()
        with TreeSpy.on(ours) as spy:
            run(
                ours, [request for request in budgeted if request.params.thinking_token_budget is not None], in_flight=4
            )
        assert spy.drafts_accepted == 0
