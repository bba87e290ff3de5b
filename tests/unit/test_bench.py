from __future__ import annotations

import gzip
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from proposers import registry
from vllm_lookahead.bench import junk_chain, methods, prompts, serve, step_cost, tables
from vllm_lookahead.bench.comparison import Comparison
from vllm_lookahead.bench.measure import PROFILE_TOKENS, WARM_UP_TOKENS, encode, identical, measure
from vllm_lookahead.bench.methods import MethodError
from vllm_lookahead.bench.prompts import Prompt, PromptError
from vllm_lookahead.bench.results import Load, Measurement, Profile, Results, save
from vllm_lookahead.bench.stats import Latency, Spread, percentile, ratios
from vllm_lookahead.bench.tables import Table
from vllm_lookahead.bench.watch import PARTS, REST, NodeCounter, StepTimers
from vllm_lookahead.bench.worker import EngineFailedError, EngineSettings
from vllm_lookahead.cli import app

# ---- statistics


def test_spread_and_how_it_is_shown() -> None:
    spread = Spread.of([3.0, 1.0, 2.0])
    assert spread == Spread(1.0, 2.0, 3.0)
    assert spread.show(".1f") == "2.0 (1.0 - 3.0)"
    assert Spread.of([1.25]).show(".2f") == "1.25"


def test_percentiles_are_weighted() -> None:
    assert percentile([], [], 50) == 0.0
    assert percentile([5.0], [1.0], 99) == 5.0
    assert percentile([1.0, 2.0, 3.0, 4.0], [1.0] * 4, 50) == 2.0
    assert percentile([4.0, 1.0, 3.0, 2.0], [1.0] * 4, 99) == 4.0
    assert percentile([1.0, 10.0], [9.0, 1.0], 90) == 1.0
    assert percentile([1.0, 10.0], [1.0, 9.0], 11) == 10.0


def test_tokens_of_one_step_share_its_time() -> None:
    # 3 steps: 1 token after 10 ms, 4 tokens after 20 ms, 1 token after 30 ms
    latency = Latency.of([(0.010, 1), (0.020, 4), (0.030, 1)])
    assert latency.itl_p50 == pytest.approx(5.0)
    assert latency.itl_p99 == pytest.approx(30.0)
    assert (latency.pause_p50, latency.pause_p99) == pytest.approx((20.0, 30.0))


def test_ratios_pair_the_rounds() -> None:
    assert ratios({0: 2.0, 1: 3.0, 2: 5.0}, {0: 1.0, 1: 2.0}) == [2.0, 1.5]


# ---- prompts


def write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    return path


