"""The engine against the paper: window, pool and accepted tokens after every step, next to an independent reference.

The engine is real vLLM with trees, KV cache and several requests in a batch; the reference (``paper_reference.py``) is
plain lists and one transformers forward per step. Both run the same model in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import add
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from vllm import LLM

from proposers import LookaheadOptions

from .cases import greedy
from .engines import Request, engine, run, runner_of
from .paper_reference import Draws, Layout, PaperLookahead, Pool, Settings, Step, Tokens
from .prompts import PROMPTS

LENGTH = 32
"""Output tokens of every request that are compared."""

BEYOND = 16
"""How many more are generated: the engine makes no guesses beyond a request's end, the reference knows of no end."""

CLOSE = 1e-4
"""Two kernels may disagree about the likeliest token where the second one's logit is less than this below it."""


@dataclass(frozen=True)
class Seen:
    """One step of the engine for one request: the tokens that came out, window and pool afterwards."""

    emitted: Tokens
    window: list[Tokens]
    pool: Pool


@dataclass(frozen=True)
class Trace:
    """One request of the engine, step by step; the first one is the prompt's."""

    request_id: str
    prompt: Tokens
    steps: list[Seen]


@dataclass(frozen=True)
class Difference:
    """Where the reference and the engine part.

    Attributes:
        step: number of the step.
        what: what differs.
        expected: by the reference.
        got: by the engine.
        margin: see ``Step.margin``: tells a bug from a rounding difference.
    """

    step: int
    what: str
    expected: Any
    got: Any
    margin: float


