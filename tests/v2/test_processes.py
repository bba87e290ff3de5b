"""Model Runner V2 in processes of its own: a server as a user starts it, and two tensor-parallel ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine.prompts import PROMPTS

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "http"))

from serving import client, complete, serving  # noqa: E402

SMALL = ("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager")
METHOD = {"method": "prompt_lookup", "num_speculative_tokens": 6, "budget": 6}


def test_a_server_answers_as_stock_vllms(demo_model: str, tmp_path: Path) -> None:
    answers: list[list[Any]] = []
    for name, config in (("stock", None), ("ours", METHOD)):
        log = tmp_path / f"{name}.log"
        asked = () if config is None else ("--speculative-config", json.dumps(config))
        arguments = (*SMALL, "--kv-cache-memory-bytes", "64M", *asked)
        with serving(demo_model, log, *arguments, VLLM_LOGGING_LEVEL="INFO") as server:
            server.wait_until_ready()
            openai = client(server)
            got: list[Any] = [complete(openai, prompt, max_tokens=12).choices[0].text for prompt in PROMPTS[:2]]
            stream = complete(openai, PROMPTS[2], max_tokens=12, stream=True)
            got.append("".join(part.choices[0].text for part in stream))
            got.append(complete(openai, PROMPTS[3], max_tokens=8, temperature=0.8, seed=7).choices[0].text)
            answers.append(got)
            if config is not None:
                metrics = server.metrics()
                assert metrics["vllm:spec_decode_num_accepted_tokens_total"] > 0
        text = log.read_text()
        assert "Model Runner V2" in text or "V2 Model Runner" in text
        if config is not None:
            assert "verifies draft trees" in text
    assert answers[0] == answers[1]


def two_ranks(model: str, config: dict[str, Any] | None, output: Path) -> dict[str, Any]:
    program = TESTS / "distributed" / "two_ranks.py"
    command = [sys.executable, str(program), model, json.dumps(config), str(output), "4", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    result: dict[str, Any] = json.loads(output.read_text())
    return result


def test_two_tensor_parallel_ranks_build_the_same_trees(
    demo_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    expected = two_ranks(demo_model, None, tmp_path / "stock.json")
    got = two_ranks(demo_model, METHOD, tmp_path / "ours.json")
    assert got["tokens"] == expected["tokens"]
    first, second = got["ranks"]
    assert first == second
    assert sum(len(step) for step in first) >= 5, "branched trees were verified"