def test_prompt_files(tmp_path: Path) -> None:
    human_eval = {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    pass\n", "test": ""}
    spec_bench = {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]}
    share_gpt = {"id": "a", "conversations": [{"from": "gpt", "value": "Hi"}, {"from": "human", "value": "Why?"}]}
    silent = {"id": "b", "conversations": [{"from": "gpt", "value": "Hi"}]}
    expected = [Prompt("def f():\n"), Prompt("Write.", chat=True), Prompt("Why?", chat=True), Prompt("x\u2028y")]
    records = [human_eval, spec_bench, share_gpt, silent, {"prompt": "x\u2028y"}]
    path = write(tmp_path / "all.jsonl", *records)
    assert prompts.read_prompts(str(path)) == expected
    zipped = tmp_path / "all.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert prompts.read_prompts(str(zipped)) == expected
    array = tmp_path / "all.json"
    array.write_text(json.dumps(records, indent=1))
    assert prompts.read_prompts(str(array)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"text": "b"}\n', "line 2: no usable field"),
        ('[{"prompt": 1}]', "record 1: no usable field"),
        ('{"prompt": "a"\n', "neither JSONL nor a JSON array"),
        ("\n", "holds none"),
        ('{"turns": []}', "line 1: no usable field"),
    ],
)
def test_prompt_file_errors(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(PromptError, match=message):
        prompts.read_prompts(str(path))


def test_missing_prompt_file(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="can't read"):
        prompts.read_prompts(str(tmp_path / "nothing.jsonl"))


def test_bundled_and_random_prompts() -> None:
    assert {prompt.chat for prompt in prompts.read_prompts("demo")} == {False, True}
    words = prompts.read_prompts("random")
    assert words == prompts.read_prompts("random")
    assert len({prompt.text for prompt in words}) == len(words) == prompts.RANDOM_PROMPTS
    assert len(set(words[0].text.split())) == prompts.RANDOM_WORDS


def test_order_of_prompts() -> None:
    first = prompts.order(10, 0, 4, 4, rotate=True)
    second = prompts.order(10, 1, 4, 4, rotate=True)
    assert not set(first) & set(second)
    assert prompts.order(10, 1, 4, 4, rotate=False) == first
    assert prompts.order(10, 1, 4, 8, rotate=True)[:4] == second, "a larger batch begins with the same prompts"
    assert sorted(prompts.order(3, 2, 4, 6, rotate=True)) == [0, 0, 1, 1, 2, 2], "too few prompts come again"
    assert prompts.order(10, 0, 4, 10, rotate=True, seed=1) != prompts.order(10, 0, 4, 10, rotate=True)


# ---- methods


def test_methods_by_name() -> None:
    found = methods.parse(["stock,ngram", "[prompt_lookup]", "lookahead"])
    assert [m.name for m in found] == ["stock", "ngram", "prompt_lookup", "lookahead"]
    assert [m.plugin for m in found] == [False, False, True, True]
    assert found[0].speculative_config is None
    assert found[3].speculative_config == {"method": "lookahead"}
    assert [m.name for m in methods.parse(methods.STANDARD)] == list(methods.STANDARD)


def test_methods_with_settings() -> None:
    found = methods.parse(['wide={"method": "lookahead", "window_size": 20}', 'n={"method": "ngram"}', "plain=null"])
    assert [(m.name, m.plugin) for m in found] == [("wide", True), ("n", False), ("plain", False)]
    assert found[0].speculative_config == {"method": "lookahead", "window_size": 20}
    assert found[2].speculative_config is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["nix"], "unknown method 'nix'"),
        (["stock,stock"], "named twice"),
        (["a={"], "not JSON"),
        (["a=3"], "must be NAME="),
        (['={"method": "ngram"}'], "must be NAME="),
    ],
)
def test_method_errors(values: list[str], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        methods.parse(values)


def test_suffix_does_not_know_the_answers() -> None:
    assert methods.STOCK["suffix"] == {"method": "suffix", "suffix_decoding_max_cached_requests": 0}


def test_suffix_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = [None]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found[0])
    assert "arctic-inference" in (methods.named("suffix").missing or "")
    assert methods.named("ngram").missing is None
    found[0] = object()
    assert methods.named("suffix").missing is None


# ---- watching an engine


