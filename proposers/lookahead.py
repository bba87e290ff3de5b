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

from typing import Literal

import numpy as np
from numba import njit
from pydantic import Field, model_validator

from proposers import ngram_pool
from proposers.base import NO_INFO, Proposer, RequestInfo, RequestProposer, Verified
from proposers.best_first import grow_tree
from proposers.calibration import CHANCE, Calibration, Float64Array, learn
from proposers.context_index import ContextIndex
from proposers.jacobi_window import STEPS, JacobiWindow, advance, comb_size, largest_comb, store_tips, write_comb
from proposers.ngram_pool import NgramPool, gather_guesses
from proposers.prompt_lookup import PromptLookupOptions, gather_matches
from proposers.registry import register
from proposers.tree import DraftTree, FloatArray, IntArray

POOL_MATCH = 2
"""A pool n-gram counts as a match of this length beside prompt lookup's matches."""

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

    def __init__(self, options: LookaheadOptions) -> None:
        super().__init__(options)
        self.separate_branch = options.branch == "separate"
        self.needs_argmax = not self.separate_branch
        most = options.max_draft_tokens + largest_comb(options.window_size, options.ngram_size)
        self._nodes = np.empty((4, most), np.int32)
        self._without = np.empty((4, options.max_draft_tokens), np.int32)
        self._calibration = Calibration()
        self._chances = np.empty((2, most), np.float32)

    def start(self, request_id: str, prompt: IntArray, info: RequestInfo = NO_INFO) -> LookaheadRequest:
        """Begin a request: an empty pool (or the prompt's n-grams) and a window that its first ``propose`` fills."""
        return LookaheadRequest(self, request_id, prompt)

    def warm_up(self) -> None:
        """Compile the kernels, or load them from numba's cache, so that the first request doesn't wait for it."""
        context = np.zeros(4, np.int32)
        request = self.start("warm-up", context[:2])
        for end in (3, 4):
            tree = request.propose_verification(context[:end], 1)
            comb = request.propose_branch(context[:end], 1)
            request.observe_branch(comb, np.zeros(len(comb) + 1, np.int32))
            request.propose(context[:end], 1)
        tree.ancestor_mask()
        request._pool.reserve(1000)


