"""What the engine does around a request must not show in its output: chunks, caches, preemption, the context's end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm import LLM, RequestOutput
from vllm.lora.request import LoRARequest

from .cases import CASES, Case, Encode, either
from .engines import Request, TreeSpy, assert_same, engine, metric, run, runner_of, token_ids
from .prompts import PROMPTS, REPETITIVE


def labels(requests: list[Request]) -> list[str]:
    return [f"prompt of {len(request.prompt)}, {request.params}" for request in requests]


def test_chunked_prefill_with_a_small_token_budget(
    demo_model: str, method: dict[str, Any], stock: LLM, encode: Encode
) -> None:
    """Prompts come in pieces of at most 48 tokens, beside rows that verify trees out of the same budget.

    The reference has a large budget: seeded requests need a generator that can rewind for chunked prefill in stock
    vLLM, and the CPU's can't.
    """
    requests = [Request(tuple(encode(p + p)), either(i, max_tokens=32, logprobs=1)) for i, p in enumerate(PROMPTS[:40])]
    assert sum(len(request.prompt) > 96 for request in requests) >= 20, "three chunks or more"
    with engine(demo_model, method, max_num_batched_tokens=48, max_num_seqs=6) as ours, TreeSpy.on(ours) as spy:
        got = run(ours, requests, in_flight=8, seed=4)
    assert_same(run(stock, requests), got, labels(requests))
    spy.assert_trees_were_used()


def test_prefix_caching_serves_what_trees_have_written(ours: LLM, stock: LLM, encode: Encode) -> None:
    """The second turn of a chat finds the first turn's output in the cache: KV that the commit has put in place."""
    ours.llm_engine.reset_prefix_cache()
    stock.llm_engine.reset_prefix_cache()
    first = [Request(tuple(encode(p)), either(i, max_tokens=96, ignore_eos=True)) for i, p in enumerate(PROMPTS[:40])]
    with TreeSpy.on(ours) as spy:
        answers = run(ours, first, in_flight=16, seed=5)
    assert_same(run(stock, first), answers, labels(first))
    spy.assert_trees_were_used(50)
    stock.llm_engine.reset_prefix_cache()  # so that stock computes the second turn's prompt in one go

    second = [
        Request((*request.prompt, *answer, *encode("\nAnd then?\n")), either(i + 1, max_tokens=24, logprobs=3))
        for i, (request, answer) in enumerate(zip(first, token_ids(answers), strict=True))
    ]
    expected = run(stock, second)
    for _ in range(2):
        got = run(ours, second, in_flight=16, seed=6)
        for one, request in zip(got, first, strict=True):
            # vLLM hands a block to the cache in the step after the one that filled it, so the last one may be missing
            assert one.num_cached_tokens is not None
            assert one.num_cached_tokens >= (len(request.prompt) + 95) // 32 * 32 - 32
            assert one.num_cached_tokens > len(request.prompt), "the first turn's output must be cached"
        assert_same(expected, got, labels(second))


def test_preemption_under_a_tiny_kv_cache(demo_model: str, method: dict[str, Any], stock: LLM, encode: Encode) -> None:
    """Requests lose their KV, and a step its scheduled drafts, and come back later, in another row perhaps."""
    requests = [
        Request(tuple(encode(p)), either(i, max_tokens=64, ignore_eos=True)) for i, p in enumerate(PROMPTS[:40])
    ]
    tiny = {"num_gpu_blocks_override": 20, "max_model_len": 256}
    with engine(demo_model, method, **tiny) as ours, TreeSpy.on(ours) as spy:
        got = run(ours, requests, in_flight=16, seed=7)
        assert metric(ours, "vllm:num_preemptions") >= 10
    assert_same(run(stock, requests), got, labels(requests))
    spy.assert_trees_were_used()


@pytest.fixture(scope="module")
def context_end(demo_model: str, encode: Encode) -> tuple[list[Request], list[RequestOutput]]:
    """Requests whose prompts leave 1 to 12 tokens of a context of 128, and what stock vLLM makes of them."""
    requests = []
    for i, text in enumerate(REPETITIVE):
        tokens = tuple(encode(text * 8))
        assert len(tokens) >= 128
        requests += [
            Request(tokens[: 128 - left], either(i, max_tokens=64, ignore_eos=left % 2 == 0)) for left in range(1, 13)
        ]
    with engine(demo_model, None, max_model_len=128) as stock:
        return requests, run(stock, requests, in_flight=16, seed=8)


