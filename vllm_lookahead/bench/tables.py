"""Tables: lists of text, made from measurements, printed for people or for a Markdown file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from vllm_lookahead.bench.results import Results, Summary
from vllm_lookahead.bench.stats import Spread, ratios
from vllm_lookahead.bench.watch import PARTS, REST

PART_NAMES = {"forward": "forward", "sample": "sample, walk", "commit": "KV commit", "propose": "propose", REST: "rest"}


@dataclass
class Table:
    """A table.

    Attributes:
        title: one line above it.
        headings: of the columns; the first ``left`` of them are words, the others numbers.
        rows: as many cells each; an empty list draws a line.
        notes: lines below it.
        left: how many columns are aligned to the left.
    """

    title: str
    headings: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left: int = 2

    def show(self, console: Console) -> None:
        """Print it."""
        console.print(self.title, style="bold", markup=False, highlight=False, soft_wrap=True)
        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
        for i, heading in enumerate(self.headings):
            table.add_column(heading, justify="left" if i < self.left else "right", no_wrap=True)
        for row in self.rows:
            if row:
                table.add_row(*(cell.replace("[", r"\[") for cell in row))
            else:
                table.add_section()
        console.print(table)
        for note in self.notes:
            console.print(note, style="dim", markup=False, highlight=False, soft_wrap=True)

    def markdown(self) -> str:
        """It, as Markdown."""
        marks = ["---" if i < self.left else "---:" for i in range(len(self.headings))]
        lines = [f"**{self.title}**", ""]
        lines += ["| " + " | ".join(cells) + " |" for cells in (self.headings, marks, *filter(None, self.rows))]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes), ""])


def by_batch(table: Table, results: Results, cells: Callable[[Summary], list[str]]) -> Table:
    """Fill a table with a row per batch size and method."""
    batch = None
    for line in results.summary():
        if batch is not None and line.batch != batch:
            table.rows.append([])
        table.rows.append([str(line.batch) if line.batch != batch else "", line.method, *cells(line)])
        batch = line.batch
    return table


def speed(results: Results) -> Table:
    """Throughput, ratio to the baseline, tokens per step, latency, and whether outputs are identical."""
    load, baseline = results.load, results.baseline
    table = Table(
        f"speed; {describe(results)}",
        [
            *("batch", "method", "tokens/s", "ratio", "tokens/step", "nodes/step", "ms/step"),
            *("ITL p50", "p99, ms", "identical"),
        ],
    )

    def cells(line: Summary) -> list[str]:
        return [
            line.tokens_per_second.show(".0f"),
            "1" if line.ratio is None or line.method == baseline else line.ratio.show(".3f"),
            f"{line.tokens_per_step:.2f}",
            f"{line.nodes_per_step:.1f}",
            f"{line.ms_per_step.median:.2f}",
            f"{line.itl_p50_ms:.2f}",
            f"{line.itl_p99_ms:.2f}",
            agreement(line),
        ]

    rounds = f"median (min - max) of {load.rounds} rounds" if load.rounds > 1 else "one round"
    table.notes = [
        f"{rounds}, methods taking turns; ratios to {baseline} are taken round by round",
        "ITL: a step that emits k tokens after a pause of d is k tokens that took d / k each; prefill is in it",
        f"identical: outputs equal to {baseline}'s at the same batch size; in {baseline}'s own rows, to those it gives "
        f"at batch {min(load.batches)}",
        *identity_notes(results),
    ]
    return by_batch(table, results, cells)


def against_best_stock(results: Results, methods: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """Our methods against the best of vLLM's own speculative methods at each batch size; None if there are not both.

    Args:
        results: the measurements.
        methods: ``worker.Engines.about``'s entries.
    """
    speculative = [name for name in results.methods if methods[name]["speculative_config"]]
    ours = [name for name in speculative if methods[name]["plugin"]]
    stock = [name for name in speculative if not methods[name]["plugin"]]
    if not ours or not stock:
        return None
    table = Table(
        "against the best of vLLM's own speculative methods",
        ["batch", "method", "best of vLLM's", "ratio"],
        left=3,
        notes=["the best: the highest median of tokens/s; ratios are taken round by round"],
    )
    for batch in results.batches:
        rates = {name: {m.round: m.tokens_per_second for m in results.of(name, batch)} for name in speculative}
        rates = {name: rounds for name, rounds in rates.items() if rounds}
        found = [name for name in stock if name in rates]
        if not found:
            continue
        best = max(found, key=lambda name: Spread.of(list(rates[name].values())).median)
        for at, name in enumerate(name for name in ours if name in rates):
            ratio = Spread.of(ratios(rates[name], rates[best])).show(".3f")
            table.rows.append([str(batch) if at == 0 else "", name, best, ratio])
    return table


def agreement(line: Summary) -> str:
    """How many outputs are identical, in words."""
    if line.identical is None:
        return "-"
    if line.identical == line.compared:
        return f"yes ({line.compared})"
    return f"{line.identical} of {line.compared}"


def identity_notes(results: Results) -> Iterator[str]:
    """What has to be known to judge the last column."""
    if all(line.identical is None or line.identical == line.compared for line in results.summary()):
        return
    yield (
        "not all identical: in bfloat16, rounding may flip two tokens whose logits are nearly equal, in stock vLLM "
        "from one batch size to another as well; --dtype float32 is the fair test of exactness"
    )
    if results.load.temperature:
        yield (
            "temperature above 0: stock speculative methods give other samples of the same distribution; ours give the "
            "samples of stock vLLM without speculation, seed by seed"
        )


def time_split(results: Results) -> Table | None:
    """Where the time of a decoding step goes, or None if it wasn't measured."""
    if not results.profiles:
        return None
    parts = (*PARTS, REST)
    table = Table(
        "where the time of a decoding step goes, in ms",
        ["batch", "method", "step", *(PART_NAMES[part] for part in parts)],
        notes=[
            "from a pass of its own, with timers; forward includes the logits; rest is scheduling, input preparation, "
            "output processing and detokenization"
        ],
    )

    def cells(line: Summary) -> list[str]:
        ms = results.profile(line.method, line.batch)
        if not ms:
            return ["-"] * (1 + len(parts))
        return [f"{sum(ms.values()):.2f}", *(f"{ms[part]:.2f}" for part in parts)]

    return by_batch(table, results, cells)


