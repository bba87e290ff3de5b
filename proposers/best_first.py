"""Which nodes to draft: all that is known about the next tokens in, the most probable tree of a given size out.

What follows a node is asked from everything that knows something, sorted into *levels*, the most trusted first:

1. copies: stretches of some text whose tokens before agree with the context, the longest agreement first;
2. for n-grams of falling length the tokens that were counted after them, each text in turn;
3. between the n-grams of length 2 and 1: the pool's n-grams, and what the target model itself found likely when it saw
   this token last.

A level gets a share of the chance that the levels before it leave, as often as its kind has held (``calibration``); its
tokens divide that share by how often they were seen. So siblings carry different tokens, and their chances add up to
what is left. Nodes are emitted by falling chance: a prefix of the tree is the best tree of its size, and the first
child of a node is its likeliest.

All arithmetic is plain IEEE in a fixed order: every tensor-parallel rank gets the same tree.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from proposers.calibration import (
    COPIES,
    MOST_RANKS,
    POOL,
    RANKS,
    RECYCLED,
    TEXTS,
    Float64Array,
    agreement_class,
    chance,
    copy_level,
    knowledge,
    learn,
    row_level,
    source_of,
)
from proposers.numba_cache import CACHE
from proposers.recycled_tokens import TOP, find_recycled
from proposers.text_index import (
    FOLLOWERS,
    ORDER,
    ROW,
    TOKEN_BITS,
    TOKEN_MASK,
    extend_key,
    find_row,
    first_key,
    prefetch_row,
    row_key,
)
from proposers.tree import FloatArray, IntArray

Int64Array = NDArray[np.int64]

CHILD_BITS = 7
MOST_CHILDREN = 1 << CHILD_BITS
MARKS = 1024
LONGEST_KEY = 7
SUPPORT = 0.25
"""What a follower's count in another text is worth beside its count in the text whose level it belongs to."""

part_of_kernel = njit(cache=CACHE, forceinline=True, _nrt=False)
"""For functions that neither make nor keep an array: counting references to those in their tuples would take longer
than what they do."""

# Rows of the candidates' table.
LENGTH, AGREEMENT, SOURCE = 0, 1, 2


class Known(NamedTuple):
    """What the sources know.

    Attributes:
        states: the texts' indices (``text_index``).
        owners: int32 [sources], whose text may be found in each; ``NOBODY`` leaves it out.
        shortest: the shortest n-gram whose followers count.
        recycled: the target's likeliest tokens after each token (``recycled_tokens``).
        tokens: int32 [c, d], the copies' tokens, from the root's child down.
        about: int32 [3, c], for each copy how many tokens it has, how many before it agree, and its source.
        engine: see ``calibration.chance``.
        request: see ``calibration.chance``.
    """

    states: tuple[IntArray, IntArray, IntArray, IntArray]
    owners: IntArray
    shortest: int
    recycled: IntArray
    tokens: IntArray
    about: IntArray
    engine: Float64Array
    request: Float64Array


class Scratch(NamedTuple):
    """What ``open_node`` works with: made once for a tree, since that takes as long as opening a node.

    Attributes:
        order: int32 [c], the copies; those that lead through a node lie side by side, most trusted first.
        children: int32 [2, ``MOST_CHILDREN``], the tokens that may follow a node and the kinds of their levels, level
            by level.
        chances: float64 [``MOST_CHILDREN``], their chances, given that the node is reached.
        weights: float64 [``MOST_CHILDREN``], how often each was seen.
        marks: int32 [``MARKS``], by a token's last bits, which child it may be, and of which node.
        rows: int64 [``LONGEST_KEY`` + 1, ``TEXTS``], for each length of n-gram where each text's followers lie, or -1.
        levels: int64, the kind of level that each of these rows is.
        holds: float64, how often that holds.
        limits: float64 [``LONGEST_KEY`` + 1], the most that any level of n-grams of this length or shorter ones holds.
        ranked: float64 [``MOST_RANKS`` + 1], the same for recycled tokens of this rank, later ones and single tokens.
        keys: uint64 [``LONGEST_KEY`` + 1, ``TEXTS``], what the rows are found by.
        totals: float64 [``TEXTS``], how often the tokens that each text added were seen.
        starts: int64 [``TEXTS`` + 1], where these tokens begin among the children.
    """

    order: IntArray
    children: IntArray
    chances: Float64Array
    weights: Float64Array
    marks: IntArray
    rows: Int64Array
    levels: Int64Array
    holds: Float64Array
    limits: Float64Array
    ranked: Float64Array
    keys: NDArray[np.uint64]
    totals: Float64Array
    starts: Int64Array


