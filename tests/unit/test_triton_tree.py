"""The Triton kernel of tree attention next to a float64 reference, and compiled for GPUs nobody needs here."""

from __future__ import annotations

import pytest
import torch

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


COMPILED = [(*size, capability) for size in SIZES if size[0] != "float32" for capability in (80, 90)]


@compiles
@pytest.mark.parametrize(("dtype", "head_size", "capability"), [*COMPILED, ("bfloat16", 128, 120)])
def test_tree_kernel_compiles(dtype: str, head_size: int, capability: int) -> None:
    """Not for float32, which FlashAttention doesn't have either."""
    from kernel_compile import compile_tree_kernel

    asm = compiled(compile_tree_kernel, capability, dtype, head_size)
    assert "mma" in asm["ptx"], "no tensor cores"
