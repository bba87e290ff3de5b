"""The draft trees of one engine step, flattened over the batch, and the walk down them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from proposers import DraftTree
from proposers.numba_cache import CACHE

IntArray = NDArray[np.int32]
PLACEHOLDER = -1
"""vLLM's filler for a row of ``SamplerOutput.sampled_token_ids`` (``rejection_sampler.PLACEHOLDER_TOKEN_ID``)."""


@dataclass(slots=True)
class StepTrees:
    """What one step verifies: for each batch row a root and, below it, the nodes that the scheduler let through.

    Row r's root is logits row ``starts[r] + r``; its node i is logits row ``starts[r] + r + 1 + i``.

    Attributes:
        starts: int32 [rows + 1], where each row's nodes begin in ``tokens`` and ``parents``.
        tokens: int32 [nodes], the token of every node.
        parents: int32 [nodes], index of the parent within the row, -1 for the root.
        trees: per row the tree that its proposer made (it may be longer than what was scheduled), or None for a row
            without drafts or with drafts that are not ours (the scheduler's padding).
        branched: bool [rows], rows whose scheduled nodes are not simply a chain: those need an ancestor mask.
    """

    starts: IntArray
    tokens: IntArray
    parents: IntArray
    trees: list[DraftTree | None]
    branched: NDArray[np.bool_]

    @classmethod
    def build(
        cls,
        req_ids: Sequence[str],
        scheduled: Mapping[str, list[int]],
        proposed: Mapping[str, DraftTree],
    ) -> StepTrees:
        """Match what the scheduler scheduled with what was proposed.

        Drafts are identified by their tokens: the scheduler may cut a tree (every prefix is a tree), drop it, or pad a
        row with placeholders; whatever is not a prefix of the proposed tree is verified as a chain, which is always
        right because a walk accepts only what the target model samples.
        """
        rows = len(req_ids)
        starts = np.zeros(rows + 1, np.int32)
        trees: list[DraftTree | None] = [None] * rows
        branched = np.zeros(rows, np.bool_)
        tokens: list[IntArray] = []
        parents: list[IntArray] = []
        for row, req_id in enumerate(req_ids):
            drafts = scheduled.get(req_id)
            if not drafts:
                starts[row + 1] = starts[row]
                continue
            row_tokens = np.array(drafts, np.int32)
            n = len(row_tokens)
            tree = proposed.get(req_id)
            if tree is not None and _begins_with(tree.token_ids, row_tokens):
                row_parents = tree.parents[:n]
                trees[row] = tree
                branched[row] = not _is_chain(row_parents)
            else:
                row_parents = np.arange(-1, n - 1, dtype=np.int32)
            tokens.append(row_tokens)
            parents.append(row_parents)
            starts[row + 1] = starts[row] + n
        empty = np.zeros(0, np.int32)
        return cls(
            starts,
            np.concatenate(tokens) if tokens else empty,
            np.concatenate(parents) if parents else empty,
            trees,
            branched,
        )

    @property
    def num_rows(self) -> int:
        """How many batch rows the step has."""
        return len(self.starts) - 1

    def num_nodes(self, row: int) -> int:
        """How many nodes of this row are verified."""
        return int(self.starts[row + 1] - self.starts[row])

    def root_logits_rows(self) -> IntArray:
        """int32 [rows]: the logits row of every root."""
        return self.starts[:-1] + np.arange(self.num_rows, dtype=np.int32)


@dataclass(slots=True)
class Walks:
    """Where the walks of one step ended.

    Attributes:
        tokens: int [rows, longest], the sampled tokens of each row's walk, padded with ``PLACEHOLDER``.
        paths: int32 [rows, longest], the accepted nodes' indices within their row, padded with -1.
        lengths: int32 [rows], tokens in each row: accepted nodes + 1.
    """

    tokens: NDArray[np.integer]
    paths: IntArray
    lengths: IntArray

    def path(self, row: int) -> IntArray:
        """The accepted nodes of one row, from the root down."""
        return self.paths[row, : self.lengths[row] - 1]


class Descent:
    """Walks down every tree of a step one depth at a time, for sampling that depends on what was sampled before.

    Args:
        step: the trees.
        discard: bool [rows], rows whose walk ends at the root.

    Attributes:
        active: int64 [a], the rows whose walk goes on, ascending.
        logits_rows: int64 [rows], the logits row of the root or node where each walk stands.
    """

    def __init__(self, step: StepTrees, discard: NDArray[np.bool_]) -> None:
        self.active: NDArray[np.int64]
        self.logits_rows: NDArray[np.int64]
        self.active, self.logits_rows, *walks = _at_the_roots(step.starts)
        self._step = step
        self._discard = discard
        self._depth = 0
        self._walks = Walks(*walks)

    def follow(self, sampled: NDArray[np.int32]) -> None:
        """Emit the token sampled at each active row's node; rows with a child that carries it stay active.

        Args:
            sampled: int32 [a], in the order of ``active``.
        """
        step, walks = self._step, self._walks
        count = _follow(
            np.ascontiguousarray(sampled),  # else it would be compiled once more
            step.tokens,
            step.parents,
            step.starts,
            self._discard,
            self.active,
            self.logits_rows,
            walks.tokens,
            walks.paths,
            walks.lengths,
        )
        self.active = self.active[:count]
        self._depth += 1

    def walks(self) -> Walks:
        """Where the walks stand."""
        return _trimmed(self._walks, self._depth)


