"""The contract check: the installed vLLM passes; anything that differs is named in one sentence."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vllm_lookahead import contract
from vllm_lookahead.contract import CONTRACT, Attributes, Function, UnsupportedVLLMError, check_contract


class Engine:
    size: int

    def __init__(self, config: Any) -> None:
        self.width = 3
        self.first, second = 1, 2
        if self.size == second:
            self.never: dict[str, int] = {}

    def step(self, tokens: Any, count: int) -> None: ...

    def anything(self, **kwargs: Any) -> None: ...


class Derived(Engine):
    def __init__(self) -> None:
        super().__init__(None)
        self.own = 1


@pytest.fixture(autouse=True)
def fake_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("fake_engine")
    module.Engine, module.Derived = Engine, Derived  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_engine", module)


def test_installed_vllm_fits() -> None:
    check_contract()


@pytest.mark.parametrize("version", ["0.26.0", "0.26.1rc1", "0.32.0+cpu", "0.33.9", "dev", "0.0.1.dev1+g123"])
def test_supported_version(version: str) -> None:
    check_contract(version=version, device="cpu", contract=())


@pytest.mark.parametrize("version", ["0.25.9", "0.34.0", "0.9.1", "1.0.0"])
def test_unsupported_version(version: str) -> None:
    with pytest.raises(UnsupportedVLLMError, match=rf"supports vLLM 0\.26 to 0\.33; vLLM {version} is installed"):
        check_contract(version=version, device="cpu", contract=())


@pytest.mark.parametrize(
    "part",
    [
        Function("fake_engine:Engine.step", ("tokens", "count"), exactly=True),
        Function("fake_engine:Engine.step", ("tokens",)),
        Function("fake_engine:Engine.anything", ("whatever",)),
        Function("fake_engine:Derived.step", ("count",)),
        Attributes("fake_engine:Engine", ("size", "width", "first", "never", "step")),
        Attributes("fake_engine:Derived", ("size", "width", "own")),
    ],
)
def test_fits(part: Function | Attributes) -> None:
    assert part.problem() is None


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        (Function("fake_engine:Engine.step", ("tokens", "counts")), r"fake_engine.Engine.step takes \(tokens, count\)"),
        (Function("fake_engine:Engine.step", ("tokens",), exactly=True), r"expected \(tokens\)"),
        (Function("fake_engine:Engine.stop"), "fake_engine.Engine has no stop"),
        (Function("fake_engine:Motor.step"), "fake_engine has no Motor"),
        (Function("no_such_module:f"), "no_such_module can't be imported"),
        (Attributes("fake_engine:Engine", ("size", "second", "depth")), "Engine has no second, depth"),
        (Attributes("fake_engine:Engine", ("own",)), "Engine has no own"),
    ],
)
def test_mismatch(part: Function | Attributes, problem: str) -> None:
    with pytest.raises(UnsupportedVLLMError, match=problem) as caught:
        check_contract(version="0.32.0", device="cpu", contract=(part,))
    assert "vLLM 0.32.0" in str(caught.value)
    assert "0.26 to 0.33" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parts_of_other_devices_are_skipped() -> None:
    broken = Function("no_such_module:f", device="cuda")
    check_contract(version="0.32.0", device="cpu", contract=(broken,))
    with pytest.raises(UnsupportedVLLMError):
        check_contract(version="0.32.0", device="cuda", contract=(broken,))


def test_changed_vllm_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def renamed(self: Any, values: Any, spec_decode_metadata: Any) -> None: ...

    monkeypatch.setattr(GPUModelRunner, "_sample", renamed)
    with pytest.raises(UnsupportedVLLMError, match=r"GPUModelRunner\._sample takes \(values, spec_decode_metadata\)"):
        check_contract()


def test_no_part_twice() -> None:
    assert len({(type(part), part.path) for part in CONTRACT}) == len(CONTRACT)


# ---- the contract is complete

PACKAGE = Path(contract.__file__).parent
OURS = [
    *(PACKAGE / f"{name}.py" for name in ("plugin", "support")),
    *(PACKAGE / "v1" / f"{name}.py" for name in ("branch", "cpu_runner", "cpu_worker", "runner", "sampler", "worker")),
    *(PACKAGE / "drafting").glob("*.py"),
    *(PACKAGE / "attention" / f"{name}.py" for name in ("cpu", "cpu_commit", "registry")),
]
"""The files that touch vLLM's insides on the CPU."""

NOT_INTERNAL = {"vllm", "vllm.config", "vllm.logger", "vllm.platforms", "vllm.envs"}
"""Modules whose names are vLLM's public interface, or so stable that nobody would notice a check."""

