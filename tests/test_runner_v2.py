"""Runs ``tests/v2`` in processes of their own: on Model Runner V2, with Triton's interpreter for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).parent
LONGEST = "test_exactness.py"
OTHERS = sorted(path.name for path in (TESTS / "v2").glob("test_*.py") if path.name != LONGEST)


@pytest.mark.parametrize("files", [[LONGEST], OTHERS], ids=["exactness", "others"])
def test_runner_v2(files: list[str]) -> None:
    """``PYTHONPATH=tests/interpreter TRITON_INTERPRET=1 pytest tests/v2/FILE`` is the same by hand.

    Two processes, so that two cores have something to do; files in one process share their engines.
    """
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(str(TESTS / "v2" / file) for file in files)]
    path = os.pathsep.join([str(TESTS / "interpreter"), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    for name in [name for name in environment if name.startswith("PYTEST_XDIST")]:
        del environment[name]
    result = subprocess.run(
        [*command, "--durations", "10"], env=environment, capture_output=True, text=True, timeout=2400, check=False
    )
    print(result.stdout[-3000:])
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
