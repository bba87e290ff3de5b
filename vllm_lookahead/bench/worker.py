"""The other end of ``engine.py``'s pipe: start an engine's process, ask it things, end it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm_lookahead.bench.methods import Method
from vllm_lookahead.demo.run import environment

Say = Callable[[str, str], None]
"""Is told what is being done, and with whom."""


def silent(what: str, who: str) -> None:
    """A ``Say`` that doesn't."""


class EngineFailedError(RuntimeError):
    """An engine could not be started or died."""


@dataclass(frozen=True)
class EngineSettings:
    """What all engines of a comparison have in common.

    Attributes:
        model: folder or name.
        arguments: further arguments for ``vllm.LLM``.
        threads: how many each engine computes with. None: the environment's OMP_NUM_THREADS, else one less than there
            are cores, as vLLM itself has it on CPUs.
        logs: the folder that keeps what each engine prints. None: it is thrown away.
    """

    model: str
    arguments: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None
    logs: Path | None = None

    def environment(self, *, plugin: bool) -> dict[str, str]:
        """The environment of an engine's process."""
        default = os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) - 1)))
        threads = default if self.threads is None else str(self.threads)
        return {
            **environment(stock=not plugin),
            "OMP_NUM_THREADS": threads,
            # stock ngram's first parallel numba kernel sets torch's thread count to numba's as well
            "NUMBA_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }


class Worker:
    """An engine's process.

    Attributes:
        method: what runs there.
        log: the file with everything that it printed.
        start_seconds: from the process's start to the engine's being ready.
        info: the engine's own account of its settings.
    """

    def __init__(self, method: Method, settings: EngineSettings, log: Path) -> None:
        self.method = method
        self.log = log
        begin = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm_lookahead.bench.engine", str(log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=settings.environment(plugin=method.plugin),
            start_new_session=True,  # so that whatever it starts can be ended with it
        )
        try:
            self.info: dict[str, Any] = self.call(
                "start",
                model=settings.model,
                speculative_config=method.speculative_config,
                arguments=settings.arguments,
                imports=method.imports,
            )
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - begin

    def call(self, command: str, **arguments: Any) -> Any:
        """Have a command of ``engine.Engine`` carried out.

        Raises:
            EngineFailedError: it failed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            print(json.dumps({"command": command, "arguments": arguments}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "its process ended\n" + _tail(self.log)}
        if "error" in answer:
            raise EngineFailedError(answer["error"])
        return answer["answer"]

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()  # it ends when there are no more commands
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


@dataclass
class Engines:
    """The engines of a comparison, all started, one of them computing at a time.

    Attributes:
        workers: by name of the method, those that started.
        starts: by name, the seconds of each start.
        failed: by name, why a method has no engine.
    """

    workers: dict[str, Worker] = field(default_factory=dict)
    starts: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def about(self, methods: Sequence[Method]) -> dict[str, Any]:
        """What belongs into a result file about each method."""
        return {
            method.name: {
                "speculative_config": method.speculative_config,
                "plugin": method.plugin,
                "start_seconds": self.starts.get(method.name, []),
                "failed": self.failed.get(method.name),
                "engine": self.workers[method.name].info if method.name in self.workers else None,
            }
            for method in methods
        }


@contextmanager
def engines(
    methods: Sequence[Method],
    settings: EngineSettings,
    *,
    starts: int = 1,
    say: Say = silent,
) -> Iterator[Engines]:
    """Start one engine per method; end them all in the end.

    Args:
        methods: what to start. Those that can't run here, or fail, are in ``Engines.failed``.
        settings: of all engines.
        starts: start each so many times: the later starts find warm caches.
        say: is told what happens.
    """
    result = Engines()
    with TemporaryDirectory(prefix="vllm-lookahead-bench-") as temporary, ExitStack() as stack:
        folder = settings.logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for method in methods:
            if method.missing is not None:
                result.failed[method.name] = method.missing
                continue
            try:
                for number in range(starts):
                    say(f"starting {method.name}", f"{number + 1} of {starts}")
                    worker = Worker(method, settings, folder / f"{_file_name(method.name)}.log")
                    result.starts.setdefault(method.name, []).append(worker.start_seconds)
                    if number + 1 < starts:
                        worker.close()
            except EngineFailedError as error:
                result.failed[method.name] = str(error)
                continue
            stack.callback(worker.close)
            result.workers[method.name] = worker
        yield result


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "(no log)"
