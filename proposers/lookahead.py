"""Lookahead decoding: a window of Jacobi iterations fills a pool of n-grams, and the pool's n-grams are the guesses.

The algorithm is that of "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding" (Fu et al.,
arXiv 2402.02057); details that the paper leaves open follow the authors' code (hao-ai-lab/LookaheadDecoding,
lade/decoding.py). Different from both, guesses and window are nodes of one draft tree, and prompt lookup's matches
may be among the guesses.

Fused and separate. Let r be the root and V(r) the window as it stands on r. *Fused*: one forward verifies the guesses
after r and evaluates V(r)'s comb. *Separate*: the comb of V(r) gets a forward of its own, after the step that found r
was committed and before the guesses after r are verified. Either way the same comb is evaluated on the same root, and
in both modes its result is used at the same moment: when the next root is known, its n-grams go to the pool and the
window moves. So for the same accepted tokens, window, pool and guesses are the same. (What may differ is the number of
accepted tokens in a step: a fused step may also walk through the comb.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numba import njit
from pydantic import Field, model_validator

from proposers import ngram_pool
from proposers.base import NO_INFO, Proposer, RequestInfo, RequestProposer, Verified
from proposers.calibration import POOL, SOURCES
from proposers.corpus import open_index
from proposers.guesses import CHANCES, NODES, Guesses, PromptLookupOptions, RequestGuesses, next_tree, taken
from proposers.jacobi_window import STEPS, JacobiWindow, advance, comb_size, largest_comb, store_tips, write_comb
from proposers.ngram_pool import NgramPool, gather_guesses
from proposers.numba_cache import CACHE
from proposers.registry import register
from proposers.tree import ByteArray, DraftTree, FloatArray, IntArray

GAIN_RATE = 0.05
"""How fast ``branch_gain`` follows the last steps."""


class LookaheadOptions(PromptLookupOptions):
    """What ``lookahead`` can be told; prompt lookup's options hold for its part of the guesses."""

    window_size: int = Field(15, ge=1, le=128, description="W: columns of the Jacobi window.")
    ngram_size: int = Field(5, ge=2, le=16, description="N: length of the n-grams; the window has N - 1 levels.")
    guess_set_size: int = Field(15, ge=0, le=128, description="G: most n-grams kept and guessed per first token.")
    pool_from_prompt: bool = Field(
        True,
        description="Also put the n-grams of the prompt and of the output into the pool. Without effect while "
        "prompt_lookup is on, which finds them itself.",
    )
    prompt_lookup: bool = Field(True, description="Merge prompt lookup's matches; false: the paper's method alone.")
    always_forward_one: bool = Field(
        False, description="Move the window by one position per step, not by the number of accepted tokens."
    )
    branch: Literal["fused", "separate"] = Field(
        "fused", description="Evaluate the window in the verification's forward pass or in one of its own."
    )
    branch_every: int = Field(1, ge=1, le=1024, description="Evaluate the window only in every k-th step.")
    max_draft_tokens: int = Field(64, ge=1, le=1024, description="Most guessed nodes, the window's not counted.")

    @property
    def max_nodes(self) -> int:
        """Most nodes that a proposed tree has: the guesses, and the comb where it is part of the tree."""
        comb = largest_comb(self.window_size, self.ngram_size) if self.branch == "fused" else 0
        return self.max_draft_tokens + comb

    @model_validator(mode="after")
    def _window_has_tokens(self) -> LookaheadOptions:
        if self.window_size == 1 and self.ngram_size == 2:
            raise ValueError("window_size 1 needs an ngram_size of at least 3: with 2 the window holds no token")
        return self


@register("lookahead")
class Lookahead(Proposer):
    """Guesses from a Jacobi window's n-grams (and from the text so far): also for text that does not repeat itself."""

    Options = LookaheadOptions
    options: LookaheadOptions
    needs_argmax = True
    sources = SOURCES
    time_limit = None

    def __init__(self, options: LookaheadOptions) -> None:
        super().__init__(options)
        self.separate_branch = options.branch == "separate"
        self.needs_argmax = not self.separate_branch
        most = options.max_draft_tokens + largest_comb(options.window_size, options.ngram_size)
        # the paper's method alone needs nothing but its window, and no memory for more
        alone = {"recycled_tokens": 0, "shared_tokens": 0}
        known = options if options.prompt_lookup else options.model_copy(update=alone)
        self.num_top = known.recycled_tokens
        self.guesses = Guesses(known, most)

    def start(self, request_id: str, prompt: IntArray, info: RequestInfo = NO_INFO) -> LookaheadRequest:
        """Begin a request: an empty pool (or the prompt's n-grams) and a window that its first ``propose`` fills."""
        return LookaheadRequest(self, request_id, prompt, info)

    def use_corpus(self, index: Path) -> None:
        """See ``Proposer.use_corpus``."""
        self.guesses.corpus = open_index(index)

    def warm_up(self) -> None:
        """Compile the kernels, or load them from numba's cache, so that the first request doesn't wait for it."""
        context = np.zeros(4, np.int32)
        request = self.start("warm-up", context[:2], RequestInfo(namespace=None))
        for end in (3, 4):
            tree = request.propose_verification(context[:end], 1)
            comb = request.propose_branch(context[:end], 1)
            request.observe_branch(comb, np.zeros(len(comb) + 1, np.int32))
            request.propose(context[:end], 1)
            top = np.zeros((len(tree) + 1, self.num_top), np.int32)
            request.observe(tree, Verified(context[:1], context[:0], None, len(tree), top))
        tree.ancestor_mask()
        request._pool.reserve(1000)


