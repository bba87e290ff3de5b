"""``vllm-lookahead bench``: what can be typed. The work is done by the other modules, imported when it is needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

if TYPE_CHECKING:
    from vllm_lookahead.bench.comparison import Comparison
    from vllm_lookahead.bench.tables import Table
    from vllm_lookahead.bench.worker import EngineSettings


class RunByDefault(TyperGroup):
    """``bench --batch 1`` means ``bench run --batch 1``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See ``click.Group``."""
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=RunByDefault, help="Measure speed, step cost and exactness against stock vLLM.")

Model = Annotated[str | None, typer.Option(help="Folder or name of a model. Default: the bundled one.")]
Dtype = Annotated[str, typer.Option(help="Of the computation; auto is vLLM's default for the model.")]
Eager = Annotated[bool, typer.Option("--eager/--no-eager", help="Skip compilation: starts faster, runs slower.")]
EngineArguments = Annotated[str, typer.Option("--engine", metavar="JSON", help="Further arguments for vllm.LLM.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Of each engine. Default: OMP_NUM_THREADS, else one less than there are cores."),
]
Logs = Annotated[Path | None, typer.Option(help="Keep what the engines print in this folder.")]
Prompts = Annotated[
    str,
    typer.Option(
        help="demo (the bundled ones), random (random words), or a .jsonl, .jsonl.gz or .json file with the fields of "
        "HumanEval (prompt), Spec-Bench (turns) or ShareGPT (conversations)."
    ),
]
NumPrompts = Annotated[
    int, typer.Option(min=1, help="Prompts per round and batch size; a larger batch takes as many as it has places.")
]
Rotate = Annotated[bool, typer.Option("--rotate/--same-prompts", help="Use other prompts in each round.")]
MaxTokens = Annotated[int, typer.Option(min=2, help="Tokens to generate per prompt.")]
StopAtEos = Annotated[bool, typer.Option("--stop-at-eos", help="Let answers end; else all have --max-tokens tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy; above, every request has its own seed.")]
Seed = Annotated[int, typer.Option(help="Of the choice of prompts and of the requests.")]
Rounds = Annotated[int, typer.Option(min=1, help="The methods take turns in each.")]
Out = Annotated[Path, typer.Option(help="The result file (JSON). The plot goes beside it.")]
MethodNames = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        "-m",
        help="stock, ngram, ngram-tuned, suffix, prompt_lookup, lookahead, or NAME=JSON with a speculative config. "
        "Repeat the option, or separate bare names by commas. Default: all.",
    ),
]


@app.command()
def run(
    method: MethodNames = None,
    batch: Annotated[str, typer.Option(help="Most requests at a time, several numbers.")] = "1,2,4,8,16,32,64",
    rounds: Rounds = 5,
    prompts: Prompts = "demo",
    num_prompts: NumPrompts = 8,
    rotate: Rotate = True,
    max_tokens: MaxTokens = 256,
    stop_at_eos: StopAtEos = False,
    temperature: Annotated[str, typer.Option(help="Several numbers. 0: greedy; above, requests have seeds.")] = "0",
    seed: Seed = 0,
    model: Model = None,
    dtype: Dtype = "auto",
    eager: Eager = False,
    engine: EngineArguments = "{}",
    threads: Threads = None,
    logs: Logs = None,
    starts: Annotated[int, typer.Option(min=1, help="Start each engine so often; the last start has warm caches.")] = 2,
    profile: Annotated[bool, typer.Option("--profile/--no-profile", help="Also time the parts of a step.")] = True,
    out: Out = Path("out/bench-run.json"),
) -> None:
    """Any set of methods side by side, by batch size: the main benchmark (default command)."""
    from dataclasses import replace

    from vllm_lookahead.bench import methods
    from vllm_lookahead.bench.comparison import compare, progress
    from vllm_lookahead.bench.results import Load

    console, setting = _begin()
    with _errors(console):
        load = Load(
            prompts=prompts,
            batches=_numbers(batch, "--batch", least=1),
            rounds=rounds,
            per_round=num_prompts,
            max_tokens=max_tokens,
            ignore_eos=not stop_at_eos,
            seed=seed,
            rotate=rotate,
        )
        loads = [replace(load, temperature=value) for value in _floats(temperature, "--temperature")]
        chosen = methods.parse(method or methods.STANDARD)
        with progress(console) as say:
            comparison = compare(
                chosen,
                loads,
                _settings(model, dtype, eager, engine, threads, logs),
                starts=starts,
                profile=profile,
                say=say,
            )
        _finish(console, "run", setting, comparison, out)


@app.command("step-cost")
def step_cost(
    nodes: Annotated[str, typer.Option(help="Nodes per request, several numbers.")] = "0,8,16,32,64,128",
    batch: Annotated[str, typer.Option(help="Numbers of requests.")] = "1,4,16",
    context: Annotated[int, typer.Option(min=1, help="Length of the prompts, random tokens.")] = 300,
    steps: Annotated[int, typer.Option(min=4, help="Steps to time for each number of nodes.")] = 20,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time limit for each (4 steps at least).")] = 1.0,
    rounds: Rounds = 5,
    model: Model = None,
    dtype: Dtype = "auto",
    eager: Eager = False,
    engine: EngineArguments = "{}",
    threads: Threads = None,
    logs: Logs = None,
    out: Out = Path("out/bench-step-cost.json"),
) -> None:
    """Time per step against nodes and batch size: our chains and trees beside stock vLLM's verification of a chain."""
    from vllm_lookahead.bench import step_cost as cost
    from vllm_lookahead.bench import worker
    from vllm_lookahead.bench.comparison import progress

    console, setting = _begin()
    sizes, batches = _numbers(nodes, "--nodes", least=0), _numbers(batch, "--batch", least=1)
    room = max(batches) * (1 + max(sizes))
    settings = _settings(model, dtype, eager, engine, threads, logs, max_num_batched_tokens=max(2048, room))
    methods = cost.methods(max(1, *sizes))
    with _errors(console):
        with progress(console) as say, worker.engines(methods, settings, say=say) as started:
            for name, reason in started.failed.items():
                raise worker.EngineFailedError(f"{name}: {reason}")
            times = cost.measure(
                started.workers,
                nodes=sizes,
                batches=batches,
                rounds=rounds,
                context=context,
                steps=steps,
                seconds=seconds,
                say=say,
            )
            about = started.about(methods)
        content = {"methods": about, "context": context, "steps": cost.to_json(times)}
        _write(console, "step-cost", setting, content, out)
        _show(console, cost.table(times, context))


