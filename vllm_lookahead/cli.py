"""The command ``vllm-lookahead``. Each subcommand's work is done elsewhere; here is what can be typed."""

from __future__ import annotations

import json
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

    console = Console()
    try:
        settings: Any = json.loads(options)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint="--options") from error
    if not isinstance(settings, dict):
        raise typer.BadParameter("must be a JSON object", param_hint="--options")
    try:
        identical = run_demo(
            console,
            model=model or MODEL,
            method=method,
            options=settings,
            max_tokens=max_tokens,
            temperature=temperature,
            engine={"dtype": dtype, "enforce_eager": enforce_eager, "enable_prefix_caching": False},
            show_texts=show,
        )
    except (ConfigError, EngineFailedError) as error:
        message = Text.assemble(("error:", "bold red"), f" {error}")
        Console(stderr=True).print(message, soft_wrap=True)
        raise typer.Exit(2) from None
    raise typer.Exit(0 if identical else 1)


if __name__ == "__main__":
    app()
