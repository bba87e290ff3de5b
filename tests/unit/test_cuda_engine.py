"""The whole CUDA path in a real engine: runner, metadata, attention, kernels and commit, over torch instead of CUDA."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu_exactness.py"


def test_its_output_is_stock_vllms(tmp_path: Path) -> None:
    """Greedy and seeded, alone and batched: ``benchmarks/gpu_exactness.py`` compares with ``==``."""
    out = tmp_path / "exactness.json"
    command = [sys.executable, str(PROGRAM), "--cpu", str(out), "--engines", "lookahead", "--max-tokens", "16"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (found,) = json.loads(out.read_text())["results"]
    assert found["ok"]
    for kind in ("greedy, alone", "greedy, batched", "seeded, alone", "seeded, batched"):
        assert found[kind]["identical"] == found[kind]["of"]
    assert found["trees"]["verified"] > 10
    assert found["trees"]["moved"] > 0, "nothing was committed"
