"""The Triton kernels, run by Triton's interpreter next to float64 references, and compiled for GPUs nobody needs here.

Triton decides about its interpreter when it is imported, and vLLM imports it. So the kernels run in a process of their
own: ``TRITON_INTERPRET=1 pytest tests/unit/test_triton_tree.py`` runs them one by one. On a GPU they run as they are.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs under TRITON_INTERPRET=1")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

SIZES = [(dtype, head_size) for dtype in ("float32", "float16", "bfloat16") for head_size in (64, 80, 96, 128, 256)]


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="this is the interpreter, or a GPU")
def test_kernels_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@runs_kernels
@pytest.mark.parametrize(("dtype", "head_size"), SIZES)
def test_tree_alone(dtype: str, head_size: int) -> None:
    from gpu_checks import check_tree

    check_tree(head_size, DEVICE, getattr(torch, dtype), 4, 2, head_size)


@runs_kernels
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (8, 2), (7, 1), (12, 2)])
def test_groups_of_heads(heads: int, kv_heads: int) -> None:
    from gpu_checks import check_tree

    check_tree(heads, DEVICE, torch.float32, heads, kv_heads, 64, rows=5)


@runs_kernels
@pytest.mark.parametrize("nodes", [2, 31, 32, 33, 100, 256])
def test_sizes_of_trees(nodes: int) -> None:
    from gpu_checks import check_tree

    check_tree(nodes, DEVICE, torch.float32, 2, 1, 64, rows=1, nodes=nodes)


@runs_kernels
@pytest.mark.parametrize(("dtype", "head_size"), SIZES)
def test_merged_with_a_prefix(dtype: str, head_size: int) -> None:
    from gpu_checks import check_merge

    check_merge(head_size + len(dtype), DEVICE, getattr(torch, dtype), 4, 2, head_size)


@runs_kernels
@pytest.mark.parametrize("slots_first", [True, False], ids=["NHD", "HND"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8"])
def test_commit(dtype: str, slots_first: bool) -> None:
    from gpu_checks import check_commit

    moved = sum(check_commit(seed, DEVICE, getattr(torch, dtype), slots_first=slots_first) for seed in range(4))
    assert moved > 5, "nothing had to move"


COMPILED = [(*size, capability) for size in SIZES if size[0] != "float32" for capability in (80, 90)]


@compiles
@pytest.mark.parametrize(("dtype", "head_size", "capability"), [*COMPILED, ("bfloat16", 128, 120)])
def test_tree_kernel_compiles(dtype: str, head_size: int, capability: int) -> None:
    """Not for float32, which FlashAttention doesn't have either."""
    from gpu_compile import compile_tree_kernel

    asm = compiled(compile_tree_kernel, capability, dtype, head_size)
    assert "mma" in asm["ptx"], "no tensor cores"


@compiles
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_commit_kernel_compiles(capability: int) -> None:
    from gpu_compile import compile_commit_kernel

    asm = compiled(compile_commit_kernel, capability)
    assert "ld.global.v" in asm["ptx"] or "ld.global.b64" in asm["ptx"]


def compiled(function: Any, *args: Any) -> Any:
    """What a kernel compiles to."""
    try:
        return function(*args).asm
    except RuntimeError as error:
        if "ptxas" in str(error).lower() or "active driver" in str(error):
            pytest.skip(f"this Triton can't compile without a device: {error}")
        raise
