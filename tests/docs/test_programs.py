"""The programs in the documents run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from docs.blocks import Piece, pieces


@pytest.mark.parametrize("piece", pieces("python vllm"), ids=lambda piece: piece.where)
def test_program(piece: Piece, demo_model: str, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(piece.text.replace("vllm_lookahead/demo/model", demo_model))
    environment = {**os.environ}
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_memory_bytes
    done = subprocess.run(
        [sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert "return a + b" in done.stdout
