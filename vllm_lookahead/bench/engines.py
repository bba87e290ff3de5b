"""Starting engines (``engine.py``), each in a process of its own, asking them things, ending them."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from vllm_lookahead.bench.methods import Method
from vllm_lookahead.config import ConfigError
from vllm_lookahead.contract import UnsupportedVLLMError
from vllm_lookahead.demo.run import environment

if TYPE_CHECKING:
    from vllm_lookahead.bench.engine import Engine

Say = Callable[[str], None]
"""Is told what is being done."""

Ask = Callable[..., Any]
"""Calls a method of ``engine.Engine``: its name, then its arguments by name."""


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


@contextmanager
def engines(methods: Sequence[Method], settings: EngineSettings, say: Say) -> Iterator[tuple[dict[str, Ask], Any]]:
    """Start one engine per method; end them all in the end.

    Yields:
        Something to ask each engine with, by the method's name; and what a result file should say about each method,
        with ``failed`` for those that can't run here or didn't start.

    Raises:
        EngineFailedError: none started.
    """
    asks: dict[str, Ask] = {}
    about: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory(prefix="vllm-lookahead-bench-") as temporary, ExitStack() as stack:
        folder = settings.logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for number, method in enumerate(methods):
            entry: dict[str, Any] = {"speculative_config": method.speculative_config, "plugin": method.plugin}
            about[method.name] = entry
            if method.missing is not None:
                entry["failed"] = method.missing
                continue
            say(f"starting {method.name}")
            begin = time.perf_counter()
            try:
                ask = stack.enter_context(engine(method, settings, folder / f"{number}.log"))
                entry["engine"] = ask("info")
                entry["start_seconds"] = round(time.perf_counter() - begin, 2)
                asks[method.name] = ask
            except EngineFailedError as error:
                entry["failed"] = str(error)
        if not asks:
            raise EngineFailedError("\n".join(f"{name}: {entry['failed']}" for name, entry in about.items()))
        yield asks, about


@contextmanager
def engine(method: Method, settings: EngineSettings, log: Path) -> Iterator[Ask]:
    """One engine, in a process of its own.

    Raises:
        EngineFailedError: it can't be started.
    """
    pool = ProcessPoolExecutor(1, get_context("spawn"), _begin, (str(log),))

    def ask(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:]) if log.exists() else "(no log)"
            raise EngineFailedError(f"its process ended\n{tail}") from None

    try:
        with patch.dict(os.environ, settings.environment(plugin=method.plugin), clear=True):
            ask(_start, settings.model, method.speculative_config, settings.arguments, method.imports)
        yield lambda name, **arguments: ask(_call, name, arguments)
    finally:
        pool.shutdown()


# ---- in the engine's process

_engine: Engine | None = None


def _begin(log: str) -> None:
    """Send what this process prints to a file, and end when the process that started it does, however that ends."""
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)

    def follow(parent: Any) -> None:
        parent.join()
        os._exit(1)

    Thread(target=follow, args=(parent_process(),), daemon=True).start()


def _start(*arguments: Any) -> None:
    from vllm_lookahead.bench.engine import Engine

    global _engine
    with _told():
        _engine = Engine(*arguments)


def _call(name: str, arguments: dict[str, Any]) -> Any:
    with _told():
        return getattr(_engine, name)(**arguments)


@contextmanager
def _told() -> Iterator[None]:
    """Any error as one that can be sent to another process; the log has all of it."""
    try:
        yield
    except (ConfigError, UnsupportedVLLMError) as error:  # written for users
        raise EngineFailedError(str(error)) from None
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        sys.stderr.flush()
        raise EngineFailedError(f"{type(error).__name__}: {error}") from None
