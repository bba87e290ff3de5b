"""What every test needs, before anything imports vLLM or torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# vLLM's kernels spin while they wait for each other: with more threads than idle cores a step takes 250 ms, not 4 ms.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# examples may take long on a busy machine, and the first one compiles
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

MODEL_VARIABLE = "LOOKAHEAD_TEST_MODEL"


@pytest.fixture(scope="session")
def demo_model() -> str:
    """The folder of the model that the engines serve: the bundled one, or what ``LOOKAHEAD_TEST_MODEL`` names."""
    bundled = Path(__file__).parents[1] / "vllm_lookahead" / "demo" / "model"
    folder = Path(os.environ.get(MODEL_VARIABLE, bundled))
    assert (folder / "model.safetensors").exists(), f"{folder} holds no model; set {MODEL_VARIABLE} to one"
    return str(folder)


@pytest.fixture(scope="module")
def parser() -> Any:
    """The parser of ``vllm serve``, as vLLM builds it."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_lookahead import plugin

    plugin.register()
    root = FlexibleArgumentParser(prog="vllm")
    make_arg_parser(root.add_subparsers(dest="subparser").add_parser("serve"))
    return root


def pytest_itemcollected(item: pytest.Item) -> None:
    """Divide the tests between processes (pytest-xdist) so that no expensive fixture is set up twice.

    Engine tests stay together by method, since a method's tests share an engine; the others by folder or file. Here,
    because pytest-xdist reads the marks before a conftest's ``pytest_collection_modifyitems`` runs.
    """
    folder = item.path.parent.name
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    together = str(params["method"]) if folder == "engine" and "method" in params else item.path.name
    if item.path.name == "test_runner_v2.py":
        together = item.name  # a process each
    group = folder if folder in ("http", "distributed", "ray") else f"{folder} {together}"
    item.add_marker(pytest.mark.xdist_group(group))