@app.command()
def serve(
    url: Annotated[
        list[str], typer.Option(help="A running server, http://HOST:PORT or NAME=http://HOST:PORT. May be repeated.")
    ],
    rate: Annotated[str, typer.Option(help="Requests per second, several numbers; inf: all at once.")] = "1,4,inf",
    requests: Annotated[int, typer.Option(min=1, help="Requests per rate and round.")] = 32,
    rounds: Rounds = 1,
    prompts: Prompts = "demo",
    max_tokens: MaxTokens = 256,
    stop_at_eos: StopAtEos = False,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    out: Out = Path("out/bench-serve.json"),
) -> None:
    """Drive running OpenAI servers at given request rates; several servers take turns with the same requests."""
    from dataclasses import asdict

    from vllm_lookahead.bench import serve as serving
    from vllm_lookahead.bench.comparison import progress
    from vllm_lookahead.bench.prompts import order, read_prompts

    console, setting = _begin()
    with _errors(console):
        rates = [0.0 if value == float("inf") else value for value in _floats(rate, "--rate")]
        available = read_prompts(prompts)
        chosen = [available[i] for i in order(len(available), 0, 0, requests, rotate=False, seed=seed)]
        traffic = serving.Traffic(requests, max_tokens, temperature, not stop_at_eos, seed)
        servers = [serving.Server.parse(text) for text in url]
        with progress(console) as say:
            found = serving.drive(servers, chosen, rates, traffic, rounds, say)
        content = {"prompts": prompts, "traffic": asdict(traffic), "results": serving.to_json(found)}
        _write(console, "serve", setting, content, out)
        _show(console, serving.table(found))


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A result file.", exists=True, dir_okay=False)],
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables as Markdown.")] = False,
) -> None:
    """Print the tables of a result file again."""
    from vllm_lookahead.bench.machine import headline

    try:
        data = json.loads(file.read_text())
        found = list(_read_tables(data))
        lines = [headline(data), f"{data['date']}: {' '.join(data['command'])}"]
    except (ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(f"not a result file of this version: {error!r}", param_hint="FILE") from error
    console = _console()
    if markdown:
        typer.echo("\n\n".join([*lines, *(table.markdown() for table in found)]))
        return
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for table in found:
        _show(console, table)


# ---- what the commands share


def _console() -> Console:
    """A console that doesn't fold tables when its output goes to a file."""
    usual = Console()
    return usual if usual.is_terminal else Console(width=180)


def _begin() -> tuple[Console, dict[str, Any]]:
    """Where to print, and what is to be said about the machine before it is busy with us."""
    from vllm_lookahead.bench.machine import describe

    return _console(), describe()


@contextmanager
def _errors(console: Console) -> Iterator[None]:
    """One line for what a user can put right, and status 2."""
    from vllm_lookahead.bench.methods import MethodError
    from vllm_lookahead.bench.prompts import PromptError
    from vllm_lookahead.bench.serve import ServerError
    from vllm_lookahead.bench.worker import EngineFailedError
    from vllm_lookahead.config import ConfigError

    try:
        yield
    except (ConfigError, EngineFailedError, MethodError, PromptError, ServerError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def _settings(
    model: str | None, dtype: str, eager: bool, engine: str, threads: int | None, logs: Path | None, **defaults: Any
) -> EngineSettings:
    from vllm_lookahead.bench.worker import EngineSettings
    from vllm_lookahead.demo.run import MODEL

    arguments = {
        "dtype": dtype,
        "enforce_eager": eager,
        "enable_prefix_caching": False,  # prompts come again in every round; their prefill shall cost what it costs
        "seed": 0,
        **defaults,
        **_json(engine, "--engine"),
    }
    return EngineSettings(model or MODEL, arguments, threads, logs)


def _tables(kind: str, comparison: Comparison) -> Iterator[Table]:
    from vllm_lookahead.bench import tables

    for results in comparison.results:
        yield tables.speed(results)
        best = tables.against_best_stock(results, comparison.methods)
        if best is not None:
            yield best
        split = tables.time_split(results)
        if split is not None:
            yield split
        yield tables.start_up(comparison.methods, results.baseline)


def _read_tables(data: dict[str, Any]) -> Iterator[Table]:
    """The tables of a result file's content."""
    from vllm_lookahead.bench import serve as serving
    from vllm_lookahead.bench import step_cost as cost
    from vllm_lookahead.bench.comparison import Comparison

    if data["kind"] == "step-cost":
        yield cost.table(cost.from_json(data["steps"]), data["context"])
    elif data["kind"] == "serve":
        yield serving.table(serving.from_json(data["results"]))
    else:
        yield from _tables(data["kind"], Comparison.from_json(data))


def _finish(console: Console, kind: str, setting: dict[str, Any], comparison: Comparison, out: Path) -> None:
    """Write the result file and the plot, print the tables and what was left out."""
    from vllm_lookahead.bench import plot, tables
    from vllm_lookahead.bench.machine import headline

    _write(console, kind, setting, comparison.to_json(), out)
    for table in _tables(kind, comparison):
        _show(console, table)
    for line in tables.left_out(comparison.methods):
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if not plot.available():
        console.print(plot.MISSING, markup=False, highlight=False)
    elif comparison.results[0].measurements:
        picture = out.with_suffix(".png")
        plot.draw(comparison.results[0], picture, headline(setting))
        console.print(f"plot: {picture}", markup=False, highlight=False)


def _write(console: Console, kind: str, setting: dict[str, Any], content: dict[str, Any], out: Path) -> None:
    """Write a result file; say where it is, and where the figures come from."""
    from vllm_lookahead.bench.machine import headline
    from vllm_lookahead.bench.results import save

    save(out, kind, setting, content)
    console.print(headline(setting), markup=False, highlight=False, soft_wrap=True)
    console.print(f"results: {out}", markup=False, highlight=False)


def _show(console: Console, table: Table) -> None:
    console.print()
    table.show(console)


def _json(text: str, option: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint=option) from error
    if not isinstance(value, dict):
        raise typer.BadParameter("must be a JSON object", param_hint=option)
    return value


def _numbers(text: str, option: str, *, least: int) -> tuple[int, ...]:
    values = _parse(text, option, int)
    if min(values) < least:
        raise typer.BadParameter(f"{min(values)}: at least {least}", param_hint=option)
    return tuple(sorted(set(values)))


def _floats(text: str, option: str) -> list[float]:
    values = _parse(text, option, float)
    if min(values) < 0.0:
        raise typer.BadParameter(f"{min(values):g}: at least 0", param_hint=option)
    return values


def _parse(text: str, option: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        values = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = []
    if not values:
        raise typer.BadParameter(f"{text!r}: numbers separated by commas", param_hint=option)
    return values
