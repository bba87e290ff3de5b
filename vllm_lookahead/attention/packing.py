"""A step's trees on the device: one pinned buffer, one copy, and views into what arrived.

Sent is only what the host alone knows: which node hangs where, and which tokens of the batch are a tree. What follows
from it and from the lengths on the device (``PackedTrees`` says what) is written there by ``v2.kernels.place``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from proposers.numba_cache import CACHE
from vllm_lookahead.trees.step import StepTrees

WORD_BITS = 32
"""An ancestor mask is kept as 32-bit words: bit j of word w says whether key 32 w + j is seen."""

ALIGNMENT = 16
"""Every part of the buffer begins at a multiple of so many int32: Triton compiles again for another alignment."""


class GraphSize(NamedTuple):
    """What a full CUDA graph of steps with trees was captured for. Every row is a tree row there.

    Attributes:
        rows: of the batch, padding included.
        tokens: of the batch, padding included.
        longest_prefix: most tokens before a root.
    """

    rows: int
    tokens: int
    longest_prefix: int


def most_tiles(rows: int, tokens: int, tile_queries: int) -> int:
    """Most tiles of so many rows that have so many tokens together."""
    rows = min(rows, tokens)
    return rows + (tokens - rows) // tile_queries


@dataclass(slots=True, frozen=True)
class PackedTrees:
    """The rows of one step that are verified as trees, on the device.

    A tree row's queries are its root and nodes: the row's last tokens in the flattened batch. "Packed" means: the
    queries of all tree rows, one row after the other. In a step that replays a full CUDA graph all sizes are the
    graph's: behind the tree rows there are rows of length 0, behind the tiles some that are none.

    Attributes:
        rows: int64 [rows], index of each tree row in the batch.
        offsets: int32 [rows + 1], where each row begins in packed order: its ``cu_seqlens``.
        lengths: int32 [rows], root and nodes.
        firsts: int32 [rows], index of each root in the flattened batch.
        whole: int32 [rows], 1 for rows that compute no token before their root, else 0.
        prefixes: int32 [rows], tokens before the root. Written by ``place``, as are the next three.
        stock_lens: int32 [rows], the ``seq_lens`` with which attention without an ancestor mask costs least and is
            right for the tokens before the root: without the prefix if there are no such tokens.
        tokens: int64 [packed], index of each query in the flattened batch.
        mask: int32 [packed, words], which of the row's root and nodes each query sees, see ``WORD_BITS``.
        tile_rows: int32 [tiles], the row of each tile of attention, -1 for none.
        tile_starts: int32 [tiles], which of the row's root and nodes is the tile's first.
        tile_queries: roots and nodes of a tile; a row's last one has what is left.
        num_rows: how many tree rows there are, without padding.
        longest: at least as many as a row has tokens.
        longest_prefix: at least as many as there are tokens before any root.
        span: the queries' indices in the flattened batch where they are all neighbours, else None.
        captured: whether a full CUDA graph reads this.
    """

    rows: torch.Tensor
    offsets: torch.Tensor
    lengths: torch.Tensor
    firsts: torch.Tensor
    whole: torch.Tensor
    prefixes: torch.Tensor
    stock_lens: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    tile_rows: torch.Tensor
    tile_starts: torch.Tensor
    tile_queries: int
    num_rows: int
    longest: int
    longest_prefix: int
    span: slice | None
    captured: bool

    @property
    def num_tokens(self) -> int:
        """How many queries they have together, padding included."""
        return len(self.mask)

    def gather(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tree rows' part of a per-token tensor, in packed order: a view where that is possible."""
        return tokens.index_select(0, self.tokens) if self.span is None else tokens[self.span]


@dataclass(slots=True, frozen=True)
class DeviceTrees:
    """The trees of one step (``StepTrees``) on the device.

    Attributes:
        starts: int32 [rows + 1], where each batch row's nodes begin in ``tokens`` and ``parents``.
        tokens: int32 [nodes], the token of every node.
        parents: int32 [nodes], index of the parent within the row, -1 for the root.
        packed: the tree rows; None if there are none.
        longest: tokens of the longest tree row.
    """

    starts: torch.Tensor
    tokens: torch.Tensor
    parents: torch.Tensor
    packed: PackedTrees | None
    longest: int

    @property
    def num_rows(self) -> int:
        """How many rows the batch has."""
        return len(self.starts) - 1


