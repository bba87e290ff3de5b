"""The batch rows of one step that are verified as branched trees, as flat arrays that any attention backend can use."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from proposers.numba_cache import CACHE
from vllm_lookahead.trees.step import StepTrees

Int64Array = NDArray[np.int64]


@dataclass(slots=True)
class TreeRows:
    """Tree rows of one step. A row's queries are its root and nodes: the row's last tokens in the flattened batch.

    "Packed" means: the queries of all tree rows, one row after the other.

    Attributes:
        rows: int64 [rows], index of each tree row in the batch.
        lengths: int64 [rows], root and nodes.
        prefixes: int64 [rows], tokens before the root, whose KV is in the cache; also the root's position.
        offsets: int64 [rows + 1], where each row begins in packed order.
        tokens: int64 [packed], index of each query in the flattened batch.
        positions: int64 [packed], RoPE position: root position + depth.
        mask: bool [sum of length ** 2], row by row and query by query, which of the row's root and nodes it sees.
        mask_offsets: int64 [rows + 1], where each row's mask begins.
    """

    rows: Int64Array
    lengths: Int64Array
    prefixes: Int64Array
    offsets: Int64Array
    tokens: Int64Array
    positions: Int64Array
    mask: NDArray[np.bool_]
    mask_offsets: Int64Array

    @classmethod
    def of(cls, step: StepTrees, query_start: NDArray[np.int32], seq_lens: NDArray[np.int32]) -> TreeRows | None:
        """The branched rows of a step, or None if there are none.

        Args:
            step: the step's trees.
            query_start: int32 [batch + 1], each row's first token in the flattened batch.
            seq_lens: int32 [batch], tokens of each row after this step if every node were accepted.
        """
        if not np.count_nonzero(step.branched):
            return None
        return cls(*_lay_out(step.branched, step.starts, step.parents, query_start, seq_lens))


@numba.njit(cache=CACHE)
def _lay_out(branched, starts, parents, query_start, seq_lens):  # type: ignore[no-untyped-def]
    """``TreeRows``'s arrays. One call: in a step of a few milliseconds, a dozen of numpy's would show."""
    rows = np.flatnonzero(branched)
    count = len(rows)
    lengths, prefixes = np.empty(count, np.int64), np.empty(count, np.int64)
    offsets, mask_offsets = np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64)
    for r in range(count):
        row = rows[r]
        n = starts[row + 1] - starts[row] + 1
        lengths[r], prefixes[r] = n, seq_lens[row] - n
        offsets[r + 1], mask_offsets[r + 1] = offsets[r] + n, mask_offsets[r] + n * n
    tokens, positions = np.empty(offsets[-1], np.int64), np.empty(offsets[-1], np.int64)
    mask = np.zeros(mask_offsets[-1], np.bool_)
    for r in range(count):
        row, length = rows[r], lengths[r]
        first_token = query_start[row + 1] - length
        at, sees = offsets[r], mask_offsets[r]
        tokens[at] = first_token
        positions[at] = prefixes[r]
        mask[sees] = True
        for i in range(1, length):
            parent = parents[starts[row] + i - 1] + 1
            tokens[at + i] = first_token + i
            positions[at + i] = positions[at + parent] + 1
            for j in range(parent + 1):
                mask[sees + i * length + j] = mask[sees + parent * length + j]
            mask[sees + i * length + i] = True
    return rows, lengths, prefixes, offsets, tokens, positions, mask, mask_offsets