ANNOTATIONS = {"AttentionLayer", "AttentionSpec", "EngineArgs", "GrammarOutput", "IntermediateTensors", "Platform"}
"""Names that only stand in annotations."""


def promised(owner: str) -> set[str]:
    """What the contract says about a class: its attributes and methods."""
    methods = {
        p.path.rpartition(".")[2] for p in CONTRACT if isinstance(p, Function) and p.path.startswith(f"{owner}.")
    }
    return methods.union(*(part.names for part in CONTRACT if isinstance(part, Attributes) and part.path == owner))


@pytest.mark.parametrize("file", OURS, ids=lambda file: file.stem)
def test_every_import_from_vllm_is_in_the_contract(file: Path) -> None:
    places = {part.path for part in CONTRACT}
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.module or node.module.split(".")[0] != "vllm":
            continue
        if node.module in NOT_INTERNAL:
            continue
        for name in {alias.name for alias in node.names} - ANNOTATIONS:
            paths = (f"{node.module}:{name}", f"{node.module}.{name}:")
            found = any(place == paths[0] or place.startswith((f"{paths[0]}.", paths[1])) for place in places)
            assert found, f"{file.name} imports {name} from {node.module}"


def test_every_override_is_in_the_contract() -> None:
    from vllm_lookahead.attention import cpu
    from vllm_lookahead.v1.cpu_runner import LookaheadCPURunner
    from vllm_lookahead.v1.cpu_worker import CPULookaheadWorker

    for cls in (LookaheadCPURunner, CPULookaheadWorker, cpu.TreeCPUAttentionMetadataBuilder):
        mro = inspect.getmro(cls)
        ours = [base for base in mro if base.__module__.startswith("vllm_lookahead")]
        theirs = [base for base in mro if base.__module__.startswith("vllm.")]
        known = set().union(*(promised(f"{base.__module__}:{base.__name__}") for base in theirs))
        methods = {name for base in ours for name, value in vars(base).items() if inspect.isfunction(value)}
        overrides = {name for name in methods if any(name in vars(base) for base in theirs)}
        assert overrides, cls
        assert overrides <= known, cls
    forward = next(part for part in CONTRACT if part.path.endswith("CPUAttentionBackendImpl.forward"))
    assert isinstance(forward, Function)
    replacement = inspect.signature(cpu.TreeCPUAttentionImpl.forward_trees).parameters
    assert (*replacement,)[1:] == forward.parameters


def test_every_attribute_of_vllms_runner_that_ours_reads_is_in_the_contract() -> None:
    from vllm_lookahead.v1.cpu_runner import LookaheadCPURunner

    ours = [base for base in inspect.getmro(LookaheadCPURunner) if base.__module__.startswith("vllm_lookahead")]
    own = {name for base in ours for name in vars(base)} | {"drafter"}
    sources = [inspect.getsource(base) for base in ours]
    own |= {name for source in sources for name in re.findall(r"self\.(\w+)\b(?::[^=\n]+)? = ", source)}
    read = {name for source in sources for name in re.findall(r"\bself\.(\w+)", source)}
    read |= set(re.findall(r"\brunner\.(\w+)", (PACKAGE / "v1" / "branch.py").read_text()))
    assert len(read - own) > 20
    assert read - own <= promised(contract.RUNNER)


@pytest.mark.parametrize("part", CONTRACT, ids=lambda part: part.path)
def test_every_part_is_noticed_when_it_is_gone(part: Function | Attributes) -> None:
    """Nobody renames vLLM's parts in a test; asking for one that isn't there comes to the same."""
    gone = replace(part, path=f"{part.path}_gone")
    with pytest.raises(UnsupportedVLLMError, match=r"has no \w+_gone; supported is") as caught:
        check_contract(device=part.device or "cpu", contract=(part, gone))
    assert "\n" not in str(caught.value)
    if isinstance(part, Attributes):
        more = replace(part, names=(*part.names, "no_such_attribute"))
        with pytest.raises(UnsupportedVLLMError, match=r"has no no_such_attribute; supported is"):
            check_contract(device=part.device or "cpu", contract=(more,))


@pytest.mark.parametrize("part", [p for p in CONTRACT if isinstance(p, Function) and p.exactly], ids=lambda p: p.path)
def test_a_parameter_more_is_noticed(part: Function) -> None:
    more = replace(part, parameters=(*part.parameters, "one_more"))
    with pytest.raises(UnsupportedVLLMError, match=r"takes \(.*\), expected \(.*one_more\); supported is"):
        check_contract(device=part.device or "cpu", contract=(more,))
