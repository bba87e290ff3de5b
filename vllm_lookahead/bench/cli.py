"""``vllm-lookahead bench``: what can be typed. The work is done by the other modules, imported when it is needed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

if TYPE_CHECKING:
    from vllm_lookahead.bench.engines import EngineSettings
    from vllm_lookahead.bench.tables import Table


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
Rounds = Annotated[int, typer.Option(min=1, help="The methods take turns in each.")]
Out = Annotated[Path, typer.Option(help="The result file (JSON).")]


@app.command()
def run(
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            help="stock, ngram, ngram-tuned, suffix, prompt_lookup, lookahead, or NAME=JSON with a speculative config. "
            "Repeat the option, or separate bare names by commas. Default: all.",
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Most requests at a time, several numbers.")] = "1,2,4,8,16,32,64",
    temperature: Annotated[str, typer.Option(help="Several numbers. 0: greedy; above, requests have seeds.")] = "0",
    rounds: Rounds = 5,
    prompts: Prompts = "demo",
    num_prompts: Annotated[
        int, typer.Option(min=1, help="Prompts per round; a larger batch takes as many as it has places.")
    ] = 8,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate per prompt.")] = 256,
    stop_at_eos: Annotated[bool, typer.Option("--stop-at-eos", help="Let answers end before --max-tokens.")] = False,
    seed: Annotated[int, typer.Option(help="Of the choice of prompts and of the requests.")] = 0,
    model: Model = None,
    dtype: Dtype = "auto",
    eager: Eager = False,
    engine: EngineArguments = "{}",
    threads: Threads = None,
    logs: Logs = None,
    out: Out = Path("out/bench-run.json"),
) -> None:
    """Any set of methods side by side, by temperature and batch size: the main benchmark (default command)."""
    from vllm_lookahead.bench import comparison, methods
    from vllm_lookahead.bench.engines import engines
    from vllm_lookahead.bench.prompts import PromptError, read_prompts

    load = comparison.Load(
        prompts=prompts,
        batches=tuple(_numbers(batch, "--batch", int, least=1)),
        temperatures=tuple(_numbers(temperature, "--temperature", float, least=0)),
        rounds=rounds,
        per_round=num_prompts,
        max_tokens=max_tokens,
        ignore_eos=not stop_at_eos,
        seed=seed,
    )
    settings = _settings(model, dtype, eager, engine, threads, logs)
    with _benchmark("run", out) as (say, finish):
        chosen, texts = methods.parse(method or methods.STANDARD), read_prompts(prompts)
        with engines(chosen, settings, say) as (asks, about):
            first = next(iter(asks))
            room = about[first]["engine"]["max_model_len"] - max_tokens
            ids = [ids for ids in asks[first]("encode", prompts=texts) if 0 < len(ids) <= room]
            if not ids:
                raise PromptError(f"prompts: none of {len(texts)} has between 1 and {room} tokens")
            found, failed = comparison.measure(asks, ids, load, say)
        for name, reason in failed.items():
            about[name]["failed"] = reason
        table = comparison.table(found, load, about)
        caption = finish(table, load=asdict(load), methods=about, measurements=[asdict(m) for m in found])
        try:
            from vllm_lookahead.bench import plot

            plot.draw(found, load, out.with_suffix(".png"), caption)
        except ImportError:
            say("no plot: matplotlib is not installed (pip install 'vllm-lookahead[bench]')")


@app.command("step-cost")
def step_cost(
    nodes: Annotated[str, typer.Option(help="Nodes per request, several numbers.")] = "0,8,16,32,64,128",
    batch: Annotated[str, typer.Option(help="Numbers of requests.")] = "1,4,16",
    context: Annotated[int, typer.Option(min=1, help="Length of the prompts, random tokens.")] = 300,
    steps: Annotated[int, typer.Option(min=4, help="Steps to time for each number of nodes.")] = 20,
    rounds: Rounds = 5,
    stock_chain: Annotated[bool, typer.Option(help="Also stock vLLM verifying a chain.")] = True,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also print what takes longest (torch's profiler).")
    ] = False,
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
    from vllm_lookahead.bench.engines import engines

    sizes, batches = _numbers(nodes, "--nodes", int, least=0), _numbers(batch, "--batch", int, least=1)
    room = max(2048, max(batches) * (1 + max(sizes)))
    settings = _settings(model, dtype, eager, engine, threads, logs, max_num_batched_tokens=room)
    with _benchmark("step-cost", out) as (say, finish):
        chosen = [m for m in cost.methods(max(1, *sizes)) if stock_chain or m.name != cost.STOCK_CHAIN]
        with engines(chosen, settings, say) as (asks, about):
            times = cost.measure(
                asks,
                nodes=sizes,
                batches=batches,
                rounds=rounds,
                context=context,
                steps=steps,
                say=say,
                profile=profile,
            )
        finish(cost.table(times, context), methods=about, **asdict(times))
        for time_ in times.times:
            if time_.operators:
                typer.echo(
                    f"\n{time_.engine}, {time_.kind}, batch {time_.batch}, {time_.nodes} nodes\n{time_.operators}"
                )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    options: typer.Context,
    url: Annotated[list[str], typer.Option(help="A running server, NAME=http://HOST:PORT. The first is the baseline.")],
    prompts: Prompts = "demo",
    rates: Annotated[
        str, typer.Option(help="Requests per second, several numbers, and inf for all at once: each is measured.")
    ] = "",
    rounds: Rounds = 3,
    out: Out = Path("out/bench-serve.json"),
) -> None:
    """Several running servers in turns, driven by ``vllm bench serve``, which gets all other options.

    For example --rates 1,4,inf --num-prompts 32 --sharegpt-output-len 128 --temperature 0 --ignore-eos.
    """
    from vllm_lookahead.bench import serve as serving
    from vllm_lookahead.bench.prompts import read_prompts

    servers = {}
    for text in url:
        name, equals, address = text.partition("=")
        if not equals or not address.startswith("http"):
            raise typer.BadParameter(f"{text!r}: must be NAME=http://HOST:PORT", param_hint="--url")
        servers[name] = address
    chosen = [f"{rate:g}" for rate in _numbers(rates, "--rates", float, least=0)] if rates else []
    with _benchmark("serve", out) as (say, finish):
        found = serving.drive(servers, read_prompts(prompts), options.args, rounds, say, chosen)
        finish(serving.table(found), results=found)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A result file.", exists=True, dir_okay=False)],
    markdown: Annotated[bool, typer.Option("--markdown", help="The table as Markdown.")] = False,
) -> None:
    """Print the table of a result file again."""
    from vllm_lookahead.bench.machine import headline
    from vllm_lookahead.bench.tables import Table

    try:
        data = json.loads(file.read_text())
        table = Table(**data["table"])
        lines = [headline(data), f"{data['date']}: {' '.join(data['command'])}"]
    except (ValueError, KeyError, TypeError) as error:
        raise typer.BadParameter(f"not a result file of this version: {error!r}", param_hint="FILE") from error
    typer.echo("\n".join(lines))
    if markdown:
        typer.echo("\n" + table.markdown())
    else:
        table.show(_console())


# ---- what the commands share


def _console() -> Console:
    """A console that doesn't fold tables when its output goes to a file."""
    usual = Console()
    return usual if usual.is_terminal else Console(width=240)


