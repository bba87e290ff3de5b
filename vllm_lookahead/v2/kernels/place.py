"""What drafts add to a step's inputs, written on the device: the nodes' tokens, RoPE positions and ancestor masks.

``trees.rows.TreeRows`` says the same on the host. Where a root is comes from vLLM's lengths on the device: under
asynchronous scheduling no number on the host stands in for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_lookahead.attention.packing import WORD_BITS, DeviceTrees

BLOCK_TOKENS = 64
"""Nodes whose tokens a program copies at a time."""
BLOCK_NODES = 32
"""Roots and nodes that a program climbs from at a time."""


def place_tokens(trees: DeviceTrees, query_start: torch.Tensor, input_ids: torch.Tensor) -> None:
    """Write the nodes' tokens to the step's input: they are each row's last tokens.

    Args:
        trees: the step's trees.
        query_start: int32 [rows + 1 or more], each row's first token in the flattened batch.
        input_ids: int32 [tokens], written. A token below 0 stands for none, and becomes 0.
    """
    place_tokens_kernel[(trees.num_rows,)](
        trees.starts, trees.tokens, query_start, input_ids, BLOCK=BLOCK_TOKENS, num_warps=1
    )


@triton.jit(do_not_specialize_on_alignment=["query_start", "input_ids"])
def place_tokens_kernel(  # type: ignore[no-untyped-def]
    starts,  # int32 [rows + 1]
    tokens,  # int32 [nodes]
    query_start,  # int32 [rows + 1]
    input_ids,  # int32 [tokens], written
    BLOCK: tl.constexpr,
):
    """One row's nodes. Grid: rows."""
    row = tl.program_id(0)
    start = tl.load(starts + row)
    nodes = tl.load(starts + row + 1) - start
    first = tl.load(query_start + row + 1) - nodes
    for begin in range(0, nodes, BLOCK):
        node = begin + tl.arange(0, BLOCK)
        token = tl.load(tokens + start + node, mask=node < nodes, other=0)
        tl.store(input_ids + first + node, tl.maximum(token, 0), mask=node < nodes)


def place(trees: DeviceTrees, seq_lens: torch.Tensor, positions: torch.Tensor) -> None:
    """Fill in what ``trees.packed`` still lacks, and write the tree rows' positions.

    Args:
        trees: the step's trees; nothing happens if there are no tree rows.
        seq_lens: int32 [rows], tokens of each row after this step if every node were accepted: vLLM's
            ``InputBatch.seq_lens``.
        positions: int64 [tokens], the flattened batch's RoPE positions: vLLM's ``InputBatch.positions``. Those of the
            tree rows' roots and nodes become root position + depth.
    """
    packed = trees.packed
    if packed is None:
        return
    words = packed.mask.shape[1]
    place_kernel[(triton.cdiv(trees.longest, BLOCK_NODES), len(packed.rows))](
        trees.starts,
        trees.parents,
        packed.rows,
        packed.offsets,
        packed.firsts,
        packed.whole,
        seq_lens,
        packed.prefixes,
        packed.stock_lens,
        packed.tokens,
        packed.mask,
        positions,
        words,
        WORDS=triton.next_power_of_2(words),
        WORD_BITS=WORD_BITS,
        BLOCK=BLOCK_NODES,
        num_warps=1 if words <= 4 else 4,
    )


@triton.jit(do_not_specialize=["words"], do_not_specialize_on_alignment=["seq_lens", "positions"])
def place_kernel(  # type: ignore[no-untyped-def]
    starts,  # int32 [batch rows + 1]
    parents,  # int32 [nodes]
    rows,  # int64 [rows]
    offsets,  # int32 [rows + 1]
    firsts,  # int32 [rows]
    whole,  # int32 [rows]
    seq_lens,  # int32 [batch rows]
    prefixes,  # int32 [rows], written
    stock_lens,  # int32 [rows], written
    tokens,  # int64 [packed], written
    mask,  # int32 [packed, words], written
    positions,  # int64 [tokens], written
    words,
    WORDS: tl.constexpr,
    WORD_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some roots and nodes of one row, each climbing to the root by itself. Grid: blocks of the longest row, tree rows.

    Root and nodes are numbered together here: 0 is the root, i + 1 the node i. A row of length 0 is a graph's padding.
    """
    tree = tl.program_id(1)
    begin = tl.load(offsets + tree)
    length = tl.load(offsets + tree + 1) - begin
    node = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = node < length
    row = tl.load(rows + tree)
    above = parents + tl.load(starts + row) - 1
    seq_len = tl.load(seq_lens + row)
    prefix = tl.where(length > 0, seq_len - length, 0)
    first = tl.load(firsts + tree)

    word = tl.arange(0, WORDS)
    sees = tl.zeros([BLOCK, WORDS], tl.int32)
    depth = tl.zeros([BLOCK], tl.int32)
    at = tl.where(real, node, -1)
    while tl.max(at, 0) >= 0:
        bit = tl.where(at >= 0, 1 << (at % WORD_BITS), 0)
        sees |= tl.where(word[None, :] == (at // WORD_BITS)[:, None], bit[:, None], 0)
        depth += (at > 0).to(tl.int32)
        at = tl.load(above + at, mask=at > 0, other=-2) + 1  # above the root: -1, and there it stays

    if tl.program_id(0) == 0:
        tl.store(prefixes + tree, prefix)
        tl.store(stock_lens + tree, tl.where(tl.load(whole + tree) != 0, length, seq_len))
    tl.store(tokens + begin + node, (first + node).to(tl.int64), mask=real)
    tl.store(positions + first + node, (prefix + depth).to(tl.int64), mask=real)
    tl.store(mask + (begin + node)[:, None] * words + word[None, :], sees, mask=real[:, None] & (word < words)[None, :])
