"""What the host knows of a request: V2 keeps its tokens on the device, and proposers read them on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

IntArray = NDArray[np.int32]


class RequestText:
    """A request's prompt and output so far.

    Args:
        tokens: the prompt, and after a preemption the output until then.
        num_prompt_tokens: how many of them are the prompt.
        params: how the request samples; None for what generates nothing.
        in_order: whether sampling a token reads the tokens before it (penalties, bad words): then the nodes of a tree
            are sampled path by path.

    Attributes:
        length: tokens so far.
        has_grammar: whether a grammar follows the request's one path.
    """

    __slots__ = ("_tokens", "has_grammar", "in_order", "length", "num_prompt_tokens", "params")

    def __init__(
        self, tokens: Sequence[int], num_prompt_tokens: int, params: SamplingParams | None, *, in_order: bool
    ) -> None:
        self.length = len(tokens)
        self.num_prompt_tokens = num_prompt_tokens
        self.params = params
        self.in_order = in_order
        self.has_grammar = params is not None and params.structured_outputs is not None
        self._tokens = np.empty(self.length + 256, np.int32)
        self._tokens[: self.length] = tokens

    @property
    def tokens(self) -> IntArray:
        """int32 [length]: a view, good until the next ``extend``."""
        return self._tokens[: self.length]

    def extend(self, tokens: NDArray[np.integer]) -> None:
        """Append what a step emitted."""
        end = self.length + len(tokens)
        if end > len(self._tokens):
            grown = np.empty(end + end // 2, np.int32)
            grown[: self.length] = self.tokens
            self._tokens = grown
        self._tokens[self.length : end] = tokens
        self.length = end

    def goes_on_from(self, earlier: RequestText) -> bool:
        """Whether this text begins with an earlier one: a preempted request may come back with less."""
        return self.length >= earlier.length and np.array_equal(self._tokens[: earlier.length], earlier.tokens)
