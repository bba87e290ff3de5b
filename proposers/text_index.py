"""What came after the last tokens, wherever they occurred in some text? An index that grows with the text.

Two questions are answered, both without looking at the text again:

- *Which tokens followed these last n tokens, and how often?* For each n below the largest n-gram a hash table from the
  n-gram to a *row*: one cache line with a check and up to ``SLOTS`` following tokens, most frequent first.
- *Where did a long stretch like this one occur?* For the largest n-gram, and for one of ``LONG`` tokens, a hash table
  to its last place and an array that links each place to the one before with the same hash. Copying on from such a
  place is a guess of any length, and how far the text before it agrees says how good it is.

Both forget nothing of a text that fits; where an index is bounded (``proposers.shared_text``), the oldest goes first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from proposers.numba_cache import CACHE
from proposers.tree import IntArray

LONG = 12
"""The longer of the two n-grams that places are kept for: it finds long stretches among many short ones."""
MAX_COMPARED = 256
"""How many tokens of agreement before a place are counted."""

# The state is one flat int32 array, so that a kernel call has one argument for it. The header says where what begins.
HEADER = 16
CAPACITY, PLACE_BITS, ROW_BITS, TOKENS, PLACES, ROWS, BLOCKS, INDEXED, NOW, HORIZON, ORDER, LENGTH = range(12)

# A row: a check of the n-gram's hash, whose text it is, when it was last written, and the followers.
ROW = 16
CHECK, OWNER, STAMP, FOLLOWERS = 0, 1, 2, 3
SLOTS = ROW - FOLLOWERS
WAYS = 4
"""An n-gram's row is one of so many beside each other; the one that was not written for longest gives way."""
# A follower: how often, up to MOST, and which token, in one integer.
TOKEN_BITS = 20
TOKEN_MASK = (1 << TOKEN_BITS) - 1
ONE = 1 << TOKEN_BITS
MOST = 2047

AHEAD = 4
"""So many tokens before they are counted a long text's rows are asked for."""

BLOCK = 32
"""Tokens that lie side by side in a text that many requests write to (``proposers.shared_text``)."""
# A block: the ones before and after it in the same text, how many tokens it has, whose they are.
BLOCK_HEADER = 4
BEFORE, AFTER, FILLED, WHOSE = 0, 1, 2, 3

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
NOBODY = -1


