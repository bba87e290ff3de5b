"""Keeps vLLM's CPU start-up alive once numba is loaded.

Without Triton, vLLM 0.32 looks through every loaded module for kernels to replace and reads ``vars(value)`` of each
object (``triton_utils/dispatcher.py``, ``_rebind_kernels``). llvmlite's library handle answers any attribute name with
a function of that name, ``__dict__`` too, so the worker dies with "'_lib_fn_wrapper' object has no attribute 'get'".
Any program that imports numba before vLLM's worker starts can meet this; we load numba ourselves, so we must not.
"""

from __future__ import annotations

import sys


def guard() -> None:
    """Give llvmlite's handle an empty ``__dict__``, if llvmlite is loaded. Nothing else about it changes."""
    ffi = sys.modules.get("llvmlite.binding.ffi")
    functions = getattr(getattr(ffi, "lib", None), "_fntab", None)
    if isinstance(functions, dict):
        functions.setdefault("__dict__", {})
