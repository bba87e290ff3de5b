"""``vllm-lookahead doctor``: refusals before an engine starts, and what it makes of the numbers; with an engine:
``tests/http/test_doctor.py``.
"""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_lookahead.cli import app
from vllm_lookahead.doctor.report import cost_of, show, spent
from vllm_lookahead.doctor.run import BATCHES, Findings
from vllm_lookahead.drafting.report import DraftingReport

ENGINE = {
    "runner": "LookaheadCPURunner",
    "async_scheduling": False,
    "dtype": "float32",
    "max_num_seqs": 64,
    "max_num_batched_tokens": 2048,
    "eager": True,
    "device": "cpu",
}
ABOUT = {
    "machine": {"cpu": "a CPU", "cores": 2, "memory_gib": 8.0, "load_average": 0.0},
    "versions": {"vllm": "0.32.0", "torch": "2.13.0"},
}
FREE, DEAR = [(1, 0.010), (1024, 0.0101)], [(1, 0.010), (1024, 10.24)]
FITTED = (0.0, 1.0, 0.0, 0.0)


def report(forward: list[tuple[int, float]], **changes: object) -> DraftingReport:
    values = {
        "runner": "LookaheadCPURunner",
        "why_chains": None,
        "most_nodes": dict.fromkeys(BATCHES, 16),
        "budget": "auto",
        "forward": forward,
        "fitted": FITTED,
    }
    return DraftingReport(**{**values, **changes})  # type: ignore[arg-type]


def printed(drafting: DraftingReport | None, **engine: object) -> str:
    stream = io.StringIO()
    show(Console(file=stream, width=200), ABOUT, Findings({**ENGINE, **engine}, drafting))
    return stream.getvalue()


def test_what_auto_spends_follows_what_steps_cost() -> None:
    free, dear = report(FREE), report(DEAR)
    free_cost, dear_cost = cost_of(free), cost_of(dear)
    assert free_cost is not None
    assert dear_cost is not None
    nodes, gain = spent(free, free_cost, 1, 0.9)
    assert nodes == 16
    assert gain == pytest.approx(sum(0.9**i for i in range(17)), rel=0.01), "the geometric series: verifying is free"
    assert spent(dear, dear_cost, 1, 0.9) == (0, 1.0)


def test_nothing_to_change() -> None:
    text = printed(report(FREE))
    assert "trees of up to 16 tokens" in text
    assert "Nothing: this is as good as it gets here." in text


@pytest.mark.parametrize(
    ("drafting", "engine", "advice"),
    [
        (None, {}, "Leave out --worker-cls"),
        (report(FREE, why_chains="its attention has sinks"), {}, "less than trees: its attention has sinks."),
        (report(DEAR), {}, "doesn't pay on this machine even for one request"),
        (report([], budget=5, fitted=()), {}, "budget is 5, whatever it costs"),
        (report(FREE, most_nodes={1: 48, 8: 48, 64: 7}), {}, "With 64 requests there is room for 7 draft tokens each"),
        (report(FREE), {"device": "cuda"}, "Leave out --enforce-eager"),
    ],
)
def test_advice(drafting: DraftingReport | None, engine: dict[str, object], advice: str) -> None:
    assert advice in printed(drafting, **engine).split("What to change:")[1]
    assert "as good as it gets" not in printed(drafting, **engine)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--method", "prompt_lookupp"], "did you mean 'prompt_lookup'"),
        (["--method", "ngram"], "'ngram' is vLLM's own method"),
        (["--options", '{"max_ngram": 0}'], "max_ngram = 0: must be an integer from 1 to 8"),
    ],
)
def test_refusals(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == 1, result.output
    assert sentence in result.output
    assert "Traceback" not in result.output


def test_a_plugin_that_vllm_must_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "VLLM_PLUGINS='other' keeps vLLM from loading this plugin" in result.output
