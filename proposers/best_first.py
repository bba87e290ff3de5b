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
    HELD,
    MOST_RANKS,
    POOL,
    RANKS,
    RECYCLED,
    SEEN,
    SOURCES,
    TEXTS,
    Float64Array,
    agreement_class,
    chance_of,
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
    HORIZON,
    NOW,
    ORDER,
    ROW,
    ROW_BITS,
    ROWS,
    STAMP,
    TOKEN_BITS,
    TOKEN_MASK,
    extend_key,
    first_key,
    peek,
    prefetch_row,
    row_address,
    row_key,
    seen_in_row,
)
from proposers.tree import FloatArray, IntArray

Int64Array = NDArray[np.int64]

CHILD_BITS = 7
MOST_CHILDREN = 1 << CHILD_BITS
MARKS = 1024
LONGEST_KEY = 7
SUPPORT = 0.25
"""What a follower's count in another text is worth beside its count in the text whose level it belongs to."""

index = np.uint64
"""For an index that is never negative where the compiler can't see that: numba adds the length to others that are, and
to find out takes a tenth of a tree's time."""

part_of_kernel = njit(cache=CACHE, forceinline=True, _nrt=False)
"""For functions that neither make nor keep an array: counting references to those in their tuples would take longer
than what they do."""

ENTRY = 8
"""Numbers about an open node: token, parent, depth, kind of level, where its copies begin and end, two unused."""

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


# What ``open_node`` works with lies in three flat arrays, each thing at a place that is known when this is compiled:
# an array for each would cost a pointer, a shape and strides, and there are not enough registers for those.
BY_TEXT = (LONGEST_KEY + 1) * TEXTS
"""Room for something about each text for each length of n-gram, length by length."""
# int32
TOKENS = 0
"""The tokens that may follow a node, level by level."""
KINDS = TOKENS + MOST_CHILDREN
"""The kinds of their levels."""
MARKED = KINDS + MOST_CHILDREN
"""By a token's last bits, which child it may be, and of which node."""
ROW_LEVEL = MARKED + MARKS
"""``BY_TEXT``: the kind of level that a row is."""
START = ROW_LEVEL + BY_TEXT
"""Where the tokens that each text added begin among the children, and where the last ones end."""
HISTORY = START + TEXTS + 1
"""The tokens up to the node, the last one first."""
ORDERED = HISTORY + LONGEST_KEY
"""The copies; those that lead through a node lie side by side, most trusted first."""
# float64
CHANCES = 0
"""The children's chances, given that the node is reached."""
WEIGHTS = CHANCES + MOST_CHILDREN
"""How often each was seen."""
HOLDS = WEIGHTS + MOST_CHILDREN
"""``BY_TEXT``: how often a row's level holds."""
LIMITS = HOLDS + BY_TEXT
"""The most that any level of n-grams of this length or shorter ones holds."""
TOTALS = LIMITS + LONGEST_KEY + 1
"""How often the tokens that each text added were seen."""
RATIOS = TOTALS + TEXTS
"""For each source, how often its levels held in this request, to how often they should have."""
RANK = RATIOS + len(SOURCES)
"""How often recycled tokens of this rank hold."""
RANKED = RANK + MOST_RANKS
"""The most that one of this rank or a later one does."""
SINGLE = RANKED + MOST_RANKS + 1
"""The most that any level of single tokens holds."""
FLOATS = SINGLE + 1
# int64
KEYS = 0
"""``BY_TEXT``: what a row is found by."""
ROW_AT = KEYS + BY_TEXT
"""``BY_TEXT``: where a row lies in memory, or 0."""
TEXT = ROW_AT + BY_TEXT
"""About each text that may be asked: its source, whose text may be found, the longest n-gram, where its hash begins,
what ``row_address`` wants to know, how old a row may be, and what time it is."""
FIELDS = 8
NUMBER, OWNED_BY, REACH, FIRST_KEY, SHIFT, FIRST_ROW, OLDEST, CLOCK = range(FIELDS)
LONGS = TEXT + TEXTS * FIELDS


class Scratch(NamedTuple):
    """What ``open_node`` works with: made once for a tree, since that takes as long as opening a node.

    Attributes:
        ints: int32 [``ORDERED`` + c], see above.
        floats: float64 [``FLOATS``], see above.
        longs: int64 [``LONGS``], see above.
        texts: how many texts may be asked.
        reach: how many tokens up to a node matter, at least 1.
    """

    ints: IntArray
    floats: Float64Array
    longs: Int64Array
    texts: int
    reach: int


