"""The target model's likeliest tokens at every verified node, for proposers that learn from them."""

from __future__ import annotations

import torch

BLOCK = 128
SMALL = 1 << 15
"""Up to so many logits one pass over all of them is the cheapest."""


def likeliest(logits: torch.Tensor, k: int) -> torch.Tensor:
    """int32 [rows, k]: the tokens with the highest logits, highest first; -1 where a logit is minus infinity.

    Tokens with equal logits may come in any order. Large vocabularies are searched in two passes, because sorting
    costs much more than finding each block's maximum: the best k tokens are in the k blocks with the best maxima.

    Args:
        logits: float [rows, vocabulary]. Not changed.
        k: how many, at most the vocabulary.
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
