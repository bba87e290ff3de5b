"""Prompt lookup: what followed the last tokens when they occurred before, in the prompt or in the output so far.

The idea is that of prompt lookup decoding (Saxena, github.com/apoorvumang/prompt-lookup-decoding) and LLMA (Yang et
al., arXiv 2304.04487). Instead of the one continuation of the longest match, all that followed earlier becomes one
tree, likeliest nodes first (``best_first``). And not only this request's text is looked into (``guesses``).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from proposers.base import NO_INFO, Proposer, RequestInfo, RequestProposer
from proposers.calibration import SOURCES
from proposers.corpus import open_index
from proposers.guesses import Guesses, PromptLookupOptions, RequestGuesses, next_tree, sources_of
from proposers.registry import register
from proposers.tree import DraftTree, IntArray

NO_GUESS = DraftTree.empty()
NO_POOL = np.empty((0, 0), np.int32)


@register("prompt_lookup")
class PromptLookup(Proposer):
    """Guesses from texts: the request's own, and whatever else is known. Needs no model and no training."""

    Options = PromptLookupOptions
    options: PromptLookupOptions
    sources = SOURCES

    def __init__(self, options: PromptLookupOptions) -> None:
        super().__init__(options)
        self.guesses = Guesses(options)

    def start(self, request_id: str, prompt: IntArray, info: RequestInfo = NO_INFO) -> RequestProposer:
        """Begin a request; its prompt is indexed by the first ``propose``."""
        return _PromptLookupRequest(self, prompt, info)

    def use_corpus(self, index: Path) -> None:
        """See ``Proposer.use_corpus``."""
        self.guesses.corpus = open_index(index)

    def warm_up(self) -> None:
        """Compile the kernels, or load them from numba's cache, so that the first request doesn't wait for it."""
        request = self.start("warm-up", np.zeros(4, np.int32), RequestInfo(namespace=None))
        request.propose(np.zeros(8, np.int32), 1)


class _PromptLookupRequest(RequestProposer):
    def __init__(self, proposer: PromptLookup, prompt: IntArray, info: RequestInfo) -> None:
        self._guesses = proposer.guesses
        self._known = RequestGuesses(proposer.guesses, prompt, info)

    def propose(self, context: IntArray, budget: int) -> DraftTree:
        size = next_tree(context, NO_POOL, budget, *self._known.arguments(len(context)))
        if size == 0:
            return NO_GUESS
        nodes = self._guesses.nodes[:, :size].copy()
        chances = self._guesses.chances[:size].copy()
        return DraftTree(nodes[0], nodes[1], nodes[2], 0, chances, sources_of(nodes[3]))
