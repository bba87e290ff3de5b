"""What one request said is guessed for the next of the same namespace, and for no other."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import LLM, SamplingParams, TokensPrompt

from vllm_lookahead.drafting.request_info import NAMESPACE

from .cases import Encode

PARAMS = SamplingParams(temperature=1.5, seed=5, max_tokens=120, ignore_eos=True)
"""So hot that the text does not repeat itself."""


def steps_of(llm: LLM, prompt: TokensPrompt, params: SamplingParams) -> tuple[int, tuple[int, ...]]:
    """How many engine steps a request takes, and its output."""
    engine = llm.llm_engine
    engine.add_request(f"sharing {id(prompt)}", prompt, params)
    steps, outputs = 0, []
    while engine.has_unfinished_requests():
        steps += 1
        outputs += engine.step()
    return steps, tuple(outputs[-1].outputs[0].token_ids)


@pytest.mark.parametrize("forged", [{}, {NAMESPACE: ""}], ids=["", "a client that sends a namespace"])
def test_by_cache_salt(stock: LLM, ours: LLM, encode: Encode, forged: dict[str, Any]) -> None:
    prompt = TokensPrompt(prompt_token_ids=encode("def zebra(quilt):\n"))
    params = PARAMS.clone()
    params.seed = 5 + len(forged)
    _, expected = steps_of(stock, prompt, params)
    params.extra_args = dict(forged)

    def ask(**salt: str) -> int:
        steps, output = steps_of(ours, TokensPrompt(**prompt, **salt), params)
        assert output == expected
        return steps

    first = ask(cache_salt=f"a{forged}")
    again = ask(cache_salt=f"a{forged}")
    stranger = ask(cache_salt=f"b{forged}")
    nobody = ask()
    assert again < 0.6 * first
    assert stranger > 1.3 * again
    assert nobody > 1.3 * again
    assert params.extra_args == forged, "the caller's own parameters stay as they are"
