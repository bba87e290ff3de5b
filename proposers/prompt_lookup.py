"""Prompt lookup: what followed the last tokens when they occurred before, in the prompt or in the output so far.

The idea is that of prompt lookup decoding (Saxena, github.com/apoorvumang/prompt-lookup-decoding) and LLMA (Yang et
al., arXiv 2304.04487). Instead of the one continuation of the longest match, all that followed earlier becomes one
tree, likeliest nodes first (``best_first``). And not only this request's text is looked into (``guesses``).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from proposers.base import NO_INFO, Proposer, RequestInfo, RequestProposer, Verified
from proposers.calibration import SOURCES
from proposers.corpus import open_index
from proposers.guesses import Guesses, PromptLookupOptions, RequestGuesses, grown
from proposers.registry import register
from proposers.tree import DraftTree, IntArray


@register("prompt_lookup")
class PromptLookup(Proposer):
    """Guesses from texts: the request's own, and whatever else is known. Needs no model and no training."""

    Options = PromptLookupOptions
    options: PromptLookupOptions
    sources = SOURCES
    time_limit = None

    def __init__(self, options: PromptLookupOptions) -> None:
        super().__init__(options)
        self.guesses = Guesses(options)
        self.num_top = options.recycled_tokens

    def start(self, request_id: str, prompt: IntArray, info: RequestInfo = NO_INFO) -> RequestProposer:
        """Begin a request; its prompt is indexed by the first ``propose``."""
        request = RecyclingRequest if self.num_top else GuessingRequest
        return request(self.guesses, prompt, info, texts=True)

    def use_corpus(self, index: Path) -> None:
        """See ``Proposer.use_corpus``."""
        self.guesses.corpus = open_index(index)

    def warm_up(self) -> None:
        """Compile the kernels, or load them from numba's cache, so that the first request doesn't wait for it."""
        warm_up(self)


def warm_up(proposer: Proposer) -> None:
    """Go through everything that a request of a proposer of ``GuessingRequest``s calls."""
    context = np.zeros(8, np.int32)
    request = proposer.start("warm-up", context[:4], RequestInfo(namespace=None))
    for end in (6, 8):
        tree = request.propose(context[:end], 1)
        top = np.zeros((len(tree) + 1, proposer.num_top), np.int32)
        request.observe(tree, Verified(context[:1], context[:0], None, len(tree), top))


class GuessingRequest(RequestProposer):
    """A request for which everything that is known makes the guesses; it learns from the text alone.

    Args:
        guesses: what it shares with the others.
        prompt: int32 [p].
        info: what else is known of it.
        texts: whether texts are looked into.
    """

    def __init__(self, guesses: Guesses, prompt: IntArray, info: RequestInfo, *, texts: bool) -> None:
        self._known = RequestGuesses(guesses, prompt, info, texts=texts)

    def propose(self, context: IntArray, budget: int) -> DraftTree:
        """See ``RequestProposer.propose``."""
        tokens, parents, depths, chances, sources = grown(context, budget, self._known.arguments(context))
        return DraftTree(tokens, parents, depths, 0, chances, sources)


class RecyclingRequest(GuessingRequest):
    """The same, which also learns from what the target model said at the nodes."""

    def observe(self, tree: DraftTree, verified: Verified) -> None:
        """See ``RequestProposer.observe``."""
        self._known.observe(tree, verified)
