"""One cluster for the tests that leave it as it was, and what stock vLLM makes of a job's rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, running
from jobs import ENGINE, ROWS, SAMPLING, write_lines


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes minutes, unless the marks to run are named: ``make test ARGS="-m ray"``."""
    if config.option.markexpr:
        return
    for item in items:
        if item.path.parent == Path(__file__).parent and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with -m ray"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster of one node."""
    with running(cpus=4) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def expected(demo_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By id: what ``LLM.generate`` of stock vLLM, without our plugin, makes of the rows."""
    folder = tmp_path_factory.mktemp("expected")
    source, target = write_lines(folder / "in.jsonl", ROWS), folder / "out.json"
    program = Path(__file__).with_name("generate.py")
    engine = json.dumps({**ENGINE, "max_num_seqs": 16})
    command = [sys.executable, str(program), demo_model, engine, json.dumps(SAMPLING), str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    found: dict[str, dict[str, Any]] = json.loads(target.read_text())
    return found
