"""The likeliest tokens of every row of logits."""

from __future__ import annotations

import pytest
import torch

from vllm_lookahead.drafting.likeliest import BLOCK, SMALL, likeliest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 8, 16])
@pytest.mark.parametrize("shape", [(1, 100), (3, 4096), (9, 4096), (5, 32_003), (2, BLOCK * 300), (1, SMALL + 1)])
def test_they_are_what_sorting_finds(shape: tuple[int, int], k: int, dtype: torch.dtype) -> None:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(k)).to(dtype)
    before = logits.clone()
    found = likeliest(logits, k)
    assert found.dtype == torch.int32
    assert found.shape == (shape[0], k)
    # bfloat16 has ties: the logits are compared
    assert torch.equal(logits.gather(-1, found.long()), logits.sort(dim=-1, descending=True).values[:, :k])
    assert all(len(set(row)) == k for row in found.tolist())
    assert torch.equal(logits, before)


@pytest.mark.parametrize("rows", [1, 20])
def test_what_a_grammar_forbids_is_nobodys_guess(rows: int) -> None:
    logits = torch.full((rows, 4100), -torch.inf)
    logits[:, 4099] = 1.0
    logits[:, 7] = 2.0
    assert likeliest(logits, 4).tolist() == [[7, 4099, -1, -1]] * rows
