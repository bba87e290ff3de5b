"""The two questions that a contract asks about a vLLM. ``running`` and ``sources`` answer them."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Missing(LookupError):
    """Something on the way to an object isn't there; the message says what."""


class Signature(NamedTuple):
    """A function's parameters.

    Attributes:
        names: all of them, without ``self``.
        takes_any: whether one of them is a ``**kwargs``.
    """

    names: list[str]
    takes_any: bool


class Reading(Protocol):
    """A way to look at a vLLM. Paths are "module", "module:name" or "module:Class.name"; both raise ``Missing``."""

    def signature(self, path: str) -> Signature | None:
        """The parameters of a function; None if it doesn't tell them."""

    def lacking(self, path: str, names: tuple[str, ...]) -> list[str]:
        """Which of the names are no attributes of a module, a class or its instances."""
