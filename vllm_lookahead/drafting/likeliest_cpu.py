"""``likeliest`` for logits in the CPU's memory: a numba kernel that reads them once.

It compares integers: the bits of floats, taken as integers, sort like the floats, except that negative ones sort
backwards. So one kernel serves every format, without conversions and without a special case for minus infinity.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from proposers.numba_cache import CACHE

BLOCK = 64
FORMATS = {
    torch.float32: (torch.int32, 0x7F80_0000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}
"""For each format that the kernel can read the integer of its size, and the bits of its infinity."""


def likeliest_on_cpu(logits: torch.Tensor, k: int) -> NDArray[np.int32]:
    """int32 [rows, k]: as ``likeliest``.

    Args:
        logits: [rows, vocabulary] on the CPU, in one of ``FORMATS``. Not changed.
        k: how many.
    """
    rows, vocabulary = logits.shape
    stride = vocabulary
    if not logits.is_contiguous():
        # vLLM cuts off the logits that pad the vocabulary: rows lie apart then, and are read where they are
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        stride = logits.stride(0)
        logits = logits.as_strided((1, (rows - 1) * stride + vocabulary), (1, 1))
    integer, infinity = FORMATS[logits.dtype]
    tokens = np.empty((rows, k), np.int32)
    find_likeliest(logits.view(integer).numpy(), stride, vocabulary, infinity, tokens)
    return tokens


@numba.njit(cache=CACHE)
def _insert(keys, names, key, name):  # type: ignore[no-untyped-def]
    """Put a key in its place among keys in descending order, of which the last one is dropped."""
    at = len(keys) - 1
    while at > 0 and keys[at - 1] < key:
        keys[at] = keys[at - 1]
        names[at] = names[at - 1]
        at -= 1
    keys[at] = key
    names[at] = name


@numba.njit(cache=CACHE)
def find_likeliest(bits, stride, vocabulary, infinity, tokens):  # type: ignore[no-untyped-def]
    """Find every row's likeliest tokens: the best k are in the k blocks with the best maxima, or behind the last block.

    Args:
        bits: int32 or int16, the logits' bits, contiguous in any shape.
        stride: from one row to the next.
        vocabulary: how many logits a row has.
        infinity: the bits of infinity in their format.
        tokens: int32 [rows, k], receives the tokens.
    """
    bits = bits.ravel()
    integer = bits.dtype.type
    turn = integer((1 << (8 * bits.itemsize - 1)) - 1)  # all bits but the sign
    lowest = integer(-infinity - 1)  # the key of minus infinity, which is never above any other
    k = tokens.shape[1]
    whole = vocabulary // BLOCK
    keys = np.empty(k, bits.dtype)
    starts = np.empty(k, np.int32)
    for r in range(len(tokens)):
        row = bits[r * stride : r * stride + vocabulary]
        keys[:] = lowest
        starts[:] = -1
        for b in range(whole):
            block = row[b * BLOCK : (b + 1) * BLOCK]
            highest = lowest
            for i in range(BLOCK):  # LLVM makes vector instructions of this loop
                highest = max(highest, integer(block[i] if block[i] >= 0 else block[i] ^ turn))
            if highest > keys[-1]:
                _insert(keys, starts, highest, b * BLOCK)
        keys[:] = lowest
        found = tokens[r]
        found[:] = -1
        for j in range(k + 1):
            start, end = (starts[j], starts[j] + BLOCK) if j < k else (whole * BLOCK, vocabulary)
            if start < 0:
                continue
            for token in range(start, end):
                key = integer(row[token] if row[token] >= 0 else row[token] ^ turn)
                if key > keys[-1]:
                    _insert(keys, found, key, token)


def warm_up() -> None:
    """Compile the kernel for every format: which one a model's logits have shows only in its first step."""
    for dtype in FORMATS:
        likeliest_on_cpu(torch.zeros(1, 1, dtype=dtype), 1)