@njit(cache=CACHE)
def make_scratch(copies: int) -> Scratch:
    """Scratch for a tree with so many copies."""
    rows = (LONGEST_KEY + 1, TEXTS)
    return Scratch(
        np.arange(copies).astype(np.int32),
        np.empty((2, MOST_CHILDREN), np.int32),
        np.empty(MOST_CHILDREN, np.float64),
        np.empty(MOST_CHILDREN, np.float64),
        np.zeros(MARKS, np.int32),
        np.empty(rows, np.int64),
        np.empty(rows, np.int64),
        np.empty(rows, np.float64),
        np.empty(LONGEST_KEY + 1, np.float64),
        np.empty(MOST_RANKS + 1, np.float64),
        np.empty(rows, np.uint64),
        np.empty(TEXTS, np.float64),
        np.empty(TEXTS + 1, np.int64),
    )


@part_of_kernel
def open_node(
    known: Known, scratch: Scratch, history: IntArray, low: int, high: int, depth: int, enough: float, serial: int
) -> int:
    """What may follow one node: ``scratch.children`` and their ``chances``.

    Args:
        known: see there.
        scratch: see there.
        history: int32 [h], the tokens up to the node, the last ``LONGEST_KEY`` of them or more.
        low: the copies that lead through this node are at ``low`` to ``high`` in ``scratch.order``.
        high: see ``low``.
        depth: the node's depth.
        enough: where no child that is still to come can have more than this chance, the rest is not asked.
        serial: a number below 2**20 that this scratch has not seen.

    Returns:
        How many.
    """
    longest = _ask_for_rows(known, scratch, history)
    at_copy, count, left = _add_copies(known, scratch, False, low, high, depth, serial, 0, 1.0)
    if left <= enough:
        return count
    recycled = np.int64(-1)
    if known.owners[RECYCLED] >= 0:
        recycled = find_recycled(known.recycled, known.owners[RECYCLED], history[len(history) - 1])
    _find_rows(known, scratch, longest, recycled >= 0, at_copy < high)
    for n in range(longest, 1, -1):
        if left * scratch.limits[n] <= enough:
            return count
        count, left = _add_rows(known, scratch, n, serial, count, left)
    if left * scratch.limits[1] <= enough:
        return count
    _, count, left = _add_copies(known, scratch, True, at_copy, high, depth, serial, count, left)
    if recycled >= 0:
        for rank in range(known.recycled.shape[1] - TOP):
            token = known.recycled[recycled, TOP + rank]
            if token < 0 or left * scratch.ranked[rank] <= enough:
                break
            if _find(scratch, count, serial, token) >= 0 or count == MOST_CHILDREN:
                continue
            level = RANKS + rank
            holds = chance(known.engine, known.request, level)
            scratch.children[1, count] = level
            scratch.chances[count] = left * holds
            count = _append(scratch, count, serial, token)
            left *= 1.0 - holds
    if longest > 0 and left * scratch.ranked[MOST_RANKS] > enough:
        count, left = _add_rows(known, scratch, 1, serial, count, left)
    return count


@part_of_kernel
def _ask_for_rows(known: Known, scratch: Scratch, history: IntArray) -> int:
    """Hash the n-grams before a node and ask for their rows' cache lines; returns how long the longest is."""
    longest = 0
    for source in range(TEXTS):
        owner = known.owners[source]
        if owner < 0:
            continue
        state = known.states[source]
        most = min(int(state[ORDER]) - 1, len(history), LONGEST_KEY)
        longest = max(longest, most)
        key = first_key(owner)
        for n in range(1, most + 1):
            key = extend_key(key, history[len(history) - n])
            if n >= known.shortest:
                scratch.keys[n, source] = row_key(key, n)
                prefetch_row(state, scratch.keys[n, source])
    return longest


