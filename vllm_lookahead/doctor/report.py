"""What the examination found, for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from vllm_lookahead.bench.machine import headline
from vllm_lookahead.doctor.run import BATCHES, Findings
from vllm_lookahead.drafting.budget import StepCost
from vllm_lookahead.drafting.report import DraftingReport

CHANCES = (0.5, 0.7, 0.9)
"""How often the next guess on a path holds: about what free text, chat about a document, and code being edited give."""


def show(console: Console, about: dict[str, Any], findings: Findings) -> None:
    """Print it.

    Args:
        console: where to.
        about: ``bench.machine.describe``'s answer.
        findings: what was found.
    """
    engine, drafting = findings.engine, findings.drafting
    versions = ", ".join(f"{name} {version}" for name, version in sorted(about["versions"].items()))
    rows = {
        "machine": headline(about),
        "versions": versions,
        "engine": f"{engine['runner']}, {'a' if engine['async_scheduling'] else ''}synchronous scheduling, "
        f"{engine['dtype']}, {engine['max_num_seqs']} requests and {engine['max_num_batched_tokens']} tokens per step",
        "drafts": _drafts(drafting),
    }
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table, highlight=False)
    cost = None if drafting is None else cost_of(drafting)
    if drafting is not None and cost is not None:
        console.print("\nA forward pass on this machine:", style="bold")
        console.print(_steps(drafting), highlight=False)
        console.print(
            "What budget: auto spends (draft tokens per request), and what it gains, if each next guess holds in",
            style="bold",
        )
        console.print(_spending(drafting, cost), highlight=False)
    advice = [*_advice(findings, cost)] or ["Nothing: this is as good as it gets here."]
    console.print("What to change:", style="bold")
    for line in advice:
        console.print(f"- {line}", markup=False, highlight=False)


def cost_of(drafting: DraftingReport) -> StepCost | None:
    """The cost model as the worker has it, or None with a fixed budget."""
    if not drafting.forward:
        return None
    sizes, seconds = zip(*drafting.forward, strict=True)
    cost = StepCost(sizes, seconds)
    cost.adopt(drafting.fitted)
    return cost


def spent(drafting: DraftingReport, cost: StepCost, batch: int, chance: float) -> tuple[float, float]:
    """What ``budget: auto`` does where the next guess on a request's path always holds with the same chance.

    Returns:
        Draft tokens per request, and tokens per second against a step without drafts.
    """
    most = drafting.most_nodes[batch]
    chances = np.float32(chance) ** np.arange(1, most + 1, dtype=np.float32)
    counts, rate = cost.allocate([chances] * batch, batch)
    return sum(counts) / batch, rate * cost.seconds(batch) / batch


def _drafts(drafting: DraftingReport | None) -> str:
    if drafting is None:
        return "chains, verified by vLLM: another --worker-cls was asked for"
    most = max(drafting.most_nodes.values())
    kind = "trees" if drafting.why_chains is None else "chains"
    reason = "" if drafting.why_chains is None else f": {drafting.why_chains}"
    return f"{kind} of up to {most} tokens per request{reason}"


def _steps(drafting: DraftingReport) -> Table:
    """Tokens and times in two rows; as many columns as fit a narrow terminal."""
    chosen = drafting.forward[:: max(1, len(drafting.forward) // 8)]
    table = Table(box=box.SIMPLE, show_header=False)
    for _ in range(len(chosen) + 1):
        table.add_column(justify="right")
    table.add_row("tokens", *(str(size) for size, _ in chosen))
    table.add_row("ms", *(f"{1e3 * seconds:.2f}" for _, seconds in chosen))
    return table


def _spending(drafting: DraftingReport, cost: StepCost) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("requests", justify="right")
    table.add_column("ms without drafts", justify="right")
    for chance in CHANCES:
        table.add_column(f"{chance:.0%}", justify="right")
    for batch in BATCHES:
        cells = [spent(drafting, cost, batch, chance) for chance in CHANCES]
        plain = f"{1e3 * cost.seconds(batch):.2f}"
        table.add_row(str(batch), plain, *(f"{nodes:.1f}  {gain:.2f}x" if nodes else "none" for nodes, gain in cells))
    return table


def _advice(findings: Findings, cost: StepCost | None) -> Iterator[str]:
    engine, drafting = findings.engine, findings.drafting
    if drafting is None:
        yield "Leave out --worker-cls: our worker verifies draft trees, which accept more than chains."
        return
    if drafting.why_chains is not None:
        yield f"Drafts are chains, which accept less than trees: {drafting.why_chains}."
    most = drafting.most_nodes
    full = most[BATCHES[0]]
    for batch in BATCHES[1:]:
        if batch <= engine["max_num_seqs"] and most[batch] < full:
            yield (
                f"With {batch} requests there is room for {most[batch]} draft tokens each, not {full}: raise "
                f"--max-num-batched-tokens (now {engine['max_num_batched_tokens']}) if so many run at once."
            )
            break
    if cost is None:
        yield f"budget is {drafting.budget}, whatever it costs: leave it out, and drafts are verified where they pay."
    elif not spent(drafting, cost, 1, max(CHANCES))[0]:
        yield (
            "Verifying drafts doesn't pay on this machine even for one request: every token of a step costs as much as "
            "the first. Nothing is drafted then, and nothing is lost."
        )
    if engine["eager"] and engine["device"] == "cuda":
        yield "Leave out --enforce-eager: without CUDA graphs a step takes longer, with and without drafts."
