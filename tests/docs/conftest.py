"""What commands of the documents need: the example proposer, installed as its document says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from docs.blocks import ROOT, pieces
from proposers import registry


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the example is installed."""
    site = tmp_path_factory.mktemp("site")
    (piece,) = pieces("bash pip install ./examples/echo_proposer")
    # from a copy: building leaves files behind
    source = tmp_path_factory.mktemp("examples") / "echo_proposer"
    source.mkdir()
    for path in (ROOT / "examples/echo_proposer").glob("*.*"):
        (source / path.name).write_bytes(path.read_bytes())
    pip, *words = piece.words(**{"./examples/echo_proposer": str(source)})
    # what it depends on is here, and so is setuptools
    offline = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([sys.executable, "-m", pip, *words, *offline], check=True)
    return site


@pytest.fixture
def example(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example is installed for the length of a test."""
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.delitem(sys.modules, "echo_proposer", raising=False)