@part_of_kernel
def _find_rows(known: Known, scratch: Scratch, longest: int, recycled: bool, pooled: bool) -> None:
    """Find the rows of the n-grams of all lengths, and what can still come from these on."""
    limit = 0.0
    for n in range(1, max(1, longest) + 1):
        most = 0
        second = 0
        for source in range(TEXTS):
            row = np.int64(-1)
            knows = 0
            owner = known.owners[source]
            if owner >= 0 and known.shortest <= n <= longest:
                state = known.states[source]
                if n < state[ORDER]:
                    row = find_row(state, scratch.keys[n, source], owner)
                    if row >= 0:
                        seen = 0
                        kinds = 0
                        for slot in range(row + FOLLOWERS, row + ROW):
                            value = state[slot]
                            if value == 0:
                                break
                            seen += value >> TOKEN_BITS
                            kinds += 1
                        knows = knowledge(seen, kinds)
            scratch.rows[n, source] = row
            scratch.levels[n, source] = knows
            if knows > most:
                second = most
                most = knows
            elif knows > second:
                second = knows
        for source in range(TEXTS):
            if scratch.rows[n, source] >= 0:
                knows = scratch.levels[n, source]
                level = row_level(n, source, knows, second if knows == most else most)
                scratch.levels[n, source] = level
                scratch.holds[n, source] = chance(known.engine, known.request, level)
                limit = max(limit, scratch.holds[n, source])
        if n == 1:
            scratch.ranked[MOST_RANKS] = limit
            if recycled:
                for rank in range(known.recycled.shape[1] - TOP - 1, -1, -1):
                    limit = max(limit, chance(known.engine, known.request, RANKS + rank))
                    scratch.ranked[rank] = limit
            if pooled:
                limit = 1.0
        scratch.limits[n] = limit


@part_of_kernel
def _add_rows(known: Known, scratch: Scratch, n: int, serial: int, count: int, left: float) -> tuple[int, float]:
    """Add the levels of the n-grams of one length.

    Returns:
        How many children there are now, and the chance that is left.
    """
    base = count
    for source in range(TEXTS):
        scratch.starts[source] = count
        scratch.totals[source] = 0.0
        row = scratch.rows[n, source]
        if row < 0:
            continue
        state = known.states[source]
        for slot in range(row + FOLLOWERS, row + ROW):
            value = state[slot]
            if value == 0:
                break
            token = value & TOKEN_MASK
            seen = value >> TOKEN_BITS
            at = _find(scratch, count, serial, token)
            if at < 0:
                if count == MOST_CHILDREN:
                    break
                scratch.weights[count] = seen
                scratch.totals[source] += seen
                count = _append(scratch, count, serial, token)
            elif at >= base:
                scratch.weights[at] += SUPPORT * seen
                owner = source
                while at < scratch.starts[owner]:
                    owner -= 1
                scratch.totals[owner] += SUPPORT * seen
    scratch.starts[TEXTS] = count
    for source in range(TEXTS):
        if scratch.starts[source + 1] > scratch.starts[source]:
            holds = scratch.holds[n, source]
            share = left * holds / scratch.totals[source]
            for at in range(scratch.starts[source], scratch.starts[source + 1]):
                scratch.chances[at] = share * scratch.weights[at]
                scratch.children[1, at] = scratch.levels[n, source]
            left *= 1.0 - holds
    return count, left