def watch(llm: LLM, prompts: list[Tokens]) -> list[Trace]:
    """Run greedy requests, several at a time, and record every step of each."""
    runner = runner_of(llm)
    draft = runner._draft
    steps: dict[str, list[Seen]] = {}

    def record(sampled_token_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        drafts = draft(sampled_token_ids, *args, **kwargs)
        for request_id, sampled in zip(runner.input_batch.req_ids, sampled_token_ids, strict=True):
            if sampled:
                request = runner.drafter._requests[request_id]
                assert request is not None, "the proposer failed"
                steps.setdefault(request_id, []).append(Seen(list(sampled), request.window(), request.pool()))
        return drafts

    runner._draft = record
    try:
        outputs = run(
            llm, [Request(tuple(p), greedy(max_tokens=LENGTH + BEYOND, ignore_eos=True)) for p in prompts], in_flight=4
        )
    finally:
        del runner._draft
    internal = {request_id.rsplit("-", 1)[0]: request_id for request_id in steps}  # ours, then what vLLM added
    traces = [Trace(internal[str(i)], prompt, steps[internal[str(i)]]) for i, prompt in enumerate(prompts)]
    for trace, output in zip(traces, outputs, strict=True):
        emitted = list(accumulate((step.emitted for step in trace.steps), add))
        assert emitted[-1][: LENGTH + BEYOND] == list(output.outputs[0].token_ids)
        del trace.steps[1 + next(i for i, tokens in enumerate(emitted) if len(tokens) >= LENGTH) :]
    return traces


def speculative_config(settings: Settings) -> dict[str, Any]:
    """The engine's configuration for the paper's parameters: a fixed budget, so that every node is verified."""
    options: dict[str, Any] = {
        "window_size": settings.w,
        "ngram_size": settings.n,
        "guess_set_size": settings.g,
        "prompt_lookup": False,
        "pool_from_prompt": settings.pool_from_text,
        "always_forward_one": settings.forward_one,
        "branch": "fused" if settings.accept_window else "separate",
    }
    return {"method": "lookahead", **options, "budget": LookaheadOptions(**options).max_nodes}


def traces_of(model: str, settings: Settings, prompts: list[Tokens]) -> list[Trace]:
    """What an engine of its own does with the prompts."""
    with engine(model, speculative_config(settings)) as llm:
        traces = watch(llm, prompts)
        # they keep the KV cache alive: 1 GiB for every engine
        trees = runner_of(llm)._trees
        trees._commit.caches.clear()
        trees._kv_caches.clear()
        for impl in trees._impls:
            vars(impl).pop("_cache", None)
            vars(impl).pop("_cells", None)
    return traces


def first_difference(reference: PaperLookahead, trace: Trace) -> tuple[Difference | None, list[Step]]:
    """Run the reference along a trace until something differs; also returns its steps before that."""
    steps: list[Step] = []
    for number, seen in enumerate(trace.steps):
        step = reference.step() if number else reference.begin()
        for what in ("emitted", "window", "pool"):
            expected, got = getattr(step, what), getattr(seen, what)
            if expected != got:
                return Difference(number, what, expected, got, step.margin), steps
        steps.append(step)
    return None, steps


@pytest.fixture(scope="module")
def transformer(demo_model: str) -> PreTrainedModel:
    """The demo model in transformers, float32."""
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@pytest.fixture(scope="module")
def prompts(demo_model: str) -> list[Tokens]:
    """Code, chats and repetitive text."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    return [tokenizer.encode(text) for text in PROMPTS[::4]]


@pytest.fixture(scope="module")
def same_ids(in_process: None) -> Iterator[None]:
    """vLLM adds the same suffix to every request id: random tokens come from it, and a failure should happen again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.v1.engine.input_processor.random_uuid", lambda: "00000000")
        yield


SMALL = Settings(w=5, n=4, g=5)
SMALL_WITH_TEXT = Settings(w=5, n=4, g=5, pool_from_text=True)


@pytest.fixture(scope="module")
def with_text(demo_model: str, prompts: list[Tokens], same_ids: None) -> list[Trace]:
    """Traces with n-grams of the text in the pool."""
    return traces_of(demo_model, SMALL_WITH_TEXT, prompts)


def assert_follows_the_paper(transformer: PreTrainedModel, settings: Settings, traces: list[Trace]) -> list[Step]:
    """Every step of every trace is the paper's.

    A trace may end early where the reference itself saw a tie within rounding: one of them, or one in six.
    """
    agreed: list[Step] = []
    ties = []
    for trace in traces:
        reference = PaperLookahead(transformer, settings, trace.request_id, trace.prompt)
        difference, steps = first_difference(reference, trace)
        agreed += steps
        if difference is not None:
            assert difference.margin < CLOSE, f"request {trace.request_id} of {settings}: {difference}"
            ties.append(difference)
    assert len(ties) <= max(1, len(traces) // 6), ties
    return agreed


@pytest.mark.parametrize("from_text", [False, True], ids=["paper", "with n-grams of the text"])
def test_every_step_is_the_papers(
    from_text: bool,
    demo_model: str,
    transformer: PreTrainedModel,
    prompts: list[Tokens],
    same_ids: None,
    request: pytest.FixtureRequest,
) -> None:
    assert len(prompts) >= 12
    if from_text:
        settings, traces = SMALL_WITH_TEXT, request.getfixturevalue("with_text")
    else:
        settings, traces = SMALL, traces_of(demo_model, SMALL, prompts)
    steps = assert_follows_the_paper(transformer, settings, traces)
    # What was compared had something to compare.
    assert sum(step.from_guess > 0 for step in steps) >= 10
    assert any(step.from_window for step in steps)
    assert any(step.from_guess == settings.n - 1 for step in steps), "a guess was right to its end"
    assert any(len(grams) == settings.g for step in steps for grams in step.pool.values()), "a key was full"


@pytest.mark.parametrize(
    "settings",
    [
        Settings(w=15, n=5, g=15),
        Settings(w=15, n=5, g=15, pool_from_text=True),
        Settings(w=5, n=4, g=5, forward_one=True),
        Settings(w=5, n=4, g=5, accept_window=False),
        Settings(w=4, n=2, g=3),
        Settings(w=1, n=3, g=1, pool_from_text=True),
        Settings(w=3, n=4, g=0),
    ],
    ids=lambda s: (
        f"W={s.w} N={s.n} G={s.g}{', text' * s.pool_from_text}{', forward one' * s.forward_one}"
        + ", separate" * (not s.accept_window)
    ),
)
def test_other_sizes(
    settings: Settings, demo_model: str, transformer: PreTrainedModel, prompts: list[Tokens], same_ids: None
) -> None:
    traces = traces_of(demo_model, settings, [prompts[0], prompts[7]])
    steps = assert_follows_the_paper(transformer, settings, traces)
    assert len(steps[-1].window) == settings.n - 1, "the window was filled"


# ---- the judge is judged


def test_every_row_sees_what_it_should(transformer: PreTrainedModel, prompts: list[Tokens]) -> None:
    """One forward of the reference against plain causal ones: each row's own text, alone."""
    reference = PaperLookahead(transformer, SMALL_WITH_TEXT, "mask", prompts[7])
    reference.begin()
    while len(reference.window) < SMALL.n - 1 or len(reference.guesses()) < 2:
        reference.step()
    window, guesses, text = reference.window, reference.guesses(), reference.text
    layout = reference.layout(window, guesses)
    said, _ = reference.forward(layout)
    paths = {
        layout.cells[level][column]: window[0][1 : column + 1]
        + [window[below][column] for below in range(1, level + 1)]
        for level in range(len(window))
        for column in range(len(window[0]))
    }
    paths |= {
        row: guess[: i + 1] for guess, rows in zip(guesses, layout.guesses, strict=True) for i, row in enumerate(rows)
    }
    assert len(paths) == SMALL.w * (SMALL.n - 1) + len(guesses) * (SMALL.n - 1)
    with torch.inference_mode():
        for row, path in paths.items():
            plain = transformer(torch.tensor([text + path])).logits[0, -1]
            assert plain.max() - plain[said[row]] < CLOSE, f"row {row}, which stands for {path}"


class FirstInFirstOut(PaperLookahead):
    """An n-gram that is seen again keeps its age."""

    def remember(self, gram: Tokens) -> None:
        if tuple(gram[1:]) not in self.pool.get(gram[0], []):
            super().remember(gram)


class LastColumnFirst(PaperLookahead):
    """The window's n-grams go to the pool from right to left."""

    def collect(self, tips: Tokens) -> None:
        for column in reversed(range(len(tips))):
            self.remember([level[column] for level in self.window] + [tips[column]])


class OtherDraws(PaperLookahead):
    """Random tokens with another seed."""

    def begin(self) -> Step:
        self.draws = Draws("another")
        return super().begin()


class BlindColumns(PaperLookahead):
    """The mask: the cells of the upper levels see level 0, but not each other."""

    def layout(self, window: list[Tokens], guesses: list[Tokens]) -> Layout:
        layout = super().layout(window, guesses)
        upper = {row for rows in layout.cells[1:] for row in rows}
        for row in upper:
            layout.sees[row] = [other for other in layout.sees[row] if other == row or other not in upper]
        return layout


class FlatPositions(PaperLookahead):
    """The window's cells have the positions at which they stand in the input."""

    def layout(self, window: list[Tokens], guesses: list[Tokens]) -> Layout:
        layout = super().layout(window, guesses)
        for rows in layout.cells:
            for row in rows:
                layout.positions[row] = row
        return layout


class OneGuess(PaperLookahead):
    """Only the oldest guess is verified."""

    def guesses(self) -> list[Tokens]:
        return super().guesses()[:1]


@pytest.mark.parametrize(
    ("algorithm", "changes"),
    [
        (FirstInFirstOut, {}),
        (LastColumnFirst, {}),
        (OtherDraws, {}),
        (BlindColumns, {}),
        (FlatPositions, {}),
        (OneGuess, {}),
        (PaperLookahead, {"g": SMALL.g + 1}),
        (PaperLookahead, {"g": SMALL.g - 1}),
        (PaperLookahead, {"forward_one": True}),
        (PaperLookahead, {"accept_window": False}),
        (PaperLookahead, {"pool_from_text": False}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value or ""),
)
def test_a_different_algorithm_is_found_out(
    algorithm: type[PaperLookahead], changes: dict[str, Any], transformer: PreTrainedModel, with_text: list[Trace]
) -> None:
    settings = replace(SMALL_WITH_TEXT, **changes)
    for trace in with_text:
        difference, _ = first_difference(algorithm(transformer, settings, trace.request_id, trace.prompt), trace)
        if difference is not None and difference.margin >= CLOSE:
            return
    pytest.fail("nobody noticed")
