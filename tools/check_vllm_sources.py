"""Check what we rely on inside vLLM (``vllm_lookahead.contract``) against the sources of its releases.

Nothing of vLLM is installed or imported. Its source distributions come from the package index that pip is configured
for, 40 MB each, and their Python files are kept in ``$XDG_CACHE_HOME`` (default ``~/.cache``), 50 MB each.

Usage: ``python tools/check_vllm_sources.py [VERSION ...]``; without versions, the newest patch release of every minor
version from the oldest that we support to the newest that there is. Exits with status 1 if something is missing in a
version that we support, and with 2 if pip has no index to ask.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vllm_lookahead.contract import CONTRACT, SUPPORTED, Release, Runner
from vllm_lookahead.contract.sources import Sources

BUILD_BACKEND = """
import os, pathlib, shutil

def prepare_metadata_for_build_wheel(folder, settings=None):
    for file in pathlib.Path("vllm").rglob("*.py"):
        kept = pathlib.Path(os.environ["KEPT"], file)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, kept)
    metadata = pathlib.Path(folder, "vllm-0.dist-info", "METADATA")
    metadata.parent.mkdir()
    shutil.copy("PKG-INFO", metadata)
    return metadata.parent.name
"""
"""pip asks a source distribution's build backend for its metadata. vLLM's would want torch and minutes to answer, so
this one stands in for it: it hands over the metadata that the distribution carries, and keeps the Python files."""


class NoIndexError(RuntimeError):
    """pip's package index can't be reached."""


def pip(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this environment's pip."""
    command = [sys.executable, "-m", "pip", *args, "--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def releases() -> dict[Release, str]:
    """The newest patch release of every minor version of vLLM that the index has, oldest first.

    Raises:
        NoIndexError: there is no index, or it has no vLLM.
    """
    result = pip("index", "versions", "vllm")
    found = re.search(r"^Available versions: (.*)$", result.stdout, re.MULTILINE)
    if found is None:
        raise NoIndexError((result.stderr.strip().splitlines() or ["pip says nothing"])[-1])
    newest: dict[Release, str] = {}
    for version in found[1].split(", "):  # newest first
        newest.setdefault(release_of(version), version)
    return dict(sorted(newest.items()))


def sources_of(version: str) -> Path:
    """The folder with the Python files of a version of vLLM, from the index if they aren't there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-lookahead" / "sources"
    folder = cache / f"vllm-{version}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        backend, kept = Path(temporary, "setuptools"), Path(temporary, "kept")
        backend.mkdir()
        (backend / "__init__.py").touch()
        (backend / "build_meta.py").write_text(BUILD_BACKEND)
        options = ("--no-deps", "--no-binary", "vllm", "--no-build-isolation", "--no-cache-dir", "--dest", temporary)
        environment = {"PYTHONPATH": temporary, "TMPDIR": temporary, "KEPT": str(kept)}
        result = pip("download", *options, f"vllm=={version}", **environment)
        if result.returncode:
            raise RuntimeError(f"pip could not get the sources of vLLM {version}\n{result.stderr}")
        if not folder.is_dir():  # another process may have been faster
            kept.rename(folder)
    return folder


def problems(root: Path) -> dict[tuple[Runner, str], list[str]]:
    """What is missing in vLLM's sources, by model runner and device."""
    sources = Sources(root)
    every = {part: part.problem(sources) for part in set().union(*CONTRACT.values())}
    return {key: [problem for part in parts if (problem := every[part])] for key, parts in CONTRACT.items()}


def release_of(version: str) -> Release:
    """Major and minor number."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def main() -> None:
    """Print a table, and what is missing where."""
    oldest = min(supported.oldest for supported in SUPPORTED.values())
    try:
        versions = sys.argv[1:] or [version for release, version in releases().items() if release >= oldest]
    except NoIndexError as error:
        print(f"no package index: {error}", file=sys.stderr)
        sys.exit(2)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(sources_of, versions))
    columns = [f"{runner.upper()}, {device}" for runner, device in CONTRACT]
    table = Table("vLLM", *columns, caption="in brackets: not supported")
    missing, later = [], []
    for version, folder in zip(versions, folders, strict=True):
        cells = []
        for (runner, device), found in problems(folder).items():
            supported, release = SUPPORTED[runner], release_of(version)
            cell = f"{len(found)} missing" if found else "fits"
            cells.append(cell if release in supported else f"({cell})")
            where = f"vLLM {version}, {runner.upper()}, {device}"
            if release in supported:
                missing += [f"{where}: {problem}" for problem in found]
            elif release > supported.newest:
                later += [f"{where}: not supported yet: {problem}" for problem in found or ["all fits"]]
        table.add_row(version, *cells)
    Console(soft_wrap=True).print(table, *missing, *later, sep="\n", markup=False, highlight=False)
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
