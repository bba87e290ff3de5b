"""What the demo prints: a table of measured numbers, and texts whose colours show the steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vllm_lookahead.demo.engine import Output, Prompt, Run

COLOURS = ("bright_green", "bright_cyan", "bright_yellow", "bright_magenta")
"""Neighbouring steps of several tokens get different ones."""


@dataclass(frozen=True)
class Comparison:
    """Two engines' runs over the same prompts.

    Attributes:
        name: of our method.
        prompts: what was continued.
        stock_alone, our_alone: a run per prompt.
        stock_together, our_together: all prompts in one batch.
    """

    name: str
    prompts: list[Prompt]
    stock_alone: list[Run]
    our_alone: list[Run]
    stock_together: Run
    our_together: Run

    @property
    def identical(self) -> bool:
        """Whether every output of ours is stock vLLM's, token for token."""
        pairs = [*zip(self.stock_alone, self.our_alone, strict=True), (self.stock_together, self.our_together)]
        return all(same_tokens(stock, ours) for stock, ours in pairs)

    def rows(self) -> Iterator[tuple[str, Run, Run]]:
        """What the table compares: each prompt alone, all of them one after the other, and all at once."""
        for prompt, stock, ours in zip(self.prompts, self.stock_alone, self.our_alone, strict=True):
            yield prompt.name, stock, ours
        yield "one after the other", joined(self.stock_alone), joined(self.our_alone)
        yield f"all {len(self.prompts)} at once", self.stock_together, self.our_together


def same_tokens(stock: Run, ours: Run) -> bool:
    """Whether two runs produced the same tokens."""
    return [output.tokens for output in stock.outputs] == [output.tokens for output in ours.outputs]


def joined(runs: list[Run]) -> Run:
    """Several runs as one, whose time is the sum."""
    return Run([output for run in runs for output in run.outputs], sum(run.seconds for run in runs))


def table(comparison: Comparison) -> Table:
    """The table of all rows."""
    title = Text(f"stock vLLM against {comparison.name}, tokens per second")
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    result.add_column("prompt", no_wrap=True)
    for column in ("stock", "ours", "speed-up", "tokens per step"):
        result.add_column(column, justify="right", no_wrap=True)
    result.add_column("identical", no_wrap=True)
    for i, (name, stock, ours) in enumerate(comparison.rows()):
        if i == len(comparison.prompts):
            result.add_section()
        ratio = ours.tokens_per_second / stock.tokens_per_second
        result.add_row(
            name,
            f"{stock.tokens_per_second:.0f}",
            f"{ours.tokens_per_second:.0f}",
            Text(f"{ratio:.2f}x", style="bold green" if ratio >= 1 else "bold red"),
            f"{ours.tokens_per_step:.2f}",
            Text("yes", style="green") if same_tokens(stock, ours) else Text("NO", style="bold red"),
        )
    return result


def coloured(output: Output) -> Text:
    """The generated text; the tokens of a step that emitted several share a colour, single tokens stay plain."""
    text = Text()
    colour = 0
    for tokens, piece in zip(output.steps, output.texts, strict=True):
        if len(tokens) > 1:
            text.append(piece, style=COLOURS[colour % len(COLOURS)])
            colour += 1
        else:
            text.append(piece, style="default")
    return text


def show(console: Console, comparison: Comparison, texts: int) -> None:
    """Print everything."""
    for prompt, run in list(zip(comparison.prompts, comparison.our_alone, strict=True))[:texts]:
        body = Text(prompt.text.lstrip("\n") + "\n" * (prompt.kind == "chat"), style="dim")
        body.append_text(coloured(run.outputs[0]))
        subtitle = f"{run.tokens_per_step:.2f} tokens per step: what one step accepted shares a colour"
        console.print(Panel(body, title=prompt.name, subtitle=subtitle, title_align="left", subtitle_align="left"))
    console.print(table(comparison))
    if comparison.identical:
        console.print("[green]All outputs are identical to stock vLLM's, token for token.[/green]")
    else:
        console.print("[bold red]Outputs differ from stock vLLM's.[/bold red]")
