"""Masked attention over the CPU backend's paged cache, compiled by numba for the machine it runs on.

One pass over the keys with a running softmax (FlashAttention, arXiv 2205.14135): per row and kv head, the scores of all
queries against one cache block, their exponentials and the weighted sum of the block's values stay in the CPU's cache.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload

from proposers.numba_cache import CACHE
from vllm_lookahead.attention.tile import float_of_bits, make_tile, maximum

FASTMATH = {"contract", "reassoc", "nsz", "arcp", "nnan"}
MASKED = np.float32(-1e30)
"""A score that no softmax notices; infinities would make NaN of a block in which a query sees nothing."""

HIGH, LOW, WIDE, NARROW = 8, 4, 32, 8
_high_wide, _low_wide, _low_narrow = make_tile(HIGH, WIDE), make_tile(LOW, WIDE), make_tile(LOW, NARROW)


def _as_floats(source: Any, scratch: Any) -> Any:
    """``source`` as float32: itself, or, where it holds the bits of bfloat16, widened into ``scratch``."""


@overload(_as_floats, inline="always")
def _as_floats_overload(source, scratch):  # type: ignore[no-untyped-def]
    if source.dtype == types.float32:
        return lambda source, scratch: source

    def widen(source, scratch):  # type: ignore[no-untyped-def]
        bits = scratch.view(np.uint32)
        for i in range(len(source)):
            bits[i] = np.uint32(source[i]) << np.uint32(16)
        return scratch[: len(source)]

    return widen


@numba.njit(cache=CACHE)
def _add_product(a, a_stride, b, b_stride, c, c_stride, rows, depth, columns):  # type: ignore[no-untyped-def]
    """``c += a @ b``; rows are a multiple of ``LOW``, columns of ``NARROW``."""
    wide = columns // WIDE * WIDE
    high = rows // HIGH * HIGH
    for j in range(0, wide, WIDE):
        for i in range(0, high, HIGH):
            _high_wide(a, i * a_stride, a_stride, b, j, b_stride, c, i * c_stride + j, c_stride, depth)
        for i in range(high, rows, LOW):
            _low_wide(a, i * a_stride, a_stride, b, j, b_stride, c, i * c_stride + j, c_stride, depth)
    for j in range(wide, columns, NARROW):
        for i in range(0, rows, LOW):
            _low_narrow(a, i * a_stride, a_stride, b, j, b_stride, c, i * c_stride + j, c_stride, depth)


@numba.njit(cache=CACHE, fastmath=FASTMATH)
def _exponentials(scores, highest):  # type: ignore[no-untyped-def]
    """Replace scores by ``exp(score - highest)`` and return their sum.

    The relative error is 2e-7 near the highest score and grows to 4e-6 where the result is 1e-35.
    """
    total = np.float32(0.0)
    for j in range(len(scores)):
        x = max((scores[j] - highest) * np.float32(1.4426950408889634), np.float32(-127.0))
        whole = np.floor(x + np.float32(0.5))
        part = x - whole
        # 2**part on [-0.5, 0.5] (coefficients: Cephes, exp2f)
        power = np.float32(1.535336188319500e-4)
        power = power * part + np.float32(1.339887440266574e-3)
        power = power * part + np.float32(9.618437357674640e-3)
        power = power * part + np.float32(5.550332471162809e-2)
        power = power * part + np.float32(2.402264791363012e-1)
        power = power * part + np.float32(6.931472028550421e-1)
        power = power * part + np.float32(1.0)
        # an exponent of -127 makes 0
        scores[j] = power * float_of_bits((np.int32(whole) + np.int32(127)) << np.int32(23))
        total += scores[j]
    return total


@numba.njit(cache=CACHE)
def attend(packed, out, cache, lengths, prefixes, offsets, blocks, mask, mask_offsets, scale):  # type: ignore[no-untyped-def]
    """Attention of every query over its row's prefix and those of the row's own tokens that its mask lets it see.

    Args:
        packed: float32 [packed, heads, head_size], the queries.
        out: float32 [packed, heads, head_size], receives the result; may be ``packed``.
        cache: float32, or uint16 with the bits of bfloat16, [blocks, kv_heads, 2 * block_size * head_size]: K as
            ``[head_size, block_size]``, then V as ``[block_size, head_size]``. Both sizes are multiples of 8.
        lengths: int64 [rows], see ``TreeRows``.
        prefixes: int64 [rows], see ``TreeRows``.
        offsets: int64 [rows + 1], see ``TreeRows``.
        blocks: int32 [rows, most blocks], each row's cache blocks.
        mask: bool, see ``TreeRows``.
        mask_offsets: int64 [rows + 1], see ``TreeRows``.
        scale: factor of the scores.
    """
    factor = np.float32(scale)
    heads, head_size = packed.shape[1], packed.shape[2]
    kv_heads = cache.shape[1]
    per_kv = heads // kv_heads
    half = cache.shape[2] // 2
    block_size = half // head_size
    most = -(-np.max(lengths) * per_kv // LOW) * LOW
    query = np.empty(most * head_size, np.float32)
    result = np.empty(most * head_size, np.float32)
    scores = np.empty(most * block_size, np.float32)
    highest = np.empty(most, np.float32)
    total = np.empty(most, np.float32)
    scratch = np.empty(half, np.float32)
    for r in range(len(lengths)):
        n, first, prefix = lengths[r], offsets[r], prefixes[r]
        used = n * per_kv
        padded = -(-used // LOW) * LOW
        seen = mask[mask_offsets[r] : mask_offsets[r] + n * n]
        for kv_head in range(kv_heads):
            for i in range(n):
                for h in range(per_kv):
                    at = (i * per_kv + h) * head_size
                    for d in range(head_size):
                        query[at + d] = packed[first + i, kv_head * per_kv + h, d] * factor
            query[used * head_size : padded * head_size] = 0.0
            result[: padded * head_size] = 0.0
            highest[:used] = MASKED
            total[:used] = 0.0
            for b in range(-(-(prefix + n) // block_size)):
                begin = b * block_size
                keys = min(block_size, prefix + n - begin)
                columns = -(-keys // NARROW) * NARROW
                scores[: padded * block_size] = 0.0
                block = cache[blocks[r, b], kv_head]
                k = _as_floats(block[:half], scratch)
                _add_product(query, head_size, k, block_size, scores, block_size, padded, head_size, columns)
                own = max(prefix - begin, 0)  # from here on the block's keys are the row's own tokens
                for q in range(used):
                    s = scores[q * block_size : q * block_size + columns]
                    sees = q // per_kv * n + begin - prefix
                    for j in range(own, keys):
                        if not seen[sees + j]:
                            s[j] = MASKED
                    s[keys:] = MASKED
                    high = maximum(scores, q * block_size, columns, highest[q])
                    if high > highest[q]:
                        if total[q] > 0.0:  # at first there is nothing to correct
                            correction = np.float32(np.exp(highest[q] - high))
                            total[q] *= correction
                            for at in range(q * head_size, (q + 1) * head_size):
                                result[at] *= correction
                        highest[q] = high
                    total[q] += _exponentials(s, high)
                v = _as_floats(block[half:], scratch)
                # only as deep as there are keys: what lies beyond may be anything, even NaN
                _add_product(scores, block_size, v, head_size, result, head_size, padded, keys, head_size)
            for i in range(n):
                for h in range(per_kv):
                    q = i * per_kv + h
                    for d in range(head_size):
                        out[first + i, kv_head * per_kv + h, d] = result[q * head_size + d] / total[q]
