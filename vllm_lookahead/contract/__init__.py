"""What we rely on inside vLLM, as lists that are checked at start-up and, against vLLM's sources, in CI.

vLLM promises no stability for the classes that our workers derive from. A version that differs is refused with one
clear sentence, instead of failing in the middle of a request. There is a list for each room of this package; extend it
with whatever else gets relied on there. ``tools/check_vllm_sources.py`` reads the same lists against vLLM's releases.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from vllm_lookahead.contract.attention import ATTENTION_CPU, ATTENTION_CUDA
from vllm_lookahead.contract.common import COMMON
from vllm_lookahead.contract.parts import Attributes, Function, Part
from vllm_lookahead.contract.v1 import V1, V1_CPU
from vllm_lookahead.contract.v2 import V2, V2_CPU, V2_CUDA

__all__ = ["CONTRACT", "SUPPORTED", "Attributes", "Function", "Part", "UnsupportedVLLMError", "check_contract"]

Runner = Literal["v1", "v2"]
Release = tuple[int, int]
"""A version of vLLM by major and minor number."""


class UnsupportedVLLMError(RuntimeError):
    """The installed vLLM is not one that this plugin was written for."""


class Releases(NamedTuple):
    """A range of vLLM's releases, both ends in it."""

    oldest: Release
    newest: Release

    def __contains__(self, release: object) -> bool:
        return isinstance(release, tuple) and self.oldest <= release <= self.newest

    def __str__(self) -> str:
        return " to ".join(f"{major}.{minor}" for major, minor in self)


SUPPORTED: dict[Runner, Releases] = {"v1": Releases((0, 26), (0, 33)), "v2": Releases((0, 32), (0, 33))}
"""What each model runner is supported in. V2 can't draft without a model before vLLM 0.32."""

CONTRACT: dict[tuple[Runner, str], tuple[Part, ...]] = {
    ("v1", "cpu"): COMMON + V1 + V1_CPU + ATTENTION_CPU,
    ("v2", "cpu"): COMMON + V2 + V2_CPU + ATTENTION_CPU,
    ("v2", "cuda"): COMMON + V2 + V2_CUDA + ATTENTION_CUDA,
}
"""What is relied on, by vLLM's model runner and the kind of device."""


def check_contract(
    runner: Runner, *, device: str | None = None, version: str | None = None, parts: Iterable[Part] | None = None
) -> None:
    """Refuse a vLLM that this plugin doesn't fit.

    Args:
        runner: the generation of vLLM's model runner that will run.
        device: "cpu" or "cuda" (default: the current platform's).
        version: vLLM's version (default: the installed one's). A development version without a number passes the
            version check; what counts then is the rest.
        parts: what to check (default: all that this runner needs on this device).

    Raises:
        UnsupportedVLLMError: names the installed version, the first mismatch, and the supported range.
    """
    if version is None:
        version = _installed_version()
    supported = f"vLLM {SUPPORTED[runner]} with Model Runner {runner.upper()}"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    release = (int(numbers[1]), int(numbers[2])) if numbers else None
    if release not in (None, (0, 0)) and release not in SUPPORTED[runner]:
        raise UnsupportedVLLMError(f"vllm-lookahead supports {supported}; vLLM {version} is installed")
    for part in CONTRACT[runner, device or _current_device()] if parts is None else parts:
        problem = part.problem()
        if problem is not None:
            raise UnsupportedVLLMError(
                f"vllm-lookahead doesn't fit the installed vLLM {version}: {problem}; supported is {supported}"
            )


def _installed_version() -> str:
    import vllm

    return str(vllm.__version__)


def _current_device() -> str:
    from vllm.platforms import current_platform

    return str(current_platform.device_type)
