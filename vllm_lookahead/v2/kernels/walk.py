"""The walk down every tree of a step, on the device: ``trees.step.walk_all`` for tokens that the host has not seen."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_lookahead.attention.packing import DeviceTrees


class DeviceWalks(NamedTuple):
    """Where the walks of one step ended (``trees.step.Walks``), on the device.

    Attributes:
        tokens: int64 [rows, width], the sampled tokens of each row's walk, padded with -1: what vLLM's
            ``SamplerOutput.sampled_token_ids`` is.
        paths: int32 [rows, width], the accepted nodes' indices within their row, padded with -1.
        lengths: int32 [rows], tokens in each row: accepted nodes + 1.
        order: int64 [nodes + rows], each row's logits rows, those of the walk first and in its order, then the rest
            in theirs: where vLLM looks for the logits of a row's n-th token.
    """

    tokens: torch.Tensor
    paths: torch.Tensor
    lengths: torch.Tensor
    order: torch.Tensor


def walk(sampled: torch.Tensor, trees: DeviceTrees, width: int, refused: torch.Tensor | None = None) -> DeviceWalks:
    """Walk every tree of a step, given the token sampled at every root and node.

    Args:
        sampled: int64 [nodes + rows], one token per logits row.
        trees: the step's trees.
        width: columns of the result, the engine's ``num_speculative_tokens`` + 1; more than any tree's nodes.
        refused: bool [nodes + rows], logits rows whose node must not be accepted whatever was sampled (a grammar's
            invalid drafts); roots are not looked at.
    """
    rows, device, block = trees.num_rows, sampled.device, triton.next_power_of_2(width - 1)
    walks = DeviceWalks(
        torch.empty((rows, width), dtype=torch.int64, device=device),
        torch.empty((rows, width), dtype=torch.int32, device=device),
        torch.empty(rows, dtype=torch.int32, device=device),
        torch.empty_like(sampled),
    )
    walk_kernel[(rows,)](
        sampled,
        trees.starts if refused is None else refused.view(torch.uint8),
        trees.starts,
        trees.tokens,
        trees.parents,
        *walks,
        width,
        REFUSES=refused is not None,
        BLOCK=block,
        num_warps=num_warps(block),
    )
    return walks


def num_warps(block: int) -> int:
    """What a walk waits for is a minimum over ``block`` nodes, which costs least within a warp that can hold them."""
    return 1 if block <= 256 else 4


def warm_up(trees: DeviceTrees, width: int) -> None:
    """Compile what ``walk`` may call, for this width. ``trees`` may be any."""
    sampled = torch.zeros(len(trees.tokens) + trees.num_rows, dtype=torch.int64, device=trees.tokens.device)
    walk(sampled, trees, width)
    walk(sampled, trees, width, torch.zeros_like(sampled, dtype=torch.bool))


# Where a tensor begins must not lead to another compilation while requests wait; nor may a number.
@triton.jit(do_not_specialize=["width"], do_not_specialize_on_alignment=["sampled", "refused"])
def walk_kernel(  # type: ignore[no-untyped-def]
    sampled,  # int64 [nodes + rows]
    refused,  # uint8 [nodes + rows], or anything
    starts,  # int32 [rows + 1]
    tokens,  # int32 [nodes]
    parents,  # int32 [nodes]
    walked,  # int64 [rows, width], written
    paths,  # int32 [rows, width], written
    lengths,  # int32 [rows], written
    order,  # int64 [nodes + rows], written
    width,
    REFUSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row's walk. Grid: rows.

    Which nodes carry the token that was sampled where they hang is found for all of them at once; a step down is then
    a minimum over the nodes (of siblings that carry it, the first is taken) and waits for no memory.
    """
    row = tl.program_id(0)
    start = tl.load(starts + row)
    nodes = tl.load(starts + row + 1) - start
    root = start + row  # its logits row
    node = tl.arange(0, BLOCK)
    real = node < nodes
    parent = tl.load(parents + start + node, mask=real, other=BLOCK)
    token = tl.load(tokens + start + node, mask=real, other=0)
    fits = real & (token == tl.load(sampled + root + 1 + parent, mask=real, other=-1))
    if REFUSES:
        fits &= tl.load(refused + root + 1 + node, mask=real, other=1) == 0
    parent = tl.where(fits, parent, BLOCK)  # nobody's children

    rank = tl.full([BLOCK], -1, tl.int32)  # where in the path an accepted node is
    accepted = 0
    child = tl.min(tl.where(parent == -1, node, BLOCK), 0)
    while child < BLOCK:
        rank = tl.where(node == child, accepted, rank)
        accepted += 1
        child = tl.min(tl.where(parent == child, node, BLOCK), 0)

    tl.store(lengths + row, accepted + 1)
    on_path = rank >= 0
    walked += row.to(tl.int64) * width
    paths += row.to(tl.int64) * width
    tl.store(walked, tl.load(sampled + root))
    tl.store(walked + 1 + rank, tl.load(sampled + root + 1 + node, mask=on_path, other=0), mask=on_path)
    tl.store(paths + rank, node, mask=on_path)
    unused = (node >= accepted) & (node < width - 1)
    tl.store(walked + 1 + node, tl.full([BLOCK], -1, tl.int64), mask=unused)
    tl.store(paths + node, tl.full([BLOCK], -1, tl.int32), mask=unused)
    tl.store(paths + width - 1, -1)  # no path is that long
    place = tl.where(on_path, rank, accepted + tl.cumsum((real & (rank < 0)).to(tl.int32), 0) - 1)
    tl.store(order + root, root.to(tl.int64))
    tl.store(order + root + 1 + place, (root + 1 + node).to(tl.int64), mask=real)
