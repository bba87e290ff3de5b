"""Trees as chains, for sampling that reads the tokens before a node.

V2's penalties and bad words find a row's earlier draft tokens in the rows before it
(``v1/worker/gpu/sample/penalties.py``, ``bad_words.py``): right for a chain, wrong for a tree. So every path from the
root to a leaf becomes a chain of rows of its own; a node that several paths share is sampled once for each of them,
with the same result.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from proposers.numba_cache import CACHE
from vllm_lookahead.trees.step import StepTrees


class ChainRows(NamedTuple):
    """The rows that are sampled instead of the step's logits rows.

    Attributes:
        rows: int64 [n], the logits row that each of them copies.
        depths: int32 [n], its distance to the root.
        back: int64 [nodes + rows], for each logits row where it is among them (the last one, where paths share it).
        ends: int64 [batch], where each batch row's part ends.
    """

    rows: NDArray[np.int64]
    depths: NDArray[np.int32]
    back: NDArray[np.int64]
    ends: NDArray[np.int64]


def paths_as_chains(step: StepTrees, in_order: NDArray[np.bool_]) -> ChainRows:
    """Lay out every path of the branched rows that need it as a chain; the other rows stay as they are.

    Args:
        step: the trees.
        in_order: bool [batch], the rows whose nodes are sampled path by path.
    """
    return ChainRows(*_paths_as_chains(step.starts, step.parents, step.branched & in_order))


@numba.njit(cache=CACHE)
def _paths_as_chains(starts, parents, split):  # type: ignore[no-untyped-def]
    num_rows = len(starts) - 1
    count = 0
    depths = np.zeros(len(parents), np.int32)
    is_leaf = np.ones(len(parents), np.bool_)
    for row in range(num_rows):
        start, end = starts[row], starts[row + 1]
        for node in range(start, end):
            parent = parents[node]
            depths[node] = 1 if parent < 0 else depths[start + parent] + 1
            if parent >= 0:
                is_leaf[start + parent] = False
        if split[row]:
            for node in range(start, end):
                if is_leaf[node]:
                    count += depths[node] + 1
        else:
            count += end - start + 1
    rows = np.empty(count, np.int64)
    local = np.empty(count, np.int32)
    back = np.empty(len(parents) + num_rows, np.int64)
    ends = np.empty(num_rows, np.int64)
    at = 0
    for row in range(num_rows):
        start, end = starts[row], starts[row + 1]
        root = start + row
        if split[row]:
            for leaf in range(start, end):
                if not is_leaf[leaf]:
                    continue
                depth = depths[leaf]
                node = leaf - start
                for i in range(depth, -1, -1):
                    rows[at + i] = root + 1 + node
                    local[at + i] = i
                    back[root + 1 + node] = at + i
                    if i > 0:
                        node = parents[start + node]
                at += depth + 1
        else:
            for i in range(end - start + 1):
                rows[at] = root + i
                local[at] = i
                back[root + i] = at
                at += 1
        ends[row] = at
    return rows, local, back, ends
