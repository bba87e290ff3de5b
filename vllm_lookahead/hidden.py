"""Small context managers for the few places where vLLM decides something that trees make untrue."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def hidden(owner: Any, attribute: str) -> Iterator[Any]:
    """Within the block ``owner.attribute`` is None; yields the real value, which comes back at the end."""
    value = getattr(owner, attribute)
    setattr(owner, attribute, None)
    try:
        yield value
    finally:
        setattr(owner, attribute, value)


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
