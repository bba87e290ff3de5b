"""What every test needs, before anything imports vLLM or torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# vLLM's kernels spin while they wait for each other: with more threads than idle cores a step takes 250 ms, not 4 ms.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MODEL_VARIABLE = "LOOKAHEAD_TEST_MODEL"


@pytest.fixture(scope="session")
def demo_model() -> str:
    """The folder of the model that the engines serve: the bundled one, or what ``LOOKAHEAD_TEST_MODEL`` names."""
    bundled = Path(__file__).parents[1] / "vllm_lookahead" / "demo" / "model"
    folder = Path(os.environ.get(MODEL_VARIABLE, bundled))
    assert (folder / "model.safetensors").exists(), f"{folder} holds no model; set {MODEL_VARIABLE} to one"
    return str(folder)
