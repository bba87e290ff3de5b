"""Prompt lookup: what followed the last tokens when they occurred before, in the prompt or in the output so far.

The idea is that of prompt lookup decoding (Saxena, github.com/apoorvumang/prompt-lookup-decoding) and LLMA (Yang et
al., arXiv 2304.04487). Instead of the one continuation of the longest match, the continuations of all matches become
one tree, likeliest nodes first (``best_first``), out of an index that grows with the context (``context_index``).
"""

from __future__ import annotations

import numpy as np
from numba import njit
from pydantic import Field, model_validator

from proposers.base import NO_INFO, Proposer, ProposerOptions, RequestInfo, RequestProposer
from proposers.best_first import MAX_MATCH, grow_tree
from proposers.calibration import CHANCE, Calibration, Float64Array, learn
from proposers.context_index import ContextIndex, extend, find
from proposers.registry import register
from proposers.tree import DraftTree, FloatArray, IntArray

MAX_NGRAM = 8
"""Largest n-gram that can be looked up: each size costs two integers of memory per token of context."""
NO_GUESS = DraftTree.empty()


class PromptLookupOptions(ProposerOptions):
    """What ``prompt_lookup`` can be told."""

    max_ngram: int = Field(4, ge=1, le=MAX_NGRAM, description="Longest suffix of the context that is looked up.")
    min_ngram: int = Field(1, ge=1, le=MAX_NGRAM, description="Shortest suffix of the context that is looked up.")
    max_draft_tokens: int = Field(48, ge=1, le=1024, description="Most nodes of the draft tree.")
    max_depth: int = Field(48, ge=1, le=128, description="Longest guess, in tokens.")
    max_matches: int = Field(32, ge=1, le=256, description="Most earlier places whose continuations are merged.")
    min_probability: float = Field(
        0.002, ge=0.0, le=1.0, description="Nodes estimated to be accepted less often than this are left out."
    )

    @property
    def max_nodes(self) -> int:
        """Most nodes that a proposed tree has."""
        return self.max_draft_tokens

    @model_validator(mode="after")
    def _ngrams_in_order(self) -> PromptLookupOptions:
        if self.min_ngram > self.max_ngram:
            raise ValueError(f"min_ngram ({self.min_ngram}) must be at most max_ngram ({self.max_ngram})")
        return self


@register("prompt_lookup")
class PromptLookup(Proposer):
    """Guesses from the request's own text. Needs no model, no statistics, and no memory beyond the request."""

    Options = PromptLookupOptions
    options: PromptLookupOptions

    def __init__(self, options: PromptLookupOptions) -> None:
        super().__init__(options)
        o = options
        self._nodes = np.empty((4, o.max_draft_tokens), np.int32)
        self._calibration = Calibration()
        self._chances = np.empty(o.max_draft_tokens, np.float32)
        self._settings = (o.min_ngram, o.max_ngram, o.max_matches, o.max_depth, o.min_probability)

    def start(self, request_id: str, prompt: IntArray, info: RequestInfo = NO_INFO) -> RequestProposer:
        """Begin a request; its prompt is indexed by the first ``propose``."""
        return _PromptLookupRequest(self, len(prompt))

    def warm_up(self) -> None:
        """Compile the kernels, or load them from numba's cache, so that the first request doesn't wait for it."""
        self.start("warm-up", np.zeros(4, np.int32)).propose(np.zeros(4, np.int32), 1)


class _PromptLookupRequest(RequestProposer):
    def __init__(self, proposer: PromptLookup, prompt_length: int) -> None:
        self._chances = proposer._chances  # shared scratch: proposers run in one thread
        self._settings = proposer._settings
        self._learnt = (proposer._calibration.state, proposer._calibration.start())
        self._last = np.empty_like(proposer._nodes)  # the tree proposed last
        self._last_size = 0
        self._length = 0
        self._index = ContextIndex(*self._settings[:2])
        self._index.reserve(prompt_length)

    def propose(self, context: IntArray, budget: int) -> DraftTree:
        self._index.reserve(len(context))
        size = _propose(
            self._index.state,
            context,
            self._length,
            *self._learnt,
            self._last,
            self._last_size,
            self._chances,
            int(budget),
            *self._settings,
        )
        self._last_size, self._length = size, len(context)
        if size == 0:
            return NO_GUESS
        nodes = self._last[:3, :size].copy()
        return DraftTree(nodes[0], nodes[1], nodes[2], 0, self._chances[:size].copy())


@njit(cache=True)
def _propose(
    state: IntArray,
    context: IntArray,
    length: int,
    engine: Float64Array,
    learnt: Float64Array,
    nodes: IntArray,
    size: int,
    chances: FloatArray,
    budget: int,
    min_ngram: int,
    max_ngram: int,
    max_matches: int,
    max_depth: int,
    min_probability: float,
) -> int:
    """Learn from the last tree, which is in ``nodes`` (int32 [4, m]) and began at ``length`` tokens; bring the index up
    to date and write the next tree to ``nodes`` and ``chances``; returns its size.
    """
    if size > 0:
        learn(engine, learnt, nodes, size, context[length:])
    tokens = np.empty((max_matches, max_depth), np.int32)
    matches = np.empty(max_matches, np.int32)
    count = gather_matches(state, context, min_ngram, max_ngram, tokens, matches)
    lengths = np.full(max_matches, max_depth, np.int32)
    return grow_tree(
        tokens, lengths, matches, count, min(budget, nodes.shape[1]), min_probability, learnt[CHANCE], nodes, chances
    )


@njit(cache=True)
def gather_matches(
    state: IntArray, context: IntArray, min_ngram: int, max_ngram: int, tokens: IntArray, matches: IntArray
) -> int:
    """Index the context and write what followed earlier occurrences of its end, as candidates for ``grow_tree``.

    Args:
        state: int32, the ``ContextIndex.state``, with room for the context.
        context: int32 [t].
        min_ngram: as the index was made with.
        max_ngram: as the index was made with.
        tokens: int32 [m, d], receives one full continuation per match.
        matches: int32 [m], receives the lengths of the matches.

    Returns:
        The number of matches, at most m.
    """
    last = len(context) - 1
    if last < 0:
        return 0
    extend(state, context, last, min_ngram, max_ngram)
    positions = np.empty(len(matches), np.int32)
    # A chain holds matches that a longer n-gram found before: walk further than there is room, but not much.
    steps = 2 * len(matches)
    count = find(state, context, min_ngram, max_ngram, MAX_MATCH, steps, positions, matches)
    for i in range(count):
        start = positions[i] + 1
        known = min(len(context) - start, tokens.shape[1])
        for depth in range(known):
            tokens[i, depth] = context[start + depth]
        # A match that reaches the end of the context goes on with its own guess: the loop continues.
        for depth in range(known, tokens.shape[1]):
            tokens[i, depth] = tokens[i, depth - known]
    return count
