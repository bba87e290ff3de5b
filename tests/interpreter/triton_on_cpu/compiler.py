"""Compiles nothing: under ``TRITON_INTERPRET=1`` no kernel gets here."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import BaseBackend


class CPUCompiler(BaseBackend):
    """What Triton asks of a backend before it ever compiles."""

    binary_ext = "none"

    @staticmethod
    def supports_target(target: Any) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "triton-on-cpu"

    def parse_options(self, options: Any) -> object:
        return object()

    def add_stages(self, stages: Any, options: Any, *args: Any) -> None:
        raise NotImplementedError("set TRITON_INTERPRET=1")

    def load_dialects(self, context: Any) -> None:
        pass

    def get_module_map(self) -> dict[str, Any]:
        return {}
