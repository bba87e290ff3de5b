from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from proposers import registry
from vllm_lookahead.bench import comparison, junk_chain, methods, prompts, serve, step_cost
from vllm_lookahead.bench.comparison import WARM_UP_TOKENS, Load, Measurement, measure
from vllm_lookahead.bench.engines import EngineFailedError, EngineSettings
from vllm_lookahead.bench.methods import MethodError
from vllm_lookahead.bench.prompts import Prompt, PromptError
from vllm_lookahead.bench.tables import Table, spread
from vllm_lookahead.cli import app


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0], ".1f") == "2.0 (1.0 - 3.0)"
    assert (spread([1.25], ".2f"), spread([], ".2f")) == ("1.25", "-")


# ---- prompts


def test_prompt_files(tmp_path: Path) -> None:
    human_eval = {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    pass\n", "test": ""}
    spec_bench = {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]}
    share_gpt = {"id": "a", "conversations": [{"from": "gpt", "value": "Hi"}, {"from": "human", "value": "Why?"}]}
    silent = {"id": "b", "conversations": [{"from": "gpt", "value": "Hi"}]}
    expected = [Prompt("def f():\n"), Prompt("Write.", chat=True), Prompt("Why?", chat=True), Prompt("x\u2028y")]
    records = [human_eval, spec_bench, share_gpt, silent, {"prompt": "x\u2028y"}]
    lines = "\n".join(map(json.dumps, records)) + "\n\n"
    path = tmp_path / "prompts"
    for content in (lines.encode(), gzip.compress(lines.encode()), json.dumps(records, indent=1).encode()):
        path.write_bytes(content)
        assert prompts.read_prompts(str(path)) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"text": "b"}\n', "line 2: no usable field"),
        ('[{"prompt": 1}]', "record 1: no usable field"),
        ('{"prompt": "a"\n', "neither JSONL nor a JSON array"),
        ("\n", "holds none"),
        (None, "can't read"),
    ],
)
def test_prompt_file_errors(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(PromptError, match=message):
        prompts.read_prompts(str(path))


def test_bundled_and_random_prompts() -> None:
    assert {prompt.chat for prompt in prompts.read_prompts("demo")} == {False, True}
    words = prompts.read_prompts("random")
    assert words == prompts.read_prompts("random")
    assert len({prompt.text for prompt in words}) == len(words) == prompts.RANDOM_PROMPTS
    assert len(set(words[0].text.split())) == prompts.RANDOM_WORDS


def test_order_of_prompts() -> None:
    first = prompts.order(10, 0, 4)
    assert not set(first) & set(prompts.order(10, 4, 4))
    assert prompts.order(10, 0, 8)[:4] == first, "a larger batch begins with the same prompts"
    assert sorted(prompts.order(3, 2, 6)) == [0, 0, 1, 1, 2, 2], "too few prompts come again"
    assert prompts.order(10, 0, 10, seed=1) != prompts.order(10, 0, 10)


# ---- methods


def test_methods() -> None:
    typed = ["stock,ngram", "[prompt_lookup]", 'wide={"method": "lookahead", "window_size": 20}', "plain=null"]
    found = {m.name: m for m in methods.parse(typed)}
    assert {name: m.plugin for name, m in found.items()} == {
        **{"stock": False, "ngram": False, "prompt_lookup": True},
        **{"wide": True, "plain": False},
    }
    assert found["stock"].speculative_config is found["plain"].speculative_config is None
    assert found["prompt_lookup"].speculative_config == {"method": "prompt_lookup"}
    assert found["wide"].speculative_config == {"method": "lookahead", "window_size": 20}
    assert [m.name for m in methods.parse(methods.STANDARD)] == list(methods.STANDARD)


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


def test_suffix(monkeypatch: pytest.MonkeyPatch) -> None:
    (suffix,) = methods.parse(["suffix"])
    assert suffix.speculative_config is not None
    assert suffix.speculative_config["suffix_decoding_max_cached_requests"] == 0, "it must not know the answers"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "arctic-inference" in (suffix.missing or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert suffix.missing is None


# ---- the comparison


class FakeEngine:
    """Answers like an engine: counts upwards from each prompt's last token, so many tokens per step."""

    def __init__(
        self, tokens_per_step: int, seconds_per_step: float, *, wrong_from_batch: int = 1000, dies_after: int = 1000
    ) -> None:
        self.per_step, self.seconds = tokens_per_step, seconds_per_step
        self.wrong_from_batch, self.dies_after = wrong_from_batch, dies_after
        self.calls: list[dict[str, Any]] = []

    def __call__(self, command: str, **arguments: Any) -> Any:
        assert command == "generate"
        if len(self.calls) == self.dies_after:
            raise EngineFailedError("out of memory")
        self.calls.append(arguments)
        length, requests = arguments["max_tokens"], arguments["prompts"]
        steps = -(-(length - 1) // self.per_step)
        outputs = [[prompt[-1] + i for i in range(length)] for prompt in requests]
        if arguments["batch"] >= self.wrong_from_batch:
            outputs[0] = [-1] * length
        return {
            "seconds": self.seconds * steps * -(-len(requests) // arguments["batch"]),
            "outputs": outputs,
            "request_steps": steps * len(requests),
            "nodes": 3 * steps * len(requests) if self.per_step > 1 else 0,
            "ms_per_step": 1e3 * self.seconds,
        }


LOAD = Load(batches=(1, 4), rounds=3, per_round=2, max_tokens=129)
IDS = [[i, i + 10] for i in range(20)]
ABOUT: dict[str, dict[str, Any]] = {
    "stock": {"speculative_config": None, "plugin": False, "start_seconds": 20.04},
    "ngram": {"speculative_config": {"method": "ngram"}, "plugin": False, "start_seconds": 21.0},
    "suffix": {"speculative_config": {"method": "suffix"}, "plugin": False, "failed": "needs arctic-inference"},
    "lookahead": {"speculative_config": {"method": "lookahead"}, "plugin": True, "start_seconds": 25.0},
}


def silent(text: str) -> None:
    """Nobody wants to know what is being done."""


def test_methods_take_turns() -> None:
    order: list[str] = []

    class Noted(FakeEngine):
        def __call__(self, command: str, **arguments: Any) -> Any:
            order.append("stock" if self.per_step == 1 else "ours")
            return super().__call__(command, **arguments)

    engines = {"stock": Noted(1, 0.004), "ours": Noted(4, 0.008)}
    measure(engines, IDS, LOAD, silent)
    assert order == ["stock", "ours"] * 4 + ["ours", "stock"] * 2 + ["stock", "ours"] * 2
    assert engines["stock"].calls == engines["ours"].calls, "the same work for everybody"
    calls = engines["stock"].calls
    assert [call["max_tokens"] for call in calls] == [WARM_UP_TOKENS] * 2 + [129] * 6
    assert [(call["batch"], len(call["prompts"])) for call in calls[2:]] == [(1, 2), (4, 4)] * 3
    assert calls[2]["prompts"] != calls[4]["prompts"], "each round has other prompts"
    assert calls[3]["prompts"][:2] == calls[2]["prompts"]


def test_sampled_requests_have_seeds() -> None:
    engine = FakeEngine(1, 0.004)
    load = Load(batches=(2,), temperatures=(0.0, 0.8), rounds=1, per_round=2, max_tokens=8, seed=100)
    measure({"stock": engine}, IDS, load, silent)
    _, greedy, sampled = engine.calls
    assert (greedy["temperature"], greedy["seeds"], sampled["temperature"]) == (0.0, [], 0.8)
    assert len(set(sampled["seeds"])) == 2
    assert all(100 <= seed < 120 for seed in sampled["seeds"])


def test_table() -> None:
    engines = {
        "stock": FakeEngine(1, 0.004),
        "ngram": FakeEngine(2, 0.005, wrong_from_batch=4),
        "lookahead": FakeEngine(4, 0.008),
    }
    found, failed = measure(engines, IDS, LOAD, silent)
    assert (len(found), failed) == (18, {})
    table = comparison.table(found, LOAD, ABOUT)
    # stock: 129 tokens in 128 steps of 4 ms; ngram: in 64 of 5 ms; lookahead: in 32 of 8 ms
    assert table.rows == [
        ["greedy", "1", "stock", "252.0 (252.0 - 252.0)", "1", "-", "1.00", "0.0", "4.00", "-"],
        *(
            ["", "", name, f"{tokens} ({tokens} - {tokens})", f"{x} ({x} - {x})", best, *figures, "yes (6)"]
            for name, tokens, x, best, figures in (
                ("ngram", "403.1", "1.600", "-", ["2.00", "3.0", "5.00"]),
                ("lookahead", "503.9", "2.000", "1.250 (1.250 - 1.250) ngram", ["4.00", "3.0", "8.00"]),
            )
        ),
        *table.rows[3:],
    ]
    assert [row[-1] for row in table.rows[3:]] == ["yes (6)", "9 of 12", "yes (12)"], "stock against its own batch of 1"
    notes = "\n".join(table.notes)
    assert "float32" in notes
    assert "start-up, in s: stock 20.0, ngram 21.0, lookahead 25.0" in notes
    assert "suffix: not available: needs arctic-inference" in notes
    correct = [m for m in found if m.method != "ngram"]
    assert "float32" not in "\n".join(comparison.table(correct, LOAD, ABOUT).notes), "needs no excuse"


def test_ratios_are_taken_round_by_round() -> None:
    # the machine was slower in round 1, for both
    speeds = {("stock", 0): 100.0, ("ours", 0): 200.0, ("stock", 1): 25.0, ("ours", 1): 50.0, ("ours", 2): 9.0}
    found = [Measurement(method, 0.0, 1, n, speed, 1.0, 0.0, 1.0) for (method, n), speed in speeds.items()]
    assert comparison.ratios(found, "ours", "stock") == [2.0, 2.0]


def test_an_engine_that_fails_is_left_out() -> None:
    engines = {"stock": FakeEngine(1, 0.004), "ours": FakeEngine(2, 0.004, dies_after=3)}
    found, failed = measure(engines, IDS, LOAD, silent)
    assert failed == {"ours": "out of memory"}
    assert [sum(m.method == name for m in found) for name in engines] == [6, 1]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from vllm_lookahead.bench import plot

    found, _ = measure({"stock": FakeEngine(1, 0.004), "ours": FakeEngine(2, 0.004)}, IDS, LOAD, silent)
    plot.draw(found, LOAD, tmp_path / "run.png", "a machine")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


# ---- step cost


def fake_steps(per_node: float, tree: float = 1.0) -> Any:
    """A step costs 2 ms and so much for each node of each request."""

    def call(command: str, batch: int, shapes: list[tuple[int, str]], steps: int, **arguments: Any) -> Any:
        assert command == "step_times"
        times = [[2.0 + batch * n * per_node * (tree if kind == "tree" else 1.0)] * steps for n, kind in shapes]
        asked = sum(batch * n for n, _ in shapes)
        return {
            **{"prefill_ms": 50.0, "step_ms": times, "operators": []},
            **{"accepted": 0, "asked": asked, "verified": asked},
        }

    return call


def test_step_cost_table() -> None:
    engines = {"stock": fake_steps(0.0), "stock chain": fake_steps(0.1), "ours": fake_steps(0.1, tree=1.5)}
    measured = step_cost.measure(engines, nodes=[0, 10, 200], batches=[1, 2], rounds=1, context=30, steps=4, say=silent)
    assert measured.warning is None
    assert step_cost.table(measured, 30).rows == [
        ["1", "prefill", "50.00", "50.00", "1.000", "-", "-"],
        ["", "0", "2.00", "2.00", "1.000", "-", "-"],
        ["", "10", "3.00", "3.00", "1.000", "3.50", "1.167"],
        ["", "200", "-", "22.00", "-", "32.00", "-"],  # stock takes no chain of more than 128
        ["2", "prefill", "50.00", "50.00", "1.000", "-", "-"],
        ["", "0", "2.00", "2.00", "1.000", "-", "-"],
        ["", "10", "4.00", "4.00", "1.000", "5.00", "1.250"],
        ["", "200", "-", "42.00", "-", "62.00", "-"],
    ]
    del engines["stock chain"]
    alone = step_cost.measure(engines, nodes=[10], batches=[1], rounds=1, context=30, steps=4, say=silent)
    assert step_cost.table(alone, 30).rows[-1] == ["", "10", "2.00", "3.00", "1.500", "3.50", "1.750"]
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


# ---- servers (what drives them: tests/http)


def test_served_table() -> None:
    def served(server: str, number: int, speed: float, *texts: str, **more: float) -> dict[str, Any]:
        latency = {f"{place}_{what}_ms": 10.0 for what in ("ttft", "tpot") for place in ("median", "p99")}
        latency["median_tpot_ms"] = 5.0 if server == "ours" else 10.0
        return {
            **{"server": server, "round": number, "rate": "4", "output_throughput": speed, "failed": 1},
            **{"generated_texts": list(texts), **latency, **more},
        }

    found = [
        *(served("stock", 0, 100.0, "a", "b"), served("ours", 0, 200.0, "a", "c", spec_decode_acceptance_length=2.5)),
        *(served("ours", 1, 100.0, "a", "b", spec_decode_acceptance_length=2.5), served("stock", 1, 25.0, "a", "b")),
    ]
    stock, ours = serve.table(found).rows
    one = "1.000 (1.000 - 1.000)"
    assert stock[:6] == ["stock", "4", "62 (25 - 100)", one, "10.0", "10.0"]
    assert stock[6:] == ["10.0", one, "10.0", one, "-", "2", "-"]
    assert ours[2:4] == ["150 (100 - 200)", "3.000 (2.000 - 4.000)"]
    assert ours[6:10] == ["5.0", "2.000 (2.000 - 2.000)", "10.0", one], "half the time is twice as good"
    assert ours[-3:] == ["2.50 (2.50 - 2.50)", "2", "3 of 4"]


def test_a_server_that_answered_nothing_has_no_ratios() -> None:
    nothing = dict.fromkeys((f"{place}_{what}_ms" for what in ("ttft", "tpot") for place in ("median", "p99")), 0.0)
    found = [
        {
            "server": name,
            "round": 0,
            "rate": "",
            "output_throughput": 0.0,
            "failed": 4,
            "generated_texts": [],
            **nothing,
        }
        for name in ("stock", "ours")
    ]
    _, ours = serve.table(found).rows
    assert (ours[3], ours[7], ours[9], ours[-2:]) == ("-", "-", "-", ["4", "0 of 0"])


# ---- the judgement of benchmarks/gpu.py


@pytest.mark.parametrize(
    ("dtype", "gap", "status"), [("bfloat16", 0.25, 0), ("bfloat16", 2.0, 1), ("float32", 0.0, 1), ("float32", None, 0)]
)
def test_rounding_is_told_from_errors(tmp_path: Path, dtype: str, gap: float | None, status: int) -> None:
    """The second token differs (unless ``gap`` is None), where stock's two likeliest were so far apart."""
    kinds = [f"{kind}, {how}" for kind in ("greedy", "seeded") for how in ("alone", "batched")]
    stock = {"method": "stock", "dtype": dtype, **{kind: [[1, 2, 3]] for kind in kinds}}
    gaps = {f"{kind}, gaps": [[9.0, gap, 0.0]] for kind in kinds}
    ours = stock if gap is None else {**stock, **{kind: [[1, 5, 7]] for kind in kinds}}
    paths = [tmp_path / "stock.json", tmp_path / "ours.json"]
    for path, content in zip(paths, ({**stock, **gaps}, ours), strict=True):
        path.write_text(json.dumps(content))
    program = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    done = subprocess.run([sys.executable, program, "compare", *paths], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert f"{int(gap is None)} of 1 identical" in done.stdout


# ---- the command


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_run_is_the_default_command() -> None:
    assert "step-cost" in invoke("--help").output
    assert "error: unknown method 'nix'" in invoke("--method", "nix").output
    assert invoke("--method", "nix").exit_code == invoke("run", "--method", "nix").exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch", "1,x"],
        ["--batch", "0"],
        ["--engine", "[]"],
        ["--engine", "{"],
        ["--temperature", "-1"],
        ["serve", "--url", "http://localhost:1"],
        ["serve", "--url", "a=http://localhost:1", "--rates", "1,x"],
        ["show", os.devnull],
    ],
)
def test_mistakes_end_in_a_message(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)


def test_engines_compute_with_the_threads_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert EngineSettings("m").environment(plugin=True)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert EngineSettings("m").environment(plugin=True)["NUMBA_NUM_THREADS"] == "2"
    stock = EngineSettings("m", threads=1).environment(plugin=False)
    assert stock["OMP_NUM_THREADS"] == stock["NUMBA_NUM_THREADS"] == "1"
    assert "lookahead" not in stock["VLLM_PLUGINS"].split(",")


def test_engines_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """Whatever kills it: an engine may hold gigabytes."""
    program = (
        "import os, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from vllm_lookahead.bench.engines import _begin\n"
        f"pool = ProcessPoolExecutor(1, get_context('spawn'), _begin, ({str(tmp_path / 'log')!r},))\n"
        "print(pool.submit(os.getpid).result(), flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()


def test_the_whole_thing(demo_model: str, tmp_path: Path) -> None:
    """Real engines, as little as possible; one that doesn't start is left out."""
    out = tmp_path / "new" / "run.json"
    small = ["--batch", "1,2", "--temperature", "0,0.8", "--rounds", "1", "--num-prompts", "2", "--max-tokens", "16"]
    engine = ["--dtype", "float32", "--eager", "--model", demo_model, "--out", str(out)]
    result = invoke("run", "-m", "stock,prompt_lookup", "-m", 'wrong={"method": "nix"}', *small, *engine)
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    table = Table(**data["table"])
    assert [row[2] for row in table.rows] == ["stock", "prompt_lookup"] * 4
    assert [row[-1] for row in table.rows] == ["-", "yes (2)", "yes (2)", "yes (2)"] * 2
    assert data["methods"]["prompt_lookup"]["engine"]["runner"] == "LookaheadCPURunner"
    assert data["methods"]["stock"]["engine"]["runner"] == "CPUModelRunner"
    assert "nix" in data["methods"]["wrong"]["failed"]
    assert max(m["nodes_per_step"] for m in data["measurements"] if m["method"] == "prompt_lookup") > 0
    assert "prompt_lookup" in result.output
    shown = invoke("show", str(out), "--markdown").output
    assert "| decoding | batch | method |" in shown
    assert f"vLLM {data['versions']['vllm']}" in shown
    assert "tokens/step" in invoke("show", str(out)).output