def allocate(
    capacity: int, order: int, *, own_tokens: bool, blocks: bool = False, rows_per_token: float = 1.0
) -> IntArray:
    """An empty index.

    Args:
        capacity: tokens that it has room for; with ``blocks`` a multiple of ``BLOCK``.
        order: the largest n-gram, at least 1.
        own_tokens: the index keeps the text itself; else every kernel call brings it.
        blocks: the text lies in blocks.
        rows_per_token: room for the n-grams that are counted, rounded up to a power of 2 in all.

    Returns:
        int32, flat, aligned to cache lines. Memory is about ``4 * (ROW * rows_per_token + 4)`` bytes for each token,
        up to twice as much where ``capacity`` is no power of 2, and 4 more with ``own_tokens``.
    """
    place_bits = max(4, int(capacity - 1).bit_length())
    row_bits = int(np.ceil(np.log2(max(WAYS, capacity * rows_per_token if order > 1 else 0))))
    rows = HEADER
    places = rows + (ROW << row_bits)
    tokens = places + 2 * ((1 << place_bits) + capacity)
    block = tokens + (capacity if own_tokens else 0)
    size = block + (BLOCK_HEADER * (capacity // BLOCK) if blocks else 0)
    line = np.empty(size + ROW, np.int32)
    shift = -(line.ctypes.data // 4 + HEADER) % ROW
    state = line[shift : shift + size]
    state[:HEADER] = 0
    state[CAPACITY], state[PLACE_BITS], state[ROW_BITS] = capacity, place_bits, row_bits
    state[TOKENS] = tokens if own_tokens else -1
    state[PLACES], state[ROWS], state[BLOCKS] = places, rows, block if blocks else -1
    state[ORDER] = order
    _clear(state)
    return state


NO_INDEX = np.zeros(HEADER, np.int32)
"""Stands where there is no index: it has no room and knows nothing."""


@njit(cache=CACHE)
def _clear(state: IntArray) -> None:
    for row in range(1 << state[ROW_BITS]):
        state[state[ROWS] + row * ROW + OWNER] = NOBODY
    places = state[PLACES]
    for bucket in range(1 << state[PLACE_BITS]):
        state[places + bucket] = -1
        state[places + state[CAPACITY] + (1 << state[PLACE_BITS]) + bucket] = -1


@njit(cache=CACHE, inline="always")
def extend_key(key: np.uint64, token: int) -> np.uint64:
    """The hash of an n-gram with one more token before it; an n-gram's hash begins with ``first_key``."""
    return (key ^ np.uint64(token + 1)) * MULTIPLIER


@njit(cache=CACHE, inline="always")
def first_key(owner: int) -> np.uint64:
    """The hash of the empty n-gram in a text of this owner's."""
    return np.uint64(owner + 1) * MULTIPLIER


@njit(cache=CACHE, inline="always")
def row_key(key: np.uint64, n: int) -> np.uint64:
    """What an n-gram's row is found by."""
    mixed = (key ^ np.uint64(n)) * MULTIPLIER
    return mixed ^ (mixed >> np.uint64(29))


@njit(cache=CACHE, inline="always")
def find_row(state: IntArray, key: np.uint64, owner: int) -> int:
    """Where in ``state`` the row of a ``row_key`` begins, or -1; also if it has not been written for too long."""
    at = np.int64(key >> np.uint64(64 - state[ROW_BITS]))
    check = np.int32(key & np.uint64(0x7FFFFFFF))
    for way in range(WAYS):
        row = np.int64(state[ROWS]) + (at ^ way) * ROW
        if state[row + CHECK] == check and state[row + OWNER] == owner:
            if state[HORIZON] > 0 and _age(state, row) > state[HORIZON]:
                return -1
            return int(row)
    return -1


@njit(cache=CACHE, inline="always")
def _age(state: IntArray, row: int) -> int:
    return int(np.int64(state[NOW]) - np.int64(state[row + STAMP])) & 0x7FFFFFFF


# The same by addresses, for a kernel that asks several indices at every turn: which array it is isn't known before, and
# to choose one out of a tuple takes longer than to look into it. Whoever passes an address keeps the array.


@intrinsic  # type: ignore[untyped-decorator]
def peek(typing: Any, address: Any) -> Any:
    """The int32 at an address, as int64."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(32).as_pointer())
        return builder.sext(builder.load(pointer, align=4), ir.IntType(64))

    return types.int64(types.int64), emit


@intrinsic  # type: ignore[untyped-decorator]
def seen_in_row(typing: Any, address: Any) -> Any:
    """How often the followers in the row at an address were seen, in all."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row = ir.VectorType(ir.IntType(32), ROW)
        values = builder.load(builder.inttoptr(arguments[0], row.as_pointer()), align=4)
        seen = builder.lshr(values, ir.Constant(row, [TOKEN_BITS] * ROW))
        seen = builder.and_(seen, ir.Constant(row, [0] * FOLLOWERS + [-1] * SLOTS))
        add = ir.FunctionType(ir.IntType(32), [row])
        function = cgutils.get_or_insert_function(builder.module, add, f"llvm.vector.reduce.add.v{ROW}i32")
        return builder.zext(builder.call(function, [seen]), ir.IntType(64))

    return types.int64(types.int64), emit


@intrinsic  # type: ignore[untyped-decorator]
def _prefetch(typing: Any, address: Any) -> Any:
    """Ask for the cache line of an address before it is needed: much of a proposal's time is spent on waiting."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        flag = ir.IntType(32)
        signature_of_llvm = ir.FunctionType(ir.VoidType(), [pointer.type, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, signature_of_llvm, "llvm.prefetch.p0i8")
        builder.call(function, [pointer, flag(0), flag(3), flag(1)])  # to read, keep, data
        return context.get_dummy_value()

    return types.void(types.int64), emit


@njit(cache=CACHE, inline="always")
def prefetch_row(first: int, key: np.uint64, shift: np.uint64) -> None:
    """``row_address`` will be asked for this soon."""
    at = np.int64(key >> shift) * (4 * ROW)
    for way in range(WAYS):
        _prefetch(first + (at ^ (way * 4 * ROW)))


@njit(cache=CACHE, inline="always")
def row_address(first: int, key: np.uint64, shift: np.uint64, owner: int) -> int:
    """Where in memory the row of a ``row_key`` begins, or 0; whatever its age.

    Without branches: which way it is can't be foreseen, and a wrong guess takes longer than to look at all.

    Args:
        first: where the rows begin.
        key: see ``row_key``.
        shift: 64 less the index's ``ROW_BITS``.
        owner: whose.
    """
    at = np.int64(key >> shift) * (4 * ROW)
    check = np.int64(key & np.uint64(0x7FFFFFFF))
    found = 0
    for way in range(WAYS - 1, -1, -1):
        row = first + (at ^ (way * 4 * ROW))
        is_it = (peek(row + 4 * CHECK) == check) & (peek(row + 4 * OWNER) == owner)
        found = int(row) if is_it else found
    return found


@njit(cache=CACHE)
def _add_follower(state: IntArray, key: np.uint64, owner: int, token: int) -> None:
    """Count that ``token`` followed the n-gram of this ``row_key`` once more."""
    row = find_row(state, key, owner)
    if row < 0:
        at = np.int64(key >> np.uint64(64 - state[ROW_BITS]))
        oldest = -1
        for way in range(WAYS):
            other = np.int64(state[ROWS]) + (at ^ way) * ROW
            age = 0x7FFFFFFF if state[other + OWNER] == NOBODY else _age(state, other)
            if age > oldest:
                row, oldest = other, age
        state[row + CHECK] = np.int32(key & np.uint64(0x7FFFFFFF))
        state[row + OWNER] = owner
        for slot in range(row + FOLLOWERS, row + ROW):
            state[slot] = 0
    state[row + STAMP] = state[NOW]
    first = row + FOLLOWERS
    slot = first
    last = row + ROW - 1
    while slot < last and state[slot] != 0 and (state[slot] & TOKEN_MASK) != token:
        slot += 1
    if state[slot] != 0 and (state[slot] & TOKEN_MASK) == token:
        value = state[slot] + ONE
        if (value >> TOKEN_BITS) >= MOST:
            for i in range(first, row + ROW):
                if state[i] != 0:
                    state[i] = max(ONE, ((state[i] >> TOKEN_BITS) >> 1) << TOKEN_BITS) | (state[i] & TOKEN_MASK)
            value = state[slot]
    else:
        value = ONE | token  # a full row loses the one that is rarest, and among these the one seen longest ago
    # Most frequent first, and among equals the one seen last.
    while slot > first and (state[slot - 1] >> TOKEN_BITS) <= (value >> TOKEN_BITS):
        state[slot] = state[slot - 1]
        slot -= 1
    state[slot] = value


@njit(cache=CACHE)
def count_token(state: IntArray, text: IntArray, start: int, at: int, owner: int) -> None:
    """Count ``text[at]`` as what followed the up to ``ORDER - 1`` tokens before it, those before ``start`` excepted."""
    token = text[at]
    if token > TOKEN_MASK:
        return
    key = first_key(owner)
    for n in range(1, min(state[ORDER] - 1, at - start) + 1):
        key = extend_key(key, text[at - n])
        _add_follower(state, row_key(key, n), owner, token)


@njit(cache=CACHE, inline="always")
def _place_key(state: IntArray, text: IntArray, end: int, n: int, owner: int) -> int:
    """The bucket of the ``n`` tokens before ``end``."""
    key = first_key(owner)
    for i in range(1, n + 1):
        key = extend_key(key, text[end - i])
    return int(key >> np.uint64(64 - state[PLACE_BITS]))


@njit(cache=CACHE)
def link_place(state: IntArray, text: IntArray, start: int, end: int, place: int, owner: int) -> None:
    """Note ``place`` as one where the tokens before ``end``, from ``start`` on, end."""
    heads = np.int64(state[PLACES])
    half = np.int64(state[CAPACITY]) + (1 << state[PLACE_BITS])
    for which in range(2):
        n = np.int64(LONG if which else state[ORDER])
        links = heads + (1 << state[PLACE_BITS])
        if end - start >= n:
            head = heads + _place_key(state, text, end, n, owner)
            state[links + place] = state[head]
            state[head] = place
        else:
            state[links + place] = -1
        heads += half


@njit(cache=CACHE, inline="always")
def _ask_for_rows(state: IntArray, text: IntArray, at: int) -> None:
    """``count_token`` will count ``text[at]`` soon."""
    first = np.int64(state.ctypes.data) + 4 * np.int64(state[ROWS])
    shift = np.uint64(64 - state[ROW_BITS])
    key = first_key(0)
    for n in range(1, min(state[ORDER] - 1, at) + 1):
        key = extend_key(key, text[at - n])
        prefetch_row(first, row_key(key, n), shift)


@njit(cache=CACHE)
def extend(state: IntArray, text: IntArray, end: int) -> None:
    """Take in a text (int32 [t]) up to ``end``, at most t - 1: its places before ``end`` and what follows each."""
    for at in range(state[INDEXED], end):
        state[NOW] = at  # an index with less than a row for each n-gram keeps the latest
        if at + AHEAD < end:
            _ask_for_rows(state, text, at + AHEAD)
        link_place(state, text, 0, at + 1, at, 0)
        count_token(state, text, 0, at + 1, 0)
    state[INDEXED] = max(int(state[INDEXED]), end)


@njit(cache=CACHE, inline="always")
def next_place(state: IntArray, place: int) -> int:
    """Where the token after the one at ``place`` lies in a text of blocks, or -1 where no more is known."""
    headers = np.int64(state[BLOCKS])
    block = place // BLOCK
    after = place + 1
    if after % BLOCK == 0:
        block = int(state[headers + block * BLOCK_HEADER + AFTER])
        if block < 0:
            return -1
        after = block * BLOCK
    return after if after % BLOCK < state[headers + block * BLOCK_HEADER + FILLED] else -1


@njit(cache=CACHE, inline="always")
def _place_before(state: IntArray, place: int) -> int:
    """The place before ``place`` in a text of blocks, or -1 where it is not known any more."""
    if place % BLOCK:
        return place - 1
    headers = np.int64(state[BLOCKS])
    block = place // BLOCK
    before = int(state[headers + block * BLOCK_HEADER + BEFORE])
    if before < 0 or state[headers + before * BLOCK_HEADER + AFTER] != block:
        return -1
    return before * BLOCK + BLOCK - 1


@njit(cache=CACHE)
def agreement(state: IntArray, text: IntArray, place: int, context: IntArray) -> int:
    """How many of the last tokens of ``context`` (int32 [t]) the text up to ``place`` ends with, ``MAX_COMPARED`` at
    most.
    """
    last = len(context) - 1
    length = 0
    if state[BLOCKS] < 0:
        most = min(MAX_COMPARED, last + 1, place + 1)
        while length < most and text[place - length] == context[last - length]:
            length += 1
        return length
    most = min(MAX_COMPARED, last + 1)
    while length < most and place >= 0 and text[place] == context[last - length]:
        length += 1
        place = _place_before(state, place)
    return length


@njit(cache=CACHE)
def find_places(
    state: IntArray, text: IntArray, context: IntArray, owner: int, steps: int, places: IntArray, matches: IntArray
) -> int:
    """Places whose text agrees with the end of ``context``, longer agreement first, then most recent.

    Args:
        state: the index.
        text: int32, what its places count in.
        context: int32 [t].
        owner: whose text may be found.
        steps: longest walk along one chain.
        places: int32 [m], receives the places.
        matches: int32 [m], receives the agreement in tokens, at least the index's ``ORDER``.

    Returns:
        How many were found, at most m.
    """
    end = len(context)
    most = len(places)
    found = 0
    half = np.int64(state[CAPACITY]) + (1 << state[PLACE_BITS])
    order = state[ORDER]
    for which in range(2):
        n = np.int64(LONG if which == 0 else order)
        if n > end:
            continue
        heads = np.int64(state[PLACES]) + (half if which == 0 else 0)
        links = heads + (1 << state[PLACE_BITS])
        place = np.int64(state[heads + _place_key(state, context, end, n, owner)])
        walked = 0
        while place >= 0 and walked < steps:
            walked += 1
            block = np.int64(state[BLOCKS]) + place // BLOCK * BLOCK_HEADER
            if state[BLOCKS] < 0 or state[block + WHOSE] == owner:
                length = agreement(state, text, place, context)
                # the first walk had the longer ones
                if length >= n and (which == 0 or length < LONG):
                    at = found
                    if found < most:
                        found += 1
                    else:
                        at = most - 1
                        if matches[at] >= length:
                            at = most
                    while 0 < at < most and matches[at - 1] < length:
                        places[at] = places[at - 1]
                        matches[at] = matches[at - 1]
                        at -= 1
                    if at < most:
                        places[at] = place
                        matches[at] = length
            place = np.int64(state[links + place])
    return found