def start_up(methods: Mapping[str, Mapping[str, Any]], baseline: str | None) -> Table:
    """How long each engine took to start. The entries are ``worker.Engines.about``'s."""
    most = max((len(about["start_seconds"]) for about in methods.values()), default=0)
    headings = ["first"] if most < 2 else ["first", *("again" for _ in range(most - 1))]
    table = Table("start-up, in s", ["method", *headings, f"last, more than {baseline}"], left=1)
    stock = (methods.get(baseline or "") or {}).get("start_seconds") or []
    for name, about in methods.items():
        seconds = about["start_seconds"]
        if seconds:
            cells = [f"{value:.1f}" for value in seconds] + [""] * (most - len(seconds))
            table.rows.append([name, *cells, f"{seconds[-1] - stock[-1]:+.1f}" if stock else "-"])
    table.notes = ["from the start of the process to the engine's being ready; starts after the first find warm caches"]
    return table


def describe(results: Results) -> str:
    """The load in a few words."""
    load = results.load
    how = "greedy" if not load.temperature else f"temperature {load.temperature:g}, seeded"
    length = f"{load.max_tokens} tokens" + ("" if load.ignore_eos else " at most")
    return f"prompts: {Path(load.prompts).name}, {length}, {how}"


def left_out(methods: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each method that did not run."""
    for name, about in methods.items():
        if about["failed"]:
            yield f"{name}: not available: {about['failed'].strip()}"
