"""Where compiled kernels are kept from one start to the next: whether they can be, and that none outlives its sources.

numba looks for a folder that it can write to (``NUMBA_CACHE_DIR``, beside the sources, the user's cache) when a kernel
is declared, and raises if there is none, as in a container with a read-only file system; on a full disk it raises when
it has compiled a kernel. Then kernels are compiled at each start instead.

numba recompiles a cached kernel when the file that defines it changes, but not when a kernel that it calls, in another
file, does: after an edit or a ``git pull`` callers would go on running the old code.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from numba import njit

ROOM = 16 << 20
"""Bytes that all kernels together need, twice over."""


def problem() -> str | None:
    """What keeps compiled kernels from being kept, in words; None if nothing does."""
    try:
        folder = njit(cache=True)(problem).stats.cache_path  # numba's own choice; nothing is compiled yet
    except RuntimeError:
        return "no folder can be written to"
    try:
        with TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, ROOM)
    except OSError as error:
        return f"{folder} can't be written to: {error.strerror}"
    return None


PROBLEM = problem()
CACHE = PROBLEM is None
"""For ``njit(cache=...)``."""


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
