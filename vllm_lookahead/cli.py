"""The command ``vllm-lookahead``. Each subcommand's work is done elsewhere; here is what can be typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

import vllm_lookahead
from vllm_lookahead.bench.cli import app as bench

app = typer.Typer(
    help="Lossless speculative decoding for vLLM with draft token trees, without a draft model.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


app.add_typer(bench, name="bench")


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """What all subcommands share."""
    if version:
        typer.echo(vllm_lookahead.__version__)
        raise typer.Exit


@app.command()
def demo(
    method: Annotated[str, typer.Option(help="The method that runs against stock vLLM.")] = "[prompt_lookup]",
    model: Annotated[str | None, typer.Option(help="Folder or name of a model. Default: the bundled one.")] = None,
    options: Annotated[
        str, typer.Option(help="Further entries of the speculative config, as JSON.", metavar="JSON")
    ] = "{}",
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate per prompt.")] = 160,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; above, every prompt has a seed.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="Of the computation. Only float32 makes 'identical' a fair test.")] = (
        "float32"
    ),
    enforce_eager: Annotated[bool, typer.Option(help="Skip compilation: starts faster, runs slower.")] = False,
    show: Annotated[int, typer.Option(min=0, help="How many generated texts to print.")] = 2,
) -> None:
    """Generate the same texts with stock vLLM and with ours; compare speed and tokens.

    Ends with status 1 if any output differs.
    """
    from vllm_lookahead.config import ConfigError
    from vllm_lookahead.demo.run import MODEL, EngineFailedError, run_demo

    try:
        identical = run_demo(
            Console(),
            model=model or MODEL,
            method=method,
            options=_object(options, "--options"),
            max_tokens=max_tokens,
            temperature=temperature,
            engine={"dtype": dtype, "enforce_eager": enforce_eager, "enable_prefix_caching": False},
            show_texts=show,
        )
    except (ConfigError, EngineFailedError) as error:
        raise _refused(error) from None
    raise typer.Exit(0 if identical else 1)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="Folder or name of a model. Default: the bundled one.")] = None,
    method: Annotated[str, typer.Option(help="The method to examine.")] = "[prompt_lookup]",
    options: Annotated[
        str, typer.Option(help="Further entries of the speculative config, as JSON.", metavar="JSON")
    ] = "{}",
    engine: Annotated[str, typer.Option(help="Arguments for vllm.LLM, as JSON.", metavar="JSON")] = "{}",
    threads: Annotated[
        int | None, typer.Option(min=1, help="To compute with. Default: OMP_NUM_THREADS, else all cores but one.")
    ] = None,
) -> None:
    """Start an engine with a method and say what drafting does on this machine, and what to change.

    Ends with status 1 and one sentence if the engine would not start.
    """
    from vllm_lookahead.bench.engines import EngineFailedError, EngineSettings
    from vllm_lookahead.bench.machine import describe
    from vllm_lookahead.config import ConfigError
    from vllm_lookahead.demo.run import MODEL
    from vllm_lookahead.doctor.report import show
    from vllm_lookahead.doctor.run import examine

    console, about = Console(), describe()  # before the machine is busy with us
    config = {**_object(options, "--options"), "method": method.strip("[]")}
    settings = EngineSettings(model or MODEL, _object(engine, "--engine"), threads)
    try:
        with console.status("") as status:
            findings = examine(config, settings, lambda text: status.update(text))
    except (ConfigError, EngineFailedError) as error:
        raise _refused(error, status=1) from None
    show(console, about, findings)


@app.command()
def batch(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN.jsonl",
            help='The rows: {"id": ..., "prompt": "..."} or {"id": ..., "messages": [...]} per line. Other fields are '
            "copied to the result; without ids, a row's id is the number of its line.",
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="A folder that all machines see: results.jsonl and errors.jsonl in the order of the input, and "
            "parts/*.jsonl with the same rows as they come. The same command resumes a job that broke off, and runs "
            "rows that failed again.",
        ),
    ],
    model: Annotated[str, typer.Option(help="Folder or name of a model; a folder has to be there on all machines.")],
    method: Annotated[str, typer.Option(help="A speculative method, ours or vLLM's, or none.")] = "prompt_lookup",
    options: Annotated[
        str, typer.Option(help="Further entries of the speculative config, as JSON.", metavar="JSON")
    ] = "{}",
    replicas: Annotated[int, typer.Option(min=1, help="Engines to run.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate per row.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Every row's seed.")] = None,
    sampling: Annotated[
        str, typer.Option(help="Further fields of vllm.SamplingParams, as JSON.", metavar="JSON")
    ] = "{}",
    engine: Annotated[str, typer.Option(help="Further arguments of vLLM's engine, as JSON.", metavar="JSON")] = "{}",
    resources: Annotated[
        str | None,
        typer.Option(
            help='What Ray reserves for each worker of an engine, as JSON. Default: {"CPU": 1, "GPU": 1}, or '
            '{"CPU": 1} in a cluster without GPUs.',
            metavar="JSON",
        ),
    ] = None,
    block_rows: Annotated[
        int | None,
        typer.Option(min=1, help="Rows that are written, and remembered as done, together. Default: up to 32."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Of the Ray cluster. Default: RAY_ADDRESS, else this machine's, else one for this job."),
    ] = None,
) -> None:
    """Generate for every row of a file with engines on a Ray cluster; survive what clusters do.

    Ends with status 1 if rows failed, 2 if the job could not run or broke off.
    """
    from vllm_lookahead.batch.folder import FolderError
    from vllm_lookahead.batch.rows import InputError
    from vllm_lookahead.batch.run import BatchError, Plan, run_batch
    from vllm_lookahead.batch.settings import Settings
    from vllm_lookahead.config import ConfigError

    name = method.strip("[]")
    own = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    further = _object(sampling, "--sampling")
    if twice := sorted(own.keys() & further.keys()):
        raise typer.BadParameter(f"{twice[0]} has an option of its own", param_hint="--sampling")
    stated = _object(options, "--options")
    if name == "none" and stated:
        raise typer.BadParameter("the method none has none", param_hint="--options")
    plan = Plan(replicas, None if resources is None else _object(resources, "--resources"), block_rows, address)
    try:
        settings = Settings.read(
            model=model,
            speculative_config=None if name == "none" else {**stated, "method": name},
            sampling={**own, **further},
            engine=_object(engine, "--engine"),
        )
        results = run_batch(Console(stderr=True), source, target, settings, plan)
    except (InputError, FolderError, ConfigError, BatchError, OSError) as error:  # a full disk, say
        raise _refused(error) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{results.done} done, {results.failed} failed, {results.missing} missing: {target}")
    raise typer.Exit(1 if results.failed or results.missing else 0)


def _object(text: str, flag: str) -> dict[str, Any]:
    """An option that is a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint=flag) from error
    if not isinstance(value, dict):
        raise typer.BadParameter("must be a JSON object", param_hint=flag)
    return value


def _refused(error: Exception, status: int = 2) -> typer.Exit:
    """Say what is wrong; the program ends with this status."""
    message = Text.assemble(("error:", "bold red"), f" {error}")
    Console(stderr=True).print(message, soft_wrap=True)
    return typer.Exit(status)


if __name__ == "__main__":
    app()
