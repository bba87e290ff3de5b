"""Predicted outputs: what is accepted as one, how its tokens are counted, and what it is worth as a guess."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proposers import PromptLookup, PromptLookupOptions, RequestInfo
from vllm_lookahead.predictions import PredictionError, count_accepted, token_ids

LIMITS = {"vocab_size": 100, "max_length": 8}
tokens = st.lists(st.integers(0, 4), max_size=40)


class Letters:
    """A tokenizer with one token per letter."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) - ord("a") for letter in text]


# ---- what is a prediction


def test_text_and_token_ids() -> None:
    assert token_ids("bad", Letters(), **LIMITS) == [1, 0, 3]
    assert token_ids([1, 0, 99], None, **LIMITS) == [1, 0, 99]
    assert token_ids("", Letters(), **LIMITS) == []


@pytest.mark.parametrize(
    ("prediction", "said"),
    [
        (7, "a text or a list of token ids, not 7"),
        ({"type": "content"}, "a text or a list of token ids"),
        (["a"], "a text or a list of token ids"),
        ([True], "a text or a list of token ids"),
        ([1.0], "a text or a list of token ids"),
        ([100], "from 0 to 99, not 100"),
        ([-1], "from 0 to 99, not -1"),
        ("a" * 9, "at most 8 tokens"),
        ("a" * 9999, "at most 8 tokens, not 9999 characters"),
        ([1] * 9, "at most 8 tokens"),
    ],
)
def test_refused(prediction: Any, said: str) -> None:
    with pytest.raises(PredictionError, match=said) as error:
        token_ids(prediction, Letters(), **LIMITS)
    assert str(error.value).startswith("prediction: ")


def test_a_text_needs_a_tokenizer() -> None:
    with pytest.raises(PredictionError, match="no tokenizer"):
        token_ids("a", None, **LIMITS)


# ---- how its tokens are counted


@given(tokens)
def test_a_prediction_that_comes_true_is_accepted_whole(text: list[int]) -> None:
    assert count_accepted(text, text) == len(text)


@given(tokens, tokens)
def test_never_more_than_there_are(prediction: list[int], output: list[int]) -> None:
    assert 0 <= count_accepted(prediction, output) <= min(len(prediction), len(output))


@given(tokens)
def test_nothing_in_common(text: list[int]) -> None:
    assert count_accepted(text, [token + 10 for token in text]) == 0


def test_it_is_taken_up_again_after_other_words() -> None:
    prediction = list(range(30))
    assert count_accepted(prediction, [*range(10), 77, 78, *range(10, 30)]) == 30, "something was put in"
    assert count_accepted(prediction, [*range(10), *range(15, 30)]) == 25, "something was left out"
    assert count_accepted(prediction, [*range(10), 77, *range(11, 30)]) == 29, "one word was changed"


def test_single_words_that_happen_to_agree_do_not_count() -> None:
    assert count_accepted([1, 2, 3, 4, 5, 6], [9, 2, 9, 4, 9, 6]) == 0


# ---- what it is worth


def steps(output: list[int], prediction: list[int] | None) -> int:
    """Steps to say ``output`` after a prompt that says nothing about it."""
    prompt = [900, 901, 902]
    info = RequestInfo(namespace=None, prediction=None if prediction is None else np.array(prediction, np.int32))
    request = PromptLookup(PromptLookupOptions()).start("r", np.array(prompt, np.int32), info)
    context, end, taken = list(prompt), len(prompt) + len(output), 0
    while len(context) < end:
        tree = request.propose(np.array(context, np.int32), 48)
        left = output[len(context) - len(prompt) :]
        node, depth = -1, 0
        for i, (token, parent) in enumerate(zip(tree.token_ids.tolist(), tree.parents.tolist(), strict=True)):
            if depth < len(left) - 1 and parent == node and token == left[depth]:
                node, depth = i, depth + 1
        context += left[: depth + 1]
        taken += 1
    return taken


NOVEL = np.random.default_rng(0).integers(0, 800, 400).tolist()


def test_the_output_itself_saves_most_steps() -> None:
    assert steps(NOVEL, None) > 390
    assert steps(NOVEL, NOVEL) <= len(NOVEL) / 8


def test_it_realigns_after_a_divergence() -> None:
    missing = NOVEL[:100] + NOVEL[110:250] + [7] * 5 + NOVEL[250:]
    assert steps(NOVEL, missing) <= len(NOVEL) / 8 + 30


def test_a_useless_one_costs_no_step() -> None:
    useless = np.random.default_rng(1).integers(0, 800, 400).tolist()
    assert steps(NOVEL, useless) <= steps(NOVEL, None)


def test_an_empty_one_is_none() -> None:
    assert steps(NOVEL[:50], []) == steps(NOVEL[:50], None)