@part_of_kernel
def _add_copies(
    known: Known,
    scratch: Scratch,
    pool: bool,
    low: int,
    high: int,
    depth: int,
    serial: int,
    count: int,
    left: float,
) -> tuple[int, int, float]:
    """Add the levels of the copies, those out of the pool (which come last) or the others; see ``open_node``.

    Returns:
        Up to where in ``order`` they were taken, how many children there are now, and the chance that is left.
    """
    about = known.about
    k = low
    while k < high and (about[SOURCE, scratch.order[k]] == POOL) == pool:
        i = scratch.order[k]
        source = about[SOURCE, i]
        agrees = agreement_class(about[AGREEMENT, i] + depth)
        first = count
        several = 0
        total = 0.0
        while k < high:
            i = scratch.order[k]
            if about[SOURCE, i] != source or agreement_class(about[AGREEMENT, i] + depth) != agrees:
                break
            k += 1
            if about[LENGTH, i] <= depth:
                continue
            token = known.tokens[i, depth]
            several += 1
            at = _find(scratch, count, serial, token)
            if at < 0 and count < MOST_CHILDREN:
                scratch.weights[count] = 1.0
                count = _append(scratch, count, serial, token)
                total += 1.0
            elif at >= first:
                scratch.weights[at] += 1.0
                total += 1.0
        if count > first:
            level = copy_level(source, agrees, 0 if several == 1 else (1 if count - first == 1 else 2))
            holds = chance(known.engine, known.request, level)
            for at in range(first, count):
                scratch.chances[at] = left * holds * scratch.weights[at] / total
                scratch.children[1, at] = level
            left *= 1.0 - holds
    return k, count, left


@njit(cache=CACHE, inline="always")
def _append(scratch: Scratch, count: int, serial: int, token: int) -> int:
    """Add a child to ``count`` others, of which none carries its token; returns how many there are now."""
    scratch.children[0, count] = token
    scratch.marks[token & (MARKS - 1)] = (serial << CHILD_BITS) | count
    return count + 1


@njit(cache=CACHE, inline="always")
def _find(scratch: Scratch, count: int, serial: int, token: int) -> int:
    """Which of the children carries this token, or -1."""
    children = scratch.children
    mark = scratch.marks[token & (MARKS - 1)]
    if (mark >> CHILD_BITS) != serial:
        return -1
    at = mark & (MOST_CHILDREN - 1)
    if children[0, at] == token:
        return at
    for at in range(count):  # another token has the same mark
        if children[0, at] == token:
            return at
    return -1


@part_of_kernel
def _keep(known: Known, order: IntArray, low: int, high: int, depth: int, token: int) -> int:
    """Move the copies that go on with ``token`` to the front of their range; returns where they end."""
    end = low
    for k in range(low, high):
        i = order[k]
        if depth < known.about[LENGTH, i] and known.tokens[i, depth] == token:
            for j in range(k, end, -1):
                order[j] = order[j - 1]
            order[end] = i
            end += 1
    return end


