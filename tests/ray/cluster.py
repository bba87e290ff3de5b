"""A real Ray cluster on this machine, for as long as a ``with`` block takes.

Run as a program, it ends a cluster when its standard input ends: when whoever started the cluster is gone, however.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MARK = "LOOKAHEAD_TEST_CLUSTER"
"""In the environment of all processes of a cluster, and of what they start: how they are found."""

TIMEOUT = 600.0


class Cluster:
    """One machine that plays several.

    Attributes:
        address: where drivers connect.
        environment: what drivers need in theirs.
    """

    def __init__(self, **variables: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="lr-", dir="/tmp"))  # a socket's path may have 107 characters
        self._mark = secrets.token_hex(8)
        self.environment = {
            **os.environ,
            MARK: self._mark,
            "SPT_NOENV": "1",  # else setproctitle writes over the environment, and the mark with it
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_worker_niceness": "0",
            # Ray would end engines because other programs need memory
            "RAY_memory_monitor_refresh_ms": "0",
            # one process less per engine
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            **variables,
        }
        # it would override kv_cache_memory_bytes
        self.environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
        self.address = ""
        command = [sys.executable, __file__, self._mark, str(self._folder)]
        self._undertaker = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def start(self, cpus: int, gpus: int = 0) -> int:
        """Start the first node, or another one; return its raylet. Ray believes in CPUs and GPUs what it is told."""
        others = set(self.raylets())
        place = ["--address", self.address] if self.address else ["--head", "--port", "0", "--include-dashboard=false"]
        ray = str(Path(sys.executable).parent / "ray")
        command = [ray, "start", *place, "--num-cpus", str(cpus), "--num-gpus", str(gpus)]
        command += ["--object-store-memory", str(100 << 20), "--temp-dir", str(self._folder), "--disable-usage-stats"]
        command += ["--include-log-monitor=false"]
        before = set(self.processes())
        for _ in range(3):  # Ray gives a node 30 s to start, whatever else the machine does
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
            for pid in set(self.processes()) - before:
                kill(pid)
        assert done.returncode == 0, done.stdout + done.stderr
        self.address = (self._folder / "ray_current_cluster").read_text()
        self.environment["RAY_ADDRESS"] = self.address
        (raylet,) = set(self.raylets()) - others
        return raylet

    def processes(self, name: str = "") -> list[int]:
        """The cluster's processes whose command line holds a name."""
        return [pid for pid, line in marked(self._mark) if name in line]

    def raylets(self) -> list[int]:
        """The daemons of the nodes."""
        return self.processes("/raylet/raylet ")

    def engines(self) -> list[int]:
        """The actors of a batch job that hold an engine."""
        return self.processes("ray::MapWorker(MapBatches(vLLMEngineStageUDF))")

    def stop(self) -> None:
        """End every process of the cluster, and whatever those left behind."""
        self._undertaker.communicate()
        assert self._undertaker.returncode == 0


def marked(mark: str) -> Iterator[tuple[int, str]]:
    """The processes of a cluster, and their command lines."""
    entry = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may have ended
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name), (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()


def bury(mark: str, folder: str) -> None:
    """Wait for the end of standard input; then end a cluster."""
    sys.stdin.read()
    while left := list(marked(mark)):
        for pid, _ in left:
            kill(pid)
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running(cpus: int, gpus: int = 0, **variables: str) -> Iterator[Cluster]:
    """A cluster of one node."""
    cluster = Cluster(**variables)
    try:
        cluster.start(cpus, gpus)
        yield cluster
    finally:
        cluster.stop()


def wait_until(condition: Callable[[], Any], what: str, seconds: float = TIMEOUT) -> None:
    """Wait; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


def kill(pid: int) -> None:
    """End a process without asking it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    bury(*sys.argv[1:])
