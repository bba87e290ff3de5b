"""KV commit: after the walk, the accepted nodes' keys and values move to where the next step expects them.

A tree's node i is written at flat position root + 1 + i. The walk accepts nodes in order of depth, so the k-th accepted
node belongs at position root + 1 + k. Whatever lies beyond is overwritten by the next step.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from proposers.numba_cache import CACHE
from vllm_lookahead.trees.step import StepTrees, Walks

SlotArray = NDArray[np.int64]


def moves(
    step: StepTrees, walks: Walks, query_start: NDArray[np.int32], slots: SlotArray
) -> tuple[SlotArray, SlotArray]:
    """Which KV slots have to be copied where.

    Args:
        step: the trees of the step.
        walks: where the walks ended.
        query_start: int32 [rows + 1], each row's first token in the flattened batch.
        slots: int64 [tokens], the KV slot that each token of the batch was written to.

    Returns:
        Source and destination slots, int64 [moved] each, in an order in which no move overwrites a later source.
    """
    return _moves(step.branched, step.starts, walks.paths, walks.lengths, query_start, slots)


@numba.njit(cache=CACHE)
def _moves(branched, starts, paths, lengths, query_start, slots):  # type: ignore[no-untyped-def]
    rows = np.flatnonzero(branched)
    count = 0
    for row in rows:
        for k in range(lengths[row] - 1):
            if paths[row, k] != k:
                count += 1
    src = np.empty(count, np.int64)
    dst = np.empty(count, np.int64)
    at = 0
    for row in rows:
        # a row's tree nodes are its last tokens; parents before children means path[k] >= k: moving in order is safe
        first = query_start[row + 1] - (starts[row + 1] - starts[row])
        for k in range(lengths[row] - 1):
            if paths[row, k] != k:
                src[at] = slots[first + paths[row, k]]
                dst[at] = slots[first + k]
                at += 1
    return src, dst
