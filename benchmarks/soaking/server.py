"""``vllm serve`` as a subprocess: started on a free port, ended with everything it started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from soaking.counters import Counters

VLLM = str(Path(sys.executable).parent / "vllm")
START_TIMEOUT = 300.0


class Server:
    """One running server.

    Attributes:
        url: where it listens.
        process: the process, which leads a session of its own.
        log: the file with everything it printed.
    """

    def __init__(self, model: str, log: Path, *arguments: str, **environment: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [VLLM, "serve", model, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo"]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Wait until the server answers ``/health``; fail with its log if it dies."""
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"vllm serve ended:\n{self.log.read_text()[-5000:]}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
            time.sleep(0.5)
        raise RuntimeError(f"no answer within {START_TIMEOUT:.0f} s:\n{self.log.read_text()[-5000:]}")

    def metrics(self) -> dict[str, float]:
        """``/metrics`` as numbers, summed over labels."""
        return Counters.read(self.url).sums()

    def stop(self) -> None:
        """End the server and its engine processes."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def serving(model: str, log: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    """A server for the length of a ``with`` block. It may not answer yet: see ``Server.wait_until_ready``."""
    server = Server(model, log, *arguments, **environment)
    try:
        yield server
    finally:
        server.stop()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
