"""A platform plugin of vLLM: CPUs that Ray can place, by calling them GPUs. vLLM's own CPU platform refuses Ray."""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


def name() -> str:
    """The entry point: where the platform is."""
    return "ray_cpu_platform.RayCpuPlatform"


class RayCpuPlatform(CpuPlatform):
    """CPUs as devices of Ray."""

    ray_device_key = "GPU"
