"""A call gets its answer or its error, or is given up in time; what it left running ends."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable

import pytest

from vllm_lookahead.drafting.time_limit import TimeLimit, TimeLimitError


def busy() -> None:
    while True:
        pass


def stubborn() -> None:
    """Catches every error that a program should catch."""
    while True:
        with contextlib.suppress(Exception):
            busy()


def proposers_running() -> int:
    gc.collect()  # tracebacks of the tests before
    return sum(thread.name == "proposer" for thread in threading.enumerate())


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_answers_come_from_one_thread() -> None:
    limit = TimeLimit(60.0)
    assert limit.run(divmod, 7, 2) == (3, 1)
    first = limit.run(threading.get_ident)
    assert first == limit.run(threading.get_ident) != threading.get_ident()


def test_errors_come_through() -> None:
    limit = TimeLimit(60.0)
    with pytest.raises(ZeroDivisionError):
        limit.run(divmod, 1, 0)
    assert limit.run(len, "abc") == 3


@pytest.mark.parametrize("hang", [busy, stubborn, lambda: time.sleep(1.0)])
def test_what_hangs_is_given_up_and_ends(hang: Callable[[], None]) -> None:
    assert eventually(lambda: proposers_running() == 0)
    limit = TimeLimit(0.1)
    with pytest.raises(TimeLimitError, match=r"0\.1 seconds"):
        limit.run(hang)
    assert eventually(lambda: proposers_running() == 0)
    limit.seconds = 60.0
    assert limit.run(len, "abc") == 3, "the next call has a thread of its own"


def test_a_late_answer_is_nobody_elses() -> None:
    limit = TimeLimit(0.1)
    late = threading.Event()
    with pytest.raises(TimeLimitError):
        limit.run(lambda: late.wait(60) and "late")
    late.set()
    limit.seconds = 60.0
    assert limit.run(len, "abc") == 3


def test_its_thread_ends_with_it() -> None:
    limit = TimeLimit(60.0)
    limit.run(len, "abc")
    assert proposers_running() >= 1
    del limit
    assert eventually(lambda: proposers_running() == 0)
