"""What V2 samples by: custom logits processors and thinking budgets see each node's own path; LoRA adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine.cases import Encode, either
from engine.engines import Request, TreeSpy, assert_same, engine, run, runner_of, token_ids
from engine.prompts import CHATS, PROMPTS
from engine.test_engine_features import adapter
from vllm import LLM, RequestOutput, SamplingParams
from vllm.config.reasoning import ReasoningConfig
from vllm.lora.request import LoRARequest
from vllm.v1.worker.gpu.sample import sampler as sampler_module
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor

from .conftest import SMALL
from .test_exactness import TREES

__all__ = ["adapter"]


class RareTokens(LogitsProcessor):
    """Makes each of a request's last tokens less likely: those of the draft, which lie in the rows before, too."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self.states = req_states

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        slots, depths = ctx.expanded_idx_mapping.tolist(), ctx.expanded_local_pos.tolist()
        for row, (slot, depth) in enumerate(zip(slots, depths, strict=True)):
            end = int(self.states.total_len.gpu[slot])
            recent = self.states.all_token_ids.gpu[slot, max(0, end - 6) : end].tolist()
            recent += ctx.input_ids[row - depth + 1 : row + 1].tolist()
            for token in recent[-6:]:
                logits[row, token] -= 1.0
        return logits


SETTINGS: dict[str, Any] = {
    **SMALL,
    "logits_processors": [RareTokens],
    "reasoning_config": ReasoningConfig(reasoning_start_str="<|assistant|>", reasoning_end_str="<|end|>"),
}


def requests_of(encode: Encode) -> list[Request]:
    """Some with a thinking budget."""
    plain = [Request(tuple(encode(p))[:32], either(i, max_tokens=14)) for i, p in enumerate(PROMPTS[:4])]
    budgets = [either(i, max_tokens=14, thinking_token_budget=(3, 6)[i % 2], ignore_eos=True) for i in range(4)]
    return plain + [Request(tuple(encode(p))[-48:], budget) for p, budget in zip(CHATS, budgets, strict=False)]


@pytest.fixture
def expected(demo_model: str, stock: LLM, encode: Encode) -> list[RequestOutput]:
    requests = requests_of(encode)
    with engine(demo_model, None, **SETTINGS) as processed:
        outputs = run(processed, requests, in_flight=6)
    plain = run(stock, requests[:4], in_flight=4)
    assert token_ids(outputs)[:4] != token_ids(plain), "the processor does something"
    return outputs


def test_custom_processors_and_thinking_budgets(demo_model: str, expected: list[RequestOutput], encode: Encode) -> None:
    requests = requests_of(encode)
    with engine(demo_model, TREES, **SETTINGS) as ours, TreeSpy.on(ours) as spy:
        got = run(ours, requests, in_flight=6)
    assert_same(expected, got, [f"budget {request.params.thinking_token_budget}" for request in requests])
    assert spy.verified >= 1
    assert spy.drafts_accepted >= 10


def test_lora(demo_model: str, adapter: LoRARequest, encode: Encode, tmp_path: Path) -> None:
    requests = [Request(tuple(encode(p))[:32], either(i, max_tokens=12)) for i, p in enumerate(PROMPTS[:4])]
    settings = {**SMALL, "enable_lora": True, "max_lora_rank": 8}
    with engine(demo_model, None, **settings) as stock:
        expected = [run(stock, requests, in_flight=4, lora_request=lora) for lora in (adapter, None)]
    assert token_ids(expected[0]) != token_ids(expected[1])
    with engine(demo_model, TREES, **settings) as ours, TreeSpy.on(ours) as spy:
        assert runner_of(ours).trees_verifiable
        got = [run(ours, requests, in_flight=4, lora_request=lora) for lora in (adapter, None)]
    for one, other in zip(expected, got, strict=True):
        assert_same(one, other, ["LoRA"] * len(requests))
    assert spy.verified >= 3


def test_greedy_rows_are_compared_as_the_model_gave_them(ours: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a copy to float32, which would keep order and ties; of equal logits the first counts, wherever it is."""
    sampler = runner_of(ours).sampler
    states, vocab_size = sampler.sampling_states, runner_of(ours).vocab_size
    states.add_request(0, SamplingParams(temperature=0.0))
    states.apply_staged_writes()
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    logits[0, [2050, 7, 1030, 8]] = 9.0
    logits[1, [vocab_size - 1, 1023, 1024]] = 9.0
    assert (logits[2] == logits[2].max()).sum() == 1
    seen = []

    def gumbel_sample(
        given: torch.Tensor, *args: Any, sample: Any = sampler_module.gumbel_sample, **kwargs: Any
    ) -> Any:
        seen.append((given.dtype, given.data_ptr()))
        return sample(given, *args, **kwargs)

    monkeypatch.setattr(sampler_module, "gumbel_sample", gumbel_sample)
    slots, places = torch.zeros(3, dtype=torch.int64), torch.arange(3)
    sampled, _ = sampler.sample(
        logits, slots, slots[:1], slots[:1].numpy(), places, places.int(), places.int(), places[:1].numpy()
    )
    assert seen == [(torch.bfloat16, logits.data_ptr())]
    assert sampled.tolist() == [7, 1023, int(logits[2].float().numpy().argmax())]
