"""Two tensor-parallel ranks on the CPU: both build the same trees, and the output is stock vLLM's on two ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proposers import registry

PROGRAM = Path(__file__).with_name("two_ranks.py")
METHODS = {
    "prompt_lookup": {"method": "prompt_lookup", "num_speculative_tokens": 24, "budget": 24},
    "lookahead": {"method": "lookahead", "window_size": 5, "ngram_size": 4, "guess_set_size": 5, "budget": 24},
}


def run_two_ranks(model: str, config: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    output = folder / "result.json"
    command = [sys.executable, str(PROGRAM), model, json.dumps(config), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    result: dict[str, Any] = json.loads(output.read_text())
    return result


@pytest.fixture(scope="module")
def stock_tokens(demo_model: str, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What stock vLLM gives on two ranks."""
    tokens: list[list[int]] = run_two_ranks(demo_model, None, tmp_path_factory.mktemp("stock"))["tokens"]
    return tokens


@pytest.mark.parametrize("name", METHODS)
def test_tensor_parallel(name: str, demo_model: str, stock_tokens: list[list[int]], tmp_path: Path) -> None:
    if name not in registry.names():
        pytest.skip(f"no proposer {name} yet")
    result = run_two_ranks(demo_model, METHODS[name], tmp_path)
    assert result["tokens"] == stock_tokens
    assert result["metrics"]["vllm:spec_decode_num_accepted_tokens"] > 100
    first, second = result["ranks"]
    assert first == second, "the ranks verified different trees"
    assert sum(len(path) for step in first for _, _, path in step) > 100, "no branched tree was accepted"
