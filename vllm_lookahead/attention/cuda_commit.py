"""KV commit on the GPU: one kernel moves the accepted nodes' keys and values of all rows in all layers.

What moves where is decided on the host (``trees.kv.moves``) as indices of the step's tokens, and sent in one copy;
the slots that these tokens were written to are read on the device, where vLLM computed them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from vllm_lookahead.attention.packing import ALIGNMENT, HostBuffer
from vllm_lookahead.trees.kv import SlotArray, moves
from vllm_lookahead.trees.step import StepTrees, Walks

UNIT = 8
"""Bytes that a thread moves at a time."""


class _Layers(NamedTuple):
    """Caches of one shape and layout; strides in units of ``UNIT`` bytes.

    Attributes:
        addresses: int64 [layers], where each cache begins, on the device.
        heads: kv heads.
        block_size: slots of a block.
        width: units of one slot and head, keys and values together.
        block_stride, head_stride, slot_stride: of the cache's dimensions.
    """

    addresses: torch.Tensor
    heads: int
    block_size: int
    width: int
    block_stride: int
    head_stride: int
    slot_stride: int


class CUDACommit:
    """Moves KV entries in vLLM's paged FlashAttention caches.

    The caches' logical shape is the same in vLLM 0.26 and 0.32 (``v1/attention/backends/flash_attn.py``); whether
    heads or slots come first in memory is a matter of their strides. 16-bit and 8-bit caches are moved as raw bytes.

    Args:
        kv_caches: every layer's cache, ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``.
        max_tokens: most tokens of a step.

    Raises:
        ValueError: a cache's layout is not one that can be moved.
    """

    def __init__(self, kv_caches: Sequence[torch.Tensor], max_tokens: int) -> None:
        device = kv_caches[0].device
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for cache in kv_caches:
            alike[_layout(cache)].append(cache.data_ptr())
        self._layers = [
            _Layers(torch.tensor(addresses, dtype=torch.int64, device=device), *layout)
            for layout, addresses in alike.items()
        ]
        self._kv_caches = list(kv_caches)  # whose memory the addresses are
        self._tokens = np.arange(max_tokens, dtype=np.int64)
        self._buffer = HostBuffer(3 * (max_tokens + ALIGNMENT), device)

    def __call__(self, step: StepTrees, walks: Walks, query_start: NDArray[np.int32], slots: torch.Tensor) -> None:
        """Enqueue the moves that a step's walks ask for.

        Args:
            step: the trees of the step.
            walks: where the walks ended.
            query_start: int32 [rows + 1], each row's first token in the flattened batch.
            slots: int64 [tokens], the KV slot that each token of the batch was written to, on the device.
        """
        source, target = moves(step, walks, query_start, self._tokens)
        if len(source):
            self.move(source, target, query_start, slots)

    def move(self, source: SlotArray, target: SlotArray, query_start: NDArray[np.int32], slots: torch.Tensor) -> None:
        """Copy token ``source[i]``'s entry to token ``target[i]``'s slot, in order within each row.

        Args:
            source: int64 [moved], indices of tokens, row by row.
            target: int64 [moved].
            query_start: int32 [rows + 1].
            slots: int64 [tokens].
        """
        count = len(source)
        row = np.searchsorted(query_start, target, side="right")
        begins = np.append(np.flatnonzero(np.diff(row, prepend=-1)), count)
        sizes = (len(begins), count, count)
        starts = np.zeros(4, np.int64)
        np.cumsum([-(-size // ALIGNMENT) * ALIGNMENT for size in sizes], out=starts[1:])
        host = self._buffer.take(int(starts[-1]))
        for values, start, size in zip((begins, source, target), starts, sizes, strict=False):
            host[start : start + size] = values
        sent = self._buffer.send(int(starts[-1]))
        for layers in self._layers:
            commit_kernel[(len(begins) - 1, len(layers.addresses), layers.heads)](
                layers.addresses,
                slots,
                sent[: starts[1]],
                sent[starts[1] : starts[2]],
                sent[starts[2] :],
                layers.block_size,
                layers.block_stride,
                layers.head_stride,
                layers.slot_stride,
                WIDTH=layers.width,
                BLOCK=triton.next_power_of_2(layers.width),
                num_warps=1,
            )


def _layout(cache: torch.Tensor) -> tuple[int, ...]:
    """A cache's fields of ``_Layers`` but the addresses."""
    _, heads, block_size, width = cache.shape
    sizes = [n * cache.element_size() for n in (width, cache.stride(0), cache.stride(1), cache.stride(2))]
    if cache.stride(3) != 1 or cache.data_ptr() % UNIT or any(size % UNIT for size in sizes):
        raise ValueError(f"can't move entries of a KV cache of shape {tuple(cache.shape)}, strides {cache.stride()}")
    return heads, block_size, *(size // UNIT for size in sizes)


@triton.jit
def commit_kernel(  # type: ignore[no-untyped-def]
    addresses,  # int64 [layers]
    slots,  # int64 [tokens]
    begins,  # int32 [rows + 1]
    sources,  # int32 [moved]
    targets,  # int32 [moved]
    block_size,
    block_stride,
    head_stride,
    slot_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The moves of one row in one layer and head, one after the other. Grid: rows with moves, layers, heads.

    Rows own different slots. Within a row the k-th move goes to place k from a place behind it, and places grow from
    move to move, so no move writes what a later one still has to read; but a later one may write what an earlier one
    reads. The barrier (one warp, so it costs nothing) keeps that order.
    """
    row = tl.program_id(0)
    cache = tl.load(addresses + tl.program_id(1)).to(tl.pointer_type(tl.int64))
    cache += tl.program_id(2).to(tl.int64) * head_stride
    unit = tl.arange(0, BLOCK)
    for i in range(tl.load(begins + row), tl.load(begins + row + 1)):
        source = tl.load(slots + tl.load(sources + i))
        target = tl.load(slots + tl.load(targets + i))
        entry = tl.load(
            cache + (source // block_size) * block_stride + (source % block_size) * slot_stride + unit,
            mask=unit < WIDTH,
        )
        tl.store(
            cache + (target // block_size) * block_stride + (target % block_size) * slot_stride + unit,
            entry,
            mask=unit < WIDTH,
        )
        tl.debug_barrier()
