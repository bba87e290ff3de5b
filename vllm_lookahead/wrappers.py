"""The functions of vLLM that are wrapped, and by whom: vLLM has no hook for a new method name or command line flag.

Each function is wrapped at most once per process, however often the plugin is loaded, and can be restored.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

_originals: dict[tuple[type, str], Any] = {}


def wrap(owner: type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> bool:
    """Replace ``owner.name`` by ``make(original)``, unless that has been done.

    Args:
        owner: a class of vLLM.
        name: its method or static method.
        make: gets the original as a plain function and returns the wrapper.

    Returns:
        Whether this call wrapped it: False the second time, and where this vLLM has no such function (the contract
        check, which runs when somebody asks for us, says so properly).
    """
    if (owner, name) in _originals or name not in vars(owner):
        return False
    original = inspect.getattr_static(owner, name)
    static = isinstance(original, staticmethod)
    wrapper = make(original.__func__ if static else original)
    _originals[owner, name] = original
    setattr(owner, name, staticmethod(wrapper) if static else wrapper)
    return True


def wrapped() -> list[str]:
    """What is wrapped at the moment, as dotted names."""
    return sorted(f"{owner.__module__}.{owner.__qualname__}.{name}" for owner, name in _originals)


def restore_all() -> None:
    """Give vLLM its own functions back (for tests)."""
    while _originals:
        (owner, name), original = _originals.popitem()
        setattr(owner, name, original)