@njit(cache=CACHE)
def make_scratch(known: Known, copies: int) -> Scratch:
    """Scratch for a tree with so many copies; it has addresses of ``known.states``, so these must outlive it."""
    ints = np.zeros(ORDERED + copies, np.int32)
    for i in range(copies):
        ints[ORDERED + i] = i
    longs = np.empty(LONGS, np.int64)
    texts = 0
    reach = 1
    for source in range(TEXTS):
        owner = known.owners[source]
        if owner < 0:
            continue
        state = known.states[source]
        text = TEXT + texts * FIELDS
        most = min(int(state[ORDER]) - 1, LONGEST_KEY)
        longs[text + NUMBER] = source
        longs[text + OWNED_BY] = owner
        longs[text + REACH] = most
        longs[text + FIRST_KEY] = np.int64(first_key(owner))
        longs[text + SHIFT] = 64 - state[ROW_BITS]
        longs[text + FIRST_ROW] = np.int64(state.ctypes.data) + 4 * np.int64(state[ROWS])
        longs[text + OLDEST] = state[HORIZON] if state[HORIZON] > 0 else 0x7FFFFFFF
        longs[text + CLOCK] = state[NOW]
        texts += 1
        reach = max(reach, most)
    return Scratch(ints, np.empty(FLOATS, np.float64), longs, texts, reach)


@njit(cache=CACHE)
def weigh(known: Known, scratch: Scratch) -> None:
    """Note what ``calibration`` says that doesn't change while a tree grows."""
    floats = scratch.floats
    for source in range(len(SOURCES)):
        floats[RATIOS + source] = known.request[HELD, source] / known.request[SEEN, source]
    limit = 0.0
    ranks = max(0, known.recycled.shape[1] - TOP)
    floats[RANKED + ranks] = limit
    for rank in range(ranks - 1, -1, -1):
        floats[RANK + rank] = chance_of(known.engine, RANKS + rank, floats[RATIOS + RECYCLED])
        limit = max(limit, floats[RANK + rank])
        floats[RANKED + rank] = limit


@part_of_kernel
def open_node(
    known: Known, scratch: Scratch, length: int, low: int, high: int, depth: int, enough: float, serial: int
) -> int:
    """What may follow one node: its children's tokens, kinds of level and chances, in ``scratch``.

    Args:
        known: see there.
        scratch: see there; with the tokens up to the node.
        length: how many these are, ``scratch.reach`` or all that there are.
        low: the copies that lead through this node are at ``low`` to ``high`` of those in order.
        high: see ``low``.
        depth: the node's depth.
        enough: where no child that is still to come can have more than this chance, the rest is not asked.
        serial: a number below 2**20 that this scratch has not seen.

    Returns:
        How many.
    """
    ints, floats = scratch.ints, scratch.floats
    longest = _ask_for_rows(known, scratch, length)
    at_copy, count, left = _add_copies(known, scratch, False, low, high, depth, serial, 0, 1.0)
    if left <= enough:
        return count
    recycled = np.int64(-1)
    if known.owners[RECYCLED] >= 0:
        recycled = find_recycled(known.recycled, known.owners[RECYCLED], ints[HISTORY])
    _find_rows(known, scratch, longest, recycled >= 0, at_copy < high)
    for n in range(longest, 1, -1):
        if left * floats[index(LIMITS + n)] <= enough:
            return count
        count, left = _add_rows(scratch, n, serial, count, left)
    if left * floats[LIMITS + 1] <= enough:
        return count
    _, count, left = _add_copies(known, scratch, True, at_copy, high, depth, serial, count, left)
    single = floats[SINGLE]
    if recycled >= 0:
        for rank in range(known.recycled.shape[1] - TOP):
            token = known.recycled[recycled, TOP + rank]
            if token < 0 or left * max(single, floats[RANKED + rank]) <= enough:
                break
            if _find(ints, count, serial, token) >= 0 or count == MOST_CHILDREN:
                continue
            holds = floats[RANK + rank]
            ints[index(KINDS + count)] = RANKS + rank
            floats[index(CHANCES + count)] = left * holds
            count = _append(ints, count, serial, token)
            left *= 1.0 - holds
    if longest > 0 and left * single > enough:
        count, left = _add_rows(scratch, 1, serial, count, left)
    return count


