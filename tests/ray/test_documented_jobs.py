"""The batch jobs that docs/scaling-out.md shows, with the rows that it shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import TIMEOUT, Cluster
from docs.blocks import Piece, pieces, write_files
from jobs import ENGINE, lines, log

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("piece", pieces("bash vllm-lookahead batch"), ids=lambda piece: piece.where)
def test_batch(piece: Piece, cluster: Cluster, demo_model: str, tmp_path: Path) -> None:
    write_files(piece.document, tmp_path)
    program, command, source, target, *words = piece.words(
        **{"MODEL": demo_model, "vllm_lookahead/demo/model": demo_model}
    )
    if "--engine" not in words:  # vLLM would take this machine's whole memory
        words += ["--engine", json.dumps(ENGINE)]
    assert program == "vllm-lookahead"
    environment = {**cluster.environment}
    if "MODEL" not in piece.words():
        del environment["RAY_ADDRESS"]  # the job on one machine starts Ray by itself
    done = subprocess.run(
        [sys.executable, "-m", "vllm_lookahead.cli", command, source, target, *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + log(tmp_path / target)
    rows = lines(tmp_path / source)
    results = lines(tmp_path / target / "results.jsonl")
    assert [{name: result[name] for name in row} for row, result in zip(rows, results, strict=True)] == rows
    for result in results:
        assert result["generated_text"]
        assert len(result["generated_tokens"]) == result["num_generated_tokens"]
        assert result["num_input_tokens"] > 0
