"""Fixtures for unit tests that import vLLM but start no engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Make a folder that vLLM accepts as a model as long as nobody loads weights."""

    def make(name: str = "llama", **changes: Any) -> str:
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
        return str(folder)

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[..., str]) -> str:
    """A small Llama."""
    return make_model()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a program that uses ``LLM``: no command line parser was built in this process."""
    from vllm_lookahead import plugin

    monkeypatch.setattr(plugin, "_command_line", False)


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ``vllm serve``."""
    from vllm_lookahead import plugin

    monkeypatch.setattr(plugin, "_command_line", True)
