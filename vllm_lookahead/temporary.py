"""Small context managers for the few places where vLLM decides something that trees make untrue."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class replaced:
    """Within the block ``owner.attribute`` is ``value``; yields the real value, which comes back at the end.

    A class, because some of these blocks are entered in every step, and a generator costs several times as much.
    """

    __slots__ = ("_attribute", "_owner", "_real", "_value")

    def __init__(self, owner: Any, attribute: str, value: Any) -> None:
        self._owner, self._attribute, self._value = owner, attribute, value

    def __enter__(self) -> Any:
        self._real = getattr(self._owner, self._attribute)
        setattr(self._owner, self._attribute, self._value)
        return self._real

    def __exit__(self, *error: object) -> None:
        setattr(self._owner, self._attribute, self._real)


@contextmanager
def muted(logger_name: str, text: str) -> Iterator[None]:
    """Within the block log records that contain ``text`` are dropped: vLLM's warnings that don't hold for us."""

    def wanted(record: logging.LogRecord) -> bool:
        return text not in str(record.msg)

    logger = logging.getLogger(logger_name)
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)
