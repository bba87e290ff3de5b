"""Prompt lookup: every guess was seen before, the best one comes first, and the index never lags behind."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from toy_engine import Tokens, decode, generate, toy_model

from proposers import DraftTree, PromptLookup, PromptLookupOptions

texts = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def propose(text: Tokens, budget: int = 1000, **options: float) -> DraftTree:
    """The tree of a request that sees ``text`` at once; everything that fits is drafted."""
    proposer = PromptLookup(PromptLookupOptions(**{"min_probability": 0.0, "max_draft_tokens": 1000, **options}))
    context = np.array(text, np.int32)
    return proposer.start("r", context).propose(context, budget)


def paths(tree: DraftTree) -> list[Tokens]:
    found: list[Tokens] = []
    for token, parent in zip(tree.token_ids.tolist(), tree.parents.tolist(), strict=True):
        found.append(([] if parent < 0 else found[parent]) + [token])
    return found


def test_what_followed_the_last_tokens_is_the_guess() -> None:
    tree = propose([1, 2, 3, 4, 9, 1, 2], max_depth=3)
    assert paths(tree) == [[3], [3, 4], [3, 4, 9]]


def test_nothing_is_guessed_when_the_last_token_is_new() -> None:
    assert len(propose([1, 2, 3])) == 0
    assert len(propose([1])) == 0
    assert len(propose([1, 2, 1], budget=0)) == 0


def test_a_loop_is_continued_beyond_the_end_of_the_text() -> None:
    assert paths(propose([5, 7, 8, 7, 8], max_depth=5))[-1] == [7, 8, 7, 8, 7]


def test_the_longest_match_comes_first_although_another_is_more_recent() -> None:
    text = [1, 2, 3, 10, 9, 3, 20, 9, 1, 2, 3]
    tree = propose(text, max_depth=1)
    assert tree.token_ids.tolist() == [10, 20]


def test_among_equal_matches_the_most_recent_comes_first() -> None:
    assert propose([1, 10, 1, 20, 1, 30, 1], max_depth=1).token_ids.tolist() == [30, 20, 10]


def test_improbable_nodes_are_left_out() -> None:
    text = [token for i in range(20) for token in (1, 10 + i)] + [1]
    assert len(propose(text, max_depth=4)) > len(propose(text, max_depth=4, min_probability=0.01)) > 0
    assert len(propose(text, max_depth=4, min_probability=1.0)) == 0


@given(texts, st.integers(1, 3), st.integers(0, 3), st.integers(1, 6))
def test_every_guess_followed_the_same_tokens_before(text: Tokens, min_ngram: int, more: int, depth: int) -> None:
    max_ngram = min_ngram + more
    tree = propose(text, 200, min_ngram=min_ngram, max_ngram=max_ngram, max_depth=depth)
    tree.validate(unique_siblings=True)
    assert max(tree.depths, default=0) <= depth
    for path in paths(tree):
        known = text + path
        end = known[-min_ngram - 1 :]
        assert any(known[at : at + min_ngram + 1] == end for at in range(len(known) - min_ngram - 1)), path


@pytest.mark.parametrize("seed", range(20))
def test_all_that_ever_followed_the_last_tokens_is_guessed(seed: int) -> None:
    text = np.random.default_rng(seed).integers(0, 4, 60).tolist()
    for n in (1, 2, 3):
        tree = propose(text, min_ngram=n, max_depth=1)
        expected = {text[at + n] for at in range(len(text) - n) if text[at : at + n] == text[-n:]}
        assert set(tree.token_ids.tolist()) == expected


@given(texts)
def test_the_longest_match_is_copied(text: Tokens) -> None:
    """As far as it reaches: the tree's first path, where nothing is known that contradicts it."""
    text = [*text, *range(100, 110), *text[:3], *range(100, 105)]
    tree = propose(text, max_depth=5)
    assert tree.token_ids[tree.first_path()].tolist() == [105, 106, 107, 108, 109]


@settings(deadline=None)
@given(texts, st.integers(0, 20))
def test_a_smaller_budget_gives_a_prefix_of_the_same_tree(text: Tokens, budget: int) -> None:
    tree, everything = propose(text, budget), propose(text)
    assert len(tree) == min(budget, len(everything))
    assert paths(tree) == paths(everything)[:budget]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 5), min_size=1, max_size=10), st.data())
def test_output_is_plain_decoding_whatever_budget_and_truncation(
    seed: int, prompt: Tokens, data: st.DataObject
) -> None:
    model = toy_model(seed, order=3)
    request = PromptLookup(PromptLookupOptions()).start("r", np.array(prompt, np.int32))
    steps = list(
        generate(
            request,
            model,
            prompt,
            40,
            budget=lambda: data.draw(st.integers(0, 40)),
            keep=lambda nodes: data.draw(st.integers(0, nodes)),
        )
    )
    output = steps[-1].context + steps[-1].emitted
    assert output == decode(model, prompt, len(output) - len(prompt))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_ngram": 9}, r"max_ngram\n  Input should be less than or equal to 8"),
        ({"max_draft_tokens": 0}, r"max_draft_tokens\n  Input should be greater than or equal to 1"),
        ({"min_ngram": 4, "max_ngram": 3}, r"min_ngram \(4\) must be at most max_ngram \(3\)"),
        ({"max_ngrams": 3}, r"max_ngrams\n  Extra inputs are not permitted"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PromptLookupOptions(**options)
