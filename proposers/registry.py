"""Proposers by name: ours register themselves, third parties come through an entry point group."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from proposers.base import Proposer

ENTRY_POINT_GROUP = "vllm_lookahead.proposers"

P = TypeVar("P", bound=type[Proposer])

_registered: dict[str, type[Proposer]] = {}


def register(name: str) -> Callable[[P], P]:
    """Class decorator: make a proposer known as ``name``.

    Raises:
        ValueError: another class has this name already. The same class again (a module that is reloaded or imported
            under two names) is fine.
    """

    def add(cls: P) -> P:
        known = _registered.get(name)
        if known is not None and _identity(known) != _identity(cls):
            raise ValueError(
                f"the proposer name {name!r} is taken by {'.'.join(_identity(known))}; "
                f"{'.'.join(_identity(cls))} needs another one"
            )
        _registered[name] = cls
        return cls

    return add


def get(name: str) -> type[Proposer]:
    """The proposer class that is called ``name``; imports it if an entry point provides it.

    Raises:
        ValueError: no proposer has this name, or the entry point that has it can't be loaded or is no ``Proposer``.
    """
    if name in _registered:
        return _registered[name]
    entry_point = _third_party().get(name)
    if entry_point is None:
        raise ValueError(f"unknown proposer {name!r}; known are: {', '.join(names())}")
    where = f"proposer {name!r} (entry point {entry_point.value!r} in group {ENTRY_POINT_GROUP!r})"
    try:
        cls = entry_point.load()
    except Exception as error:
        raise ValueError(f"{where} can't be loaded: {type(error).__name__}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Proposer)):
        raise ValueError(f"{where} is not a subclass of proposers.Proposer: {cls!r}")
    return register(name)(cls)


def names() -> list[str]:
    """All names that ``get`` knows, sorted. Entry points are listed without being loaded."""
    return sorted(_registered.keys() | _third_party().keys())


def _third_party() -> dict[str, EntryPoint]:
    return {entry_point.name: entry_point for entry_point in entry_points(group=ENTRY_POINT_GROUP)}


def _identity(cls: type[Proposer]) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__
