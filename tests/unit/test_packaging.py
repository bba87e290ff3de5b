"""The built wheel, as pip would install it: everything is in it, and vLLM finds the plugin."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("LICENSE", "README.md", "pyproject.toml", "proposers", "vllm_lookahead")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the wheel is built from, because building leaves files behind."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    return source


@pytest.fixture(scope="module")
def site(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed."""
    wheels, site = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source], check=True)
    (wheel,) = wheels.glob("vllm_lookahead-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    return site


def test_everything_is_in_it(source: Path, site: Path) -> None:
    for package in ("vllm_lookahead", "proposers"):
        expected = {path.relative_to(source) for path in (source / package).rglob("*.py")}
        installed = {path.relative_to(site) for path in (site / package).rglob("*.py")}
        assert installed == expected
        assert (site / package / "py.typed").exists()
    model = {path.name for path in (source / "vllm_lookahead/demo/model").iterdir()}
    assert {path.name for path in (site / "vllm_lookahead/demo/model").iterdir()} == model
    assert (site / "vllm_lookahead/demo/prompts.toml").exists()
    assert list(site.glob("vllm_lookahead-*.dist-info/licenses/LICENSE"))
    assert (site / "bin/vllm-lookahead").exists()


def test_plugin_and_proposers_are_found(site: Path) -> None:
    code = (
        "import importlib.metadata as m, vllm_lookahead, proposers\n"
        f"assert vllm_lookahead.__file__.startswith({str(site)!r}), vllm_lookahead.__file__\n"
        f"(distribution,) = [d for d in m.distributions(path=[{str(site)!r}]) if d.name == 'vllm-lookahead']\n"
        "points = {(p.group, p.name): p.load() for p in distribution.entry_points}\n"
        "assert points['vllm.general_plugins', 'lookahead'].__module__ == 'vllm_lookahead.plugin'\n"
        "assert set(proposers.names()) >= {'lookahead', 'prompt_lookup'}\n"
        "assert ('console_scripts', 'vllm-lookahead') in points\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(site)}, cwd=site, check=True)
