"""The demo command before any engine starts: mistakes are told at once."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_lookahead.cli import app
from vllm_lookahead.demo import engine, run


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(run, "run_engine", fail)


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--method", "[prompt_lookupp]"],
            "unknown speculative method 'prompt_lookupp' (did you mean 'prompt_lookup'?)",
        ),
        (["--options", '{"max_ngram": 0}'], "[prompt_lookup]: max_ngram = 0: must be an integer from 1 to"),
        (["--method", "lookahead", "--options", '{"windw": 1}'], "[lookahead]: unknown option 'windw'"),
        (["--options", '{"model": "some/model"}'], "contradict each other"),
        (["--options", "{"], "not JSON"),
        (["--options", "[]"], "must be a JSON object"),
        (["--max-tokens", "1"], "--max-tokens"),
    ],
)
def test_mistake(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("method", ["ngram", "prompt_lookup", "lookahead", "token_recycling"])
def test_methods_of_vllm_and_ours_pass(method: str) -> None:
    run.check_method({"method": method, "num_speculative_tokens": 3})


def test_what_vllm_refuses_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise ValueError("no such model")

    monkeypatch.setattr("vllm.LLM", refuse)
    stream = io.StringIO()
    job = engine.Job("nowhere", None, [], 2, 0.0)
    with pytest.raises(ValueError, match="no such model"):
        engine.work(job, engine.Reporter(stream))
    assert json.loads(stream.getvalue()) == {"event": "refused", "reason": "no such model"}
