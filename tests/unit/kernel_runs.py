"""How tests run Triton kernels on machines without a GPU: in Triton's interpreter, or compiled without a launch.

Triton decides about its interpreter when it is imported, and vLLM imports it. So each file of kernel tests runs itself
once more in a process of its own (``run_under_interpreter``); ``TRITON_INTERPRET=1 pytest FILE`` is the same by hand.
On a GPU the kernels run as they are.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="runs under TRITON_INTERPRET=1")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
starts_interpreter = pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="this is the interpreter, or a GPU")


def run_under_interpreter(path: str) -> None:
    """Run the tests of a file in a process in which Triton interprets its kernels."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", path]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def compiled(function: Any, *args: Any, **more: Any) -> Any:
    """What a kernel compiles to."""
    try:
        return function(*args, **more).asm
    except RuntimeError as error:
        if "ptxas" in str(error).lower() or "active driver" in str(error):
            pytest.skip(f"this Triton can't compile without a device: {error}")
        raise


@contextmanager
def launched_nowhere(capability: int = 90) -> Iterator[dict[str, set[Any]]]:
    """Within the block kernels are bound and compiled as on a GPU of this capability, but not run.

    Yields:
        Per kernel's name what it has been compiled for.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled_for: dict[str, set[Any]] = {}
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if self not in kernels:
            self.device_caches.clear()  # of what others have compiled
            kernels.append(self)
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled_for[self.fn.__name__] = set(self.device_caches[0][0])
        return kernel

    gpu = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", gpu)
        patch.setattr(JITFunction, "run", compile_only)
        yield compiled_for
    for kernel in kernels:
        kernel.device_caches.clear()
