"""How much memory a server and all its processes take, while it works."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import psutil

MIB = 1 << 20


class Sample(NamedTuple):
    """One look at a server.

    Attributes:
        finished: how many requests had an outcome then.
        rss: bytes that each of its processes had in memory, by process id.
    """

    finished: int
    rss: dict[int, int]

    @property
    def total(self) -> int:
        """All processes together."""
        return sum(self.rss.values())


class Growth(NamedTuple):
    """Bytes in memory, all processes together.

    Attributes:
        before: the median in the first quarter after the warm-up.
        after: the median in the last tenth.
    """

    before: float
    after: float

    @property
    def mib(self) -> float:
        """By how much it grew."""
        return (self.after - self.before) / MIB


class Watch:
    """Looks at a server now and then, for the length of an ``async with`` block.

    Args:
        pid: of the server.
        every: seconds between two looks.

    Attributes:
        finished: how many requests have an outcome; whoever drives the server counts.
        samples: what was seen.
    """

    def __init__(self, pid: int, every: float = 1.0) -> None:
        self.finished = 0
        self.samples: list[Sample] = []
        self._process = psutil.Process(pid)
        self._every = every

    async def __aenter__(self) -> Watch:
        """Begin."""
        self._task = asyncio.create_task(self._look())
        return self

    async def __aexit__(self, *error: object) -> None:
        """End."""
        self._task.cancel()

    async def _look(self) -> None:
        while True:
            self.samples.append(Sample(self.finished, rss_of(self._process)))
            await asyncio.sleep(self._every)


def rss_of(process: psutil.Process) -> dict[int, int]:
    """Bytes that a process and those that it started have in memory."""
    found = {}
    for one in (process, *process.children(recursive=True)):
        try:
            found[one.pid] = one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return found


def growth(samples: Sequence[Sample], warm_up: float = 0.2) -> Growth | None:
    """How much memory grew once everything had been seen; None if there are too few samples to tell.

    Args:
        samples: in order.
        warm_up: the part of the requests that doesn't count: caches fill, code is loaded.
    """
    if not samples:
        return None
    last = samples[-1].finished
    begin = warm_up * last
    first_quarter = [s.total for s in samples if begin <= s.finished <= begin + (last - begin) / 4]
    end = [s.total for s in samples if s.finished >= 0.9 * last]
    if len(first_quarter) < 3 or len(end) < 3:
        return None
    return Growth(median(first_quarter), median(end))
