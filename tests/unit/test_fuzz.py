"""Whatever is written into a speculative config is served as it stands, or refused in one line. Nothing in between."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
from command_line import engine_args
from hypothesis import given, settings
from vllm.utils.argparse_utils import FlexibleArgumentParser

from proposers import registry
from vllm_lookahead.config import SHARED_OPTIONS, ConfigError, LookaheadConfig, requested_method

METHODS = ("prompt_lookup", "lookahead", "token_recycling")
STOCK = ("ngram", "eagle", "suffix", "draft_model")

NUMBERS = (
    st.integers(-2, 70)
    | st.sampled_from([128, 1024, 1025, 2**31, 2**63, -(2**70)])
    | st.floats()
    | st.sampled_from([0.5, 1.0])
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.sampled_from(["auto", "fused", "separate", "/"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
"""Anything that JSON can say, right values among it."""


def options_of(method: str) -> st.SearchStrategy[dict[str, Any]]:
    """Options of a method: its own, those of all methods, and names that nobody knows."""
    names = [*registry.get(method).Options.model_fields, *SHARED_OPTIONS]
    known = st.dictionaries(st.sampled_from(names), VALUES, max_size=4)
    unknown = st.dictionaries(st.text(max_size=8), VALUES, max_size=1)
    return st.builds(lambda some, more: {**more, **some}, known, st.just({}) | unknown)


REQUESTS = st.sampled_from(METHODS).flatmap(lambda method: st.tuples(st.just(method), options_of(method)))


def assert_for_users(message: str) -> None:
    """One line that says what is wrong."""
    assert message
    assert "\n" not in message
    assert "Traceback" not in message
    assert "pydantic" not in message


def assert_as_it_stands(method: str, given: dict[str, Any], config: LookaheadConfig) -> None:
    """Every value that was given is the one that is used, its type included."""
    assert config.method == method
    for name, value in given.items():
        if name == "num_speculative_tokens":
            assert value is None or config.num_speculative_tokens <= value
        elif name == "budget":
            assert config.budget == value
        else:
            used = config.options[name]
            assert used == value
            assert isinstance(value, bool) == isinstance(used, bool)
    LookaheadConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))


@given(REQUESTS)
@settings(max_examples=600)
def test_options(request: tuple[str, dict[str, Any]]) -> None:
    method, given = request
    refusal, config = None, None
    try:
        config = LookaheadConfig.parse(method, given)
    except ConfigError as error:
        refusal = str(error)
    if config is not None:
        assert_as_it_stands(method, given, config)
    else:
        assert_for_users(str(refusal))
        assert any(name in str(refusal) or repr(name) in str(refusal) for name in given), "it names an option"


@given(st.dictionaries(st.sampled_from(["method", "model", "num_speculative_tokens", "x"]), VALUES, max_size=4))
def test_who_is_asked(given: dict[str, Any]) -> None:
    try:
        requested = requested_method(given, METHODS, STOCK)
    except ConfigError as error:
        assert_for_users(str(error))
    else:
        assert requested is None or requested[0] in METHODS


@given(request=REQUESTS, data=st.data())
@settings(max_examples=60)
def test_vllm_serve(
    parser: FlexibleArgumentParser, model: str, request: tuple[str, dict[str, Any]], data: st.DataObject
) -> None:
    """Through vLLM's own command line: an engine config, or status 2."""
    method, given = request
    # JSON knows neither NaN nor what a shell can't pass on
    text = json.dumps({**given, "method": method}).replace("\\u0000", "")
    flags = data.draw(st.sampled_from([[], ["--enable-lora"], ["--enforce-eager"]]))
    command = [model, "--skip-tokenizer-init", "--speculative-config", text, *flags]
    status, config = None, None
    try:
        config = engine_args(parser, *command).create_engine_config()
    except SystemExit as end:
        status = end.code
    if config is None:
        assert status == 2
    else:
        given = {name: value for name, value in json.loads(text).items() if name != "method"}
        assert_as_it_stands(method, given, LookaheadConfig.from_vllm_config(config))
