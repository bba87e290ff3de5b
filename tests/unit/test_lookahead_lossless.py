"""Lookahead in an engine that truncates, drops and shrinks at will: the output stays plain greedy decoding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from toy_engine import Tokens, argmax_of, decode, generate, toy_model

from proposers import Lookahead, LookaheadOptions, LookaheadRequest, Verified

prompts = st.lists(st.integers(0, 5), min_size=1, max_size=12)


@st.composite
def any_options(draw: st.DrawFn) -> LookaheadOptions:
    window, ngram = draw(st.tuples(st.integers(1, 8), st.integers(2, 6)).filter(lambda wn: wn != (1, 2)))
    return LookaheadOptions(
        window_size=window,
        ngram_size=ngram,
        guess_set_size=draw(st.integers(0, 6)),
        pool_from_prompt=draw(st.booleans()),
        prompt_lookup=draw(st.booleans()),
        always_forward_one=draw(st.booleans()),
        branch=draw(st.sampled_from(["fused", "separate"])),
        branch_every=draw(st.integers(1, 3)),
        max_draft_tokens=draw(st.integers(1, 30)),
        max_depth=draw(st.integers(1, 12)),
    )


def start(options: LookaheadOptions, prompt: Tokens, request_id: str = "r") -> LookaheadRequest:
    return Lookahead(options).start(request_id, np.array(prompt, np.int32))


@settings(deadline=None, max_examples=150)
@given(any_options(), st.integers(0, 10**6), prompts, st.data())
def test_output_is_plain_decoding_whatever_budget_and_truncation(
    options: LookaheadOptions, seed: int, prompt: Tokens, data: st.DataObject
) -> None:
    model = toy_model(seed)
    steps = list(
        generate(
            start(options, prompt),
            model,
            prompt,
            30,
            budget=lambda: data.draw(st.integers(0, 60)),
            keep=lambda nodes: data.draw(st.integers(0, nodes)),
            branch=options.branch == "separate",
        )
    )
    output = steps[-1].context + steps[-1].emitted
    assert output == decode(model, prompt, len(output) - len(prompt))


@settings(deadline=None, max_examples=50)
@given(any_options(), st.integers(0, 10**6), prompts)
def test_all_ranks_build_the_same_trees(options: LookaheadOptions, seed: int, prompt: Tokens) -> None:
    model, branch = toy_model(seed), options.branch == "separate"
    ranks = [generate(start(options, prompt), model, prompt, 20, branch=branch) for _ in range(2)]
    for one, other in zip(*ranks, strict=True):
        assert one.tree.token_ids.tolist() == other.tree.token_ids.tolist()
        assert one.tree.parents.tolist() == other.tree.parents.tolist()


def test_randomness_comes_from_the_request_id() -> None:
    context = np.arange(100, dtype=np.int32)
    windows = []
    for request_id in ("a", "a", "b"):
        request = start(LookaheadOptions(), context.tolist(), request_id)
        request.propose(context, 100)
        windows.append(request.window())
    assert windows[0] == windows[1] != windows[2]
    assert set(windows[0][0]) <= set(range(100)), "the window begins with tokens of the context"


def test_the_filled_window_is_a_comb_of_the_papers_size() -> None:
    w, n = 5, 4
    model, prompt = toy_model(1, vocabulary=1000), [1, 2, 3]
    request = start(LookaheadOptions(window_size=w, ngram_size=n, guess_set_size=0, prompt_lookup=False), prompt)
    steps = list(generate(request, model, prompt, 10))
    assert [len(level) for level in request.window()] == [w - 1] + [w] * (n - 2)
    assert len(steps[-1].tree) == w * (n - 1) - 1
    depths = steps[-1].tree.depths
    assert depths.tolist() == [1, 2, 1, 2, 3, 2, 3, 4, 3, 4, 5, 4, 5, 6], "column by column: trunk node, then tooth"


def test_guesses_come_before_the_comb() -> None:
    prompt = [1, 2, 3, 4, 1, 2, 3, 4, 1]
    context = np.array(prompt, np.int32)
    options = LookaheadOptions(max_depth=4)
    guesses = start(options, prompt).propose_verification(context, 100)
    comb = start(options, prompt).propose_branch(context, 100)
    fused = start(options, prompt).propose(context, 100)
    assert len(guesses) > 0
    assert fused.token_ids.tolist() == guesses.token_ids.tolist() + comb.token_ids.tolist()
    guesses.validate(unique_siblings=True)


@pytest.mark.parametrize("budget", range(70))
def test_the_comb_shrinks_by_whole_columns_to_the_budget(budget: int) -> None:
    prompt = list(range(30))
    request = start(LookaheadOptions(prompt_lookup=False), prompt)
    model = toy_model(5, vocabulary=1000, order=4)
    *_, last = generate(request, model, prompt, 12)  # the window is filled by now
    context = np.array(last.context + last.emitted, np.int32)
    tree = request.propose(context, budget)
    assert len(tree) <= budget
    assert len(tree) == min(59, max(0, (budget + 1) // 4 * 4 - 1)), "a tooth of 3 nodes, then 4 nodes a column"


def test_the_window_runs_every_kth_step_only() -> None:
    prompt = list(range(30))
    request = start(LookaheadOptions(prompt_lookup=False, guess_set_size=0, branch_every=3), prompt)
    steps = list(generate(request, toy_model(5, vocabulary=1000, order=4), prompt, 12))
    assert [len(step.tree) > 0 for step in steps[:7]] == [True, False, False, True, False, False, True]


def test_a_request_that_takes_chains_only_gets_guesses_and_no_lookahead_branch() -> None:
    model, prompt = toy_model(2), [1, 2, 3, 1, 2]
    request = start(LookaheadOptions(), prompt)
    request.without_branch = True
    request.without_branch = True
    context = [*prompt, model(prompt)]
    for _ in range(5):
        array = np.array(context, np.int32)
        chain = request.propose(array, 64).as_chain()
        argmax = argmax_of(model, context, chain)
        path = chain.walk(argmax)
        emitted = np.append(chain.token_ids[path], argmax[len(path)])
        request.observe(chain, Verified(emitted, path, argmax, len(chain)))
        context += emitted.tolist()
    assert context == decode(model, prompt, len(context) - len(prompt))
    array = np.array(context, np.int32)
    request.propose(array, 64).validate(unique_siblings=True)
    assert len(request.propose_branch(array, 64)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 0}, r"window_size\n  Input should be greater than or equal to 1"),
        ({"ngram_size": 1}, r"ngram_size\n  Input should be greater than or equal to 2"),
        ({"guess_set_size": -1}, r"guess_set_size\n  Input should be greater than or equal to 0"),
        ({"window_size": 1, "ngram_size": 2}, r"window_size 1 needs an ngram_size of at least 3"),
        ({"branch": "later"}, r"branch\n  Input should be 'fused' or 'separate'"),
        ({"branch_every": 0}, r"branch_every\n  Input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LookaheadOptions(**options)
