"""The contract check at start-up: the installed vLLM passes; anything that differs is named in one sentence."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from vllm_lookahead.contract import (
    CONTRACT,
    SUPPORTED,
    Attributes,
    Function,
    Part,
    UnsupportedVLLMError,
    check_contract,
)

ON_CPU = sorted({part for (_, device), parts in CONTRACT.items() if device == "cpu" for part in parts}, key=str)


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


@pytest.mark.parametrize("runner", SUPPORTED)
def test_installed_vllm_fits(runner: Any) -> None:
    check_contract(runner)


@pytest.mark.parametrize(
    ("runner", "version"),
    [
        *(("v1", version) for version in ("0.26.0", "0.26.1rc1", "0.32.0+cpu", "0.33.9", "dev", "0.0.1.dev1+g123")),
        *(("v2", version) for version in ("0.32.0", "0.32.1rc1", "0.33.9", "dev")),
    ],
)
def test_supported_version(runner: Any, version: str) -> None:
    check_contract(runner, version=version, parts=())


@pytest.mark.parametrize(
    ("runner", "version", "supported"),
    [
        *(
            ("v1", version, r"0\.26 to 0\.33 with Model Runner V1")
            for version in ("0.25.9", "0.34.0", "0.9.1", "1.0.0")
        ),
        *(("v2", version, r"0\.32 to 0\.33 with Model Runner V2") for version in ("0.31.9", "0.34.0", "1.0.0")),
    ],
)
def test_unsupported_version(runner: Any, version: str, supported: str) -> None:
    with pytest.raises(UnsupportedVLLMError, match=rf"supports vLLM {supported}; vLLM {version} is installed"):
        check_contract(runner, version=version, parts=())


@pytest.mark.parametrize(
    "part",
    [
        Function("fake_engine:Engine.step", ("tokens", "count"), exactly=True),
        Function("fake_engine:Engine.step", ("tokens",)),
        Function("fake_engine:Engine.anything", ("whatever",)),
        Function("fake_engine:Derived.step", ("count",)),
        Function("fake_engine:Engine", ("config",), exactly=True),
        Attributes("fake_engine:Engine", ("size", "width", "first", "never", "step")),
        Attributes("fake_engine:Derived", ("size", "width", "own")),
        Attributes("fake_engine", ("Derived",)),
    ],
)
def test_fits(part: Part) -> None:
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
        (Attributes("fake_engine", ("Motor",)), "fake_engine has no Motor"),
    ],
)
def test_mismatch(part: Part, problem: str) -> None:
    with pytest.raises(UnsupportedVLLMError, match=problem) as caught:
        check_contract("v1", version="0.32.0", parts=(part,))
    assert "vLLM 0.32.0" in str(caught.value)
    assert "0.26 to 0.33" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_what_runner_and_device_need_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Function("no_such_module:f")
    monkeypatch.setitem(CONTRACT, ("v2", "cuda"), (broken,))
    for runner in SUPPORTED:
        check_contract(runner, device="cpu")
    with pytest.raises(UnsupportedVLLMError, match="no_such_module"):
        check_contract("v2", device="cuda")


def test_changed_vllm_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def renamed(self: Any, values: Any, spec_decode_metadata: Any) -> None: ...

    monkeypatch.setattr(GPUModelRunner, "_sample", renamed)
    with pytest.raises(UnsupportedVLLMError, match=r"GPUModelRunner\._sample takes \(values, spec_decode_metadata\)"):
        check_contract("v1")


@pytest.mark.parametrize("part", ON_CPU, ids=lambda part: part.path)
def test_every_part_is_noticed_when_it_is_gone(part: Part) -> None:
    """Nobody renames vLLM's parts in a test; asking for one that isn't there comes to the same."""
    gone = replace(part, path=f"{part.path}_gone")
    with pytest.raises(
        UnsupportedVLLMError, match=r"(has no \w+_gone|_gone can't be imported .*); supported is"
    ) as caught:
        check_contract("v1", parts=(part, gone))
    assert "\n" not in str(caught.value)
    if isinstance(part, Attributes):
        more = replace(part, names=(*part.names, "no_such_attribute"))
        with pytest.raises(UnsupportedVLLMError, match=r"has no no_such_attribute; supported is"):
            check_contract("v1", parts=(more,))


@pytest.mark.parametrize("part", [p for p in ON_CPU if isinstance(p, Function) and p.exactly], ids=lambda p: p.path)
def test_a_parameter_more_is_noticed(part: Function) -> None:
    more = replace(part, parameters=(*part.parameters, "one_more"))
    with pytest.raises(UnsupportedVLLMError, match=r"takes \(.*\), expected \(.*one_more\); supported is"):
        check_contract("v1", parts=(more,))
