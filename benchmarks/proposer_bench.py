"""Proposers alone, without an engine: how long a proposal takes, and how good prompt lookup's trees are.

    python benchmarks/proposer_bench.py speed
    python benchmarks/proposer_bench.py replay outputs.jsonl

(Not called proposers.py: beside a script of that name, ``import proposers`` would find the script.)
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from proposers import (
    DraftTree,
    Lookahead,
    LookaheadOptions,
    PromptLookup,
    PromptLookupOptions,
    Proposer,
    Verified,
)
from proposers.tree import IntArray

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

BUDGET = 64  # nodes per request, for every proposer that drafts trees
Step = Callable[[IntArray], int]  # propose on a context, and observe; returns the number of nodes


def synthetic_text(length: int, seed: int = 0) -> IntArray:
    """int32 [length]: runs copied from earlier places, and new tokens of a Zipf distribution between them."""
    rng = np.random.default_rng(seed)
    text = list(rng.zipf(1.3, 32) % 32_000)
    while len(text) < length:
        start, run = int(rng.integers(max(0, len(text) - 20_000), len(text) - 8)), int(rng.geometric(0.15))
        text += text[start : start + run]
        text += list(rng.zipf(1.3, int(rng.integers(1, 4))) % 32_000)
    return np.array(text[:length], np.int32)


def of_proposer(proposer: Proposer, budget: int) -> Callable[[IntArray], Step]:
    """One step of a request: propose, then observe a verification that accepted nothing."""

    def start(prompt: IntArray) -> Step:
        request = proposer.start(f"request of {len(prompt)}", prompt)
        said = np.arange(1 + budget, dtype=np.int32)
        nothing = np.empty(0, np.int32)

        def step(context: IntArray) -> int:
            tree = request.propose(context, budget)
            argmax = said[: len(tree) + 1] if proposer.needs_argmax else None
            request.observe(tree, Verified(said[:1], nothing, argmax, len(tree)))
            return len(tree)

        return step

    return start


def of_stock_ngram() -> Callable[[IntArray], Step] | None:
    """vLLM's own ``ngram`` kernel (it drafts a chain), or None where vLLM is not installed."""
    try:
        from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens as find
    except ImportError:
        return None

    def start(prompt: IntArray) -> Step:
        return lambda context: len(find(context, 1, 5, 1 << 20, BUDGET))

    return start


def time_steps(
    start: Callable[[IntArray], Step], text: IntArray, length: int, steps: int, batch: int
) -> dict[str, Any]:
    """Time the first proposal (it indexes the prompt) and then ``steps`` more, each 1 to 3 tokens further on.

    Returns:
        ``first_ms``; ``step_us``, mean over the steps, for one request of the batch; ``batch_ms``, for all of them;
        ``nodes``, mean.
    """
    requests = [start(text[:length]) for _ in range(batch)]
    begin = time.perf_counter()
    for step in requests:
        step(text[:length])
    first = (time.perf_counter() - begin) / batch
    nodes, spent, end = 0, 0.0, length
    for i in range(steps):
        end += 1 + i % 3
        context = text[:end]
        begin = time.perf_counter()
        for step in requests:
            nodes += step(context)
        spent += time.perf_counter() - begin
    return {
        "first_ms": 1e3 * first,
        "step_us": 1e6 * spent / steps / batch,
        "batch_ms": 1e3 * spent / steps,
        "nodes": nodes / steps / batch,
    }