@njit(cache=CACHE)
def grow_tree(
    known: Known,
    context: IntArray,
    copies: int,
    budget: int,
    threshold: float,
    max_depth: int,
    out: IntArray,
    out_chances: FloatArray,
) -> int:
    """The most probable tree.

    Args:
        known: see there.
        context: int32 [t], the text so far; its last token is the root.
        copies: how many rows of ``known.tokens`` are filled, most trusted first.
        budget: most nodes.
        threshold: leave out nodes that are less probable than this.
        max_depth: no node is deeper.
        out: int32 [4, >= budget], receives the nodes' tokens, parents, depths and sources.
        out_chances: float32 [>= budget], receives their probabilities.

    Returns:
        The number of nodes.
    """
    if budget <= 0 or len(context) == 0 or max_depth <= 0:
        return 0
    scratch = make_scratch(copies)
    children, chances, order = scratch.children, scratch.chances, scratch.order
    room = 8 * MOST_CHILDREN
    entry = np.empty((6, room), np.int32)  # open nodes: token, parent, depth, kind of level, its copies in ``order``
    score = np.empty(room, np.float64)
    heap = np.empty(room, np.int32)
    # The ``budget`` best chances seen so far, smallest first (a heap): whatever is below can't become a node.
    best = np.empty(budget, np.float64)
    num_best = 0
    bound = 0.0
    tail = min(len(context), LONGEST_KEY)
    history = np.empty(LONGEST_KEY, np.int32)
    entries = 0
    heaped = 0
    nodes = 0
    node = -1
    depth = 0
    low, high = 0, copies
    probability = 1.0
    while True:
        if depth < max_depth and probability > bound and probability >= threshold:
            length = 0
            here = node
            while here >= 0 and length < LONGEST_KEY:
                length += 1
                history[LONGEST_KEY - length] = out[0, here]
                here = out[1, here]
            at = len(context) - 1
            while length < LONGEST_KEY and at >= len(context) - tail:
                length += 1
                history[LONGEST_KEY - length] = context[at]
                at -= 1
            # a little less: a child whose chance is the bound but for rounding stays
            enough = max(bound, threshold) / probability * (1.0 - 1e-12)
            count = open_node(known, scratch, history[LONGEST_KEY - length :], low, high, depth, enough, nodes + 1)
            for c in range(count):
                p = probability * chances[c]
                if p < threshold or p <= bound:
                    continue
                if entries == room:
                    grown = 2 * room
                    more_entry = np.empty((6, grown), np.int32)
                    more_entry[:, :room] = entry
                    entry = more_entry
                    more_score = np.empty(grown, np.float64)
                    more_score[:room] = score
                    score = more_score
                    more_heap = np.empty(grown, np.int32)
                    more_heap[:room] = heap
                    heap = more_heap
                    room = grown
                entry[0, entries] = children[0, c]
                entry[1, entries] = node
                entry[2, entries] = depth + 1
                entry[3, entries] = children[1, c]
                entry[4, entries] = low
                if children[1, c] >= COPIES:
                    low = _keep(known, order, low, high, depth, children[0, c])
                entry[5, entries] = low
                score[entries] = p
                # Sift up; among equals the older entry stays above.
                at = heaped
                heaped += 1
                while at > 0:
                    up = (at - 1) >> 1
                    if score[heap[up]] >= p:
                        break
                    heap[at] = heap[up]
                    at = up
                heap[at] = entries
                entries += 1
                if num_best < budget:
                    at = num_best
                    num_best += 1
                    while at > 0 and best[(at - 1) >> 1] > p:
                        best[at] = best[(at - 1) >> 1]
                        at = (at - 1) >> 1
                    best[at] = p
                else:
                    at = 0
                    while True:
                        down = 2 * at + 1
                        if down >= budget:
                            break
                        if down + 1 < budget and best[down + 1] < best[down]:
                            down += 1
                        if best[down] >= p:
                            break
                        best[at] = best[down]
                        at = down
                    best[at] = p
                if num_best == budget:
                    bound = best[0]
        if heaped == 0 or nodes == budget:
            return nodes
        top = heap[0]
        heaped -= 1
        if heaped > 0:
            last_entry = heap[heaped]
            at = 0
            while True:
                down = 2 * at + 1
                if down >= heaped:
                    break
                right = down + 1
                if right < heaped and (
                    score[heap[right]] > score[heap[down]]
                    or (score[heap[right]] == score[heap[down]] and heap[right] < heap[down])
                ):
                    down = right
                if score[last_entry] > score[heap[down]] or (
                    score[last_entry] == score[heap[down]] and last_entry < heap[down]
                ):
                    break
                heap[at] = heap[down]
                at = down
            heap[at] = last_entry
        node = nodes
        depth = entry[2, top]
        low = entry[4, top]
        high = entry[5, top]
        probability = score[top]
        out[0, nodes] = entry[0, top]
        out[1, nodes] = entry[1, top]
        out[2, nodes] = depth
        out[3, nodes] = source_of(entry[3, top])
        out_chances[nodes] = probability
        nodes += 1


@njit(cache=CACHE)
def learn_from(known: Known, context: IntArray, length: int, copies: int) -> None:
    """Learn what the levels are worth from the tokens that followed a root, as far as ``grow_tree`` could have looked.

    Args:
        known: what was known at the root: indices and copies are those of that moment.
        context: int32 [t], the text so far.
        length: where the tokens that followed begin; the root is the token before.
        copies: see ``grow_tree``.
    """
    scratch = make_scratch(copies)
    tokens, levels = scratch.children
    high = copies
    for at in range(length, len(context)):
        history = context[max(0, at - LONGEST_KEY) : at]
        count = open_node(known, scratch, history, 0, high, at - length, 0.0, at - length + 1)
        learn(known.engine, known.request, tokens, levels, count, context[at])
        if _find(scratch, count, at - length + 1, context[at]) < 0:
            return
        high = _keep(known, scratch.order, 0, high, at - length, context[at])
