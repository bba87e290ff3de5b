"""Models whose attention can't verify trees get chains, the others trees; the output is stock vLLM's either way."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from .cases import either
from .engines import METHODS, Request, TreeSpy, assert_same, engine, run, runner_of

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
EXPERTS = "Mixtral: a mixture of experts"
FAMILIES: dict[str, tuple[PretrainedConfig, dict[str, Any], str | None]] = {
    "Qwen2": (Qwen2Config(**SIZES), {}, None),
    "GPT-2: learned positions": (
        GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=2, n_positions=512, bos_token_id=0, eos_token_id=1),
        {},
        None,
    ),
    EXPERTS: (
        MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
        {},
        None,
    ),
    "Mistral: sliding window": (MistralConfig(**SIZES, sliding_window=48), {}, "sliding-window attention"),
    "Gemma 2: soft-capped scores": (
        Gemma2Config(**SIZES, head_dim=32, sliding_window=48, query_pre_attn_scalar=32),
        {},
        "soft-capped|sliding-window|different kinds",
    ),
    "Bloom: ALiBi": (
        BloomConfig(vocab_size=300, hidden_size=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1),
        {"max_model_len": 512},
        "ALiBi",
    ),
    "fp8 KV cache": (Qwen2Config(**SIZES), {"kv_cache_dtype": "fp8"}, "fp8"),
    "float16": (Qwen2Config(**SIZES), {"dtype": "float16"}, "float16"),
}
"""A config, engine arguments, and why the family can't verify trees (None: it can)."""


def requests() -> list[Request]:
    """Repetitive prompts of random tokens: a random model falls into loops, which prompt lookup finds."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(16):
        piece = rng.integers(2, 300, 8 + i).tolist()
        found.append(Request(tuple(piece * 5), either(i, max_tokens=48, ignore_eos=True, detokenize=False)))
    return found


def check(family: str, folder: str) -> None:
    """Stock's output and ours for one family, and what was verified.

    Args:
        family: a key of ``FAMILIES``.
        folder: an empty folder for the model.

    Raises:
        AssertionError: an output, the kind of drafts or the warning is not what it should be.
    """
    config, arguments, reason = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # outputs that depend on the input
    model.save_pretrained(folder)
    settings = {"skip_tokenizer_init": True, "structured_outputs_config": None, **arguments}
    with engine(folder, None, **settings) as stock:
        expected = run(stock, requests())
    # caplog hears nothing of the first engine of a process: vLLM sets up its loggers anew while it starts
    warnings: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_lookahead.v1.runner.logger.warning", lambda text, *args: warnings.append(text % args))
        with engine(folder, METHODS["lookahead"], **settings) as ours, TreeSpy.on(ours) as spy:
            got = run(ours, requests(), in_flight=8, seed=18)
            verifiable = runner_of(ours).trees_verifiable
    assert_same(expected, got, [f"request {i}" for i in range(len(got))])
    assert spy.drafts_accepted >= 20
    assert verifiable == (reason is None)
    warnings = [text for text in warnings if "falls back to draft chains" in text]
    if reason is None:
        assert spy.accepted >= 5
        assert not warnings
    else:
        assert spy.verified == 0
        assert len(warnings) == 1, "one line at start-up"
        assert any(part in warnings[0] for part in reason.split("|")), warnings


FP8 = pytest.mark.skipif(
    not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()),
    reason="stock vLLM refuses an fp8 KV cache without AVX-512 or AMX",
)


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=FP8 if "fp8" in name else ()) for name in FAMILIES if name != EXPERTS],
)
def test_model_family(family: str, tmp_path: Path) -> None:
    check(family, str(tmp_path))


def test_mixture_of_experts(tmp_path: Path) -> None:
    # vLLM makes the experts' process group only when the first engine of a process has experts
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        process.submit(check, EXPERTS, str(tmp_path)).result()
