"""Compiled kernels never outlive an edit of the code that they call."""

from __future__ import annotations

import os
from pathlib import Path

from proposers.numba_cache import drop_stale


def package_with_index(tmp_path: Path, *, source_time: float, index_time: float) -> Path:
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "kernel.py").touch()
    index = tmp_path / "__pycache__" / "caller.propose-1.py311.nbi"
    index.touch()
    os.utime(tmp_path / "kernel.py", (source_time, source_time))
    os.utime(index, (index_time, index_time))
    return index


def test_an_index_older_than_any_source_is_dropped(tmp_path: Path) -> None:
    index = package_with_index(tmp_path, source_time=2000, index_time=1000)
    assert drop_stale(tmp_path) == [index]
    assert not index.exists()


def test_an_index_newer_than_every_source_stays(tmp_path: Path) -> None:
    index = package_with_index(tmp_path, source_time=1000, index_time=2000)
    assert drop_stale(tmp_path) == []
    assert index.exists()
