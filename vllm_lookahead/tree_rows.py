"""The batch rows of one step that are verified as branched trees, as flat arrays that any attention backend can use."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from vllm_lookahead.step import StepTrees

Int64Array = NDArray[np.int64]


@dataclass(slots=True, frozen=True)
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
        rows = np.flatnonzero(step.branched)
        if len(rows) == 0:
            return None
        lengths = step.starts[rows + 1].astype(np.int64) - step.starts[rows] + 1
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        mask_offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths * lengths, out=mask_offsets[1:])
        prefixes = seq_lens[rows] - lengths
        tokens = np.empty(offsets[-1], np.int64)
        positions = np.empty(offsets[-1], np.int64)
        mask = np.zeros(mask_offsets[-1], np.bool_)
        _fill(rows, step.starts, step.parents, query_start, prefixes, offsets, mask_offsets, tokens, positions, mask)
        return cls(rows, lengths, prefixes, offsets, tokens, positions, mask, mask_offsets)


@numba.njit(cache=True)
def _fill(  # type: ignore[no-untyped-def]
    rows, starts, parents, query_start, prefixes, offsets, mask_offsets, tokens, positions, mask
):
    for r in range(len(rows)):
        row = rows[r]
        length = offsets[r + 1] - offsets[r]
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
