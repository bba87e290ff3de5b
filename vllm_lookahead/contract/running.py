"""A contract read from the vLLM that is installed: imported and inspected."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from pathlib import Path
from typing import Any

from vllm_lookahead.contract.reading import Missing, Signature
from vllm_lookahead.contract.sources import assigned_to_self


def signature(path: str) -> Signature | None:
    """See ``Reading.signature``."""
    try:
        parameters = inspect.signature(_resolve(path)).parameters
    except (TypeError, ValueError):
        return None  # compiled code tells nothing
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return Signature([name for name in parameters if name != "self"], takes_any)


def lacking(path: str, names: tuple[str, ...]) -> list[str]:
    """See ``Reading.lacking``."""
    owner = _resolve(path)
    unknown = [name for name in names if not hasattr(owner, name)]
    for cls in inspect.getmro(owner) if unknown and isinstance(owner, type) else ():
        known = {*vars(cls).get("__annotations__", ()), *_assigned(cls)}
        unknown = [name for name in unknown if name not in known]
    return unknown


def _resolve(path: str) -> Any:
    done, _, names = path.partition(":")
    try:
        found: Any = importlib.import_module(done)
    except ImportError as error:
        raise Missing(f"{done} can't be imported ({error})") from None
    for name in filter(None, names.split(".")):
        if not hasattr(found, name):
            raise Missing(f"{done} has no {name}")
        found = getattr(found, name)
        done = f"{done}.{name}"
    return found


def _assigned(cls: type) -> set[str]:
    try:
        return _assigned_in(inspect.getsourcefile(cls) or "").get(cls.__name__, set())
    except (OSError, TypeError):  # no source at hand: the annotations have to do
        return set()


@functools.cache  # reading a large file takes a moment, and all processes of an engine pay for it
def _assigned_in(file: str) -> dict[str, set[str]]:
    """What the methods of each of a file's classes assign to ``self``."""
    nodes = ast.walk(ast.parse(Path(file).read_bytes()))
    return {node.name: assigned_to_self(node) for node in nodes if isinstance(node, ast.ClassDef)}
