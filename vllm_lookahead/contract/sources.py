"""A contract read from vLLM's sources by their syntax alone: nothing is imported, nothing has to be installed.

Names are followed through imports and base classes within the tree. What comes from other packages counts as missing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vllm_lookahead.contract.reading import Missing, Signature

FIELDS_BY = {"NamedTuple", "config", "dataclass"}
"""Bases and decorators that make a constructor of a class's annotations (``config`` is vLLM's)."""


class Found(NamedTuple):
    """A module, class, function, assignment or import, and the name of the module that it stands in."""

    node: ast.AST
    module: str


class Sources:
    """vLLM's sources; see ``Reading``.

    Args:
        root: the folder that ``vllm/`` is in.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._modules: dict[str, Found | None] = {}

    def signature(self, path: str) -> Signature | None:
        """See ``Reading.signature``. A class's is its constructor's."""
        found: Found | None = self._resolve(path)
        if found and isinstance(found.node, ast.ClassDef):
            found = self._member(found, "__init__")
        if found and isinstance(found.node, ast.Pass):
            return None
        if found is None or not isinstance(found.node, ast.FunctionDef | ast.AsyncFunctionDef):
            raise Missing(f"{path.replace(':', '.')} is no function by its syntax")
        given = found.node.args
        positional = [*given.posonlyargs, *given.args]
        if "classmethod" in _labels(found.node):
            del positional[0]
        arguments = [*positional, given.vararg, *given.kwonlyargs, given.kwarg]
        return Signature([a.arg for a in arguments if a and a.arg != "self"], given.kwarg is not None)

    def lacking(self, path: str, names: tuple[str, ...]) -> list[str]:
        """See ``Reading.lacking``."""
        owner = self._resolve(path)
        unknown = [name for name in names if self._member(owner, name) is None]
        for cls in self._classes(owner) if unknown else ():
            assigned = assigned_to_self(cls.node)
            unknown = [name for name in unknown if name not in assigned]
        return unknown

    def _resolve(self, path: str) -> Found:
        done, _, names = path.partition(":")
        found = self._module(done)
        if found is None:
            raise Missing(f"{done} can't be imported (no such file)")
        for name in filter(None, names.split(".")):
            found = self._member(found, name)
            if found is None:
                raise Missing(f"{done} has no {name}")
            done = f"{done}.{name}"
        return found

    def _module(self, name: str) -> Found | None:
        if name not in self._modules:
            stem = self._root.joinpath(*name.split("."))
            files = [file for file in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")) if file.is_file()]
            self._modules[name] = Found(ast.parse(files[0].read_bytes()), name) if files else None
        return self._modules[name]

    def _member(self, owner: Found, name: str) -> Found | None:
        match owner.node:
            case ast.Module():
                return self._global(owner, name)
            case ast.ClassDef():
                for cls in self._classes(owner):
                    member = bindings(cls.node).get(name)
                    if member is None and name == "__init__" and FIELDS_BY & _labels(cls.node):
                        member = self._constructor(cls)
                    if member is not None:
                        return Found(member, cls.module)
            case ast.FunctionDef() if name == "cache_clear" and {"cache", "lru_cache"} & _labels(owner.node):
                return Found(ast.Pass(), owner.module)  # there, but written elsewhere
        return None

    def _global(self, module: Found, name: str) -> Found | None:
        match bindings(module.node).get(name):
            case ast.Import(names=[ast.alias(name=origin, asname=asname)]):
                return self._module(origin if asname else name)
            case ast.ImportFrom(module=origin, names=[ast.alias(name=original)], level=level):
                if level:
                    parts = module.module.split(".")
                    is_package = (self._root.joinpath(*parts) / "__init__.py").is_file()
                    kept = parts[: len(parts) - level + is_package]
                    origin = ".".join([*kept, *filter(None, [origin])])
                source = self._module(origin or "")
                if source is None or (source, original) == (module, name):
                    return self._module(f"{origin}.{original}")
                return self._global(source, original)
            case None:
                return self._module(f"{module.module}.{name}")
            case node:
                return Found(node, module.module)

    def _classes(self, cls: Found) -> Iterator[Found]:
        """A class and its bases, depth first, which serves as long as diamonds don't override."""
        if not isinstance(cls.node, ast.ClassDef):
            return
        yield cls
        for base in cls.node.bases:
            expression = base.value if isinstance(base, ast.Subscript) else base
            found = self._module(cls.module)
            for name in ast.unparse(expression).split("."):
                found = found and self._member(found, name)
            if found is not None:
                yield from self._classes(found)

    def _constructor(self, cls: Found) -> ast.stmt:
        """The ``__init__`` that a class gets from its fields."""
        fields: dict[str, None] = {}
        for base in reversed([*self._classes(cls)]):
            if FIELDS_BY & _labels(base.node):
                for name, node in bindings(base.node).items():
                    text = ast.unparse(node) if isinstance(node, ast.AnnAssign) else "ClassVar"
                    if "ClassVar" not in text and "init=False" not in text:
                        fields[name] = None
        return ast.parse(f"def __init__(self, {', '.join(fields)}): ...").body[0]


def bindings(node: ast.AST) -> dict[str, ast.stmt]:
    """What a module or a class binds in its body; imports with one name each.

    Of the branches of a condition the first counts, and of a ``try`` its body.
    """
    return dict(_bindings(getattr(node, "body", ())))


def _bindings(body: Sequence[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    for node in body:
        match node:
            case ast.If(test=test):
                yield from _bindings(node.orelse)
                if "TYPE_CHECKING" not in ast.unparse(test):
                    yield from _bindings(node.body)
            case ast.Try():
                for handler in node.handlers:
                    yield from _bindings(handler.body)
                yield from _bindings([*node.orelse, *node.finalbody, *node.body])
            case ast.With():
                yield from _bindings(node.body)
            case ast.Import():
                for alias in node.names:
                    yield alias.asname or alias.name.partition(".")[0], ast.Import([alias])
            case ast.ImportFrom():
                for alias in node.names:
                    yield alias.asname or alias.name, ast.ImportFrom(node.module, [alias], node.level)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name, node
            case ast.Assign() | ast.AnnAssign():
                for target in ast.walk(node):
                    if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                        yield target.id, node


def assigned_to_self(node: ast.AST) -> set[str]:
    """Names of the attributes of ``self`` that are assigned somewhere in a class."""
    return {
        target.attr
        for target in ast.walk(node)
        if isinstance(target, ast.Attribute)
        and isinstance(target.ctx, ast.Store)
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
    }


def _labels(node: ast.AST) -> set[str]:
    """The last names of a definition's decorators and of a class's bases."""
    marks = [*getattr(node, "decorator_list", ()), *getattr(node, "bases", ())]
    return {ast.unparse(mark).partition("(")[0].rpartition(".")[2] for mark in marks}