def test_prompts_that_end_just_before_max_model_len(
    demo_model: str, method: dict[str, Any], context_end: tuple[list[Request], list[RequestOutput]]
) -> None:
    requests, expected = context_end
    assert all(
        len(request.prompt) + len(output.outputs[0].token_ids) <= 128
        for request, output in zip(requests, expected, strict=True)
    )
    assert sum(output.outputs[0].finish_reason == "length" for output in expected) > len(expected) // 2
    with engine(demo_model, method, max_model_len=128) as ours:
        for in_flight, seed in ((1, None), (16, 9)):
            with TreeSpy.on(ours) as spy:
                got = run(ours, requests, in_flight=in_flight, seed=seed)
            assert_same(expected, got, labels(requests))
            spy.assert_trees_were_used()


def test_64_concurrent_requests(ours: LLM, reference: Callable[[Case], list[RequestOutput]], encode: Encode) -> None:
    """With 64 rows the scheduler's token budget leaves each tree about 30 nodes."""
    cases = [case for case in CASES if case.name in ("greedy", "seeded sampling")]
    requests = [request for case in cases for request in case.requests(encode)]
    expected = [output for case in cases for output in reference(case)]
    with TreeSpy.on(ours) as spy:
        got = run(ours, requests, in_flight=64)
    assert_same(expected, got, labels(requests))
    spy.assert_trees_were_used(50)


def test_compiled_mode(
    demo_model: str, method: dict[str, Any], reference: Callable[[Case], list[RequestOutput]], encode: Encode
) -> None:
    """The default: torch.compile. The other tests run eagerly, because that starts faster."""
    cases = [case for case in CASES if case.name in ("greedy", "seeded sampling")]
    with engine(demo_model, method, enforce_eager=False) as ours:
        for case in cases:
            with TreeSpy.on(ours) as spy:
                got = run(ours, case.requests(encode), in_flight=16, seed=10)
            assert_same(reference(case), got, case.prompts)
            spy.assert_trees_were_used()


@pytest.fixture(scope="module")
def adapter(demo_model: str, tmp_path_factory: pytest.TempPathFactory) -> LoRARequest:
    """A random LoRA adapter of rank 4 for the attention and the MLP, strong enough to change every output."""
    config = json.loads((Path(demo_model) / "config.json").read_text())
    hidden, head, inner = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, heads * head),
        "self_attn.k_proj": (hidden, kv_heads * head),
        "self_attn.v_proj": (hidden, kv_heads * head),
        "self_attn.o_proj": (heads * head, hidden),
        "mlp.down_proj": (inner, hidden),
    }
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (inputs, outputs) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{key}.lora_A.weight"] = torch.randn(4, inputs, generator=generator) / inputs**0.5
            weights[f"{key}.lora_B.weight"] = torch.randn(outputs, 4, generator=generator) * 0.1
    folder = tmp_path_factory.mktemp("adapter")
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": [*shapes]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return LoRARequest("random", 1, str(folder))


@pytest.fixture(scope="module")
def lora_reference(
    demo_model: str, adapter: LoRARequest, encode: Encode
) -> tuple[list[Request], list[RequestOutput], list[RequestOutput]]:
    """Requests, and stock vLLM's outputs with and without the adapter."""
    requests = [Request(tuple(encode(p)), either(i, max_tokens=24)) for i, p in enumerate(PROMPTS[:24])]
    with engine(demo_model, None, enable_lora=True, max_lora_rank=8) as stock:
        return requests, run(stock, requests, lora_request=adapter), run(stock, requests)


def test_lora(
    demo_model: str,
    method: dict[str, Any],
    adapter: LoRARequest,
    lora_reference: tuple[list[Request], list[RequestOutput], list[RequestOutput]],
) -> None:
    requests, adapted, plain = lora_reference
    assert sum(a != b for a, b in zip(token_ids(adapted), token_ids(plain), strict=True)) > 12
    # larger trees than vLLM has places for next to LoRA: they are cut
    places = {"max_num_seqs": 128, "max_num_batched_tokens": 2048}
    with engine(demo_model, method, enable_lora=True, max_lora_rank=8, **places) as ours:
        assert runner_of(ours).num_spec_tokens == 2048 // 128 - 1 < method["num_speculative_tokens"]
        for lora, expected in ((adapter, adapted), (None, plain)):
            with TreeSpy.on(ours) as spy:
                got = run(ours, requests, in_flight=8, seed=11, lora_request=lora)
            assert_same(expected, got, labels(requests))
            spy.assert_trees_were_used()