@app.command()
def speed(
    contexts: Annotated[str, typer.Option(help="Context lengths, in tokens.")] = "1024,8192,32768,131072",
    batch: Annotated[int, typer.Option(min=1, help="Requests in the batch.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Steps per round.")] = 200,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the proposers take turns in each.")] = 5,
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Time propose + observe for one request and for a batch, in one thread."""
    lookahead = LookaheadOptions(window_size=15, ngram_size=5, guess_set_size=15)
    # The comb of W=15 N=5 comes on top of the 64 guessed nodes.
    candidates: dict[str, Callable[[IntArray], Step] | None] = {
        "prompt_lookup": of_proposer(PromptLookup(PromptLookupOptions(max_draft_tokens=BUDGET)), BUDGET),
        "lookahead": of_proposer(Lookahead(lookahead), BUDGET + 59),
        "stock ngram": of_stock_ngram(),
    }
    starts = {name: start for name, start in candidates.items() if start is not None}
    lengths = [int(length) for length in contexts.split(",")]
    text = synthetic_text(max(lengths) + 2 * steps + 16)
    for start in starts.values():
        time_steps(start, text, 64, 8, 1)  # compile
    results = []
    for length in lengths:
        # The same local statistics for every length: the context is always the end of the text.
        window = np.ascontiguousarray(text[len(text) - length - 2 * steps - 16 :])
        runs: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {name: [] for name in starts}
        for _ in range(rounds):
            for name, start in starts.items():
                batched_steps = max(1, steps // 8)
                one = time_steps(start, window, length, steps, 1)
                runs[name].append((one, time_steps(start, window, length, batched_steps, batch)))
        for name, measured in runs.items():
            results.append(
                {
                    "proposer": name,
                    "context": length,
                    "nodes": measured[0][0]["nodes"],
                    "first_ms": median(one["first_ms"] for one, _ in measured),
                    "step_us": spread([one["step_us"] for one, _ in measured]),
                    "batch": batch,
                    "batch_ms": spread([many["batch_ms"] for _, many in measured]),
                }
            )
    table = Table(title=f"propose + observe, one thread, {rounds} rounds of {steps} steps")
    for heading in ("proposer", "context", "nodes", "index prompt, ms", "one request, us", "min - max"):
        table.add_column(heading, justify="right")
    table.add_column(f"batch of {batch}, ms", justify="right")
    table.add_column("min - max", justify="right")
    for r in results:
        table.add_row(
            r["proposer"],
            f"{r['context']:,}",
            f"{r['nodes']:.1f}",
            f"{r['first_ms']:.2f}",
            f"{r['step_us']['median']:.1f}",
            f"{r['step_us']['min']:.1f} - {r['step_us']['max']:.1f}",
            f"{r['batch_ms']['median']:.2f}",
            f"{r['batch_ms']['min']:.2f} - {r['batch_ms']['max']:.2f}",
        )
    report(table, {"machine": machine(), "steps": steps, "rounds": rounds, "results": results}, json_out)


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values)}


def read_replays(path: Path) -> Iterator[tuple[IntArray, int]]:
    """Token ids and the length of the prompt, for each line of the JSONL file."""
    for line in path.read_text().splitlines():
        record = json.loads(line)
        prompt, output = record["prompt_ids"], record["output_ids"]
        if output:
            yield np.array(prompt + output, np.int32), len(prompt)


def replay_tree(proposer: Proposer, text: IntArray, prompt: int, budget: int) -> tuple[int, int]:
    """Replay one output; returns the number of steps and of nodes."""
    request = proposer.start("replay", text[:prompt])
    at, steps, nodes = prompt, 0, 0
    while at < len(text):
        tree = request.propose(text[:at], budget)
        steps += 1
        nodes += len(tree)
        at += 1 + accepted(tree, text[at:])
    return steps, nodes


def accepted(tree: DraftTree, text: IntArray) -> int:
    """How many tokens of the text that follows are in the tree; the last token is always the model's."""
    here, depth = -1, 0
    for node, (token, parent) in enumerate(zip(tree.token_ids.tolist(), tree.parents.tolist(), strict=True)):
        if depth < len(text) - 1 and parent == here and token == text[depth]:
            here, depth = node, depth + 1
    return depth


def replay_ceiling(text: IntArray, prompt: int, depth: int) -> int:
    """Number of steps if everything that ever followed the last token were drafted, up to ``depth`` tokens deep."""
    tokens = text.tolist()
    places: dict[int, list[int]] = {}
    at, steps, indexed = prompt, 0, 0
    while at < len(tokens):
        for place in range(indexed, at - 1):
            places.setdefault(tokens[place], []).append(place)
        indexed = max(indexed, at - 1)
        best = 0
        for place in places.get(tokens[at - 1], []):
            most = min(depth, len(tokens) - 1 - at, at - 1 - place)
            hit = 0
            while hit < most and tokens[place + 1 + hit] == tokens[at + hit]:
                hit += 1
            best = max(best, hit)
        steps += 1
        at += 1 + best
    return steps


def replay_stock(
    text: IntArray, prompt: int, start: Callable[..., IntArray], shortest: int, longest: int, k: int
) -> tuple[int, int]:
    at, steps, nodes = prompt, 0, 0
    while at < len(text):
        draft = start(text[:at], shortest, longest, 1 << 20, k)
        steps += 1
        nodes += len(draft)
        at += 1 + accepted(DraftTree.chain(draft), text[at:])
    return steps, nodes


@app.command()
def replay(
    path: Annotated[Path, typer.Argument(help='JSONL with {"prompt_ids": [...], "output_ids": [...]} on each line.')],
    budgets: Annotated[str, typer.Option(help="Values of max_draft_tokens to try.")] = "12,16,24,32,40,48,64",
    options: Annotated[str, typer.Option(help="JSON object: other options of prompt_lookup.")] = "{}",
    json_out: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Tokens per step when given outputs are decoded again with prompt lookup's trees.

    The ceiling drafts, without any limit on nodes, all that ever followed the last token (to the same depth).
    """
    texts = list(read_replays(path))
    total = sum(len(text) - prompt for text, prompt in texts)
    chosen = json.loads(options)
    depth = PromptLookupOptions(**chosen).max_depth
    ceiling = total / sum(replay_ceiling(text, prompt, depth) for text, prompt in texts)
    results = [{"method": f"ceiling, depth {depth}", "tokens_per_step": ceiling, "of_ceiling": 1.0}]
    for budget in map(int, budgets.split(",")):
        proposer = PromptLookup(PromptLookupOptions(**{**chosen, "max_draft_tokens": budget}))
        runs = [replay_tree(proposer, text, prompt, budget) for text, prompt in texts]
        results.append(figures(f"prompt_lookup, at most {budget} nodes", total, runs, ceiling))
    try:
        from vllm.v1.spec_decode.ngram_proposer import _find_longest_matched_ngram_and_propose_tokens as find
    except ImportError:
        pass
    else:
        for shortest, longest, k in ((5, 5, 5), (1, 3, 10)):
            runs = [replay_stock(text, prompt, find, shortest, longest, k) for text, prompt in texts]
            results.append(figures(f"stock ngram {shortest} to {longest}, k={k}", total, runs, ceiling))
    table = Table(title=f"{len(texts)} outputs, {total:,} tokens")
    for heading in ("method", "tokens per step", "of ceiling", "nodes per step"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for r in results:
        nodes = f"{r['nodes_per_step']:.1f}" if "nodes_per_step" in r else "unlimited"
        table.add_row(str(r["method"]), f"{r['tokens_per_step']:.3f}", f"{r['of_ceiling']:.1%}", nodes)
    report(table, {"machine": machine(), "file": str(path), "tokens": total, "results": results}, json_out)


def figures(method: str, total: int, runs: list[tuple[int, int]], ceiling: float) -> dict[str, Any]:
    steps = sum(steps for steps, _ in runs)
    return {
        "method": method,
        "tokens_per_step": total / steps,
        "of_ceiling": total / steps / ceiling,
        "nodes_per_step": sum(nodes for _, nodes in runs) / steps,
    }


def machine() -> str:
    return f"{platform.processor() or platform.machine()}, Python {platform.python_version()}"


def report(table: Table, figures: dict[str, Any], json_out: Path | None) -> None:
    Console().print(table)
    if json_out is not None:
        json_out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    app()
