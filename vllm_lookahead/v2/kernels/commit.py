"""KV commit on the device: one kernel moves the accepted nodes' keys and values of all tree rows in all layers.

``trees.kv`` says on the host what moves where. Here the paths are where the walks left them, on the device, and so are
the slots that the step's tokens were written to, where vLLM computed them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_lookahead.attention.packing import PackedTrees

UNIT = 8
"""Bytes that a thread moves at a time."""

MOVES = 8
"""Moves of a row that are made at a time."""


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


class KVCommit:
    """Moves KV entries in vLLM's paged FlashAttention caches.

    The caches' logical shape is the same in vLLM 0.26 and 0.32 (``v1/attention/backends/flash_attn.py``); whether
    heads or slots come first in memory is a matter of their strides. 16-bit and 8-bit caches are moved as raw bytes.

    Args:
        kv_caches: every layer's cache, ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``.

    Raises:
        ValueError: a cache's layout is not one that can be moved.
    """

    def __init__(self, kv_caches: Sequence[torch.Tensor]) -> None:
        device = kv_caches[0].device
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for cache in kv_caches:
            alike[_layout(cache)].append(cache.data_ptr())
        self._layers = [
            _Layers(torch.tensor(addresses, dtype=torch.int64, device=device), *layout)
            for layout, addresses in alike.items()
        ]
        self._kv_caches = list(kv_caches)  # whose memory the addresses are

    def __call__(self, trees: PackedTrees, paths: torch.Tensor, lengths: torch.Tensor, slots: torch.Tensor) -> None:
        """Enqueue the moves that a step's walks ask for.

        Args:
            trees: the step's tree rows; the batch's other rows have nothing to move.
            paths: int32 [batch rows, width], ``DeviceWalks.paths``.
            lengths: int32 [batch rows], ``DeviceWalks.lengths``; a row of 0 or 1 moves nothing.
            slots: int64 [tokens], the KV slot that each token of the batch was written to.
        """
        for layers in self._layers:
            commit_kernel[(trees.num_rows, len(layers.addresses), layers.heads)](
                layers.addresses,
                trees.rows,
                trees.firsts,
                paths,
                lengths,
                slots,
                paths.stride(0),
                layers.block_size,
                layers.block_stride,
                layers.head_stride,
                layers.slot_stride,
                WIDTH=layers.width,
                BLOCK=triton.next_power_of_2(layers.width),
                MOVES=MOVES,
                num_warps=1,
            )


def _layout(cache: torch.Tensor) -> tuple[int, ...]:
    """A cache's fields of ``_Layers`` but the addresses."""
    _, heads, block_size, width = cache.shape
    sizes = [n * cache.element_size() for n in (width, cache.stride(0), cache.stride(1), cache.stride(2))]
    if cache.stride(3) != 1 or cache.data_ptr() % UNIT or any(size % UNIT for size in sizes):
        raise ValueError(f"can't move entries of a KV cache of shape {tuple(cache.shape)}, strides {cache.stride()}")
    return heads, block_size, *(size // UNIT for size in sizes)


# Where a tensor begins must not lead to another compilation while requests wait.
@triton.jit(do_not_specialize=["path_stride"], do_not_specialize_on_alignment=["paths", "lengths", "slots"])
def commit_kernel(  # type: ignore[no-untyped-def]
    addresses,  # int64 [layers]
    rows,  # int64 [rows]
    firsts,  # int32 [rows]
    paths,  # int32 [batch rows, width]
    lengths,  # int32 [batch rows]
    slots,  # int64 [tokens]
    path_stride,
    block_size,
    block_stride,
    head_stride,
    slot_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    MOVES: tl.constexpr,
):
    """The moves of one row in one layer and head, ``MOVES`` at a time. Grid: tree rows, layers, heads.

    Rows own different slots. Within a row the k-th move goes to place k from place ``path[k]``, and paths ascend: no
    move writes what one after it still has to read, but it may write what one before it reads. So all of a block's
    entries are read before any is written (the barrier; one warp, so it costs nothing), and the blocks go in order.
    """
    tree = tl.program_id(0)
    row = tl.load(rows + tree)
    accepted = tl.load(lengths + row) - 1
    nodes = slots + tl.load(firsts + tree) + 1
    cache = tl.load(addresses + tl.program_id(1)).to(tl.pointer_type(tl.int64))
    cache += tl.program_id(2).to(tl.int64) * head_stride
    unit = tl.arange(0, BLOCK)
    for start in range(0, accepted, MOVES):
        k = start + tl.arange(0, MOVES)
        node = tl.load(paths + row * path_stride + k, mask=k < accepted, other=0)
        moves = (k < accepted) & (node != k)
        source = tl.load(nodes + node, mask=moves, other=0)
        target = tl.load(nodes + k, mask=moves, other=0)
        source = (source // block_size) * block_stride + (source % block_size) * slot_stride
        target = (target // block_size) * block_stride + (target % block_size) * slot_stride
        there = moves[:, None] & (unit < WIDTH)[None, :]
        entries = tl.load(cache + source[:, None] + unit[None, :], mask=there)
        tl.debug_barrier()
        tl.store(cache + target[:, None] + unit[None, :], entries, mask=there)
