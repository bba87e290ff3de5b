"""Independent judges: transformers' own decoding, and transformers' probabilities under what we sampled."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from vllm import LLM, SamplingParams

from .cases import Encode, greedy
from .engines import Request, TreeSpy, engine, run, token_ids
from .prompts import PROMPTS, REPETITIVE


@pytest.fixture(scope="module")
def transformer(demo_model: str) -> PreTrainedModel:
    """The demo model in transformers, float32."""
    return AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()


@torch.inference_mode()
def test_greedy_is_what_transformers_generates(ours: LLM, transformer: PreTrainedModel, encode: Encode) -> None:
    requests = [Request(tuple(encode(p)), greedy(max_tokens=48, ignore_eos=True)) for p in PROMPTS[::4]]
    with TreeSpy.on(ours) as spy:
        got = token_ids(run(ours, requests, in_flight=16, seed=15))
    spy.assert_trees_were_used()
    for request, tokens in zip(requests, got, strict=True):
        prompt = torch.tensor([request.prompt])
        expected = transformer.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=48, eos_token_id=-1
        )
        assert tokens == expected[0, len(request.prompt) :].tolist()


@torch.inference_mode()
def test_bfloat16_tokens_are_the_argmax_within_rounding(
    demo_model: str, method: dict[str, Any], transformer: PreTrainedModel, encode: Encode
) -> None:
    """In bfloat16 two kernels rarely agree on a close call, so every token is judged given the text before it.

    A bfloat16 logit has 8 significant bits: between 8 and 16 neighbours are 0.06 apart, and stock vLLM's tokens are as
    far from the argmax as that (measured: 4 of 1,635 tokens, up to 0.07). So the distance allowed is relative: 2e-2 of
    the largest logit.
    """
    requests = [Request(tuple(encode(p)), greedy(max_tokens=48)) for p in PROMPTS[:40]]
    with engine(demo_model, method, dtype="bfloat16", block_size=128) as ours, TreeSpy.on(ours) as spy:
        got = token_ids(run(ours, requests, in_flight=16, seed=16))
    if not torch.cpu._is_amx_tile_supported():  # there vLLM's kernel is kept, and drafts are chains
        spy.assert_trees_were_used()
    gaps = []
    for request, tokens in zip(requests, got, strict=True):
        logits = transformer(torch.tensor([[*request.prompt, *tokens]])).logits[0, len(request.prompt) - 1 : -1]
        best = logits.amax(-1)
        gaps.append((best - logits[torch.arange(len(tokens)), torch.tensor(tokens)]) / best.abs())
    relative = torch.cat(gaps)
    assert relative.max() <= 2e-2
    assert (relative == 0).float().mean() >= 0.99, "nearly always it is the argmax itself"


SAMPLES = 10_000
LENGTH = 3
"""How many tokens of each sample are judged. One more is generated: no guess reaches beyond a request's end."""
CONTEXTS = {
    "prompt_lookup": (REPETITIVE[9], SamplingParams(temperature=0.8, max_tokens=LENGTH + 1)),
    "lookahead": (REPETITIVE[2], SamplingParams(temperature=1.0, top_k=12, max_tokens=LENGTH + 1)),
}
"""Prompts that repeat themselves, so that drafts are accepted, and warm enough that many tokens may follow."""
SMALL: dict[str, dict[str, Any]] = {"prompt_lookup": {}, "lookahead": {"window_size": 2, "ngram_size": 3}}
"""Small trees: 20,000 of them are verified."""


def test_unseeded_sampling_follows_the_models_distribution(
    demo_model: str, method: dict[str, Any], transformer: PreTrainedModel, encode: Encode
) -> None:
    """Chi-square tests of 10,000 samples: of the first token, of the first two, and of all three together.

    The first token comes out of the prefill, the second out of a tree's root, the third often out of a tree's node.
    """
    text, params = CONTEXTS[method["method"]]
    tokens = encode(text)
    prompt = tuple(tokens[: (len(tokens) - 1) // 32 * 32 + 1])
    params = params.clone()
    params.n, params.detokenize, params.ignore_eos = SAMPLES // 2, False, True
    small = {**SMALL[method["method"]], "method": method["method"], "num_speculative_tokens": 4, "budget": 4}
    with engine(demo_model, small, max_num_seqs=128) as ours, TreeSpy.on(ours) as spy:
        # All of the prompt but its last token is in the cache from here on.
        run(ours, [Request(prompt, greedy(max_tokens=1))])
        got = run(ours, [Request(prompt, params)] * 2, in_flight=2)
    spy.assert_trees_were_used(20)
    assert spy.drafts_accepted >= 500, spy
    samples = [tuple(completion.token_ids[:LENGTH]) for output in got for completion in output.outputs]
    assert len(samples) == SAMPLES
    for length in range(1, LENGTH + 1):
        expected = sequence_probabilities(transformer, prompt, params, length)
        counts = Counter(sample[:length] for sample in samples)
        p_value, bins = chi_square(counts, expected, SAMPLES)
        assert bins >= 10, "too few outcomes to say anything"
        assert p_value > 1e-4, f"sequences of {length}: p = {p_value:.2e} in {bins} bins"


@torch.inference_mode()
def sequence_probabilities(
    transformer: PreTrainedModel, prompt: tuple[int, ...], params: SamplingParams, length: int
) -> dict[tuple[int, ...], float]:
    """The likely continuations of a prompt with their probabilities: those that 20,000 samples should show often."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        heads = sorted(found, key=lambda head: -found[head])[:200]
        logits = transformer(torch.tensor([prompt + head for head in heads])).logits[:, -1] / params.temperature
        if params.top_k > 0:
            logits[logits < logits.topk(params.top_k).values[:, -1:]] = -torch.inf
        probabilities = logits.double().softmax(-1)
        longer = {}
        for head, row in zip(heads, probabilities, strict=True):
            values, tokens = row.topk(200)
            for token, value in zip(tokens.tolist(), values.tolist(), strict=True):
                longer[(*head, token)] = found[head] * value
        found = longer
    return found


def chi_square(
    counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float], total: int
) -> tuple[float, int]:
    """Pearson's test. Outcomes that are expected less than ten times count as one.

    Returns:
        The p-value and the number of bins.
    """
    bins = {outcome: p * total for outcome, p in expected.items() if p * total >= 10}
    rest_expected = total - sum(bins.values())
    rest_observed = total - sum(counts[outcome] for outcome in bins)
    statistic = sum((counts[outcome] - mean) ** 2 / mean for outcome, mean in bins.items())
    freedom = len(bins) - 1
    if rest_expected >= 5:
        statistic += (rest_observed - rest_expected) ** 2 / rest_expected
        freedom += 1
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1])), len(bins)


def test_chi_square_tells_right_from_wrong() -> None:
    """The judge itself: a fair die passes, a slightly loaded one does not."""
    fair = {(side,): 1 / 6 for side in range(6)}
    generator = torch.Generator().manual_seed(0)
    rolls = torch.randint(0, 6, (SAMPLES,), generator=generator).tolist()
    assert chi_square(Counter((roll,) for roll in rolls), fair, SAMPLES)[0] > 1e-4
    loaded = torch.multinomial(torch.tensor([1.25, 1, 1, 1, 1, 1]), SAMPLES, True, generator=generator).tolist()
    assert chi_square(Counter((roll,) for roll in loaded), fair, SAMPLES)[0] < 1e-4
    assert math.isclose(chi_square(Counter({(side,): 10 for side in range(6)}), fair, 60)[0], 1.0)