@part_of_kernel
def _ask_for_rows(known: Known, scratch: Scratch, length: int) -> int:
    """Hash the n-grams before a node and ask for their rows' cache lines; returns how long the longest is."""
    ints, longs = scratch.ints, scratch.longs
    longest = 0
    for i in range(scratch.texts):
        text = TEXT + i * FIELDS
        most = min(longs[text + REACH], length)
        longest = max(longest, most)
        key = np.uint64(longs[text + FIRST_KEY])
        shift = np.uint64(longs[text + SHIFT])
        first = longs[text + FIRST_ROW]
        for n in range(1, most + 1):
            key = extend_key(key, ints[HISTORY + n - 1])
            if n >= known.shortest:
                found_by = row_key(key, n)
                longs[index(KEYS + n * TEXTS + i)] = np.int64(found_by)
                prefetch_row(first, found_by, shift)
    return longest


@part_of_kernel
def _find_rows(known: Known, scratch: Scratch, longest: int, recycled: bool, pooled: bool) -> None:
    """Find the rows of the n-grams of all lengths, and what can still come from these on."""
    ints, floats, longs = scratch.ints, scratch.floats, scratch.longs
    limit = 0.0
    for n in range(1, max(1, longest) + 1):
        most = 0
        second = 0
        for i in range(scratch.texts):
            row = 0
            knows = 0
            text = TEXT + i * FIELDS
            if known.shortest <= n <= min(longest, longs[text + REACH]):
                key = np.uint64(longs[index(KEYS + n * TEXTS + i)])
                shift = np.uint64(longs[text + SHIFT])
                row = row_address(longs[text + FIRST_ROW], key, shift, longs[text + OWNED_BY])
                if row != 0 and (longs[text + CLOCK] - peek(row + 4 * STAMP)) & 0x7FFFFFFF > longs[text + OLDEST]:
                    row = 0
                if row != 0:
                    knows = knowledge(seen_in_row(row), 1 if peek(row + 4 * FOLLOWERS + 4) == 0 else 2)
            longs[index(ROW_AT + n * TEXTS + i)] = row
            ints[index(ROW_LEVEL + n * TEXTS + i)] = knows
            second = max(second, min(most, knows))
            most = max(most, knows)
        for i in range(scratch.texts):
            if longs[index(ROW_AT + n * TEXTS + i)] != 0:
                source = longs[TEXT + i * FIELDS + NUMBER]
                knows = ints[index(ROW_LEVEL + n * TEXTS + i)]
                level = row_level(n, source, knows, second if knows == most else most)
                ints[index(ROW_LEVEL + n * TEXTS + i)] = level
                holds = chance_of(known.engine, level, floats[RATIOS + source])
                floats[index(HOLDS + n * TEXTS + i)] = holds
                limit = max(limit, holds)
        if n == 1:
            floats[SINGLE] = limit
            if recycled:
                limit = max(limit, floats[RANKED])
            if pooled:
                limit = 1.0
        floats[index(LIMITS + n)] = limit


