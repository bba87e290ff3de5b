"""The likeliest tokens of every row of logits."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_lookahead.drafting import likeliest_cpu
from vllm_lookahead.drafting.likeliest import BLOCK, SMALL, likeliest, likeliest_by_topk, likeliest_np, warm_up
from vllm_lookahead.drafting.likeliest_cpu import BLOCK as CPU_BLOCK
from vllm_lookahead.drafting.likeliest_cpu import FORMATS
from vllm_lookahead.v1 import runner as v1
from vllm_lookahead.v2 import runner as v2

Find = Callable[[torch.Tensor, int], torch.Tensor]

both = pytest.mark.parametrize("find", [likeliest, likeliest_by_topk])
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda logits: logits,
    "rows apart": lambda logits: torch.nn.functional.pad(logits, (3, 61), value=torch.inf)[:, 3:-61],
    "every second row": lambda logits: logits.repeat_interleave(2, dim=0)[::2],
    "columns apart": lambda logits: logits.repeat_interleave(2, dim=1)[:, ::2],
    "columns first": lambda logits: logits.t().contiguous().t(),
}


def check(find: Find, logits: torch.Tensor, k: int) -> None:
    """What is found are the k highest logits, in order, each once."""
    before = logits.clone()
    found = find(logits, k)
    assert found.dtype == torch.int32
    assert found.shape == (len(logits), k)
    assert torch.equal(logits, before)
    best = logits.sort(dim=-1, descending=True).values[:, :k]
    known = found >= 0
    assert torch.equal(known, best != -torch.inf)
    # the logits are compared: equal ones may come in any order
    assert torch.equal(logits.gather(-1, found.clamp(min=0).long())[known], best[known])
    assert all(len(set(row[row >= 0].tolist())) == int((row >= 0).sum()) for row in found)
    assert torch.equal(find(logits, k), found)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("k", [1, 8, 16])
@pytest.mark.parametrize("shape", [(1, 100), (3, 4096), (9, 4096), (5, 32_003), (2, BLOCK * 300), (1, SMALL + 1)])
def test_they_are_what_sorting_finds(find: Find, shape: tuple[int, int], k: int, dtype: torch.dtype) -> None:
    check(find, torch.randn(shape, generator=torch.Generator().manual_seed(k)).to(dtype), k)


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 3),
    vocabulary=st.integers(16, 6 * CPU_BLOCK),
    k=st.integers(1, 16),
    dtype=st.sampled_from(list(FORMATS)),
    layout=st.sampled_from(list(LAYOUTS)),
    levels=st.sampled_from([1, 2, 5, 1000]),
    forbidden=st.sampled_from([0.0, 0.5, 0.97, 1.0]),
)
def test_any_logits_in_any_layout(
    seed: int, rows: int, vocabulary: int, k: int, dtype: torch.dtype, layout: str, levels: int, forbidden: float
) -> None:
    """Few levels make ties, some of them between the two zeros; what is forbidden is minus infinity."""
    rng = np.random.default_rng(seed)
    logits = (rng.integers(levels, size=(rows, vocabulary)) - levels // 2) * rng.choice([-1.0, 1.0, 1e-3, 1e-39])
    logits[rng.random(logits.shape) < forbidden] = -np.inf
    check(likeliest, LAYOUTS[layout](torch.from_numpy(logits).to(dtype)), k)


@given(
    values=st.lists(st.floats(width=16, allow_nan=False), min_size=1, max_size=200),
    dtype=st.sampled_from(list(FORMATS)),
    data=st.data(),
)
def test_any_float(values: list[float], dtype: torch.dtype, data: st.DataObject) -> None:
    """Both signs, both infinities, both zeros and what is next to them."""
    check(likeliest, torch.tensor([values], dtype=dtype), data.draw(st.integers(1, min(16, len(values)))))


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("sign", [-1, 1])
def test_sorted_logits(sign: int, descending: bool) -> None:
    """Every block is the best so far, or the first one holds all."""
    logits = sign * torch.linspace(1, 2, 3000).sort(descending=descending).values
    check(likeliest, logits.expand(3, -1), 16)


@both
@pytest.mark.parametrize("rows", [1, 20])
def test_what_a_grammar_forbids_is_nobodys_guess(find: Find, rows: int) -> None:
    logits = torch.full((rows, 4100), -torch.inf)
    logits[:, 4099] = 1.0
    logits[:, 7] = 2.0
    assert find(logits, 4).tolist() == [[7, 4099, -1, -1]] * rows


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_only_minus_infinity_is_forbidden(dtype: torch.dtype) -> None:
    lowest = torch.finfo(dtype).min
    assert likeliest(torch.tensor([[-torch.inf, lowest, 0.0, -torch.inf]], dtype=dtype), 4).tolist() == [[2, 1, -1, -1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_host_gets_the_same(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0), dtype=dtype)
    found = likeliest_np(logits, 5)
    assert found.dtype == np.int32
    assert found.tolist() == likeliest(logits, 5).tolist() == logits.topk(5).indices.tolist()


def test_nothing_is_compiled_after_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = numba.njit(likeliest_cpu.find_likeliest.py_func)  # other tests have compiled the module's own
    monkeypatch.setattr(likeliest_cpu, "find_likeliest", kernel)
    warm_up(torch.device("cpu"))
    compiled = list(kernel.signatures)
    assert len(compiled) == len({integer for integer, _ in FORMATS.values()})
    for dtype in FORMATS:
        for layout in LAYOUTS.values():
            for rows in (0, 1, 3):
                likeliest(layout(torch.zeros(rows, 100, dtype=dtype)), 8)
    assert kernel.signatures == compiled


@pytest.mark.parametrize("num_top", [0, 4])
@pytest.mark.parametrize(
    ("module", "mixin"), [(v1, v1.LookaheadRunnerMixin), (v2, v2.LookaheadV2RunnerMixin)], ids=["V1", "V2"]
)
def test_engines_that_need_it_start_with_it(
    module: Any, mixin: Any, num_top: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[torch.device] = []
    monkeypatch.setattr(module, "warm_up_likeliest", started.append)
    monkeypatch.setattr(module, "policy_for", lambda *arguments: None)
    proposer = SimpleNamespace(num_top=num_top)
    runner = object.__new__(mixin)
    vars(runner).update(
        device=torch.device("cpu"),
        drafter=SimpleNamespace(proposer=proposer, config=None, warm_up=lambda: None),
        planner=SimpleNamespace(),
        scheduler_config=None,
        trees_verifiable=False,
    )
    runner.prepare_drafting()
    assert started == [runner.device] * bool(num_top)