class Runner:
    """Something like a model runner, whose work advances a clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.model = types.SimpleNamespace()
        self.model.compute_logits = lambda: self.work(1.0)

    def work(self, seconds: float) -> None:
        self.now += seconds

    def _model_forward(self) -> None:
        self.work(4.0)

    def _sample(self) -> None:
        self.work(0.5)
        self.commit_kv()

    def commit_kv(self) -> None:
        self.work(0.25)

    def propose_draft_token_ids(self) -> None:
        self.work(0.5)
        self._model_forward()  # a branch of its own

    def run_branches(self, rows: Any) -> int:
        return len(rows)

    def execute_model(self, scheduler_output: Any) -> str:
        self._model_forward()
        self.model.compute_logits()
        self._sample()
        self.propose_draft_token_ids()
        self.work(2.0)
        return "done"


def scheduled(**drafts: list[int]) -> Any:
    return types.SimpleNamespace(scheduled_spec_decode_tokens=drafts)


def test_timers_split_a_step_without_counting_twice() -> None:
    runner = Runner()

    # an attribute of the instance, as nn.Module's methods never are
    class Model:
        def compute_logits(self) -> None:
            runner.work(1.0)

    runner.model = Model()  # type: ignore[assignment]
    timers = StepTimers(clock=lambda: runner.now)
    with timers.on(runner):
        for counts in (True, False, True):
            before = runner.now
            runner.execute_model(scheduled())
            timers.end_step(runner.now - before, counts=counts)
    expected = {"forward": 9.0, "sample": 0.5, "commit": 0.25, "propose": 0.5, REST: 2.0}
    assert timers.report() == {part: pytest.approx(1e3 * seconds) for part, seconds in expected.items()}
    assert set(expected) == {*PARTS, REST}
    assert "_sample" not in vars(runner), "nothing stays behind"
    assert "compute_logits" not in vars(runner.model)


def test_nothing_to_watch() -> None:
    timers = StepTimers()
    with timers.on(None):
        timers.end_step(1.0, counts=True)
    assert timers.report() == {}
    NodeCounter().attach(None)


def test_nodes_are_counted() -> None:
    runner, counter = Runner(), NodeCounter()
    counter.attach(runner)
    assert runner.execute_model(scheduled(a=[1, 2], b=[3])) == "done"
    runner.execute_model(scheduled())
    assert runner.run_branches([types.SimpleNamespace(comb=[1, 2, 3, 4])]) == 1
    assert counter.nodes == 7
    counter.reset()
    assert counter.nodes == 0


# ---- the measurement


class FakeEngine:
    """Answers like an engine: counts upwards from each prompt's last token, so many tokens per step."""

    def __init__(self, tokens_per_step: int, seconds_per_step: float, *, wrong_from_batch: int = 1000) -> None:
        self.per_step, self.per_second, self.wrong_from_batch = tokens_per_step, seconds_per_step, wrong_from_batch
        self.calls: list[dict[str, Any]] = []

    def call(self, command: str, **arguments: Any) -> Any:
        if command == "encode":
            return {"ids": [list(range(len(prompt["text"]))) for prompt in arguments["prompts"]]}
        assert command == "generate"
        self.calls.append(arguments)
        length, requests = arguments["max_tokens"], arguments["prompts"]
        steps = -(-(length - 1) // self.per_step)
        outputs = [[prompt[-1] + i for i in range(length)] for prompt in requests]
        if arguments["batch"] >= self.wrong_from_batch:
            outputs[0] = [-1] * length
        waves = -(-len(requests) // arguments["batch"])
        return {
            "seconds": self.per_second * steps * waves,
            "outputs": outputs,
            "request_steps": steps * len(requests),
            "nodes": 3 * steps * len(requests) if self.per_step > 1 else 0,
            "steps": steps * waves,
            "decode_steps": steps * waves,
            "decode_seconds": self.per_second * steps * waves,
            "itl_p50_ms": 1.0,
            "itl_p99_ms": 2.0,
            "pause_p50_ms": 3.0,
            "pause_p99_ms": 4.0,
            "profile": dict.fromkeys((*PARTS, REST), 1.0) if arguments.get("profile") else {},
        }


LOAD = Load(batches=(1, 4), rounds=3, per_round=2, max_tokens=129)
IDS = [[i, i + 10] for i in range(20)]


@pytest.fixture
def results() -> Results:
    workers = {
        "stock": FakeEngine(1, 0.004),
        "ngram": FakeEngine(2, 0.005, wrong_from_batch=4),
        "lookahead": FakeEngine(4, 0.008),
    }
    return measure(workers, IDS, LOAD)


def test_methods_take_turns() -> None:
    workers = {"stock": FakeEngine(1, 0.004), "lookahead": FakeEngine(4, 0.008)}
    said: list[tuple[str, str]] = []
    measure(workers, IDS, LOAD, say=lambda what, who: said.append((what, who)))
    turns = [who for what, who in said if what.startswith("round")]
    assert turns == ["stock", "lookahead"] * 2 + ["lookahead", "stock"] * 2 + ["stock", "lookahead"] * 2
    for one, other in zip(workers["stock"].calls, workers["lookahead"].calls, strict=True):
        assert one == other, "the same work for everybody"
    calls = workers["stock"].calls
    assert [call["max_tokens"] for call in calls] == [WARM_UP_TOKENS] * 2 + [129] * 6 + [PROFILE_TOKENS] * 2
    assert [(call["batch"], len(call["prompts"])) for call in calls[2:]] == [(1, 2), (4, 4)] * 3 + [(1, 1), (4, 4)]
    assert calls[2]["prompts"] != calls[4]["prompts"], "each round has other prompts"
    assert calls[3]["prompts"][:2] == calls[2]["prompts"]


def test_sampled_requests_have_seeds() -> None:
    engine = FakeEngine(1, 0.004)
    load = Load(batches=(2,), rounds=1, per_round=2, max_tokens=8, temperature=0.8, seed=100)
    measure({"stock": engine}, IDS, load, profile=False)
    (seeds,) = {tuple(call["seeds"]) for call in engine.calls}
    assert len(set(seeds)) == 2
    assert all(100 <= seed < 120 for seed in seeds)


def test_measurements(results: Results) -> None:
    assert (results.methods, results.batches, results.baseline) == (["stock", "ngram", "lookahead"], [1, 4], "stock")
    assert len(results.measurements) == 18
    first = results.of("lookahead", 1)[0]
    assert (first.tokens, first.tokens_per_step, first.nodes_per_step) == (258, 4.0, 3.0)
    assert first.ms_per_step == pytest.approx(8.0)
    assert first.tokens_per_second == pytest.approx(258 / (2 * 32 * 0.008))
    assert results.profile("ngram", 4) == dict.fromkeys((*PARTS, REST), 1.0)
    assert results.profile("ngram", 2) == {}


def test_outputs_are_compared_with_stock(results: Results) -> None:
    lines = {(line.method, line.batch): line for line in results.summary()}
    assert lines["stock", 1].identical is None
    assert (lines["stock", 4].identical, lines["stock", 4].compared) == (6, 6), "with its own at batch 1"
    assert (lines["ngram", 1].identical, lines["ngram", 1].compared) == (6, 6)
    assert (lines["ngram", 4].identical, lines["ngram", 4].compared) == (9, 12)
    assert tables.agreement(lines["ngram", 4]) == "9 of 12"
    assert tables.agreement(lines["lookahead", 4]) == "yes (12)"
    assert identical([[1], [2]], [[1], [3], [4]]) == (1, 2)


def test_summary_takes_ratios_round_by_round() -> None:
    def measured(method: str, number: int, seconds: float) -> Measurement:
        return Measurement(method, 1, number, seconds, 100, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0)

    # the machine was slower in round 1, for both
    found = [measured("stock", 0, 1.0), measured("ours", 0, 0.5), measured("stock", 1, 4.0), measured("ours", 1, 2.0)]
    _, ours = Results(Load(), found).summary()
    assert ours.ratio == Spread(2.0, 2.0, 2.0)
    assert ours.tokens_per_second == Spread(50.0, 125.0, 200.0)


def test_an_engine_that_fails_is_left_out() -> None:
    class Failing(FakeEngine):
        def call(self, command: str, **arguments: Any) -> Any:
            if len(self.calls) == 3:
                raise EngineFailedError("out of memory")
            return super().call(command, **arguments)

    results = measure({"stock": FakeEngine(1, 0.004), "ours": Failing(2, 0.004)}, IDS, LOAD)
    assert results.failed == {"ours": "out of memory"}
    assert len(results.of("stock", 4)) == 3
    assert len(results.of("ours", 1)) == 1
    assert [line.method for line in results.summary()] == ["stock", "ours", "stock"]


def test_prompts_must_fit() -> None:
    engine = FakeEngine(1, 0.004)
    assert encode(engine, [Prompt("abc"), Prompt(""), Prompt("abcdef")], room=5) == [[0, 1, 2]]
    with pytest.raises(PromptError, match="none of 1 has between 1 and 5 tokens"):
        encode(engine, [Prompt("abcdef")], room=5)


# ---- results and tables


def about(name: str, config: dict[str, Any] | None, *seconds: float, failed: str | None = None) -> dict[str, Any]:
    plugin = name == "lookahead"
    return {
        "speculative_config": config,
        "plugin": plugin,
        "start_seconds": list(seconds),
        "failed": failed,
        "engine": {"dtype": "bfloat16"},
    }


@pytest.fixture
def comparison(results: Results) -> Comparison:
    entries = {
        "stock": about("stock", None, 20.0, 10.0),
        "ngram": about("ngram", {"method": "ngram"}, 21.0, 11.0),
        "suffix": about("suffix", {"method": "suffix"}, failed="needs arctic-inference"),
        "lookahead": about("lookahead", {"method": "lookahead"}, 25.0, 13.5),
    }
    return Comparison(entries, [results], len(IDS))


SETTING: dict[str, Any] = {
    "date": "2026-01-01T00:00:00+00:00",
    "command": ["vllm-lookahead", "bench"],
    "machine": {"cpu": "a CPU", "cores": 2, "memory_gib": 16.0, "system": "Linux", "load_average": 0.1},
    "versions": {"python": "3.11", "vllm": "0.32.0+cpu", "torch": "2.13.0+cpu"},
}


def test_result_files_hold_everything(tmp_path: Path, comparison: Comparison) -> None:
    path = tmp_path / "new" / "run.json"
    save(path, "run", SETTING, comparison.to_json())
    data = json.loads(path.read_text())
    assert data["schema"] == 1
    assert data["kind"] == "run"
    assert set(data) >= {"date", "command", "machine", "versions", "methods", "num_prompts", "results"}
    (found,) = data["results"]
    assert set(found) == {"load", "measurements", "profiles", "failed", "summary"}
    assert set(found["summary"][0]) >= {"method", "batch", "tokens_per_second", "ratio", "tokens_per_step", "identical"}
    assert found["summary"][0]["tokens_per_second"].keys() == {"min", "median", "max"}
    assert Comparison.from_json(data) == comparison


def cells(table: Table, *row: str) -> list[str]:
    """The cells after the first ones of the row that begins with ``row``; a batch size counts for the rows below it."""
    group = ""
    for line in filter(None, table.rows):
        group = line[0] or group
        if [group, *line[1:]][: len(row)] == list(row):
            return line[len(row) :]
    raise AssertionError(f"no row {row}")


def test_speed_table(results: Results) -> None:
    table = tables.speed(results)
    assert all(len(row) == len(table.headings) for row in table.rows if row)
    # stock: 129 tokens in 128 steps of 4 ms; lookahead: in 32 of 8 ms
    assert cells(table, "1", "stock")[:2] == ["252", "1"]
    assert cells(table, "1", "lookahead")[:4] == ["504", "2.000", "4.00", "3.0"]
    assert cells(table, "4", "ngram")[-1] == "9 of 12"
    assert any("float32" in note for note in table.notes)
    markdown = table.markdown()
    assert "| 1 | stock | 252 | 1 |" in markdown
    assert "| --- | --- | ---: |" in markdown


def test_all_identical_needs_no_excuse(results: Results) -> None:
    results.measurements = [m for m in results.measurements if m.method != "ngram"]
    assert not any("float32" in note for note in tables.speed(results).notes)


def test_time_split_table(results: Results) -> None:
    table = tables.time_split(results)
    assert table is not None
    assert cells(table, "4", "lookahead") == ["5.00", "1.00", "1.00", "1.00", "1.00", "1.00"]
    results.profiles = [Profile("stock", 1, dict.fromkeys((*PARTS, REST), 2.0))]
    table = tables.time_split(results)
    assert table is not None
    assert cells(table, "4", "lookahead") == ["-"] * 6
    results.profiles = []
    assert tables.time_split(results) is None


def test_best_of_stock(comparison: Comparison) -> None:
    (results,) = comparison.results
    table = tables.against_best_stock(results, comparison.methods)
    assert table is not None
    # per token: ngram 5 ms / 2, lookahead 8 ms / 4
    assert cells(table, "1", "lookahead") == ["ngram", "1.250"]
    results.measurements = [m for m in results.measurements if m.method != "ngram"]
    assert tables.against_best_stock(results, comparison.methods) is None


def test_start_up_table(comparison: Comparison) -> None:
    table = tables.start_up(comparison.methods, "stock")
    assert table.rows == [
        ["stock", "20.0", "10.0", "+0.0"],
        ["ngram", "21.0", "11.0", "+1.0"],
        ["lookahead", "25.0", "13.5", "+3.5"],
    ]
    assert list(tables.left_out(comparison.methods)) == ["suffix: not available: needs arctic-inference"]


def test_plot(tmp_path: Path, results: Results) -> None:
    pytest.importorskip("matplotlib")
    from vllm_lookahead.bench import plot

    path = tmp_path / "run.png"
    plot.draw(results, path, "a machine")
    assert path.read_bytes().startswith(b"\x89PNG")
    results.profiles = []
    plot.draw(results, path)


# ---- step cost


class FakeSteps:
    """A step costs 2 ms and so much for each node of each request."""

    def __init__(self, per_node: float, tree: float = 1.0) -> None:
        self.per_node, self.tree = per_node, tree

    def call(self, command: str, **arguments: Any) -> Any:
        assert command == "step_times"
        batch = arguments["batch"]
        times = [
            [2.0 + batch * n * self.per_node * (self.tree if kind == "tree" else 1.0)] * arguments["steps"]
            for n, kind in arguments["shapes"]
        ]
        asked = sum(batch * n for n, _ in arguments["shapes"])
        return {"prefill_ms": 50.0, "step_ms": times, "accepted": 0, "asked": asked, "nodes": asked}


def test_step_cost_table() -> None:
    workers = {"stock": FakeSteps(0.0), "stock chain": FakeSteps(0.1), "ours": FakeSteps(0.1, tree=1.5)}
    measured = step_cost.measure(
        workers, nodes=[0, 10, 200], batches=[1, 2], rounds=2, context=30, steps=4, seconds=1.0
    )
    assert step_cost.from_json(json.loads(json.dumps(step_cost.to_json(measured)))) == measured
    assert measured.warning is None
    table = step_cost.table(measured, 30)
    assert cells(table, "1", "prefill") == ["50.00", "50.00", "1.000", "-", "-"]
    assert cells(table, "2", "0") == ["2.00", "2.00", "1.000", "-", "-"]
    assert cells(table, "2", "10") == ["4.00", "4.00", "1.000", "5.00", "1.250"]
    assert cells(table, "1", "200")[:2] == ["-", "22.00"], "stock takes no chain of more than 128"
    measured.verified = measured.asked // 2
    assert "nodes were verified" in step_cost.table(measured, 30).notes[0]


def test_junk_is_what_was_asked_for() -> None:
    from vllm_lookahead.bench.junk_tree import NAME, Junk, JunkOptions

    assert step_cost.JUNK_METHOD == NAME
    request = Junk(JunkOptions()).start("a", np.zeros(4, np.int32))
    context = np.zeros(5, np.int32)
    try:
        junk_chain.choose(8, "tree", 100)
        tree = request.propose(context, 64)
        tree.validate(unique_siblings=True)
        assert tree.parents.tolist() == [-1, -1, -1, 0, 1, 2, 3, 4]
        assert len(request.propose(context, 5)) == 5
        junk_chain.choose(3, "chain", 100)
        assert request.propose(context, 64).parents.tolist() == [-1, 0, 1]
        stock = junk_chain.JunkChain(None)
        assert stock.propose([[1], []], None, None) == [[99, 98, 97], []]
        junk_chain.choose(0, "tree", 100)
        assert len(request.propose(context, 64)) == 0
    finally:
        junk_chain.choose(0, "chain", 64)
        registry._registered.pop(NAME, None)
        sys.modules.pop("vllm_lookahead.bench.junk_tree")


# ---- servers


def test_servers_are_named() -> None:
    assert serve.Server.parse("http://a:1/v1/") == serve.Server("http://a:1/v1/", "http://a:1")
    assert serve.Server.parse("ours=http://a:1") == serve.Server("ours", "http://a:1")
    assert serve.Server.parse("http://a:1/?x=y").name == "http://a:1/?x=y"


def test_counters_are_summed_over_labels() -> None:
    metrics = """# HELP vllm:spec_decode_num_drafts_total Number of drafts.
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 5.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 1e2
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7e9
"""
    assert serve.counters(metrics) == {serve.DRAFTS: 15.0, serve.DRAFT_TOKENS: 100.0, serve.ACCEPTED: 0.0}


def test_served_table() -> None:
    answers = [serve.Answer(0.0, [(0.1, 1), (0.2, 5), (0.2, 5)], "ab"), serve.Answer(0.5, error="refused")]
    counters = {serve.DRAFTS: 10.0, serve.DRAFT_TOKENS: 50.0, serve.ACCEPTED: 15.0}
    first = serve.Served.of("stock", 2.0, 0, answers, 2.0, dict.fromkeys(counters, 0.0), None)
    ours = serve.Served.of("ours", 2.0, 0, answers, 1.0, counters, answers)
    assert (first.tokens, first.errors, first.identical) == (5, 1, None)
    assert (ours.ttft_p50_ms, ours.itl_p50_ms, ours.identical) == (pytest.approx(100.0), pytest.approx(25.0), 2)
    assert serve.from_json(json.loads(json.dumps(serve.to_json([first, ours])))) == [first, ours]
    table = serve.table([first, ours])
    assert cells(table, "2/s", "stock") == ["2", "100.0", "100.0", "25.0", "25.0", "0", "-", "-", "1", "-"]
    assert cells(table, "2/s", "ours")[-5:] == ["10", "5.0", "2.50", "1", "2 of 2"]


# ---- the command


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_run_is_the_default_command() -> None:
    assert "run --batch" not in invoke("--help").output
    assert "step-cost" in invoke("--help").output
    assert invoke("--method", "nix").output.startswith("error: unknown method 'nix'")
    assert invoke("--method", "nix").exit_code == invoke("run", "--method", "nix").exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch", "1,x"],
        ["--batch", "0"],
        ["--engine", "[]"],
        ["--temperature", "-1"],
        ["show", os.devnull],
    ],
)
def test_mistakes_end_in_a_message(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)


