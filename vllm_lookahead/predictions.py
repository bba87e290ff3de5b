"""Predicted outputs: what a caller expects a request to say, as a source of guesses.

The caller sets ``SamplingParams.extra_args["prediction"]`` (``vllm_xargs`` over HTTP; ``middleware`` translates
OpenAI's own field). The front end turns it into token ids, which the workers read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PREDICTION = "prediction"
"""The key in ``extra_args``: text or token ids where the caller sets it, token ids in the workers."""
REALIGN = 3
"""So many tokens must agree before a prediction that was left is taken up again."""


class PredictionError(ValueError):
    """A prediction that can't be used; the message names the field and what is allowed."""


def token_ids(prediction: Any, tokenizer: Any, vocab_size: int, max_length: int) -> list[int]:
    """The tokens of a prediction as the caller wrote it.

    Args:
        prediction: text or a list of token ids.
        tokenizer: vLLM's, or None where the engine has none.
        vocab_size: token ids are below it.
        max_length: most tokens.

    Raises:
        PredictionError: it is something else, or too long, or there is no tokenizer for a text.
    """
    if isinstance(prediction, str):
        if tokenizer is None:
            raise PredictionError("prediction: must be a list of token ids: this engine has no tokenizer")
        # a token has few characters: what is far too long need not be tokenised to be refused
        if len(prediction) > 64 * max_length:
            raise PredictionError(
                f"prediction: must have at most {max_length} tokens, not {len(prediction)} characters"
            )
        prediction = tokenizer.encode(prediction, add_special_tokens=False)
    elif not isinstance(prediction, list) or not all(type(token) is int for token in prediction):
        raise PredictionError(f"prediction: must be a text or a list of token ids, not {_show(prediction)}")
    if len(prediction) > max_length:
        raise PredictionError(
            f"prediction: must have at most {max_length} tokens (max_model_len), not {len(prediction)}"
        )
    wrong = next((token for token in prediction if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise PredictionError(f"prediction: token ids must be from 0 to {vocab_size - 1}, not {wrong}")
    return list(prediction)


def tokenised(prediction: Any, front_end: Any) -> list[int]:
    """A prediction's token ids by an engine's tokenizer and limits.

    Args:
        prediction: see ``token_ids``.
        front_end: vLLM's ``AsyncLLM`` or ``InputProcessor``.

    Raises:
        PredictionError: see ``token_ids``.
    """
    model = front_end.model_config
    return token_ids(prediction, front_end.tokenizer, model.get_vocab_size(), model.max_model_len)


def count_accepted(prediction: Sequence[int], output: Sequence[int]) -> int:
    """How many of a prediction's tokens appeared in the output.

    The output is followed along the prediction from its beginning. Where it says something else, it is lost, until
    ``REALIGN`` tokens in a row stand in the prediction again; the place that comes next is taken. So words that any
    two texts share by chance don't count. OpenAI defines the figure as "the number of tokens in the prediction that
    appeared in the completion" and leaves the details open.

    Args:
        prediction: its token ids.
        output: the completion's token ids.
    """
    ends: dict[tuple[int, ...], list[int]] = {}
    for end in range(REALIGN, len(prediction) + 1):
        ends.setdefault(tuple(prediction[end - REALIGN : end]), []).append(end)
    appeared: set[int] = set()
    expected: int | None = 0
    reached = 0
    for at, token in enumerate(output):
        if expected is not None and expected < len(prediction) and prediction[expected] == token:
            appeared.add(expected)
            expected += 1
            reached = expected
            continue
        expected = None
        places = ends.get(tuple(output[max(0, at + 1 - REALIGN) : at + 1]))
        if places is not None:
            expected = next((end for end in places if end > reached), places[0])
            appeared.update(range(expected - REALIGN, expected))
            reached = expected
    return min(len(appeared), len(output))


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