class LookaheadRequest(RequestProposer):
    """One request's window, pool and index.

    Where ``branch`` is "separate", a step of the engine is: ``propose_branch``, a forward over its tree,
    ``observe_branch``; ``propose``, the verifying forward, ``observe``. The two halves may come in either order.
    """

    def __init__(self, proposer: Lookahead, request_id: str, prompt: IntArray, info: RequestInfo) -> None:
        o = proposer.options
        self._options = o
        pool = (o.guess_set_size, o.ngram_size - 1)
        self._known = RequestGuesses(proposer.guesses, prompt, info, pool, texts=o.prompt_lookup)
        self._window = JacobiWindow(o.window_size, o.ngram_size, request_id)
        self._pool = NgramPool(o.ngram_size, o.guess_set_size)
        self._pool_from_context = o.pool_from_prompt and not o.prompt_lookup and o.guess_set_size > 0
        self._length = len(prompt)
        if self._pool_from_context:
            self._pool.extend(prompt)
        self._gains = 0  # how many steps ``branch_gain`` was taken from
        self._due = False  # it is the window's turn to be evaluated
        self._settings = (
            self._pool_from_context,
            o.always_forward_one,
            o.branch_every,
            o.max_draft_tokens,
        )

    def propose(self, context: IntArray, budget: int) -> DraftTree:
        """The guesses and, if ``branch`` is "fused" and the window's turn has come, the comb after them."""
        return self._propose(context, budget, True, self._options.branch == "fused")

    def propose_verification(self, context: IntArray, budget: int) -> DraftTree:
        """The guesses alone."""
        return self._propose(context, budget, True, False)

    def propose_branch(self, context: IntArray, budget: int) -> DraftTree:
        """The comb alone, empty when it is not the window's turn; for a forward of its own."""
        return self._propose(context, budget, False, True)

    def observe(self, tree: DraftTree, verified: Verified) -> None:
        """Take the tips' argmax out of a fused tree, and measure what the branch adds to prompt lookup alone."""
        self._known.observe(tree, verified)
        if not len(tree):
            return
        if tree.num_branch and verified.argmax is not None and self._due:
            argmax = np.asarray(verified.argmax, np.int32)
            store_tips(self._window.state, argmax, tree.num_guesses, verified.num_nodes - tree.num_guesses)
        if not self.without_branch and self._options.prompt_lookup:
            gain = _gained(tree.sources, tree.num_guesses, verified.path)
            self._gains += 1
            before = self.branch_gain or 0.0
            self.branch_gain = before + max(GAIN_RATE, 1 / self._gains) * (gain - before)

    def observe_branch(self, tree: DraftTree, argmax: IntArray) -> None:
        """Take the tips' argmax out of a forward over the comb alone.

        Args:
            tree: what ``propose_branch`` returned.
            argmax: int32 [m + 1], the argmax after the root (entry 0) and after node i (entry i + 1), for the first
                m nodes.
        """
        store_tips(self._window.state, np.asarray(argmax, np.int32), 0, len(argmax) - 1)

    def window(self) -> list[list[int]]:
        """The window's filled levels, as of the last proposal (for tests and for looking inside)."""
        return self._window.contents()

    def pool(self) -> dict[int, list[tuple[int, ...]]]:
        """The pool: first token to its n-grams' other tokens, oldest first (for tests and for looking inside)."""
        return self._pool.contents()

    def _propose(self, context: IntArray, budget: int, with_guesses: bool, with_comb: bool) -> DraftTree:
        self._pool.reserve(self._options.window_size + len(context) - self._length)
        self._length = len(context)
        tree, comb, self._due = _propose(
            self._pool.state,
            self._window.state,
            context,
            budget,
            with_guesses,
            with_comb,
            not self.without_branch,
            *self._settings,
            self._known.arguments(context),
        )
        tokens, parents, depths, chances, sources = tree
        return DraftTree(tokens, parents, depths, comb, chances, sources)


@njit(cache=CACHE)
def _propose(
    pool: IntArray,
    window: IntArray,
    context: IntArray,
    budget: int,
    with_guesses: bool,
    with_comb: bool,
    with_window: bool,
    pool_from_context: bool,
    always_forward_one: bool,
    branch_every: int,
    max_draft_tokens: int,
    known: tuple[Any, ...],
) -> tuple[tuple[IntArray, IntArray, IntArray, FloatArray, ByteArray], int, bool]:
    """One step, in one call: bring window, pool and texts up to date and write the tree.

    Returns:
        The tree (``guesses.taken``), the number of comb nodes, which follow the guesses, and whether it is the window's
        turn.
    """
    if with_window:
        advance(window, pool, context, always_forward_one)
    if pool_from_context:
        ngram_pool.extend(pool, context)
    due = window[STEPS] % branch_every == 0
    comb = comb_size(window) if with_window and with_comb and due else 0
    guessed = 0
    if with_guesses:
        # Where both don't fit, each gets half, and the guesses what the comb leaves.
        room = min(max_draft_tokens, max(budget - comb, (budget + 1) // 2))
        pooled = np.empty((pool[ngram_pool.GUESSES], pool[ngram_pool.LENGTH]), np.int32)
        count = gather_guesses(pool, context[len(context) - 1], pooled)
        guessed = next_tree(context, pooled[:count], room, *known)
    if comb > 0:
        comb = write_comb(window, guessed, min(comb, budget - guessed), known[NODES])
    return taken(guessed + comb, guessed, known[NODES], known[CHANCES]), comb, due


@njit(cache=CACHE)
def _gained(sources: ByteArray, guesses: int, path: IntArray) -> int:
    """How many accepted nodes are, or hang from, a node that only the branch provided."""
    for depth in range(len(path)):
        node = path[depth]
        if node >= guesses or sources[node] == POOL:
            return len(path) - depth
    return 0
