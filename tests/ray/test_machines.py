"""Batch jobs on several nodes: one is lost; and an engine whose two ranks are Ray's actors."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, kill, running
from jobs import ENGINE, ROWS, Job, committed, lines, log, write_lines

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def check(job: Job, expected: dict[str, dict[str, Any]]) -> None:
    """The job ends well, with every row once, as stock vLLM has it."""
    status, printed = job.wait()
    assert status == 0, printed + log(job.target)
    assert lines(job.target / "results.jsonl") == [{**row, **expected[row["id"]]} for row in ROWS]
    written = Counter(row["id"] for part in committed(job.target) for row in lines(part))
    assert written == Counter(row["id"] for row in ROWS)


def test_a_node_is_lost(demo_model: str, expected: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    # the first node has no place for engines, the second for one, the third for both
    with running(cpus=0) as cluster:
        lost = cluster.start(cpus=1)
        cluster.start(cpus=2)
        job = Job(cluster, write_lines(tmp_path / "in.jsonl", ROWS), tmp_path / "out", demo_model)
        try:
            job.wait_for_parts(4)
            kill(lost)
            before = len(committed(job.target))
            check(job, expected)
        finally:
            job.kill()
        assert before < len(committed(job.target)), "the node was lost too late to prove anything"


@pytest.fixture
def two_devices(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster where vLLM takes CPUs for devices that Ray hands out: see ``ray_cpu_platform``."""
    metadata = tmp_path / "plugin" / "ray_cpu_platform-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-cpu-platform\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[vllm.platform_plugins]\nray_cpu = ray_cpu_platform:name\n")
    path = [str(metadata.parent), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {"PYTHONPATH": os.pathsep.join(path), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with running(cpus=4, gpus=2, **variables) as cluster:
        yield cluster


def test_two_ranks(two_devices: Cluster, demo_model: str, expected: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    engine = json.dumps({**ENGINE, "tensor_parallel_size": 2})
    source = write_lines(tmp_path / "in.jsonl", ROWS)
    job = Job(two_devices, source, tmp_path / "out", demo_model, "--engine", engine, "--replicas", "1")
    try:
        job.wait_for_parts(1)
        workers = two_devices.processes("RayWorker")
        check(job, expected)
    finally:
        job.kill()
    assert len(workers) == 2
