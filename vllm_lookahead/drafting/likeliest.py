"""The target model's likeliest tokens at every verified node, for proposers that learn from them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_lookahead.drafting.likeliest_cpu import FORMATS, likeliest_on_cpu
from vllm_lookahead.drafting.likeliest_cpu import warm_up as warm_up_cpu

BLOCK = 128
SMALL = 1 << 15
"""Up to so many logits one pass over all of them is the cheapest."""


def likeliest(logits: torch.Tensor, k: int) -> torch.Tensor:
    """int32 [rows, k]: the tokens with the highest logits, highest first; -1 where a logit is minus infinity.

    Tokens with equal logits may come in any order, which is the same every time.

    Args:
        logits: float [rows, vocabulary]. Not changed.
        k: how many, at most the vocabulary.
    """
    if logits.is_cpu and logits.dtype in FORMATS:
        return torch.from_numpy(likeliest_on_cpu(logits, k))
    return likeliest_by_topk(logits, k)


def likeliest_np(logits: torch.Tensor, k: int) -> NDArray[np.int32]:
    """As ``likeliest``, on the host."""
    if logits.is_cpu and logits.dtype in FORMATS:
        return likeliest_on_cpu(logits, k)  # without the detour by a tensor, which takes longer than a small search
    return likeliest_by_topk(logits, k).cpu().numpy()


def likeliest_by_topk(logits: torch.Tensor, k: int) -> torch.Tensor:
    """As ``likeliest``, with torch's operations, for any device.

    Large vocabularies are searched in two passes, because sorting costs much more than finding each block's maximum:
    the best k tokens are in the k blocks with the best maxima.
    """
    rows, vocabulary = logits.shape
    if logits.numel() <= SMALL or vocabulary < 2 * k * BLOCK:
        values, tokens = logits.topk(k, dim=-1)
    else:
        blocks = vocabulary // BLOCK
        whole = blocks * BLOCK
        maxima = logits[:, :whole].view(rows, blocks, BLOCK).amax(-1)
        starts = maxima.topk(k, dim=-1, sorted=False).indices * BLOCK
        candidates = (starts.unsqueeze(-1) + torch.arange(BLOCK, device=logits.device)).flatten(1)
        if whole < vocabulary:
            rest = torch.arange(whole, vocabulary, device=logits.device).expand(rows, -1)
            candidates = torch.cat((candidates, rest), dim=-1)
        values, places = logits.gather(-1, candidates).topk(k, dim=-1)
        tokens = candidates.gather(-1, places)
    return tokens.masked_fill(values == -torch.inf, -1).to(torch.int32)


def warm_up(device: torch.device) -> None:
    """Compile what the first call for logits on this device would wait for."""
    if device.type == "cpu":
        warm_up_cpu()