def test_result_files_can_be_shown(tmp_path: Path, comparison: Comparison) -> None:
    path = tmp_path / "run.json"
    save(path, "run", SETTING, comparison.to_json())
    printed = invoke("show", str(path)).output
    assert "a CPU, 2 cores" in printed
    assert "against the best of vLLM's own speculative methods" in printed
    markdown = invoke("show", str(path), "--markdown").output
    assert "| 1 | stock | 252 | 1 |" in markdown
    measured = step_cost.StepTimes([step_cost.StepTime("stock", "chain", 1, 0, 0, 2.0)])
    save(path, "step-cost", SETTING, {"context": 10, "steps": step_cost.to_json(measured)})
    assert "time per step, in ms, by nodes per request; context 10" in invoke("show", str(path)).output


def test_engines_compute_with_the_threads_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert EngineSettings("m").environment(plugin=True)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert EngineSettings("m").environment(plugin=True)["NUMBA_NUM_THREADS"] == "2"
    stock = EngineSettings("m", threads=1).environment(plugin=False)
    assert stock["OMP_NUM_THREADS"] == stock["NUMBA_NUM_THREADS"] == "1"
    assert "lookahead" not in stock["VLLM_PLUGINS"].split(",")


def test_the_whole_thing(demo_model: str, tmp_path: Path) -> None:
    """Real engines, as little as possible."""
    out = tmp_path / "run.json"
    small = ["--batch", "1,2", "--rounds", "1", "--num-prompts", "2", "--max-tokens", "16", "--starts", "1"]
    engine = ["--dtype", "float32", "--eager", "--model", demo_model, "--out", str(out)]
    result = invoke("run", "-m", "stock,prompt_lookup", *small, *engine)
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    lines = {(line["method"], line["batch"]): line for line in data["results"][0]["summary"]}
    assert set(lines) == {("stock", 1), ("stock", 2), ("prompt_lookup", 1), ("prompt_lookup", 2)}
    assert all(line["identical"] == line["compared"] for key, line in lines.items() if key != ("stock", 1))
    assert all(m["tokens"] == 32 for m in data["results"][0]["measurements"])
    assert data["methods"]["prompt_lookup"]["engine"]["runner"] == "LookaheadCPURunner"
    assert data["methods"]["stock"]["engine"]["runner"] == "CPUModelRunner"
    assert {p["method"] for p in data["results"][0]["profiles"]} == {"stock", "prompt_lookup"}
    assert "prompt_lookup" in result.output
