"""The contract is complete: whatever our files import, override and read of vLLM's insides is in it.

The files are found by their room, and so are the lists: a file in ``v1/`` or ``v2/`` needs that runner's, one whose
name says so one device's, and any other file has to find what it needs in all of them.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import vllm_lookahead
from vllm_lookahead.contract import CONTRACT, Attributes, Function, Part
from vllm_lookahead.contract.sources import assigned_to_self, bindings

PACKAGE = Path(vllm_lookahead.__file__).parent
FILES = [
    file
    for file in sorted(PACKAGE.rglob("*.py"))
    if file.relative_to(PACKAGE).parts[0] not in ("bench", "contract", "demo") and "vllm" in file.read_text()
]
STABLE = {"vllm", "vllm.config", "vllm.envs", "vllm.logger", "vllm.platforms"}
"""Modules whose names are vLLM's public interface, or so stable that nobody would notice a check."""
DEVICES = {"cpu": re.compile("cpu"), "cuda": re.compile("cuda|gpu|flash|triton")}
"""How the names begin of the files that are for one device."""


def name_of(file: Path) -> str:
    return ".".join(("vllm_lookahead", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def rows(module: str) -> list[tuple[Part, ...]]:
    """The contract's rows of which each has to hold what a module of ours needs."""
    _, *rooms, name = module.split(".")
    runners = {"v1", "v2"}.intersection(rooms) or {"v1", "v2"}
    devices = [device for device, names in DEVICES.items() if names.match(name)] or list(DEVICES)
    return [parts for (runner, device), parts in CONTRACT.items() if runner in runners and device in devices]


def promised(parts: tuple[Part, ...], owner: str) -> set[str]:
    """What the contract says about a class or module: its attributes and methods."""
    methods = {p.path.rpartition(".")[2] for p in parts if isinstance(p, Function) and p.path.startswith(f"{owner}.")}
    return methods.union(*(part.names for part in parts if isinstance(part, Attributes) and part.path == owner))


def imported(tree: ast.AST, *, types: bool) -> dict[str, str]:
    """Names that a file takes from vLLM, and the paths of what they stand for; ``types``: those of annotations, too."""
    skipped: set[ast.AST] = set()
    if not types:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                skipped.update(inner for statement in node.body for inner in ast.walk(statement))
    return {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and re.match(r"vllm(\.|$)", node.module or "") and node not in skipped
        for alias in node.names
    }


def theirs(cls: type) -> list[type]:
    return [base for base in inspect.getmro(cls) if base.__module__.startswith("vllm.")]


def ours(cls: type) -> list[ast.ClassDef]:
    """What we wrote of a class, from the class itself to its last base."""
    bases = [base for base in inspect.getmro(cls) if base.__module__.startswith("vllm_lookahead.")]
    found = [ast.parse(inspect.cleandoc("\n" + inspect.getsource(base))).body[0] for base in bases]
    return [node for node in found if isinstance(node, ast.ClassDef)]


def own_names(cls: type) -> set[str]:
    return set().union(*(bindings(node) | dict.fromkeys(assigned_to_self(node)) for node in ours(cls)))


def promised_of(parts: tuple[Part, ...], cls: type) -> set[str]:
    return set().union(*(promised(parts, f"{base.__module__}:{base.__qualname__}") for base in theirs(cls)))


MEMBERS = [value for file in FILES for value in vars(importlib.import_module(name_of(file))).values()]
CLASSES = sorted({cls for cls in MEMBERS if isinstance(cls, type) and ours(cls) and theirs(cls)}, key=str)
"""Our classes that derive from vLLM's."""


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_import(file: Path) -> None:
    for path in imported(ast.parse(file.read_text()), types=False).values():
        module, _, name = path.partition(":")
        for parts in rows(name_of(file)) if module not in STABLE else ():
            known = any(re.match(rf"({re.escape(path)}|{module}.{name}:)(\.|$|(?<=:))", part.path) for part in parts)
            assert known or name in promised(parts, module), path


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_attribute_of_an_annotated_parameter(file: Path) -> None:
    """What a function reads of parameters whose type is one of vLLM's, or a class of those that it is narrowed to."""
    tree = ast.parse(file.read_text())
    types = imported(tree, types=True)
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        owners = {
            argument.arg: types[name]
            for argument in (*function.args.args, *function.args.kwonlyargs)
            for name in re.findall(r"\w+", ast.unparse(argument.annotation) if argument.annotation else "")
            if name in types
        }
        for node in ast.walk(function):
            match node:
                case ast.Assign(targets=[ast.Name(id=alias)], value=ast.Name(id=name)) if name in owners:
                    owners[alias] = owners[name]
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in owners:
                owner = object_at(owners[node.value.id])
                others = [path for path in types.values() if is_subclass(object_at(path), owner)]
                own = set().union(*(own_names(cls) for cls in CLASSES if is_subclass(cls, owner)))
                for parts in rows(name_of(file)):
                    known = own.union(*(promised(parts, path) for path in others))
                    assert node.attr in known, f"{owner}.{node.attr} in {function.name}"


def object_at(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name, None)


def is_subclass(cls: Any, base: Any) -> bool:
    return isinstance(cls, type) and isinstance(base, type) and issubclass(cls, base)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__qualname__)
def test_every_override(cls: type) -> None:
    """An override that names all of its parameters needs vLLM's to have exactly these."""
    for name in set().union(*map(bindings, ours(cls))):
        override = inspect.getattr_static(cls, name, None)
        parameters = list(inspect.signature(override).parameters.values())[1:] if inspect.isfunction(override) else []
        named = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        if not any(name in vars(base) for base in theirs(cls)) or (name == "__init__" and not named):
            continue
        methods = [f"{base.__module__}:{base.__qualname__}.{name}" for base in theirs(cls)]
        for parts in rows(cls.__module__):
            assert name in promised_of(parts, cls), name
            if inspect.isfunction(override) and name != "__init__":
                (part,) = (part for part in parts if isinstance(part, Function) and part.path in methods)
                assert part.parameters[: len(named)] == named, name
                assert part.exactly == (len(named) == len(parameters)), name


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__qualname__)
def test_every_attribute_of_self(cls: type) -> None:
    source = "\n".join(map(ast.unparse, ours(cls)))
    read = set(re.findall(r"\bself\.(?!__)(\w+)", source)) - set(re.findall(r"hasattr\(self, '(\w+)'", source))
    others = {name for base in inspect.getmro(cls) if not base.__module__.startswith("vllm") for name in vars(base)}
    for parts in rows(cls.__module__):
        assert read - own_names(cls) - others <= promised_of(parts, cls)


@pytest.mark.parametrize("room", ["v1", "v2"])
def test_every_attribute_of_the_runner(room: str) -> None:
    """What our other files read of a ``runner``."""
    runners = [
        cls
        for cls in CLASSES
        if re.match(rf"vllm_lookahead\.{room}\..*Runner$", f"{cls.__module__}.{cls.__qualname__}")
    ]
    own = set().union(*map(own_names, runners))
    for file in (PACKAGE / room).rglob("*.py"):
        read = set(re.findall(r"\b_?runner\.(\w+)(?!.* import )", file.read_text()))
        for parts in rows(name_of(file)):
            assert read - own <= set().union(*(promised_of(parts, cls) for cls in runners)), file


def test_no_part_twice() -> None:
    for key, parts in CONTRACT.items():
        assert len(set(parts)) == len(parts), key


def test_something_is_looked_at() -> None:
    assert {"v1.runner", "v1.cpu_runner", "attention.cpu", "plugin"} <= {name_of(file)[15:] for file in FILES}
    assert {"LookaheadCPURunner", "CPULookaheadWorker", "TreeCPUAttentionImpl"} <= {cls.__name__ for cls in CLASSES}
