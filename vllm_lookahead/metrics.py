"""Where accepted guesses came from, as Prometheus counters beside vLLM's.

Drafts are verified in a worker, ``/metrics`` is served by the front end, and vLLM's own statistics have no room for
this. So both map one small file: each engine's first worker adds to it, and the front end reads it when it is asked.
With several API servers ``prometheus_client`` already has such files, and a worker writes them as a server would.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import REGISTRY
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.values import MultiProcessValue

from proposers import DraftTree
from proposers.tree import IntArray

logger = logging.getLogger(f"vllm.{__name__}")

FILE = "VLLM_LOOKAHEAD_COUNTS"
"""Tells the workers, which inherit the front end's environment, where the file is."""
WINDOW = "window"
"""Source of the nodes of a lookahead branch."""
DRAFTED, ACCEPTED = 0, 1
MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
"""Set where several API servers share vLLM's metrics."""
LABELS = ("model_name", "engine", "source")
COUNTERS = (
    ("vllm:spec_decode_num_draft_tokens_by_source", "Number of verified draft tokens, by where they came from."),
    ("vllm:spec_decode_num_accepted_tokens_by_source", "Number of accepted draft tokens, by where they came from."),
)

Counts = NDArray[np.int64]


class SourceCollector(Collector):
    """The counters of the engines that this process started last.

    Attributes:
        counts: int64 [engines, 2, sources].
        sources: their names.
        model: the model's name.
    """

    def __init__(self) -> None:
        self.counts: Counts = np.zeros((0, 2, 0), np.int64)
        self.sources: tuple[str, ...] = ()
        self.model = ""

    def collect(self) -> Iterator[CounterMetricFamily]:
        """See ``prometheus_client.registry.Collector``."""
        for row, (name, text) in enumerate(COUNTERS):
            family = CounterMetricFamily(name, text, labels=LABELS)
            for engine, counts in enumerate(self.counts):
                for source, value in zip(self.sources, counts[row], strict=True):
                    family.add_metric([self.model, str(engine), source], int(value))
            yield family


_collector: SourceCollector | None = None


def publish(sources: Sequence[str], model: str, engines: int) -> None:
    """Make room for the counts and register the counters; replaces those of an engine that this process had before.

    Args:
        sources: names of what guesses come from.
        model: the name that the model is served under.
        engines: how many there are (data parallelism).
    """
    global _collector
    if _collector is None:
        _collector = SourceCollector()
        REGISTRY.register(_collector)
    names = (*sources, WINDOW)
    os.environ.pop(FILE, None)
    try:
        counts = _new_file((engines, 2, len(names)))
    except OSError as error:
        logger.warning("No counters by source on /metrics: there is no room for their file: %s", error)
        counts = np.zeros((0, 2, len(names)), np.int64)
    _collector.counts = counts
    _collector.sources = names
    _collector.model = model


def _new_file(shape: tuple[int, ...]) -> Counts:
    """Map a new file of zeros, whose name workers find in ``FILE``.

    Raises:
        OSError: there is no room for it.
    """
    handle, path = tempfile.mkstemp(prefix="vllm-lookahead-")
    atexit.register(_remove, path, os.getpid())
    try:
        # its blocks now: where they are missing when somebody counts, the kernel kills the process
        os.posix_fallocate(handle, 0, np.dtype(np.int64).itemsize * math.prod(shape))
    finally:
        os.close(handle)
    os.environ[FILE] = path
    return np.memmap(path, np.int64, "r+", shape=shape)


class SourceCounts:
    """What one worker counts.

    Args:
        sources: names of what guesses come from; without any, nothing is counted.
        engine: which engine this is.
        model: the name that the model is served under.
        first: whether this is its first worker; the others see the same.
    """

    def __init__(self, sources: Sequence[str], engine: int, model: str, *, first: bool) -> None:
        self._size = len(sources) + 1
        self._counts: Counts | None = None
        self._shared: list[list[Any]] | None = None
        path = os.environ.get(FILE)
        if not sources or not first or path is None:
            return
        # no file: the front end runs on another machine, and nobody would read it
        with contextlib.suppress(OSError, ValueError):
            if MULTIPROCESS in os.environ:
                self._shared = _shared_counters((*sources, WINDOW), engine, model)
                return
            counts = np.memmap(path, np.int64, "r+").reshape(-1, 2, self._size)
            self._counts = counts[engine] if engine < len(counts) else None

    def add(self, tree: DraftTree, num_nodes: int, path: IntArray) -> None:
        """Count one verified tree.

        Args:
            tree: the tree.
            num_nodes: how many of its nodes were verified.
            path: int32 [a], the accepted ones.
        """
        if (self._counts is None and self._shared is None) or tree.sources is None:
            return
        of_node = np.full(num_nodes, self._size - 1, np.intp)
        guesses = tree.sources[:num_nodes]
        of_node[: len(guesses)] = guesses
        for row, nodes in ((DRAFTED, of_node), (ACCEPTED, of_node[path])):
            counts = np.bincount(nodes, minlength=self._size)
            if self._counts is not None:
                self._counts[row] += counts
            if self._shared is not None:
                for source in counts.nonzero()[0].tolist():
                    self._shared[row][source].inc(int(counts[source]))


def served_name(model_config: Any) -> str:
    """The name that a model (``vllm.config.ModelConfig``) has in vLLM's metrics: the first that it is served under."""
    names = model_config.served_model_name
    return names if isinstance(names, str) else str(names[0])


def _shared_counters(sources: Sequence[str], engine: int, model: str) -> list[list[Any]]:
    """Counters in files that ``prometheus_client`` sums up over processes: vLLM's way with several API servers.

    Returns:
        For each of ``COUNTERS`` one value per source.
    """
    # in files of their own: those of this process's other counters must not be opened twice
    value = MultiProcessValue(lambda: f"{os.getpid()}-lookahead")  # type: ignore[no-untyped-call]
    names = [*LABELS]
    return [
        [value("counter", name, f"{name}_total", names, [model, str(engine), source], text) for source in sources]
        for name, text in COUNTERS
    ]


def _remove(path: str, pid: int) -> None:
    if os.getpid() == pid:  # not in a forked child
        with contextlib.suppress(OSError):
            os.remove(path)
