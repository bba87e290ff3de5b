"""Attention among the tokens of a draft tree, as one Triton kernel for all tree rows of a batch.

Every root and node sees its ancestors and itself, and these keys and values were computed in this very step: no cache
is read here. What lies before the root (the prefix) is somebody else's part; its output and log-sum-exp can be handed
in, and the kernel then writes the attention over both. Scores, sums and the merge are float32.

No vLLM here: the kernel is compiled and, under TRITON_INTERPRET=1, run on machines that have no GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_lookahead.attention.packing import WORD_BITS, PackedTrees

HEAD_SIZES = range(16, 257, 16)
"""Head sizes that the kernel takes: what tensor cores can multiply, without masks that nobody needs."""

TILE_ROWS = 32
"""Rows of a tile: queries times the heads that share a kv head."""
LEAST_ROWS = 16
"""What tensor cores multiply at least."""
LN2 = 0.6931471805599453
LOG2E = 1.4426950408889634


def tile_queries(heads_per_kv: int) -> int:
    """How many queries a tile should have, by the number of heads that share a kv head; any number is right."""
    return max(1, TILE_ROWS // max(1, heads_per_kv))


class Prefix(NamedTuple):
    """Attention of the packed queries over what lies before their root.

    Attributes:
        output: [packed, num_heads, head_size]; anything where a row has no prefix.
        lse: float32 [num_heads, packed], natural logarithm of the sum of the exponentiated scores.
    """

    output: torch.Tensor
    lse: torch.Tensor


def tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    trees: PackedTrees,
    scale: float,
    output: torch.Tensor,
    prefix: Prefix | None = None,
    lse: torch.Tensor | None = None,
) -> None:
    """Attention of the tree rows' tokens; the other rows of ``output`` are left alone.

    All of one floating type, the last dimension contiguous, the others with any stride. What is launched depends on
    shapes and on numbers that the host knows, so that a CUDA graph can be replayed for other trees of the same sizes.

    Args:
        query: [tokens, num_heads, head_size], the flattened batch.
        key: [tokens, num_kv_heads, head_size].
        value: [tokens, num_kv_heads, head_size].
        trees: the tree rows, on the same device.
        scale: factor of the scores.
        output: [tokens, num_heads, head_size], written.
        prefix: to be merged with; None: attention among the tree's tokens alone.
        lse: float32 [num_heads, packed], written if given: log-sum-exp of what ``output`` covers.
    """
    heads, head_size = query.shape[1:]
    kv_heads = key.shape[1]
    per_kv = heads // kv_heads
    merged = prefix if prefix is not None else Prefix(output, trees.offsets)
    stored = lse if lse is not None else trees.offsets
    tree_kernel[(len(trees.tile_rows), kv_heads)](
        query,
        key,
        value,
        output,
        merged.output,
        merged.lse,
        stored,
        trees.tile_rows,
        trees.tile_starts,
        trees.offsets,
        trees.firsts,
        trees.prefixes,
        trees.mask,
        scale,
        trees.mask.stride(0),
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        output.stride(0),
        output.stride(1),
        merged.output.stride(0),
        merged.output.stride(1),
        *((merged.lse.stride(0), merged.lse.stride(1)) if prefix is not None else (0, 0)),
        *((stored.stride(0), stored.stride(1)) if lse is not None else (0, 0)),
        PER_KV=per_kv,
        HEAD_SIZE=head_size,
        BLOCK_D=triton.next_power_of_2(head_size),
        QUERIES=trees.tile_queries,
        BLOCK_M=max(LEAST_ROWS, triton.next_power_of_2(trees.tile_queries * per_kv)),
        BLOCK_N=WORD_BITS,
        MERGE=prefix is not None,
        STORE_LSE=lse is not None,
        WIDEN=query.device.type == "cpu",  # Triton's interpreter multiplies matrices of bfloat16 as if of integers
        num_warps=4,
        num_stages=2,
    )


# What differs from step to step must not lead to another compilation while requests wait.
@triton.jit(do_not_specialize=["scale", "words", "prefix_lse_head", "prefix_lse_token", "lse_head", "lse_token"])
def tree_kernel(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    output,
    prefix_output,
    prefix_lse,
    lse,
    tile_rows,  # int32 [tiles]
    tile_starts,  # int32 [tiles]
    offsets,  # int32 [rows + 1]
    firsts,  # int32 [rows]
    prefixes,  # int32 [rows]
    mask,  # int32 [packed, words]
    scale,
    words,
    query_token,
    query_head,
    key_token,
    key_head,
    value_token,
    value_head,
    output_token,
    output_head,
    prefix_token,
    prefix_head,
    prefix_lse_head,
    prefix_lse_token,
    lse_head,
    lse_token,
    PER_KV: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MERGE: tl.constexpr,
    STORE_LSE: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile: ``QUERIES`` queries with the heads of one kv head, over all keys that they can see.

    ``BLOCK_N`` keys are one word of the mask. Grid: tiles, kv heads.
    """
    row = tl.load(tile_rows + tl.program_id(0))
    if row < 0:
        return
    kv_head = tl.program_id(1).to(tl.int64)
    tile_start = tl.load(tile_starts + tl.program_id(0))
    begin = tl.load(offsets + row)
    length = tl.load(offsets + row + 1) - begin
    first = tl.load(firsts + row).to(tl.int64)
    pair = tl.arange(0, BLOCK_M)
    node = tile_start + pair // PER_KV
    head = kv_head * PER_KV + pair % PER_KV
    real = (pair < QUERIES * PER_KV) & (node < length)
    dim = tl.arange(0, BLOCK_D)
    inside = dim < HEAD_SIZE

    q = tl.load(
        query + (first + node)[:, None] * query_token + head[:, None] * query_head + dim[None, :],
        mask=real[:, None] & inside[None, :],
        other=0.0,
    )
    if WIDEN:
        q = q.to(tl.float32)
    factor = scale * 1.4426950408889634  # exponents of two from here on
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # parents come before children: no query of the tile sees a key behind the tile's last query
    last = tl.minimum(tile_start + QUERIES, length) - 1
    for start in range(0, last + 1, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        there = column < length
        k = tl.load(
            key + (first + column)[None, :] * key_token + kv_head * key_head + dim[:, None],
            mask=there[None, :] & inside[:, None],
            other=0.0,
        )
        if WIDEN:
            k = k.to(tl.float32)
        # rows of the tile that are no queries see one key, so that nothing becomes a NaN
        word = tl.load(mask + (begin + node) * words + start // BLOCK_N, mask=real, other=1)
        sees = (word[:, None] >> tl.arange(0, BLOCK_N)[None, :]) & 1
        scores = tl.dot(q, k, input_precision="ieee") * factor
        scores = tl.where(sees != 0, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.math.exp2(scores - new_top[:, None])
        shrink = tl.math.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(
            value + (first + column)[:, None] * value_token + kv_head * value_head + dim[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        )
        rounded = weights.to(v.dtype)
        if WIDEN:
            rounded, v = rounded.to(tl.float32), v.to(tl.float32)
        sums = sums * shrink[:, None] + tl.dot(rounded, v, input_precision="ieee")
        top = new_top

    packed = (begin + node).to(tl.int64)
    if MERGE:
        # whatever a backend says about an empty prefix (-inf, +inf or nothing) must not be looked at
        read = real & (node < tl.where(tl.load(prefixes + row) > 0, length, 0))
        before = tl.load(
            prefix_lse + head * prefix_lse_head + packed * prefix_lse_token, mask=read, other=float("-inf")
        )
        before *= 1.4426950408889634
        partial = tl.load(
            prefix_output + packed[:, None] * prefix_token + head[:, None] * prefix_head + dim[None, :],
            mask=read[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        new_top = tl.maximum(top, before)
        ours = tl.math.exp2(top - new_top)
        theirs = tl.math.exp2(before - new_top)
        total = total * ours + theirs
        sums = sums * ours[:, None] + partial * theirs[:, None]
        top = new_top
    result = sums / total[:, None]
    tl.store(
        output + (first + node)[:, None] * output_token + head[:, None] * output_head + dim[None, :],
        result.to(output.dtype.element_ty),
        mask=real[:, None] & inside[None, :],
    )
    if STORE_LSE:
        tl.store(
            lse + head * lse_head + packed * lse_token, (top + tl.math.log2(total)) * 0.6931471805599453, mask=real
        )