@contextmanager
def _benchmark(kind: str, out: Path) -> Iterator[tuple[Callable[[str], None], Callable[..., str]]]:
    """What every benchmark does: say what it is doing, and at the end write the result file and print the table.

    What a user can put right ends in one line and status 2.

    Yields:
        ``say(text)``, and ``finish(table, **raw)``, which returns a line about the machine.
    """
    from vllm_lookahead.bench.engines import EngineFailedError
    from vllm_lookahead.bench.machine import describe, headline
    from vllm_lookahead.bench.methods import MethodError
    from vllm_lookahead.bench.prompts import PromptError
    from vllm_lookahead.bench.serve import ServerError
    from vllm_lookahead.config import ConfigError

    console, about, begin = _console(), describe(), time.monotonic()  # before the machine is busy with us

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - begin:4.0f} s  {text}", style="dim", highlight=False, markup=False)

    def finish(table: Table, **raw: Any) -> str:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"kind": kind, **about, "table": asdict(table), **raw}, indent=1) + "\n")
        typer.echo(f"{headline(about)}\nresults: {out}\n")
        table.show(console)
        return headline(about)

    try:
        yield say, finish
    except (ConfigError, EngineFailedError, MethodError, PromptError, ServerError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


def _settings(
    model: str | None, dtype: str, eager: bool, engine: str, threads: int | None, logs: Path | None, **defaults: Any
) -> EngineSettings:
    from vllm_lookahead.bench.engines import EngineSettings
    from vllm_lookahead.demo.run import MODEL

    try:
        given = json.loads(engine)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint="--engine") from error
    if not isinstance(given, dict):
        raise typer.BadParameter("must be a JSON object", param_hint="--engine")
    arguments = {
        "dtype": dtype,
        "enforce_eager": eager,
        "enable_prefix_caching": False,  # prompts come again in every round; their prefill shall cost what it costs
        "seed": 0,
        **defaults,
        **given,
    }
    return EngineSettings(model or MODEL, arguments, threads, logs)


def _numbers(text: str, option: str, kind: Callable[[str], Any], *, least: int) -> list[Any]:
    try:
        values = sorted({kind(part) for part in text.split(",") if part.strip()})
    except ValueError:
        values = []
    if not values or values[0] < least:
        raise typer.BadParameter(f"{text!r}: numbers from {least} on, separated by commas", param_hint=option)
    return values
