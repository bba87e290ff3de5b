"""Token recycling: guesses from what the model said before, for its own namespace, worth what they have been worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from toy_engine import Tokens, decode, generate, toy_model

from proposers import (
    DraftTree,
    Lookahead,
    LookaheadOptions,
    PromptLookup,
    PromptLookupOptions,
    Proposer,
    RequestInfo,
    RequestProposer,
    TokenRecycling,
    TokenRecyclingOptions,
    Verified,
)
from proposers.calibration import RANKS, RECYCLED, chance

PROMPT = np.array([1, 2], np.int32)


def recycling(**options: Any) -> TokenRecycling:
    return TokenRecycling(TokenRecyclingOptions(**options))


def tell(request: RequestProposer, root: int, top: Tokens, sampled: int | None = None) -> None:
    """A step without a tree: after ``root`` the model found ``top`` likely, and ``sampled`` (else the first) came."""
    request.propose(np.array([1, root], np.int32), 0)
    tokens = np.array([top[0] if sampled is None else sampled], np.int32)
    nothing = np.empty(0, np.int32)
    request.observe(DraftTree.empty(), Verified(tokens, nothing, None, 0, np.array([top], np.int32)))


def guesses(request: RequestProposer, *context: int, budget: int = 50) -> DraftTree:
    return request.propose(np.array(context, np.int32), budget)


def test_what_the_model_found_likely_is_the_guess_likeliest_first() -> None:
    request = recycling(recycled_tokens=3).start("r", PROMPT)
    tell(request, 5, [7, 8, 9])
    tree = guesses(request, 1, 5)
    assert tree.token_ids.tolist() == [7, 8, 9]
    assert tree.parents.tolist() == [-1, -1, -1]
    assert tree.sources is not None
    assert set(tree.sources.tolist()) == {RECYCLED}


def test_guesses_hang_from_guesses() -> None:
    request = recycling(recycled_tokens=2).start("r", PROMPT)
    tell(request, 5, [6, 7])
    tell(request, 6, [8, 5])
    tree = guesses(request, 1, 5)
    tree.validate(unique_siblings=True)
    paths = {
        (5 if p < 0 else int(tree.token_ids[p]), int(t)) for t, p in zip(tree.token_ids, tree.parents, strict=True)
    }
    assert paths == {(5, 6), (5, 7), (6, 8), (6, 5)}
    assert tree.depths.max() >= 3, "the loop 5, 6, 5 goes on"


def test_nodes_that_were_not_accepted_are_recycled_too() -> None:
    request = recycling(recycled_tokens=2).start("r", PROMPT)
    tell(request, 5, [6, 7])
    tree = guesses(request, 1, 5)
    assert tree.token_ids.tolist() == [6, 7]
    top = np.array([[9, 6], [60, 61], [70, 71]], np.int32)
    request.observe(tree, Verified(np.array([9], np.int32), np.empty(0, np.int32), None, 2, top))
    assert guesses(request, 1, 5, 9, 7).token_ids.tolist() == [70, 71]
    assert guesses(request, 1, 5, 9, 7, 6).token_ids.tolist() == [60, 61]


def test_a_cut_tree_tells_of_its_verified_nodes_only() -> None:
    request = recycling(recycled_tokens=2).start("r", PROMPT)
    tell(request, 5, [6, 7])
    tree = guesses(request, 1, 5)
    request.observe(tree, Verified(np.array([9], np.int32), np.empty(0, np.int32), None, 1, np.ones((2, 2), np.int32)))
    assert len(guesses(request, 1, 5, 9, 7)) == 0
    assert len(guesses(request, 1, 5, 9, 7, 6)) > 0


@pytest.mark.parametrize(
    ("teacher", "pupil", "learns"),
    [("", "", True), ("a", "a", True), ("a", "b", False), ("", "a", False), (None, None, False), (None, "", False)],
)
def test_requests_of_other_namespaces_learn_nothing(teacher: str | None, pupil: str | None, learns: bool) -> None:
    proposer = recycling(recycled_tokens=2)
    one, other = (proposer.start(name, PROMPT, RequestInfo(name)) for name in (teacher, pupil))
    tell(one, 5, [6, 7])
    assert len(guesses(one, 1, 5)) == 2
    assert (len(guesses(other, 1, 5)) == 2) == learns


def test_a_loop_is_found_and_output_is_plain_decoding() -> None:
    model = toy_model(3, vocabulary=12, order=1)
    proposer = recycling(max_draft_tokens=32)
    steps = list(generate(proposer.start("r", PROMPT), model, [1, 2], 200, num_top=8))
    output = steps[-1].context + steps[-1].emitted
    assert output == decode(model, [1, 2], len(output) - 2)
    assert len(steps[0].tree) == 0
    assert np.mean([len(step.emitted) for step in steps[-5:]]) > 6


@pytest.mark.parametrize("seed", range(5))
def test_output_is_plain_decoding_whatever_the_scheduler_cuts(seed: int) -> None:
    model, rng = toy_model(seed, order=2), np.random.default_rng(seed)
    request = recycling(recycled_tokens=4).start("r", PROMPT)
    keep, budget = (lambda nodes: int(rng.integers(0, nodes + 1))), (lambda: int(rng.integers(0, 30)))
    steps = list(generate(request, model, [1, 2], 150, keep=keep, budget=budget, num_top=4))
    output = steps[-1].context + steps[-1].emitted
    assert output == decode(model, [1, 2], len(output) - 2)


def test_what_a_step_says_does_not_count_as_known_before_it() -> None:
    """The first of a row is always right about the step that it comes from. What is next is random here."""
    proposer, rng = recycling(recycled_tokens=1, min_probability=0.0), np.random.default_rng(0)
    request = proposer.start("r", PROMPT)
    context = [1, 2, 3]
    for _ in range(400):
        tree = guesses(request, *context, budget=4)
        sampled = int(rng.integers(0, 40))
        top = np.full((len(tree) + 1, 1), sampled, np.int32)
        path = tree.walk(top[:, 0])
        emitted = [*tree.token_ids[path].tolist(), sampled]
        request.observe(tree, Verified(np.array(emitted, np.int32), path, None, len(tree), top))
        context += emitted
    calibration = proposer.guesses.calibration
    assert chance(calibration.state, calibration.start(), RANKS) < 0.15


@pytest.mark.parametrize("right", [0, 2])
def test_ranks_are_worth_how_often_they_were_right(right: int) -> None:
    proposer = recycling(recycled_tokens=3, min_probability=0.0)
    request = proposer.start("r", PROMPT)
    top = np.array([3, 4, 5], np.int32)
    context = [1, 2, int(top[right])]
    for _ in range(300):
        guesses(request, *context, budget=3)
        verified = Verified(top[right : right + 1], np.empty(0, np.int32), None, 0, top[None])
        request.observe(DraftTree.empty(), verified)
        context.append(int(top[right]))
    calibration = proposer.guesses.calibration
    worth = [chance(calibration.state, calibration.start(), RANKS + rank) for rank in range(3)]
    assert worth[right] > 0.9
    assert all(value < 0.1 for value in worth[:right])


@pytest.mark.parametrize("method", [PromptLookup, Lookahead])
def test_the_other_methods_recycle_too(method: type[Proposer]) -> None:
    proposer = method(method.Options(recycled_tokens=4))
    assert proposer.num_top == 4
    request = proposer.start("r", PROMPT)
    tell(request, 5, [6, 7, 8, 9])
    tree = guesses(request, 1, 2, 3, 4, 5)
    assert set(tree.token_ids[: tree.num_guesses].tolist()) == {6, 7, 8, 9}


def test_switched_off_nothing_is_asked_for() -> None:
    for proposer in (
        PromptLookup(PromptLookupOptions(recycled_tokens=0)),
        Lookahead(LookaheadOptions(recycled_tokens=0)),
        Lookahead(LookaheadOptions(prompt_lookup=False)),
    ):
        assert proposer.num_top == 0
        assert proposer.guesses.recycled is None


def test_a_pause_of_any_length_leaves_a_request_small() -> None:
    request = recycling().start("r", PROMPT)
    guesses(request, 1, 5)
    top, nothing = np.arange(8, dtype=np.int32)[None], np.empty(0, np.int32)
    for i in range(1000):  # steps without a proposal
        request.observe(DraftTree.empty(), Verified(np.array([i % 9], np.int32), nothing, None, 0, top))
    assert len(guesses(request, 1, 5, 3)) > 0


@pytest.mark.parametrize("k", [0, 17])
def test_a_wrong_option_is_refused(k: int) -> None:
    with pytest.raises(ValidationError, match="recycled_tokens"):
        TokenRecyclingOptions(recycled_tokens=k)