class LookaheadRequest(RequestProposer):
    """One request's window, pool and index.

    Where ``branch`` is "separate", a step of the engine is: ``propose_branch``, a forward over its tree,
    ``observe_branch``; ``propose``, the verifying forward, ``observe``. The two halves may come in either order.
    """

    def __init__(self, proposer: Lookahead, request_id: str, prompt: IntArray) -> None:
        o = proposer.options
        self._options = o
        # shared scratch: proposers run in one thread
        self._scratch = (proposer._nodes, proposer._without, proposer._chances)
        self._learnt = (proposer._calibration.state, proposer._calibration.start())
        # the guesses proposed last, how many, and the context's length then
        self._last = np.empty_like(proposer._nodes)
        self._last_size = 0
        self._last_length = 0
        self._window = JacobiWindow(o.window_size, o.ngram_size, request_id)
        self._pool = NgramPool(o.ngram_size, o.guess_set_size)
        self._index = ContextIndex(o.min_ngram, o.max_ngram)
        self._pool_from_context = o.pool_from_prompt and not o.prompt_lookup and o.guess_set_size > 0
        self._length = len(prompt)
        if self._pool_from_context:
            self._pool.extend(prompt)
        if o.prompt_lookup:
            self._index.reserve(len(prompt))
        self._baseline: DraftTree | None = None  # what prompt lookup alone would have guessed
        self._gains = 0  # how many steps ``branch_gain`` was taken from
        self._due = False  # it is the window's turn to be evaluated
        self._settings = (
            o.prompt_lookup,
            self._pool_from_context,
            o.always_forward_one,
            o.branch_every,
            o.min_ngram,
            o.max_ngram,
            o.max_matches,
            o.max_depth,
            o.max_draft_tokens,
            o.min_probability if o.prompt_lookup else 0.0,
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
        if tree.num_branch and verified.argmax is not None and self._due:
            argmax = np.asarray(verified.argmax, np.int32)
            store_tips(self._window.state, argmax, tree.num_guesses, verified.num_nodes - tree.num_guesses)
        if self._baseline is not None:
            without = _walk_length(self._baseline.token_ids, self._baseline.parents, verified.tokens)
            gain = max(0, len(verified.path) - without)
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
        if self._options.prompt_lookup:
            self._index.reserve(len(context))
        nodes, without, chances = self._scratch
        if with_guesses:
            nodes = self._last
        guessed, comb, baseline, self._due = _propose(
            self._index.state,
            self._pool.state,
            self._window.state,
            context,
            self._last_length,
            *self._learnt,
            nodes,
            self._last_size,
            without,
            chances,
            int(budget),
            with_guesses,
            with_comb,
            not self.without_branch,
            *self._settings,
        )
        if with_guesses:
            self._last_size, self._last_length = guessed, len(context)
            # nothing to compare where the window is left out
            self._baseline = None if self.without_branch else DraftTree(*without[:3, :baseline].copy())
        nodes = nodes[:3, : guessed + comb].copy()
        return DraftTree(nodes[0], nodes[1], nodes[2], comb, chances[0, :guessed].copy())


@njit(cache=True)
def _propose(
    index: IntArray,
    pool: IntArray,
    window: IntArray,
    context: IntArray,
    last_length: int,
    engine: Float64Array,
    learnt: Float64Array,
    nodes: IntArray,
    last_size: int,
    without: IntArray,
    chances: FloatArray,
    budget: int,
    with_guesses: bool,
    with_comb: bool,
    with_window: bool,
    prompt_lookup: bool,
    pool_from_context: bool,
    always_forward_one: bool,
    branch_every: int,
    min_ngram: int,
    max_ngram: int,
    max_matches: int,
    max_depth: int,
    max_draft_tokens: int,
    min_probability: float,
) -> tuple[int, int, int, bool]:
    """One step, in one call: learn from the last guesses (in ``nodes``, ``last_size`` of them, made at ``last_length``
    tokens), bring window, pool and index up to date and write the tree to ``nodes``.

    Returns:
        The number of guessed nodes, the number of comb nodes, which follow them, the size of the tree of prompt
        lookup's matches alone, which is written to ``without``, and whether it is the window's turn.
    """
    if with_window:
        advance(window, pool, context, always_forward_one)
    if pool_from_context:
        ngram_pool.extend(pool, context)
    due = window[STEPS] % branch_every == 0
    comb = comb_size(window) if with_window and with_comb and due else 0
    guessed = 0
    baseline = 0
    if with_guesses:
        if last_size > 0:
            learn(engine, learnt, nodes, last_size, context[last_length:])
        hit = learnt[CHANCE]
        # Where both don't fit, each gets half, and the guesses what the comb leaves.
        room = min(max_draft_tokens, max(budget - comb, (budget + 1) // 2))
        guesses = pool[ngram_pool.GUESSES]
        length = pool[ngram_pool.LENGTH]
        tokens = np.empty((max_matches + guesses, max(max_depth, length)), np.int32)
        lengths = np.empty(max_matches + guesses, np.int32)
        matches = np.empty(max_matches + guesses, np.int32)
        count = 0
        if prompt_lookup:
            count = gather_matches(index, context, min_ngram, max_ngram, tokens[:max_matches], matches[:max_matches])
            lengths[:count] = max_depth
        pooled = gather_guesses(pool, context[len(context) - 1], tokens[count : count + guesses])
        lengths[count : count + pooled] = length
        matches[count : count + pooled] = POOL_MATCH
        if pooled > 0:
            most = min(room, without.shape[1])
            baseline = grow_tree(tokens, lengths, matches, count, most, min_probability, hit, without, chances[1])
        guessed = grow_tree(tokens, lengths, matches, count + pooled, room, min_probability, hit, nodes, chances[0])
        if pooled == 0:
            baseline = min(guessed, without.shape[1])
            without[:3, :baseline] = nodes[:3, :baseline]
    if comb > 0:
        comb = write_comb(window, guessed, min(comb, budget - guessed), nodes)
    return guessed, comb, baseline, due


@njit(cache=True)
def _walk_length(token_ids: IntArray, parents: IntArray, emitted: IntArray) -> int:
    """How many of the emitted tokens a tree would have got right."""
    here, length = -1, 0
    for node in range(len(parents)):
        if length < len(emitted) and parents[node] == here and token_ids[node] == emitted[length]:
            here = node
            length += 1
    return length
