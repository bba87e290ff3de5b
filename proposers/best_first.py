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

import numpy as np
from numba import njit
from numpy.typing import NDArray

from proposers.calibration import (
    COPIES,
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

# Rows of the candidates' table.
LENGTH, AGREEMENT, SOURCE = 0, 1, 2


Scratch = tuple[Float64Array, Float64Array, Int64Array, Int64Array, Int64Array, NDArray[np.uint64]]


@njit(cache=CACHE)
def make_scratch() -> Scratch:
    """What ``open_node`` works with: made once for a tree, since that takes as long as opening a node."""
    return (
        np.empty(MOST_CHILDREN, np.float64),
        np.empty(TEXTS, np.float64),
        np.empty(TEXTS, np.int64),
        np.empty(TEXTS, np.int64),
        np.empty(TEXTS + 1, np.int64),
        np.empty((TEXTS, LONGEST_KEY + 1), np.uint64),
    )


@njit(cache=CACHE)
def open_node(
    history: IntArray,
    states: tuple[IntArray, IntArray, IntArray, IntArray],
    owners: IntArray,
    shortest: int,
    recycled: IntArray,
    tokens: IntArray,
    about: IntArray,
    order: IntArray,
    low: int,
    high: int,
    depth: int,
    engine: Float64Array,
    request: Float64Array,
    enough: float,
    marks: IntArray,
    serial: int,
    scratch: Scratch,
    children: IntArray,
    chances: Float64Array,
) -> int:
    """What may follow one node.

    Args:
        history: int32 [h], the tokens up to the node, the last ``LONGEST_KEY`` of them or more.
        states: the texts' indices (``text_index``).
        owners: int32 [sources], whose text may be found in each; ``NOBODY`` leaves it out.
        shortest: the shortest n-gram whose followers count.
        recycled: the target's likeliest tokens after each token (``recycled_tokens``).
        tokens: int32 [c, d], the copies' tokens, from the root's child down.
        about: int32 [3, c], for each copy how many tokens it has, how many before it agree, and its source.
        order: int32 [c], copies; those that lead through this node are at ``low`` to ``high``, most trusted first.
        low: see ``order``.
        high: see ``order``.
        depth: the node's depth.
        engine: see ``calibration.chance``.
        request: see ``calibration.chance``.
        enough: when less than this chance is left, the rest is not worth asking.
        marks: int32 [``MARKS``], scratch that has never seen this ``serial``.
        serial: a number below 2**20.
        scratch: see ``make_scratch``.
        children: int32 [2, ``MOST_CHILDREN``], receives the tokens and the kinds of their levels, level by level.
        chances: float64 [``MOST_CHILDREN``], receives their chances, given that the node is reached.

    Returns:
        How many.
    """
    weights, totals, rows, knows, starts, keys = scratch
    longest = 0
    for source in range(TEXTS):
        if owners[source] >= 0:
            longest = max(longest, int(states[source][ORDER]) - 1)
    longest = min(longest, len(history), LONGEST_KEY)
    for source in range(TEXTS):
        if owners[source] < 0:
            continue
        key = first_key(owners[source])
        for n in range(1, min(longest, int(states[source][ORDER]) - 1) + 1):
            key = extend_key(key, history[len(history) - n])
            if n >= shortest:
                keys[source, n] = row_key(key, n)
                prefetch_row(states[source], keys[source, n])
    at_copy, count, left = _add_copies(
        False,
        order,
        low,
        high,
        depth,
        tokens,
        about,
        engine,
        request,
        marks,
        serial,
        children,
        chances,
        weights,
        0,
        1.0,
    )
    asked_model = False
    for n in range(longest, -1, -1):
        if left <= enough or count == MOST_CHILDREN:
            break
        if n <= 1 and not asked_model:
            asked_model = True
            at_copy, count, left = _add_copies(
                True,
                order,
                at_copy,
                high,
                depth,
                tokens,
                about,
                engine,
                request,
                marks,
                serial,
                children,
                chances,
                weights,
                count,
                left,
            )
            row = np.int64(-1)
            if owners[RECYCLED] >= 0:
                row = find_recycled(recycled, owners[RECYCLED], history[len(history) - 1])
            if row >= 0:
                for rank in range(recycled.shape[1] - TOP):
                    token = recycled[row, TOP + rank]
                    if token < 0 or count == MOST_CHILDREN or left <= enough:
                        break
                    if _find(children, count, marks, serial, token) >= 0:
                        continue
                    level = RANKS + rank
                    holds = chance(engine, request, level)
                    children[0, count] = token
                    children[1, count] = level
                    chances[count] = left * holds
                    marks[token & (MARKS - 1)] = (serial << CHILD_BITS) | count
                    count += 1
                    left *= 1.0 - holds
        if n < shortest or n == 0:
            continue
        most = 0
        second = 0
        for source in range(TEXTS):
            rows[source] = -1
            knows[source] = 0
            if owners[source] >= 0 and n < states[source][ORDER]:
                row = find_row(states[source], keys[source, n], owners[source])
                rows[source] = row
                if row >= 0:
                    seen = 0
                    kinds = 0
                    for slot in range(row + FOLLOWERS, row + ROW):
                        value = states[source][slot]
                        if value == 0:
                            break
                        seen += value >> TOKEN_BITS
                        kinds += 1
                    known = knowledge(seen, kinds)
                    knows[source] = known
                    if known > most:
                        second = most
                        most = known
                    elif known > second:
                        second = known
        if most == 0:
            continue
        base = count
        for source in range(TEXTS):
            starts[source] = count
            totals[source] = 0.0
            row = rows[source]
            if row < 0:
                continue
            for slot in range(row + FOLLOWERS, row + ROW):
                value = states[source][slot]
                if value == 0:
                    break
                token = value & TOKEN_MASK
                seen = value >> TOKEN_BITS
                at = _find(children, count, marks, serial, token)
                if at < 0:
                    if count == MOST_CHILDREN:
                        break
                    children[0, count] = token
                    marks[token & (MARKS - 1)] = (serial << CHILD_BITS) | count
                    weights[count] = seen
                    totals[source] += seen
                    count += 1
                elif at >= base:
                    weights[at] += SUPPORT * seen
                    owner = source
                    while at < starts[owner]:
                        owner -= 1
                    totals[owner] += SUPPORT * seen
        starts[TEXTS] = count
        for source in range(TEXTS):
            if starts[source + 1] > starts[source]:
                others = second if knows[source] == most else most
                level = row_level(n, source, knows[source], others)
                holds = chance(engine, request, level)
                share = left * holds / totals[source]
                for at in range(starts[source], starts[source + 1]):
                    chances[at] = share * weights[at]
                    children[1, at] = level
                left *= 1.0 - holds
    return count


@njit(cache=CACHE)
def _add_copies(
    pool: bool,
    order: IntArray,
    low: int,
    high: int,
    depth: int,
    tokens: IntArray,
    about: IntArray,
    engine: Float64Array,
    request: Float64Array,
    marks: IntArray,
    serial: int,
    children: IntArray,
    chances: Float64Array,
    weights: Float64Array,
    count: int,
    left: float,
) -> tuple[int, int, float]:
    """Add the levels of the copies, those out of the pool (which come last) or the others; see ``open_node``.

    Returns:
        Up to where in ``order`` they were taken, how many children there are now, and the chance that is left.
    """
    k = low
    while k < high and (about[SOURCE, order[k]] == POOL) == pool:
        i = order[k]
        source = about[SOURCE, i]
        agrees = agreement_class(about[AGREEMENT, i] + depth)
        first = count
        several = 0
        total = 0.0
        while k < high:
            i = order[k]
            if about[SOURCE, i] != source or agreement_class(about[AGREEMENT, i] + depth) != agrees:
                break
            k += 1
            if about[LENGTH, i] <= depth:
                continue
            token = tokens[i, depth]
            several += 1
            at = _find(children, count, marks, serial, token)
            if at < 0:
                if count == MOST_CHILDREN:
                    continue
                children[0, count] = token
                marks[token & (MARKS - 1)] = (serial << CHILD_BITS) | count
                weights[count] = 1.0
                count += 1
                total += 1.0
            elif at >= first:
                weights[at] += 1.0
                total += 1.0
        if count > first:
            level = copy_level(source, agrees, 0 if several == 1 else (1 if count - first == 1 else 2))
            holds = chance(engine, request, level)
            for at in range(first, count):
                chances[at] = left * holds * weights[at] / total
                children[1, at] = level
            left *= 1.0 - holds
    return k, count, left


@njit(cache=CACHE, inline="always")
def _find(children: IntArray, count: int, marks: IntArray, serial: int, token: int) -> int:
    """Which of the children carries this token, or -1."""
    mark = marks[token & (MARKS - 1)]
    if (mark >> CHILD_BITS) != serial:
        return -1
    at = mark & (MOST_CHILDREN - 1)
    if children[0, at] == token:
        return at
    for at in range(count):  # another token has the same mark
        if children[0, at] == token:
            return at
    return -1


@njit(cache=CACHE)
def _keep(order: IntArray, low: int, high: int, tokens: IntArray, about: IntArray, depth: int, token: int) -> int:
    """Move the copies that go on with ``token`` to the front of their range; returns where they end."""
    end = low
    for k in range(low, high):
        i = order[k]
        if depth < about[LENGTH, i] and tokens[i, depth] == token:
            for j in range(k, end, -1):
                order[j] = order[j - 1]
            order[end] = i
            end += 1
    return end


@njit(cache=CACHE)
def grow_tree(
    context: IntArray,
    states: tuple[IntArray, IntArray, IntArray, IntArray],
    owners: IntArray,
    shortest: int,
    recycled: IntArray,
    tokens: IntArray,
    about: IntArray,
    copies: int,
    engine: Float64Array,
    request: Float64Array,
    budget: int,
    threshold: float,
    max_depth: int,
    out: IntArray,
    out_chances: FloatArray,
) -> int:
    """The most probable tree.

    Args:
        context: int32 [t], the text so far; its last token is the root.
        states: see ``open_node``.
        owners: see ``open_node``.
        shortest: see ``open_node``.
        recycled: see ``open_node``.
        tokens: see ``open_node``.
        about: see ``open_node``.
        copies: how many rows of ``tokens`` are filled, most trusted first.
        engine: see ``open_node``.
        request: see ``open_node``.
        budget: most nodes.
        threshold: leave out nodes that are less probable than this.
        max_depth: no node is deeper.
        out: int32 [4, >= budget], receives the nodes' tokens, parents, depths and kinds of levels.
        out_chances: float32 [>= budget], receives their probabilities.

    Returns:
        The number of nodes.
    """
    if budget <= 0 or len(context) == 0 or max_depth <= 0:
        return 0
    order = np.arange(copies).astype(np.int32)
    marks = np.zeros(MARKS, np.int32)
    children = np.empty((2, MOST_CHILDREN), np.int32)
    chances = np.empty(MOST_CHILDREN, np.float64)
    scratch = make_scratch()
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
            count = open_node(
                history[LONGEST_KEY - length :],
                states,
                owners,
                shortest,
                recycled,
                tokens,
                about,
                order,
                low,
                high,
                depth,
                engine,
                request,
                max(bound, threshold) / probability,
                marks,
                nodes + 1,
                scratch,
                children,
                chances,
            )
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
                    low = _keep(order, low, high, tokens, about, depth, children[0, c])
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
        out[3, nodes] = entry[3, top]
        out_chances[nodes] = probability
        nodes += 1


@njit(cache=CACHE)
def learn_from(
    context: IntArray,
    length: int,
    states: tuple[IntArray, IntArray, IntArray, IntArray],
    owners: IntArray,
    shortest: int,
    recycled: IntArray,
    tokens: IntArray,
    about: IntArray,
    copies: int,
    engine: Float64Array,
    request: Float64Array,
) -> None:
    """Learn what the levels are worth from the tokens that followed a root, as far as ``grow_tree`` could have looked.

    Args:
        context: int32 [t], the text so far.
        length: where the tokens that followed begin; the root is the token before. The texts' indices and the copies
            are those of that moment.
        states: see ``open_node``.
        owners: see there.
        shortest: see there.
        recycled: see there.
        tokens: see there.
        about: see there.
        copies: see ``grow_tree``.
        engine: see ``calibration.learn``.
        request: see there.
    """
    order = np.arange(copies).astype(np.int32)
    marks = np.zeros(MARKS, np.int32)
    children = np.empty((2, MOST_CHILDREN), np.int32)
    chances = np.empty(MOST_CHILDREN, np.float64)
    scratch = make_scratch()
    high = copies
    for at in range(length, len(context)):
        count = open_node(
            context[max(0, at - LONGEST_KEY) : at],
            states,
            owners,
            shortest,
            recycled,
            tokens,
            about,
            order,
            0,
            high,
            at - length,
            engine,
            request,
            0.0,
            marks,
            at - length + 1,
            scratch,
            children,
            chances,
        )
        learn(engine, request, children[0], children[1], count, context[at])
        high = _keep(order, 0, high, tokens, about, at - length, context[at])
        known = False
        for c in range(count):
            if children[0, c] == context[at]:
                known = True
        if not known:
            return
