"""A device that is always there."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class CPUDriver(DriverBase):
    """What Triton asks of a device."""

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        def bench(call: Any, quantiles: Any = None, **options: Any) -> Any:
            call()
            return [0.0] * len(quantiles) if quantiles else 0.0

        return bench

    def map_python_to_cpp_type(self, ty: str) -> str:
        return "int"

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: Any) -> None:
        pass

    def get_device_interface(self) -> Any:
        return torch.cpu
