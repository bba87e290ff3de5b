"""Thousands of requests of every kind for ``vllm serve`` with one of our methods, and what has to be true afterwards.

    python benchmarks/soak.py
    python benchmarks/soak.py --method '[lookahead]' --requests 2000 --seed 7

First stock vLLM answers a few hundred distinct requests, once each. Then our server, which has hardly any room for KV,
gets them over and over in random order: streaming or not, one after the other, in bursts and at random moments, with
predictions and cache salts; clients leave in mid-stream or before the first token; some requests are wrong. Every
answer has to be stock's, none may be lost or doubled, memory has to be flat, the counters have to fit, and nothing
may be left in the engine. Ends with status 1 if anything is not so.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from soaking.asking import Request, plan
from soaking.checks import Check, check_answers
from soaking.client import Outcome
from soaking.counters import Counters
from soaking.load import ask, drive
from soaking.memory import Watch, growth
from soaking.reference import answers_of, texts_of
from soaking.server import serving
from soaking.server_checks import check_counters, check_idle, check_log, check_memory, check_preempted
from soaking.specs import Spec, bad_predictions, pool

from proposers import registry
from vllm_lookahead.bench.machine import describe, headline
from vllm_lookahead.config import LookaheadConfig
from vllm_lookahead.demo.run import MODEL

CONTEXT = 1024
SHARED_TOKENS = 4096
"""So few that the text which requests share is full long before memory is compared."""
SERVER = ("--dtype", "float32", "--enforce-eager", "--max-model-len", str(CONTEXT))
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
"""glibc gives back what is freed; otherwise holes in its heap look like a leak."""
STOCK = (*SERVER, "--max-num-batched-tokens", "16384", "--kv-cache-memory-bytes", "256M")


def main(
    method: Annotated[str, typer.Option(help="One of our methods.")] = "[prompt_lookup]",
    requests: Annotated[int, typer.Option(min=1, help="How many are sent to our server.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of what is asked, how and when.")] = 0,
    specs: Annotated[int, typer.Option(min=50, help="How many distinct ones there are.")] = 400,
    seats: Annotated[int, typer.Option(min=2, help="Requests that the server runs at a time.")] = 16,
    rate: Annotated[float, typer.Option(min=0.1, help="Requests per second where they come at random moments.")] = 20,
    kv_cache: Annotated[str, typer.Option(help="Our server's --kv-cache-memory-bytes: it shall preempt.")] = "11M",
    growth_limit: Annotated[float, typer.Option(help="MiB by which its memory may grow after the warm-up.")] = 32,
    model: Annotated[str, typer.Option(help="Folder or name of a model.")] = MODEL,
    out: Annotated[Path, typer.Option(help="Folder for the servers' logs and what memory was seen.")] = Path(
        "out/soak"
    ),
) -> None:
    """Soak our server, print what was checked, and end with status 1 if anything is wrong."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    out.mkdir(parents=True, exist_ok=True)
    asked = pool(seed, specs, CONTEXT)
    config = speculative_config(method)
    nodes = LookaheadConfig.parse(config["method"], {k: v for k, v in config.items() if k != "method"})
    ours = (
        *SERVER,
        *("--max-num-seqs", str(seats), "--kv-cache-memory-bytes", kv_cache),
        *("--speculative-config", json.dumps(config), "--middleware", "vllm_lookahead.middleware.PredictedOutputs"),
    )
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        with serving(model, out / "stock.log", *STOCK, VLLM_PLUGINS="") as server:
            task = progress.add_task("stock vLLM", total=sum(spec.repeatable for spec in asked))
            server.wait_until_ready()
            stock = asyncio.run(answers_of(server.url, asked, lambda outcome: progress.advance(task)))
        rng = random.Random(seed)
        planned = plan([*asked, *bad_predictions()], texts_of(stock), requests, rng)
        with serving(model, out / "ours.log", *ours, **MALLOC) as server:
            task = progress.add_task(escape(method), total=requests)
            server.wait_until_ready()
            before = Counters.read(server.url)
            begun = time.monotonic()

            async def soak() -> tuple[list[Outcome], Watch]:
                async with Watch(server.process.pid) as watch:

                    def finished(outcome: Outcome) -> None:
                        watch.finished += 1
                        progress.advance(task)

                    return await drive(server.url, planned, seats, rate, rng, finished), watch

            outcomes, watch = asyncio.run(soak())
            seconds = time.monotonic() - begun
            (out / "memory.json").write_text(json.dumps(watch.samples))
            checks = check_answers(planned, outcomes, stock)
            checks.append(check_idle(server.url))
            moved = Counters.read(server.url).since(before)
            checks += check_counters(moved, outcomes, nodes.num_speculative_tokens)
            checks.append(check_preempted(moved))
            checks.append(check_memory(growth(watch.samples), growth_limit))
            checks.append(afterwards(server.url, stock))
            checks.append(check_log(server.log))
    console.print(table_of(f"{method}: {requests} requests in {seconds:.0f} s, seed {seed}", checks))
    console.print(headline(describe()), style="dim", highlight=False, soft_wrap=True)
    if not all(check.ok for check in checks):
        console.print(f"the servers' logs are in {out}")
        raise typer.Exit(1)


def table_of(title: str, checks: list[Check]) -> Table:
    """What was checked, a line each."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("check", "", "details"):
        table.add_column(heading, no_wrap=heading != "details")
    for check in checks:
        table.add_row(check.name, "yes" if check.ok else "NO", Text(check.details))
    return table


def speculative_config(method: str) -> dict[str, Any]:
    """A method with little shared text, where it has any."""
    name = method.strip("[]")
    options = registry.get(name).Options.model_fields
    return {"method": name, **({"shared_tokens": SHARED_TOKENS} if "shared_tokens" in options else {})}


def afterwards(url: str, stock: dict[Spec, Outcome]) -> Check:
    """Whether the server still answers, and as stock does."""
    spec = next(spec for spec in stock if spec.kind == "greedy")
    (outcome,) = asyncio.run(ask(url, [Request("afterwards", spec)], 1))
    ok = outcome.ending == "answered" and outcome.texts == stock[spec].texts
    return Check("a request afterwards equals stock's", ok, outcome.message or f"{outcome.num_tokens} tokens")


if __name__ == "__main__":
    typer.run(main)
