"""A corpus to guess from: tokens and their index in one file, which every worker maps into its memory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from proposers import text_index
from proposers.text_index import TOKENS, allocate, extend
from proposers.tree import IntArray

MAX_TOKENS = 100_000_000
"""Largest corpus: the index counts in 32 bits."""
MOST_ROWS = 1 << 22
"""Rows for more than so many n-grams (256 MiB) are not kept: in a large text the latest come first."""


def write_index(tokens: IntArray, path: Path, order: int) -> None:
    """Index a corpus and write it to a file, which appears at once or not at all.

    Args:
        tokens: int32 [t], at most ``MAX_TOKENS``.
        path: the file.
        order: the largest n-gram that is looked up.

    Raises:
        OSError: it can't be written.
    """
    state = allocate(len(tokens), order, own_tokens=True, rows_per_token=min(1.0, MOST_ROWS / len(tokens)))
    state[state[TOKENS] :][: len(tokens)] = tokens
    state[text_index.LENGTH] = len(tokens)
    extend(state, tokens, len(tokens) - 1)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        state.tofile(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def open_index(path: Path) -> IntArray:
    """Map what ``write_index`` wrote. Nobody writes to it; pages are read when they are needed, and shared.

    Raises:
        OSError: the file can't be read.
    """
    # private and writable, as numba's kernels have one type for all indices
    return np.asarray(np.memmap(path, np.int32, "c"))
