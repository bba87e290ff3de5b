"""A step's tree rows on the device: one pinned buffer, one copy, and views into what arrived."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from vllm_lookahead.trees.rows import TreeRows

WORD_BITS = 32
"""An ancestor mask is kept as 32-bit words: bit j of word w says whether key 32 w + j is seen."""

ALIGNMENT = 16
"""Every part of the buffer begins at a multiple of so many int32: Triton compiles again for another alignment."""


@dataclass(slots=True, frozen=True)
class PackedTrees:
    """The tree rows of one step (``TreeRows``) on the device.

    Attributes:
        offsets: int32 [rows + 1], where each row begins in packed order: its ``cu_seqlens``.
        prefixes: int32 [rows], tokens before the root.
        lengths: int32 [rows], root and nodes.
        firsts: int32 [rows], index of each root in the flattened batch.
        rows: int64 [rows], index of each row in the batch.
        tokens: int64 [packed], index of each query in the flattened batch.
        positions: int64 [packed], RoPE positions.
        mask: int32 [packed, words], see ``WORD_BITS``.
        on_host: where it came from.
        longest: most tokens of a row.
        longest_prefix: most tokens before a root.
        span: the queries' indices in the flattened batch where they are all neighbours, else None.
    """

    offsets: torch.Tensor
    prefixes: torch.Tensor
    lengths: torch.Tensor
    firsts: torch.Tensor
    rows: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    on_host: TreeRows
    longest: int
    longest_prefix: int
    span: slice | None

    @property
    def num_rows(self) -> int:
        """How many tree rows there are."""
        return len(self.on_host.rows)

    def gather(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tree rows' part of a per-token tensor, in packed order: a view where that is possible."""
        return tokens.index_select(0, self.tokens) if self.span is None else tokens[self.span]


class HostBuffer:
    """int32 memory on the host and as much on the device, copied without waiting.

    Args:
        size: int32 numbers to begin with; it grows if need be.
        device: where the copies go.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.device = device
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._allocate(size)

    def _allocate(self, size: int) -> None:
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        self._on_device = torch.zeros(size, dtype=torch.int32, device=self.device)
        self._filled = False

    def take(self, size: int) -> NDArray[np.int32]:
        """int32 [size]: memory to fill and then to ``send``. The last copy out of it has ended."""
        if size > len(self._host):
            self._allocate(2 * size)
        if self._copied is not None and self._filled:
            self._copied.synchronize()
        return self._host[:size].numpy()

    def send(self, size: int) -> torch.Tensor:
        """int32 [size]: the filled memory on the device, valid until the next call."""
        target = self._on_device[:size]
        target.copy_(self._host[:size], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        self._filled = True
        return target


class TreePacker:
    """Brings tree rows to the device.

    Args:
        device: where.
        max_tokens: most tokens of a step.
        max_rows: most rows of a step.
        max_nodes: most nodes of a tree.
    """

    def __init__(self, device: torch.device, max_tokens: int, max_rows: int, max_nodes: int) -> None:
        words = -(-(max_nodes + 1) // WORD_BITS)
        self._buffer = HostBuffer(max_tokens * (4 + words) + 6 * max_rows + 16 * ALIGNMENT, device)

    def __call__(self, trees: TreeRows) -> PackedTrees:
        """The step's tree rows on the device. They are overwritten by the next step's."""
        rows, packed = len(trees.rows), len(trees.tokens)
        longest = int(trees.lengths.max())
        words = -(-longest // WORD_BITS)
        # 64-bit parts take two words each
        sizes = (rows + 1, rows, rows, rows, 2 * rows, 2 * packed, 2 * packed, packed * words)
        starts = np.zeros(len(sizes) + 1, np.int64)
        np.cumsum([-(-size // ALIGNMENT) * ALIGNMENT for size in sizes], out=starts[1:])
        total = int(starts[-1])
        host = self._buffer.take(total)
        parts = [host[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        parts[0][:] = trees.offsets
        parts[1][:] = trees.prefixes
        parts[2][:] = trees.lengths
        parts[3][:] = trees.tokens[trees.offsets[:-1]]
        parts[4].view(np.int64)[:] = trees.rows
        parts[5].view(np.int64)[:] = trees.tokens
        parts[6].view(np.int64)[:] = trees.positions
        pack_mask(trees.mask, trees.mask_offsets, trees.offsets, parts[7].view(np.uint32).reshape(packed, words))
        sent = self._buffer.send(total)
        offsets, prefixes, lengths, firsts, row_indices, tokens, positions, mask = (
            sent[start : start + size] for start, size in zip(starts, sizes, strict=False)
        )
        first, last = int(trees.tokens[0]), int(trees.tokens[-1])
        return PackedTrees(
            offsets=offsets,
            prefixes=prefixes,
            lengths=lengths,
            firsts=firsts,
            rows=row_indices.view(torch.int64),
            tokens=tokens.view(torch.int64),
            positions=positions.view(torch.int64),
            mask=mask.view(packed, words),
            on_host=trees,
            longest=longest,
            longest_prefix=int(trees.prefixes.max()),
            span=slice(first, last + 1) if last - first + 1 == packed else None,
        )


@numba.njit(cache=True)
def pack_mask(mask, mask_offsets, offsets, words):  # type: ignore[no-untyped-def]
    """Squeeze boolean ancestor masks into words.

    Args:
        mask: bool, see ``TreeRows``.
        mask_offsets: int64 [rows + 1], see ``TreeRows``.
        offsets: int64 [rows + 1], see ``TreeRows``.
        words: uint32 [packed, words], written.
    """
    words[:] = 0
    for r in range(len(offsets) - 1):
        length = offsets[r + 1] - offsets[r]
        for i in range(length):
            sees = mask_offsets[r] + i * length
            for j in range(i + 1):  # parents come before children
                if mask[sees + j]:
                    words[offsets[r] + i, j // 32] |= np.uint32(1 << (j % 32))
