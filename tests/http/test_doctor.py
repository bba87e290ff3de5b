"""``vllm-lookahead doctor`` with a real engine, as the documents have it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from docs.blocks import pieces

BIN = Path(sys.executable).parent
SMALL = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "enforce_eager": True}


def doctor(model: str, engine: dict[str, object], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The documents' command with more arguments for the engine, so that it starts soon."""
    (piece,) = pieces("bash vllm-lookahead doctor")
    words = piece.words(MODEL=model)
    at = words.index("--engine") + 1
    words[at] = json.dumps({**json.loads(words[at]), **SMALL, **engine})
    command = [str(BIN / words[0]), *words[1:], *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_healthy_engine(demo_model: str) -> None:
    result = doctor(demo_model, {"kv_cache_memory_bytes": 64 << 20, "dtype": "float32"}, "--method", "lookahead")
    assert result.returncode == 0, result.stdout + result.stderr
    words = " ".join(result.stdout.split())
    assert "LookaheadCPURunner, synchronous scheduling, float32, 8 requests and 256 tokens per step" in words
    assert "trees of up to 123 tokens per request" in words
    assert "A forward pass on this machine" in words
    assert "With 8 requests there is room for 31 draft tokens each, not 123" in words


def test_an_engine_that_would_be_refused(demo_model: str) -> None:
    result = doctor(demo_model, {"pipeline_parallel_size": 2})
    assert result.returncode == 1
    assert result.stdout == ""
    assert " ".join(result.stderr.split()).startswith("error: [prompt_lookup] can't run with pipeline parallelism")
    assert "Traceback" not in result.stderr
