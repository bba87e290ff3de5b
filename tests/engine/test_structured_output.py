"""Structured output: drafts are chains there, side by side with other requests' trees, and the result is stock's."""

from __future__ import annotations

import json
import re

import jsonschema
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from .cases import CASES, Case, Encode, either
from .engines import Request, TreeSpy, assert_same, run
from .prompts import PROMPTS

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "values": {"type": "array", "items": {"enum": [10, 20, 30]}, "minItems": 3, "maxItems": 6},
        "mode": {"enum": ["read", "write", "read and write"]},
    },
    "required": ["name", "values", "mode"],
    "additionalProperties": False,
}
REGEX = r"(abc|abd)( (abc|abd)){4} [0-9]{3}-[0-9]{3}"
CHOICE = ["apples and pears", "apples and plums", "pears and plums"]


def structured(i: int, _: Encode) -> SamplingParams:
    options = (
        StructuredOutputsParams(json=SCHEMA),
        StructuredOutputsParams(regex=REGEX),
        StructuredOutputsParams(choice=CHOICE),
    )
    return either(i // 2, structured_outputs=options[i % 3], max_tokens=160)


CASE = Case("structured output", structured, tuple(p + json.dumps({"values": [10, 20, 10]}) for p in PROMPTS[:24]))


def test_structured_output_is_valid_and_stock_vllms(stock: LLM, ours: LLM, encode: Encode) -> None:
    requests = CASE.requests(encode)
    trees = next(case for case in CASES if case.name == "greedy").requests(encode)[24:]
    # One stream of both kinds, so that they share batches.
    mixed: list[Request] = [request for pair in zip(requests, trees, strict=True) for request in pair]
    labels = [f"{request.params.structured_outputs}" for request in mixed]
    with TreeSpy.on(ours) as spy:
        got = run(ours, mixed, in_flight=16, seed=1)
    assert_same(run(stock, mixed), got, labels)
    spy.assert_trees_were_used()
    for i, output in enumerate(got[::2]):
        text = output.outputs[0].text
        assert output.outputs[0].finish_reason == "stop", text
        if i % 3 == 0:
            jsonschema.validate(json.loads(text), SCHEMA)
        elif i % 3 == 1:
            assert re.fullmatch(REGEX, text)
        else:
            assert text in CHOICE


def test_structured_output_is_drafted_in_chains(ours: LLM, encode: Encode) -> None:
    with TreeSpy.on(ours) as spy:
        run(ours, CASE.requests(encode), in_flight=8)
    assert spy.verified == 0, "a grammar follows one path"
    assert spy.drafts_accepted >= 50
