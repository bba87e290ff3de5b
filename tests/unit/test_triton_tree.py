"""The Triton kernel of tree attention next to a float64 reference, and compiled for GPUs nobody needs here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from kernel_runs import DEVICE, compiled, compiles, run_under_interpreter, runs_kernels, starts_interpreter

SIZES = [(dtype, head_size) for dtype in ("float32", "float16", "bfloat16") for head_size in (64, 80, 96, 128, 256)]


@starts_interpreter
def test_kernels_under_the_interpreter() -> None:
    run_under_interpreter(__file__)


@runs_kernels
@pytest.mark.parametrize(("dtype", "head_size"), SIZES)
def test_tree_alone(dtype: str, head_size: int) -> None:
    from kernel_checks import check_tree

    check_tree(head_size, DEVICE, getattr(torch, dtype), 4, 2, head_size)


@runs_kernels
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (8, 2), (7, 1), (12, 2)])
def test_groups_of_heads(heads: int, kv_heads: int) -> None:
    from kernel_checks import check_tree

    check_tree(heads, DEVICE, torch.float32, heads, kv_heads, 64, rows=5)


@runs_kernels
@pytest.mark.parametrize("nodes", [2, 31, 32, 33, 100, 256])
def test_sizes_of_trees(nodes: int) -> None:
    from kernel_checks import check_tree

    check_tree(nodes, DEVICE, torch.float32, 2, 1, 64, rows=1, nodes=nodes)


@runs_kernels
@pytest.mark.parametrize(("dtype", "head_size"), SIZES)
def test_merged_with_a_prefix(dtype: str, head_size: int) -> None:
    from kernel_checks import check_merge

    check_merge(head_size + len(dtype), DEVICE, getattr(torch, dtype), 4, 2, head_size)


@runs_kernels
@pytest.mark.parametrize(("dtype", "head_size"), [("float32", 64), ("bfloat16", 80), ("bfloat16", 128)])
@settings(max_examples=6)
@given(seed=st.integers(0, 2**32 - 1), heads=st.sampled_from([(2, 2), (4, 2), (8, 2), (7, 1), (40, 1)]))
def test_launched_once_for_all_steps_of_a_size(dtype: str, head_size: int, seed: int, heads: tuple[int, int]) -> None:
    """What a CUDA graph does: the launch of one step stands for others'."""
    from kernel_checks import check_replays

    check_replays(seed, DEVICE, getattr(torch, dtype), *heads, head_size)


@runs_kernels
@pytest.mark.parametrize("forgotten", ["tile_rows", "offsets", "firsts", "prefixes", "mask"])
def test_this_check_sees_what_does_not_stay_in_its_place(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: one of the tensors is at a new address in every step."""
    import kernel_checks

    def moved(*args: Any, place_in: Any = kernel_checks.place_in) -> Any:
        packed = place_in(*args)
        return replace(packed, **{forgotten: getattr(packed, forgotten).clone()})

    monkeypatch.setattr(kernel_checks, "place_in", moved)
    with pytest.raises(AssertionError, match=r"off by|padding was written|differs"):
        [kernel_checks.check_replays(seed, DEVICE, torch.float32, 4, 2, 32) for seed in range(6)]


COMPILED = [(*size, capability) for size in SIZES if size[0] != "float32" for capability in (80, 90)]


@compiles
@pytest.mark.parametrize(("dtype", "head_size", "capability"), [*COMPILED, ("bfloat16", 128, 120)])
def test_tree_kernel_compiles(dtype: str, head_size: int, capability: int) -> None:
    """Not for float32, which FlashAttention doesn't have either."""
    from kernel_compile import compile_tree_kernel

    asm = compiled(compile_tree_kernel, capability, dtype, head_size)
    assert "mma" in asm["ptx"], "no tensor cores"


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("per_kv", [1, 7, 40])
def test_tree_kernel_compiles_for_any_group_of_heads(per_kv: int, capability: int) -> None:
    from kernel_compile import compile_tree_kernel

    assert "mma" in compiled(compile_tree_kernel, capability, "bfloat16", 128, per_kv)["ptx"], "no tensor cores"
