"""KV commit in the CPU backend's paged cache: which entries move is decided in ``trees.kv``."""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from proposers.numba_cache import CACHE
from vllm_lookahead.trees.kv import SlotArray


class CPUCommit:
    """Moves KV entries in the CPU backend's paged cache, whose blocks hold K transposed.

    Per block and kv head the cache is K as ``[head_size, block_size]`` followed by V as ``[block_size, head_size]``
    (vLLM's ``CPU_ATTN`` with isa "vec" and "vec16"; csrc/cpu/cpu_attn_vec.hpp).

    Args:
        kv_caches: every layer's cache, ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``.
    """

    def __init__(self, kv_caches: list[torch.Tensor]) -> None:
        self.caches = [_as_integers(cache) for cache in kv_caches]

    def __call__(self, src: SlotArray, dst: SlotArray) -> None:
        """Copy slot ``src[i]`` to slot ``dst[i]`` in every layer, in order."""
        if len(src) == 0:
            return
        for cache in self.caches:
            _copy_slots(cache, src, dst)


def _as_integers(cache: torch.Tensor) -> NDArray[np.generic]:
    """The cache's memory as numpy integers of the same width (numpy knows no bfloat16)."""
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32}[cache.element_size()]
    return cache.view(width).numpy()


@numba.njit(cache=CACHE)
def _copy_slots(cache, src, dst):  # type: ignore[no-untyped-def]
    num_blocks, num_heads, block_size, twice = cache.shape
    head_size = twice // 2
    flat = cache.reshape(num_blocks, num_heads, block_size * twice)
    values = block_size * head_size
    for i in range(len(src)):
        from_block, from_offset = divmod(src[i], block_size)
        to_block, to_offset = divmod(dst[i], block_size)
        for head in range(num_heads):
            source, target = flat[from_block, head], flat[to_block, head]
            for d in range(head_size):
                target[d * block_size + to_offset] = source[d * block_size + from_offset]
                target[values + to_offset * head_size + d] = source[values + from_offset * head_size + d]
