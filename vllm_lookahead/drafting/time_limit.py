"""A limit on how long a call may take: it runs on a thread that is given up if no answer comes."""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class TimeLimitError(TimeoutError):
    """A call took longer than it may."""


class TimeLimit:
    """Runs calls one after the other, each for a limited time.

    A call that takes longer goes on by itself until it next runs Python code, where it is ended. While it holds the
    interpreter's lock inside of C or numba code, nothing can be done about it, here or anywhere.

    Args:
        seconds: the limit.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._thread: _Thread | None = None

    def run(self, call: Callable[..., T], *arguments: object) -> T:
        """What ``call(*arguments)`` returns; what it raises is raised here, too.

        Raises:
            TimeLimitError: no answer in time.
        """
        thread = self._thread
        if thread is None:
            thread = self._thread = _Thread()
            thread.start()
        thread.calls.put((call, arguments))
        try:
            result, error = thread.answers.get(timeout=self.seconds)
        except queue.Empty:
            self._thread = None
            thread.end()
            raise TimeLimitError(f"no answer within {self.seconds:g} seconds") from None
        if error is not None:
            raise error
        return result

    def __del__(self) -> None:
        if self._thread is not None:
            self._thread.calls.put(None)


class _Thread(threading.Thread):
    # Not a ThreadPoolExecutor: Python waits at its exit for those threads, so one that hangs would keep the process.

    def __init__(self) -> None:
        super().__init__(name="proposer", daemon=True)
        self.calls: queue.SimpleQueue[tuple[Callable[..., Any], tuple[object, ...]] | None] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run(self) -> None:
        while (work := self.calls.get()) is not None:
            call, arguments = work
            answer: tuple[Any, BaseException | None]
            try:
                answer = call(*arguments), None
            except SystemExit:  # from ``end``, or the call's own wish
                return
            except Exception as error:
                answer = None, error
            self.answers.put(answer)

    def end(self) -> None:
        """Let the thread end as soon as it runs Python code again; SystemExit passes ``except Exception``."""
        self.calls.put(None)
        identifier = ctypes.c_ulong(self.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(identifier, ctypes.py_object(SystemExit))
