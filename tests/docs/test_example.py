"""The proposer that docs/proposers.md shows is the one in examples/, and works as it says."""

from __future__ import annotations

import tomllib
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from docs.blocks import ROOT, pieces
from proposers import DraftTree, registry

FOLDER = ROOT / "examples" / "echo_proposer"


def test_the_document_shows_the_file() -> None:
    (module,) = pieces("python proposers")
    assert module.text == (FOLDER / "echo_proposer.py").read_text()
    (settings,) = pieces("toml")
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    assert tomllib.loads(settings.text)["project"].items() <= project["project"].items()


@pytest.mark.usefixtures("example")
def test_it_is_found_by_its_entry_point() -> None:
    assert "echo" in registry.names()
    assert registry.get("echo") is import_module("echo_proposer").Echo


@pytest.mark.usefixtures("example")
def test_alone() -> None:
    (piece,) = pieces("python echo_proposer")
    names: dict[str, Any] = {}
    exec(compile(piece.text, piece.where, "exec"), names)
    assert isinstance(names["tree"], DraftTree)


@pytest.mark.usefixtures("example")
def test_trees_are_valid_and_copy_the_text() -> None:
    module = import_module("echo_proposer")
    rng = np.random.default_rng(0)
    nodes = 0
    for suffix in (1, 2, 3):
        request = module.Echo(module.EchoOptions(suffix=suffix)).start("x", np.zeros(0, np.int32))
        for length in (1, 2, 3, 4, 30, 200):
            context = rng.integers(0, 5, length).astype(np.int32)
            for budget in (0, 1, 7, 100):
                tree = request.propose(context, budget)
                tree.validate(unique_siblings=True)
                assert len(tree) <= budget
                nodes += len(tree)
                places = [p for p in range(suffix, length) if (context[p - suffix : p] == context[-suffix:]).all()]
                roots = tree.token_ids[tree.parents == -1].tolist()
                assert set(roots) <= {int(context[p]) for p in places}
                assert bool(roots) == bool(places and budget)
    assert nodes