@part_of_kernel
def _add_rows(scratch: Scratch, n: int, serial: int, count: int, left: float) -> tuple[int, float]:
    """Add the levels of the n-grams of one length.

    Returns:
        How many children there are now, and the chance that is left.
    """
    ints, floats, longs = scratch.ints, scratch.floats, scratch.longs
    base = count
    for i in range(scratch.texts):
        ints[START + i] = count
        total = 0.0
        row = longs[index(ROW_AT + n * TEXTS + i)]
        if row != 0:
            for slot in range(FOLLOWERS, ROW):
                value = peek(row + 4 * slot)
                if value == 0:
                    break
                token = value & TOKEN_MASK
                seen = value >> TOKEN_BITS
                at = _find(ints, count, serial, token)
                if at < 0:
                    if count == MOST_CHILDREN:
                        break
                    floats[index(WEIGHTS + count)] = seen
                    total += seen
                    count = _append(ints, count, serial, token)
                elif at >= base:
                    floats[index(WEIGHTS + at)] += SUPPORT * seen
                    j = i
                    while at < ints[index(START + j)]:
                        j -= 1
                    if j == i:
                        total += SUPPORT * seen
                    else:
                        floats[index(TOTALS + j)] += SUPPORT * seen
        floats[TOTALS + i] = total
    ints[START + scratch.texts] = count
    for i in range(scratch.texts):
        first = ints[START + i]
        end = ints[START + i + 1]
        if end > first:
            holds = floats[index(HOLDS + n * TEXTS + i)]
            level = ints[index(ROW_LEVEL + n * TEXTS + i)]
            share = left * holds / floats[TOTALS + i]
            for at in range(first, end):
                floats[index(CHANCES + at)] = share * floats[index(WEIGHTS + at)]
                ints[index(KINDS + at)] = level
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
        Up to where in order they were taken, how many children there are now, and the chance that is left.
    """
    about = known.about
    ints, floats = scratch.ints, scratch.floats
    k = low
    while k < high and (about[SOURCE, ints[index(ORDERED + k)]] == POOL) == pool:
        i = ints[index(ORDERED + k)]
        source = about[SOURCE, i]
        agrees = agreement_class(about[AGREEMENT, i] + depth)
        first = count
        several = 0
        total = 0.0
        while k < high:
            i = ints[index(ORDERED + k)]
            if about[SOURCE, i] != source or agreement_class(about[AGREEMENT, i] + depth) != agrees:
                break
            k += 1
            if about[LENGTH, i] <= depth:
                continue
            token = known.tokens[i, depth]
            several += 1
            at = _find(ints, count, serial, token)
            if at < 0 and count < MOST_CHILDREN:
                floats[index(WEIGHTS + count)] = 1.0
                count = _append(ints, count, serial, token)
                total += 1.0
            elif at >= first:
                floats[index(WEIGHTS + at)] += 1.0
                total += 1.0
        if count > first:
            level = copy_level(source, agrees, 0 if several == 1 else (1 if count - first == 1 else 2))
            holds = chance_of(known.engine, level, floats[RATIOS + source])
            for at in range(first, count):
                floats[index(CHANCES + at)] = left * holds * floats[index(WEIGHTS + at)] / total
                ints[index(KINDS + at)] = level
            left *= 1.0 - holds
    return k, count, left


@njit(cache=CACHE, inline="always")
def _append(ints: IntArray, count: int, serial: int, token: int) -> int:
    """Add a child to ``count`` others, of which none carries its token; returns how many there are now."""
    ints[index(TOKENS + count)] = token
    ints[MARKED + (token & (MARKS - 1))] = (serial << CHILD_BITS) | count
    return count + 1


@njit(cache=CACHE, inline="always")
def _find(ints: IntArray, count: int, serial: int, token: int) -> int:
    """Which of the children carries this token, or -1."""
    mark = ints[MARKED + (token & (MARKS - 1))]
    if (mark >> CHILD_BITS) != serial:
        return -1
    at = mark & (MOST_CHILDREN - 1)
    if ints[TOKENS + at] == token:
        return at
    for at in range(count):  # another token has the same mark
        if ints[TOKENS + at] == token:
            return at
    return -1


@part_of_kernel
def _keep(known: Known, ints: IntArray, low: int, high: int, depth: int, token: int) -> int:
    """Move the copies that go on with ``token`` to the front of their range; returns where they end."""
    end = low
    for k in range(low, high):
        i = ints[index(ORDERED + k)]
        if depth < known.about[LENGTH, i] and known.tokens[i, depth] == token:
            for j in range(k, end, -1):
                ints[index(ORDERED + j)] = ints[index(ORDERED + j - 1)]
            ints[index(ORDERED + end)] = i
            end += 1
    return end


@part_of_kernel
def _grow(
    known: Known,
    scratch: Scratch,
    context: IntArray,
    copies: int,
    threshold: float,
    max_depth: int,
    entry: IntArray,
    score: Float64Array,
    heap: IntArray,
    best: Float64Array,
    out: IntArray,
    out_chances: FloatArray,
) -> int:
    """``grow_tree`` but for what it allocates: where a function makes or replaces arrays, references are counted at
    every turn of its loops.

    Args:
        known: see ``grow_tree``; so ``context``, ``copies``, ``threshold``, ``max_depth``, ``out``, ``out_chances``.
        scratch: new, weighed.
        context: see there.
        copies: see there.
        threshold: see there.
        max_depth: see there.
        entry: int32 [``ENTRY`` * room], for the open nodes.
        score: float64 [room], for their chances.
        heap: int32 [room], for their order.
        best: float64 [budget], for the best chances seen so far, smallest first (a heap): whatever is below them can't
            become a node.
        out: see there.
        out_chances: see there.

    Returns:
        The number of nodes, or -1 where there was too little room.
    """
    ints, floats, reach = scratch.ints, scratch.floats, scratch.reach
    room = len(score)
    budget = len(best)
    num_best = 0
    bound = 0.0
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
            while here >= 0 and length < reach:
                ints[index(HISTORY + length)] = out[0, here]
                here = out[1, here]
                length += 1
            at = len(context) - 1
            while length < reach and at >= 0:
                ints[index(HISTORY + length)] = context[at]
                at -= 1
                length += 1
            # a little less: a child whose chance is the bound but for rounding stays
            enough = max(bound, threshold) / probability * (1.0 - 1e-12)
            count = open_node(known, scratch, length, low, high, depth, enough, nodes + 1)
            for c in range(count):
                p = probability * floats[CHANCES + c]
                if p < threshold or p <= bound:
                    continue
                if entries == room:
                    return -1
                token = ints[TOKENS + c]
                level = ints[KINDS + c]
                new = ENTRY * entries
                entry[index(new)] = token
                entry[index(new + 1)] = node
                entry[index(new + 2)] = depth + 1
                entry[index(new + 3)] = level
                entry[index(new + 4)] = low
                if level >= COPIES:
                    low = _keep(known, ints, low, high, depth, token)
                entry[index(new + 5)] = low
                score[index(entries)] = p
                # Sift up; among equals the older entry stays above.
                at = heaped
                heaped += 1
                while at > 0:
                    up = (at - 1) >> 1
                    if score[index(heap[index(up)])] >= p:
                        break
                    heap[index(at)] = heap[index(up)]
                    at = up
                heap[index(at)] = entries
                entries += 1
                if num_best < budget:
                    at = num_best
                    num_best += 1
                    while at > 0 and best[index((at - 1) >> 1)] > p:
                        best[index(at)] = best[index((at - 1) >> 1)]
                        at = (at - 1) >> 1
                    best[index(at)] = p
                else:
                    at = 0
                    while True:
                        down = 2 * at + 1
                        if down >= budget:
                            break
                        if down + 1 < budget and best[index(down + 1)] < best[index(down)]:
                            down += 1
                        if best[index(down)] >= p:
                            break
                        best[index(at)] = best[index(down)]
                        at = down
                    best[index(at)] = p
                if num_best == budget:
                    bound = best[0]
        if heaped == 0 or nodes == budget:
            return nodes
        top = heap[0]
        heaped -= 1
        if heaped > 0:
            last_entry = heap[index(heaped)]
            last_score = score[index(last_entry)]
            at = 0
            while True:
                down = 2 * at + 1
                if down >= heaped:
                    break
                lower = heap[index(down)]
                lower_score = score[index(lower)]
                if down + 1 < heaped:
                    right = heap[index(down + 1)]
                    right_score = score[index(right)]
                    if right_score > lower_score or (right_score == lower_score and right < lower):
                        down, lower, lower_score = down + 1, right, right_score
                if last_score > lower_score or (last_score == lower_score and last_entry < lower):
                    break
                heap[index(at)] = lower
                at = down
            heap[index(at)] = last_entry
        node = nodes
        probability = score[index(top)]
        top *= ENTRY
        depth = entry[index(top + 2)]
        low = entry[index(top + 4)]
        high = entry[index(top + 5)]
        out[0, nodes] = entry[index(top)]
        out[1, nodes] = entry[index(top + 1)]
        out[2, nodes] = depth
        out[3, nodes] = source_of(entry[index(top + 3)])
        out_chances[nodes] = probability
        nodes += 1


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
    room = max(8 * MOST_CHILDREN, 4 * budget)
    while True:  # once; again where that is too little room
        scratch = make_scratch(known, copies)
        weigh(known, scratch)
        entry = np.empty(ENTRY * room, np.int32)
        score = np.empty(room, np.float64)
        heap = np.empty(room, np.int32)
        best = np.empty(budget, np.float64)
        nodes = _grow(known, scratch, context, copies, threshold, max_depth, entry, score, heap, best, out, out_chances)
        if nodes >= 0:
            return nodes
        room *= 2


@njit(cache=CACHE)
def learn_from(known: Known, context: IntArray, length: int, copies: int) -> None:
    """Learn what the levels are worth from the tokens that followed a root, as far as ``grow_tree`` could have looked.

    Args:
        known: what was known at the root: indices and copies are those of that moment.
        context: int32 [t], the text so far.
        length: where the tokens that followed begin; the root is the token before.
        copies: see ``grow_tree``.
    """
    scratch = make_scratch(known, copies)
    ints = scratch.ints
    tokens, levels = ints[TOKENS:KINDS], ints[KINDS:MARKED]
    high = copies
    for at in range(length, len(context)):
        weigh(known, scratch)
        reach = min(at, scratch.reach)
        for i in range(reach):
            ints[HISTORY + i] = context[at - 1 - i]
        count = open_node(known, scratch, reach, 0, high, at - length, 0.0, at - length + 1)
        learn(known.engine, known.request, tokens, levels, count, context[at])
        if _find(ints, count, at - length + 1, context[at]) < 0:
            return
        high = _keep(known, ints, 0, high, at - length, context[at])