@numba.njit(cache=CACHE)
def logits_indices(num_nodes: IntArray, ends: IntArray) -> NDArray[np.int64]:
    """Where in the flattened batch the rows' roots and nodes are: each row's last tokens.

    Args:
        num_nodes: int32 [rows], how many nodes each row verifies.
        ends: int32 [rows], where each row's tokens end.
    """
    indices = np.empty(len(num_nodes) + np.sum(num_nodes), np.int64)
    at = 0
    for row in range(len(num_nodes)):
        for token in range(ends[row] - num_nodes[row] - 1, ends[row]):
            indices[at] = token
            at += 1
    return indices


def warm_up() -> None:
    """Compile this module's kernels."""
    logits_indices(np.ones(1, np.int32), np.array([2], np.int32))
    step = StepTrees.build(["warm-up"], {"warm-up": [1]}, {"warm-up": DraftTree.chain([1])})
    walk_all(step, np.array([1, 0]))
    retrace(step, np.array([[1, 0]]), np.array([2], np.int32))
    Descent(step, np.zeros(1, np.bool_)).follow(np.array([0], np.int32))


def walk_all(step: StepTrees, sampled: NDArray[np.int64]) -> Walks:
    """Walk every tree at once, given the token sampled at every node.

    Args:
        step: the trees.
        sampled: int64 [nodes + rows], the sampled token of each logits row.
    """
    walks = Walks(*_at_the_roots(step.starts)[2:])
    _walk_all(sampled, step.tokens, step.parents, step.starts, walks.tokens, walks.paths, walks.lengths)
    return _trimmed(walks, int(walks.lengths.max()) if step.num_rows else 1)


def retrace(step: StepTrees, tokens: NDArray[np.int64], lengths: IntArray) -> Walks:
    """The walks that emitted these tokens, for a host that learns only of the tokens.

    Args:
        step: the trees.
        tokens: int64 [rows, width], what each row emitted.
        lengths: int32 [rows], how many tokens that were; 0 where a row emitted nothing.
    """
    paths = np.full((step.num_rows, max(1, int(lengths.max()))), -1, np.int32)
    _retrace(tokens, lengths, step.tokens, step.parents, step.starts, paths)
    return Walks(tokens, paths, lengths)


def _trimmed(walks: Walks, used: int) -> Walks:
    # contiguous whatever the number of rows: numba compiles its readers once more for another layout
    tokens, paths = (np.ascontiguousarray(part[:, :used]) for part in (walks.tokens, walks.paths))
    return Walks(tokens, paths, walks.lengths)


@numba.njit(cache=CACHE)
def _begins_with(values, start):  # type: ignore[no-untyped-def]
    return len(values) >= len(start) and np.array_equal(values[: len(start)], start)


@numba.njit(cache=CACHE)
def _is_chain(parents):  # type: ignore[no-untyped-def]
    for i in range(len(parents)):  # noqa: SIM110 - numba knows no generators
        if parents[i] != i - 1:
            return False
    return True


@numba.njit(cache=CACHE)
def _at_the_roots(starts):  # type: ignore[no-untyped-def]
    """Before the first sample: every row, the roots' logits rows, and the arrays of empty ``Walks``."""
    rows = len(starts) - 1
    active, logits_rows = np.arange(rows), np.empty(rows, np.int64)
    longest = 1
    for row in range(rows):
        logits_rows[row] = starts[row] + row
        longest = max(longest, 1 + starts[row + 1] - starts[row])
    tokens, paths = np.full((rows, longest), PLACEHOLDER, np.int32), np.full((rows, longest), -1, np.int32)
    return active, logits_rows, tokens, paths, np.zeros(rows, np.int32)


@numba.njit(cache=CACHE, inline="always")
def _find_child(tokens, parents, start, end, node, token):  # type: ignore[no-untyped-def]
    # parents come before children, so the scan may begin right after the parent
    for i in range(start + node + 1, end):
        if parents[i] == node and tokens[i] == token:
            return i - start
    return -1


@numba.njit(cache=CACHE)
def _walk_all(sampled, tokens, parents, starts, out_tokens, out_paths, lengths):  # type: ignore[no-untyped-def]
    for row in range(len(starts) - 1):
        start, end = starts[row], starts[row + 1]
        root_row = start + row
        node, length = -1, 0
        while True:
            token = sampled[root_row + 1 + node]
            out_tokens[row, length] = token
            node = _find_child(tokens, parents, start, end, node, token)
            if node < 0:
                break
            out_paths[row, length] = node
            length += 1
        lengths[row] = length + 1


@numba.njit(cache=CACHE)
def _retrace(emitted, lengths, tokens, parents, starts, paths):  # type: ignore[no-untyped-def]
    for row in range(len(starts) - 1):
        node = -1
        for k in range(lengths[row] - 1):
            node = _find_child(tokens, parents, starts[row], starts[row + 1], node, emitted[row, k])
            paths[row, k] = node


@numba.njit(cache=CACHE)
def _follow(sampled, tokens, parents, starts, discard, active, logits_rows, out_tokens, out_paths, lengths):  # type: ignore[no-untyped-def]
    """Returns how many rows go on; they are moved to the front of ``active``."""
    going_on = 0
    for i in range(len(active)):
        row = active[i]
        start, length = starts[row], lengths[row]
        out_tokens[row, length] = sampled[i]
        lengths[row] = length + 1
        if discard[row]:
            continue
        node = out_paths[row, length - 1] if length > 0 else -1
        child = _find_child(tokens, parents, start, starts[row + 1], node, sampled[i])
        if child >= 0:
            out_paths[row, length] = child
            logits_rows[row] = start + row + 1 + child
            active[going_on] = row
            going_on += 1
    return going_on