class HostBuffer:
    """int32 memory on the host and as much on the device, copied without waiting.

    Args:
        size: int32 numbers.
        device: where the copies go.

    Attributes:
        on_device: int32 [size], what was sent last.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.on_device = torch.zeros(size, dtype=torch.int32, device=device)

    def take(self) -> NDArray[np.int32]:
        """int32 [size]: memory to fill and then to ``send``. The last copy out of it has ended."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.numpy()

    def send(self, size: int) -> None:
        """Bring the memory's first ``size`` numbers to the device."""
        self.on_device[:size].copy_(self._host[:size], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


class _Sections(NamedTuple):
    """The buffer's parts, on the host (arrays) or on the device (tensors), each int32 and as large as it may get.

    Attributes:
        starts, parents, tokens: as in ``DeviceTrees``.
        rows: as in ``PackedTrees``, 64-bit numbers in pairs of 32 bits.
        offsets, lengths, firsts, whole, tile_rows, tile_starts: as in ``PackedTrees``.
    """

    starts: Any
    rows: Any
    offsets: Any
    lengths: Any
    firsts: Any
    whole: Any
    tile_rows: Any
    tile_starts: Any
    parents: Any
    tokens: Any


class TreePacker:
    """Brings a step's trees to the device, to the same addresses in every step.

    Args:
        device: where.
        max_tokens: most tokens of a step.
        max_rows: most rows of a step.
        max_nodes: most nodes of a tree.
        tile_queries: roots and nodes of a tile of attention.

    Attributes:
        tile_queries: as given.
    """

    def __init__(
        self, device: torch.device, max_tokens: int, max_rows: int, max_nodes: int, tile_queries: int = 8
    ) -> None:
        self.tile_queries = tile_queries
        self._limits = (max_tokens, max_rows, max_nodes)
        tiles = most_tiles(max_rows, max_tokens, tile_queries)
        # rows are 64-bit numbers; the sections of which most is unused come last
        sizes = (max_rows + 1, 2 * max_rows, max_rows + 1, *3 * (max_rows,), tiles, tiles, max_tokens, max_tokens)
        starts = list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
        self._buffer = HostBuffer(starts[-1], device)
        self._sections = [slice(start, start + size) for start, size in zip(starts, sizes, strict=False)]
        self._there = _Sections(*(self._buffer.on_device[section] for section in self._sections))
        # and what is written there
        aligned_rows = -(-max_rows // ALIGNMENT) * ALIGNMENT
        self._prefixes, self._stock_lens = torch.zeros((2, aligned_rows), dtype=torch.int32, device=device)
        self._queries = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        words = -(-(max_nodes + 1) // WORD_BITS)
        self._mask = torch.zeros((max_tokens, words), dtype=torch.int32, device=device)

    def __call__(
        self,
        step: StepTrees,
        query_start: NDArray[np.int32],
        seq_lens: NDArray[np.int32],
        graph: GraphSize | None = None,
    ) -> DeviceTrees:
        """The step's trees on the device. They are overwritten by the next step's.

        Args:
            step: the step's trees.
            query_start: int32 [rows + 1 or more], each row's first token in the flattened batch.
            seq_lens: int32 [rows or more], at least as many as each row's tokens after this step if every node were
                accepted.
            graph: of the full CUDA graph that the step replays: then every row becomes a tree row, and the sizes are
                the graph's.

        Raises:
            ValueError: the step is larger than what the packer or the graph was made for, or has tokens in a graph that
                are neither root nor node.
        """
        rows, nodes = step.num_rows, len(step.tokens)
        size = (nodes + rows, rows, int(np.diff(step.starts).max(initial=0)))
        if any(part > most for part, most in zip(size, self._limits, strict=True)):
            raise ValueError(f"a step of {size} tokens, rows and nodes of a tree, in a packer for {self._limits}")
        if graph is not None and not (rows <= graph.rows and nodes + rows == query_start[rows] <= graph.tokens):
            raise ValueError(f"a step of {query_start[rows]} tokens, {nodes} nodes and {rows} rows, in {graph}")
        host = self._buffer.take()
        here, there = _Sections(*(host[section] for section in self._sections)), self._there
        here.starts[: rows + 1], here.parents[:nodes], here.tokens[:nodes] = step.starts, step.parents, step.tokens
        num_rows, packed, tiles, longest, longest_prefix, first, last = _lay_out(
            step.branched if graph is None else np.ones(rows, np.bool_),
            step.starts,
            query_start,
            seq_lens,
            self.tile_queries,
            here.rows.view(np.int64),
            here.offsets,
            here.lengths,
            here.firsts,
            here.whole,
            here.tile_rows,
            here.tile_starts,
        )
        trees = None
        if graph is not None:
            self._pad(here, num_rows, tiles, graph)
            trees = self._captured(graph, num_rows)
        elif num_rows:
            span = slice(first, last) if last - first == packed else None
            trees = self._view(num_rows, packed, tiles, num_rows, longest, longest_prefix, span, captured=False)
        self._buffer.send(self._sections[-1].start + nodes)
        return DeviceTrees(
            starts=there.starts[: rows + 1],
            tokens=there.tokens[:nodes],
            parents=there.parents[:nodes],
            packed=trees,
            longest=longest,
        )

    def _pad(self, here: _Sections, rows: int, tiles: int, graph: GraphSize) -> None:
        """Let rows of no length and tiles of no row follow."""
        here.rows.view(np.int64)[rows : graph.rows] = 0  # any row: they ask for nothing
        here.offsets[rows + 1 : graph.rows + 1] = here.offsets[rows]
        for section in (here.lengths, here.firsts, here.whole):
            section[rows : graph.rows] = 0
        end = most_tiles(graph.rows, graph.tokens, self.tile_queries)
        here.tile_rows[tiles:end], here.tile_starts[tiles:end] = -1, 0

    def _captured(self, graph: GraphSize, num_rows: int) -> PackedTrees:
        """What a graph of this size reads; but for ``num_rows`` the same in every step."""
        tiles = most_tiles(graph.rows, graph.tokens, self.tile_queries)
        longest, whole = min(self._limits[2] + 1, graph.tokens), slice(0, graph.tokens)
        return self._view(
            graph.rows, graph.tokens, tiles, num_rows, longest, graph.longest_prefix, whole, captured=True
        )

    def _view(
        self,
        rows: int,
        packed: int,
        tiles: int,
        num_rows: int,
        longest: int,
        longest_prefix: int,
        span: slice | None,
        *,
        captured: bool,
    ) -> PackedTrees:
        there = self._there
        return PackedTrees(
            rows=there.rows.view(torch.int64)[:rows],
            offsets=there.offsets[: rows + 1],
            lengths=there.lengths[:rows],
            firsts=there.firsts[:rows],
            whole=there.whole[:rows],
            prefixes=self._prefixes[:rows],
            stock_lens=self._stock_lens[:rows],
            tokens=self._queries[:packed],
            mask=self._mask[:packed],
            tile_rows=there.tile_rows[:tiles],
            tile_starts=there.tile_starts[:tiles],
            tile_queries=self.tile_queries,
            num_rows=num_rows,
            longest=longest,
            longest_prefix=longest_prefix,
            span=span,
            captured=captured,
        )


@numba.njit(cache=CACHE)
def _lay_out(  # type: ignore[no-untyped-def]
    chosen,
    starts,
    query_start,
    seq_lens,
    tile_queries,
    rows,
    offsets,
    lengths,
    firsts,
    whole,
    tile_rows,
    tile_starts,
):
    """Write what ``PackedTrees`` says of the chosen rows on the host: rows to whole, and the tiles.

    Returns:
        How many rows, queries and tiles that are, the longest row, the longest prefix, the first query in the flattened
        batch, and the one after the last.
    """
    trees = packed = tiles = longest = longest_prefix = last = 0
    offsets[0] = 0
    for row in np.flatnonzero(chosen):
        length = starts[row + 1] - starts[row] + 1
        last = query_start[row + 1]
        rows[trees], lengths[trees], firsts[trees] = row, length, last - length
        whole[trees] = query_start[row] == last - length
        for start in range(0, length, tile_queries):
            tile_rows[tiles], tile_starts[tiles] = trees, start
            tiles += 1
        packed += length
        trees += 1
        offsets[trees] = packed
        longest, longest_prefix = max(longest, length), max(longest_prefix, seq_lens[row] - length)
    return trees, packed, tiles, longest, longest_prefix, firsts[0], last
