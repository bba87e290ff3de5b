"""The contract check: the installed vLLM passes; anything that differs is named in one sentence."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

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
