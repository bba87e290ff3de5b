"""Drops compiled kernels that are older than the sources.

numba recompiles a cached kernel when the file that defines it changes, but not when a kernel that it calls, in another
file, does: after an edit or a ``git pull`` callers would go on running the old code.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def drop_stale(package: Path) -> list[Path]:
    """Delete the cache index files in ``package`` that are older than its newest source file; returns them."""
    newest = max(source.stat().st_mtime for source in package.glob("*.py"))
    stale = []
    for index in package.glob("__pycache__/*.nbi"):
        with suppress(OSError):  # another process was faster, or the folder is read-only
            if index.stat().st_mtime < newest:
                index.unlink()
                stale.append(index)
    return stale
