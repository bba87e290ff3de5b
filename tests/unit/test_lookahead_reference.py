"""Lookahead against the paper: an independent implementation in plain lists must agree at every single step."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import Model, Tokens, decode, generate, toy_model

from proposers import Lookahead, LookaheadOptions


class PaperLookahead:
    """Section 3 of arXiv 2402.02057 in plain Python, one request, greedy.

    Attributes:
        levels: the window; level 0 first. Its tokens follow the root; the others have a column for the root, too.
        pool: first token to the rest of its n-grams, oldest first.
    """

    def __init__(
        self, w: int, n: int, g: int, request_id: str, prompt: Tokens, from_prompt: bool, forward_one: bool
    ) -> None:
        self.w, self.n, self.g = w, n, g
        self.from_prompt, self.forward_one = from_prompt, forward_one
        self.seed = int.from_bytes(blake2b(request_id.encode(), digest_size=4).digest(), "little") << 32
        self.draws = 0
        self.levels: list[Tokens] = []
        self.pool: dict[int, list[tuple[int, ...]]] = {}
        if from_prompt:
            self.remember_text(prompt, 0)

    def remember(self, gram: Tokens) -> None:
        if self.g == 0:
            return
        grams = self.pool.setdefault(gram[0], [])
        rest = tuple(gram[1:])
        if rest in grams:
            grams.remove(rest)
        grams.append(rest)
        del grams[: max(0, len(grams) - self.g)]

    def remember_text(self, text: Tokens, known: int) -> None:
        """All n-grams of the text that end after its first ``known`` tokens."""
        for end in range(max(known + 1, self.n), len(text) + 1):
            self.remember(text[end - self.n : end])

    def random_token(self, context: Tokens) -> int:
        mask = 2**64 - 1
        self.draws += 1
        x = (self.seed + self.draws) * 0x9E3779B97F4A7C15 & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return context[(x ^ x >> 31) % len(context)]

    def begin(self, context: Tokens) -> None:
        self.levels = [[self.random_token(context) for _ in range(self.w + self.n - 3)]]
        if self.from_prompt:
            self.remember_text(context, len(context) - 1)

    def column(self, c: int) -> Tokens:
        """Tokens between the root and the tip of a column: the trunk below it, then its tooth."""
        return self.levels[0][:c] + [level[c] for level in self.levels[1:]]

    def accepted(self, model: Model, context: Tokens) -> Tokens:
        """The path that the step accepts: down the guesses if one of them begins right, else down the comb."""
        guesses = [list(guess) for guess in self.pool.get(context[-1], [])]
        columns = [self.column(c) for c in range(len(self.levels[0]) + 1)]

        def agreed(path: Tokens) -> Tokens:
            hits: Tokens = []
            for token in path:
                if token != model(context + hits):
                    break
                hits.append(token)
            return hits

        best = max((agreed(guess) for guess in guesses), key=len, default=[])
        if best:
            return best
        # In the comb, a column's tooth comes before the next trunk token: the lowest column that fits is taken.
        fitting = dict(enumerate(columns))
        while True:
            right = [*best, model(context + best)]
            fitting = {c: column for c, column in fitting.items() if column[: len(right)] == right}
            if not fitting:
                return best
            best = right
            lowest = min(fitting)
            if len(best) > lowest:  # that was a token of its tooth, which no other column shares
                fitting = {lowest: fitting[lowest]}

    def step(self, model: Model, context: Tokens) -> Tokens:
        """One step on the context; returns the tokens that it emits."""
        if not self.levels:
            self.begin(context)
        hits = self.accepted(model, context)
        emitted = [*hits, model(context + hits)]
        tips = [model(context + self.column(c)) for c in range(len(self.levels[0]) + 1)]
        after = context + emitted
        h = 0 if self.forward_one else len(hits)

        def fill(tokens: Tokens, length: int) -> Tokens:
            return tokens + [self.random_token(after) for _ in range(length - len(tokens))]

        if len(self.levels) < self.n - 1:
            size = len(self.levels[0])
            moved = [level[1 + h :] for level in [*self.levels, tips]]
            self.levels = [fill(level, size - 1 if i == 0 else size) for i, level in enumerate(moved)]
        else:
            for c in range(self.w):
                key = context[-1] if c == 0 else self.levels[0][c - 1]
                self.remember([key] + [level[c] for level in self.levels[1:]] + [tips[c]])
            above = [*self.levels[1:], tips]
            self.levels = [
                fill(level[1 + h :] if i == 0 else level[h:], self.w - 1 if i == 0 else self.w)
                for i, level in enumerate(above)
            ]
        if self.from_prompt:
            self.remember_text(after, len(context))
        return emitted


corners = st.tuples(st.integers(1, 7), st.integers(2, 6), st.integers(0, 5)).filter(lambda wng: wng[:2] != (1, 2))


@settings(deadline=None, max_examples=150)
@given(
    corners,
    st.integers(0, 10**6),
    st.lists(st.integers(0, 5), min_size=1, max_size=12),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["fused", "separate"]),
)
def test_window_pool_and_accepted_tokens_equal_the_papers_at_every_step(
    sizes: tuple[int, int, int], seed: int, prompt: Tokens, from_prompt: bool, forward_one: bool, branch: str
) -> None:
    w, n, g = sizes
    options = LookaheadOptions(
        window_size=w,
        ngram_size=n,
        guess_set_size=g,
        pool_from_prompt=from_prompt,
        always_forward_one=forward_one,
        prompt_lookup=False,
        branch=branch,
        max_draft_tokens=1000,
    )
    model = toy_model(seed)
    request = Lookahead(options).start(f"request {seed}", np.array(prompt, np.int32))
    paper = PaperLookahead(w, n, g, f"request {seed}", prompt, from_prompt, forward_one)
    separate = branch == "separate"
    for step in generate(request, model, prompt, 30, branch=separate):
        if not paper.levels:
            paper.begin(step.context)
        assert request.window() == paper.levels
        assert request.pool() == paper.pool
        if separate:
            # The comb was not in the verified tree, so nothing of it can be accepted.
            paper.accepted = lambda model, context, emitted=step.emitted: emitted[:-1]  # type: ignore[method-assign]
        assert paper.step(model, step.context) == step.emitted


@pytest.mark.parametrize("branch_every", [1, 3])
def test_fused_and_separate_evolve_alike_for_the_same_accepted_tokens(branch_every: int) -> None:
    # A model without any pattern: nothing is ever accepted, so both modes take the same steps.
    def model(tokens: Tokens) -> int:
        return hash((len(tokens), tuple(tokens[-3:]))) % 50_000

    prompt = list(range(20))
    runs = []
    for branch in ("fused", "separate"):
        options = LookaheadOptions(prompt_lookup=False, branch=branch, branch_every=branch_every)
        request = Lookahead(options).start("same", np.array(prompt, np.int32))
        steps = generate(request, model, prompt, 25, branch=branch == "separate")
        runs.append([(step.emitted, request.window(), request.pool()) for step in steps])
    assert runs[0] == runs[1]
    assert runs[0][-1][2], "the pool was filled"


def test_the_reference_itself_decodes_greedily() -> None:
    model = toy_model(3)
    paper = PaperLookahead(5, 4, 4, "r", [1, 2, 3], True, False)
    context = [1, 2, 3, model([1, 2, 3])]
    while len(context) < 60:
        context += paper.step(model, context)
    assert context == decode(model, [1, 2, 3], len(context) - 3)
