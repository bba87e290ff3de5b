"""All that one engine and one request know about what comes next, asked in one kernel call.

Sources, each of which can be left out: the request's own text, what other requests said (``shared_text``), the output
that the caller expects, a corpus, and the tokens that the target model found likely before (token recycling, Luo et
al., arXiv 2408.08696). Their answers become one tree (``best_first``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from pydantic import Field, model_validator

from proposers import text_index
from proposers.base import ProposerOptions, RequestInfo, Verified
from proposers.best_first import AGREEMENT, LENGTH, SOURCE, Known, grow_tree, learn_from
from proposers.calibration import (
    CORPUS,
    LOCAL,
    MOST_RANKS,
    POOL,
    PREDICTION,
    RECYCLED,
    SHARED,
    TEXTS,
    Calibration,
    Float64Array,
    agreement_class,
)
from proposers.numba_cache import CACHE
from proposers.recycled_tokens import RecycledTokens, note, recycle
from proposers.shared_text import SharedText, write
from proposers.text_index import NO_INDEX, NOBODY, TOKENS, allocate, extend, find_places, next_place
from proposers.tree import ByteArray, DraftTree, FloatArray, IntArray

MAX_NGRAM = 8
"""Largest n-gram that can be looked up."""
NO_TOKENS = np.empty((0, 0), np.int32)
NODES, CHANCES = 10, 11
"""Which of ``RequestGuesses.arguments`` are the nodes and their chances."""
COPIED, LEARNT, SAID, ROOT = range(4)
"""A request's progress: how many copies the last tree had and how long the context was then, how many tokens the target
model has said something about since, and the root's token, or -1 before the first."""
STEPS = 24
"""Longest walk along the places of one n-gram."""


