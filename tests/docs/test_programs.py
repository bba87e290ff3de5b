"""The programs in the documents that start an engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from docs.blocks import Piece, pieces

PROMPT = "def add(a, b):"
MEMORY = "kv_cache_memory_bytes=2**30"


@pytest.mark.parametrize("piece", pieces("python vllm"), ids=lambda piece: piece.where)
def test_program(piece: Piece, demo_model: str, tmp_path: Path) -> None:
    """As they stand, but for a smaller cache and without compilation, which takes a minute."""
    assert MEMORY in piece.text
    assert f'generate(["{PROMPT}"], SamplingParams(temperature=0, max_tokens=64))' in piece.text
    text = piece.text.replace(MEMORY, "kv_cache_memory_bytes=2**26, enforce_eager=True, dtype='float32'")
    path = tmp_path / "program.py"
    path.write_text(text.replace("vllm_lookahead/demo/model", demo_model))
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_memory_bytes
    done = subprocess.run(
        [sys.executable, str(path)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    assert done.stdout.strip("\n") == greedy(demo_model, PROMPT, 64).strip("\n")


def greedy(model: str, prompt: str, tokens: int) -> str:
    """What transformers makes of a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(prompt, return_tensors="pt")
    made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).generate(
        **ids, do_sample=False, max_new_tokens=tokens
    )
    return str(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