class PromptLookupOptions(ProposerOptions):
    """What ``prompt_lookup`` can be told, and every method that guesses from texts as it does."""

    max_ngram: int = Field(4, ge=1, le=MAX_NGRAM, description="Longest suffix of the context that is looked up.")
    min_ngram: int = Field(1, ge=1, le=MAX_NGRAM, description="Shortest suffix of the context that is looked up.")
    max_draft_tokens: int = Field(48, ge=1, le=1024, description="Most nodes of the draft tree.")
    max_depth: int = Field(48, ge=1, le=128, description="Longest guess, in tokens.")
    max_matches: int = Field(8, ge=1, le=64, description="Most earlier places in one text that are copied from.")
    min_probability: float = Field(
        0.002, ge=0.0, le=1.0, description="Nodes estimated to be accepted less often than this are left out."
    )
    shared_tokens: int = Field(
        1 << 20,
        ge=0,
        le=1 << 26,
        description="How many tokens of other requests' outputs are remembered; 0: none.",
    )
    share_prompts: bool = Field(False, description="Remember prompts, too.")
    corpus: str | None = Field(
        None, min_length=1, description="A .txt or .jsonl file, or a folder of them, to guess from."
    )
    recycled_tokens: int = Field(
        8,
        ge=0,
        le=MOST_RANKS,
        description="How many of the model's own likeliest tokens are remembered after each token; 0: none.",
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


class Guesses:
    """What an engine's requests share.

    Args:
        options: see ``PromptLookupOptions``.
        most_nodes: room for a tree, where it holds more than guesses.

    Attributes:
        nodes: int32 [4, most_nodes], the tree that was made last, as ``best_first.grow_tree`` wrote it.
        chances: float32 [max_draft_tokens], its guesses' chances.
    """

    def __init__(self, options: PromptLookupOptions, most_nodes: int | None = None) -> None:
        o = options
        self.options = o
        # shared scratch: proposers run in one thread
        self.nodes = np.empty((4, most_nodes or o.max_draft_tokens), np.int32)
        self.chances = np.empty(o.max_draft_tokens, np.float32)
        self.calibration = Calibration()
        self.shared = SharedText(o.shared_tokens, o.max_ngram) if o.shared_tokens > 0 else None
        self.corpus = NO_INDEX
        self.recycled = RecycledTokens(o.recycled_tokens) if o.recycled_tokens > 0 else None


class RequestGuesses:
    """What is known for one request.

    Args:
        guesses: what it shares with the others.
        prompt: int32 [p].
        info: what else is known of it.
        pool: how many n-grams of a pool there may be, and how long they are.
        texts: whether any text is looked into; else the pool is all there is.
    """

    def __init__(
        self,
        guesses: Guesses,
        prompt: IntArray,
        info: RequestInfo,
        pool: tuple[int, int] = (0, 0),
        *,
        texts: bool = True,
    ) -> None:
        self._guesses = guesses
        o = guesses.options
        self._learnt = guesses.calibration.start()
        most = TEXTS * o.max_matches + pool[0]
        self._copies = np.empty((most, max(o.max_depth, pool[1])), np.int32)
        self._about = np.empty((3, most), np.int32)
        self._progress = np.array([0, 0, 0, -1])
        self._local = self._reserved(len(prompt)) if texts else NO_INDEX
        self._shared = NO_INDEX
        owner = NOBODY
        if texts and guesses.shared is not None and info.namespace is not None:
            self._shared = guesses.shared.state
            owner = guesses.shared.owner(info.namespace)
        self._writer = SharedText.writer(0 if o.share_prompts else len(prompt))
        self._prediction = NO_INDEX
        predicted = NOBODY
        if texts and info.prediction is not None and len(info.prediction) > 0:
            self._prediction = predicted_text(prompt, info.prediction, o.max_ngram)
            predicted = 0
        corpus = 0 if texts and len(guesses.corpus) > text_index.HEADER else NOBODY
        recycler = NOBODY if guesses.recycled is None else guesses.recycled.owner(info.namespace)
        self._owners = np.array([0 if texts else NOBODY, owner, predicted, corpus, NOBODY, recycler], np.int32)
        self._recycles = guesses.recycled is not None
        room = 2 * (guesses.nodes.shape[1] + 1) if self._recycles else 0
        self._said = np.empty(room, np.int32), np.empty((room, o.recycled_tokens), np.int32)
        self._texts = texts
        # an n-gram of the pool is taken as it is
        depth, threshold = (o.max_depth, o.min_probability) if texts or room else (pool[1], 0.0)
        self._settings = (o.min_ngram, o.max_matches, depth, threshold)
        self._arguments = self._collected()

    def _reserved(self, length: int) -> IntArray:
        return allocate(length + length // 2 + 256, self._guesses.options.max_ngram, own_tokens=False)

    def observe(self, tree: DraftTree, verified: Verified) -> None:
        """Keep what the target model said at the verified guesses for the next ``next_tree``, which takes it in when it
        has learnt what the last tree was worth: before, that would have been a look into the future.
        """
        if verified.top is not None and self._recycles:
            n = min(verified.num_nodes, tree.num_guesses)
            note_step(self._said, self._progress, verified.tokens, tree.token_ids, n, verified.top, verified.path)

    def arguments(self, context: IntArray) -> tuple[Any, ...]:
        """What ``next_tree`` takes after the context and the pool's guesses."""
        length = len(context)
        if self._texts and length > self._local[text_index.CAPACITY]:
            self._local = self._reserved(length)
            self._arguments = self._collected()
        return self._arguments

    def _collected(self) -> tuple[Any, ...]:
        g = self._guesses
        return (
            (self._local, self._shared, self._prediction, g.corpus),
            self._owners,
            self._writer,
            NO_TOKENS if g.recycled is None else g.recycled.state,
            self._said,
            self._copies,
            self._about,
            self._progress,
            g.calibration.state,
            self._learnt,
            g.nodes,
            g.chances,
            *self._settings,
        )


def predicted_text(prompt: IntArray, prediction: IntArray, order: int) -> IntArray:
    """The index of a prediction (int32 [p]), the end of the prompt before it: there the output begins to agree."""
    text = np.concatenate((prompt[-text_index.LONG :], prediction)).astype(np.int32)
    state = allocate(len(text), order, own_tokens=True)
    state[state[TOKENS] :][: len(text)] = text
    state[text_index.LENGTH] = len(text)
    extend(state, text, len(text) - 1)
    return state


@njit(cache=CACHE)
def note_step(
    said: tuple[IntArray, IntArray],
    progress: IntArray,
    tokens: IntArray,
    nodes: IntArray,
    verified: int,
    top: IntArray,
    path: IntArray,
) -> None:
    """Keep what a step said, and its new root.

    Args:
        said: see ``next_tree``; so ``progress``.
        progress: see there.
        tokens: int32 [a + 1], what the step emitted.
        nodes: see ``recycled_tokens.note``; so ``verified`` and ``path``.
        verified: see there.
        top: its ``said``.
        path: see there.
    """
    if progress[ROOT] >= 0:
        progress[SAID] = note(said[0], said[1], progress[SAID], progress[ROOT], nodes, verified, top, path)
    progress[ROOT] = tokens[len(tokens) - 1]


@njit(cache=CACHE)
def grown(
    context: IntArray, budget: int, known: tuple[Any, ...]
) -> tuple[IntArray, IntArray, IntArray, FloatArray, ByteArray]:
    """``next_tree`` without a pool, and ``taken``."""
    size = next_tree(context, np.empty((0, 0), np.int32), budget, *known)
    return taken(size, size, known[NODES], known[CHANCES])


@njit(cache=CACHE)
def taken(
    size: int, guesses: int, nodes: IntArray, chances: FloatArray
) -> tuple[IntArray, IntArray, IntArray, FloatArray, ByteArray]:
    """The tree that was made last (``Guesses``), in arrays of its own: here, since numpy takes several times as long.

    Args:
        size: how many nodes it has.
        guesses: how many of them are guesses.
        nodes: see ``Guesses``; so ``chances``.
        chances: see there.

    Returns:
        Its tokens, parents and depths, the guesses' chances and sources.
    """
    sources = nodes[3, :guesses].astype(np.uint8)
    return nodes[0, :size].copy(), nodes[1, :size].copy(), nodes[2, :size].copy(), chances[:guesses].copy(), sources


@njit(cache=CACHE)
def next_tree(
    context: IntArray,
    pooled: IntArray,
    budget: int,
    states: tuple[IntArray, IntArray, IntArray, IntArray],
    owners: IntArray,
    writer: IntArray,
    recycled: IntArray,
    said: tuple[IntArray, IntArray],
    copies: IntArray,
    about: IntArray,
    progress: IntArray,
    engine: Float64Array,
    request: Float64Array,
    nodes: IntArray,
    chances: FloatArray,
    shortest: int,
    most: int,
    max_depth: int,
    threshold: float,
) -> int:
    """Learn from what followed the last tree, take in the new tokens and write the next tree.

    Args:
        context: int32 [t].
        pooled: int32 [g, n], the pool's n-grams.
        budget: most nodes.
        states: see ``best_first.Known``; so ``owners``, ``recycled``, ``engine``, ``request`` and ``shortest``.
        owners: see there.
        writer: see ``shared_text.write``.
        recycled: see there.
        said: int32 [room] and [room, k], tokens and what the target model found likeliest after them.
        copies: what ``find_copies`` wrote for the last tree, changed in place.
        about: see ``copies``.
        progress: int64 [4], see ``COPIED``; changed in place.
        engine: see there.
        request: see there.
        nodes: see ``best_first.grow_tree``; so ``chances``, ``max_depth`` and ``threshold``.
        chances: see there.
        shortest: see there.
        most: see ``find_copies``.
        max_depth: see there.
        threshold: see there.

    Returns:
        The number of nodes.
    """
    known = Known(states, owners, shortest, recycled, copies, about, engine, request)
    progress[ROOT] = context[len(context) - 1]
    if progress[LEARNT] > 0:
        learn_from(known, context, progress[LEARNT], progress[COPIED])
    if progress[SAID] > 0:
        recycle(recycled, owners[RECYCLED], said[0][: progress[SAID]], said[1])
        progress[SAID] = 0
    if owners[LOCAL] >= 0:
        extend(states[LOCAL], context, len(context) - 1)
    if owners[SHARED] >= 0:
        write(states[SHARED], writer, owners[SHARED], context)
    count = find_copies(context, states, owners, most, copies, about)
    for i in range(len(pooled)):
        for k in range(pooled.shape[1]):
            copies[count, k] = pooled[i, k]
        about[LENGTH, count] = pooled.shape[1]
        about[AGREEMENT, count] = 1
        about[SOURCE, count] = POOL
        count += 1
    progress[COPIED] = count
    progress[LEARNT] = len(context)
    return grow_tree(known, context, count, min(budget, nodes.shape[1]), threshold, max_depth, nodes, chances)


@njit(cache=CACHE)
def find_copies(
    context: IntArray,
    states: tuple[IntArray, IntArray, IntArray, IntArray],
    owners: IntArray,
    most: int,
    copies: IntArray,
    about: IntArray,
) -> int:
    """Find places in the texts that agree with the end of the context, and copy what follows them.

    Args:
        context: int32 [t], in all of the local index but for its last token.
        states: see ``best_first.Known``.
        owners: see ``best_first.Known``.
        most: how many for each text.
        copies: int32 [>= 4 * most, d], receives the tokens.
        about: int32 [3, >= 4 * most], receives what ``open_node`` wants to know of each.

    Returns:
        How many, most trusted first.
    """
    depth = copies.shape[1]
    found = 0
    places = np.empty(most, np.int32)
    matches = np.empty(most, np.int32)
    for source in (PREDICTION, LOCAL, SHARED, CORPUS):
        owner = owners[source]
        if owner < 0:
            continue
        state = states[source]
        text = context if source == LOCAL else state[state[TOKENS] :]
        count = find_places(state, text, context, owner, STEPS, places, matches)
        for i in range(count):
            place = np.int64(places[i])
            length = 0
            if source == SHARED:
                place = next_place(state, place)
                while place >= 0 and length < depth:
                    copies[found, length] = text[place]
                    length += 1
                    place = next_place(state, place)
            else:
                known = min((len(context) if source == LOCAL else state[text_index.LENGTH]) - place - 1, depth)
                while length < known:
                    copies[found, length] = text[place + 1 + length]
                    length += 1
                if source == LOCAL:
                    # A copy that reaches the end of the context goes on with itself: the loop continues.
                    while length < depth:
                        copies[found, length] = copies[found, length - known]
                        length += 1
            if length > 0:
                about[LENGTH, found] = length
                about[AGREEMENT, found] = matches[i]
                about[SOURCE, found] = source
                found += 1
    # Longest agreement first; among equals the order in which the texts were asked.
    keys = np.empty(found, np.int32)
    for i in range(found):
        keys[i] = agreement_class(about[AGREEMENT, i])
    order = np.argsort(-keys, kind="mergesort")
    sorted_copies = copies[:found].copy()
    sorted_about = about[:, :found].copy()
    for i in range(found):
        copies[i] = sorted_copies[order[i]]
        about[:, i] = sorted_about[:, order[i]]
    return found
