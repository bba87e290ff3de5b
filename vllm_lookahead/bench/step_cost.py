"""What a step costs by nodes and batch size: stock vLLM verifying a chain, ours verifying a chain, ours a tree.

Nothing is ever accepted (``junk_chain``), so that every step does the same work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from vllm_lookahead.bench import junk_chain
from vllm_lookahead.bench.engines import Ask, Say
from vllm_lookahead.bench.methods import BASELINE, Method
from vllm_lookahead.bench.tables import Table, spread

STOCK_CHAIN, OURS = "stock chain", "ours"
MOST_STOCK_NODES = 128
"""vLLM's own rejection sampler takes no longer chains."""
JUNK_TREE = "vllm_lookahead.bench.junk_tree"
JUNK_METHOD = "bench_junk"


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of a step: the median over the steps of one round.

    Attributes:
        engine: ``BASELINE`` (no speculative config), ``STOCK_CHAIN`` or ``OURS``.
        kind: "chain" or "tree"; "prefill" for all prompts of the batch together.
        nodes: per request.
        operators: what took longest, as torch's profiler prints it; empty unless asked for.
    """

    engine: str
    kind: str
    batch: int
    nodes: int
    round: int
    ms: float
    operators: str = ""


@dataclass
class StepTimes:
    """All times, and whether the steps did what they should: junk nodes asked for, verified, accepted (by luck)."""

    times: list[StepTime] = field(default_factory=list)
    asked: int = 0
    verified: int = 0
    accepted: int = 0

    @property
    def warning(self) -> str | None:
        """What is wrong with these times, or None."""
        if self.accepted > 0.01 * self.verified:
            return f"{self.accepted} junk tokens were accepted: use other prompts (--context)"
        if self.verified < 0.9 * self.asked:
            return f"only {self.verified} of {self.asked} nodes were verified: raise max_num_batched_tokens (--engine)"
        return None


def methods(nodes: int) -> list[Method]:
    """The three engines, for at most so many nodes."""
    chain = {"method": "custom_class", "model": junk_chain.STOCK_CHAIN}
    tree = {"method": JUNK_METHOD, "max_draft_tokens": nodes, "num_speculative_tokens": nodes, "budget": nodes}
    return [
        Method(BASELINE, None, plugin=False),
        Method(STOCK_CHAIN, {**chain, "num_speculative_tokens": min(nodes, MOST_STOCK_NODES)}, plugin=False),
        Method(OURS, tree, plugin=True, imports=(JUNK_TREE,)),
    ]


def shapes(engine: str, nodes: Sequence[int]) -> list[tuple[int, str]]:
    """What an engine is made to verify."""
    if engine == BASELINE:
        return [(0, "chain")]
    if engine == STOCK_CHAIN:
        return [(n, "chain") for n in nodes if n <= MOST_STOCK_NODES]
    return [(n, kind) for n in nodes for kind in ("chain", "tree") if n or kind == "chain"]


def measure(
    engines: Mapping[str, Ask],
    *,
    nodes: Sequence[int],
    batches: Sequence[int],
    rounds: int,
    context: int,
    steps: int,
    say: Say,
    profile: bool = False,
) -> StepTimes:
    """Time the engines in turns, after a round that warms up.

    Args:
        engines: by name, as in ``methods``.
        nodes: per request.
        batches: numbers of requests.
        rounds: how often.
        context: length of the prompts.
        steps: to time for each number of nodes.
        say: is told before each measurement.
        profile: list the operators that take longest, in the last round.
    """
    names, found = list(engines), StepTimes()
    for number in range(-1, rounds):
        for batch in batches:
            say(f"round {number + 1} of {rounds}, batch {batch}" if number >= 0 else "warm-up")
            for name in names[number % len(names) :] + names[: number % len(names)]:
                chosen = shapes(name, nodes)
                answer = engines[name](
                    "step_times",
                    batch=batch,
                    context=context,
                    shapes=chosen,
                    steps=2 if number < 0 else steps,
                    profile=profile and number == rounds - 1,
                )
                if number < 0:
                    continue
                found.times.append(StepTime(name, "prefill", batch, 0, number, answer["prefill_ms"]))
                texts = answer["operators"] or [""] * len(chosen)
                found.times += [
                    StepTime(name, kind, batch, n, number, median(ms), text)
                    for (n, kind), ms, text in zip(chosen, answer["step_ms"], texts, strict=True)
                ]
                found.accepted += answer["accepted"]
                found.verified += answer["verified"]
                found.asked += answer["asked"]
    return found


def table(measured: StepTimes, context: int) -> Table:
    """Rows by batch size and nodes; ratios round by round."""
    chains = any(t.engine == STOCK_CHAIN for t in measured.times)
    result = Table(
        f"time per step, in ms, by nodes per request; context {context}",
        ["batch", "nodes", "stock", "ours, chain", "ratio", "ours, tree", "ratio"],
        notes=[
            "prefill and 0 nodes: stock without speculation against our engine with nothing drafted; else stock "
            "verifies a chain of as many tokens (custom_class)"
            if chains
            else "stock: without speculation, also where ours verifies nodes",
            "medians (min - max) of the rounds",
        ],
        words=2,
    )
    if measured.warning is not None:
        result.notes.insert(0, measured.warning)
    times = {(t.batch, t.engine, t.kind, t.nodes, t.round): t.ms for t in measured.times}
    rounds = sorted({t.round for t in measured.times})

    def of(*key: object) -> list[float]:
        return [times[(*key, number)] for number in rounds if (*key, number) in times]  # type: ignore[index]

    for batch in sorted({t.batch for t in measured.times}):
        sizes = sorted({t.nodes for t in measured.times if t.batch == batch})
        for label, kind, nodes in [("prefill", "prefill", 0), *((str(n), "chain", n) for n in sizes)]:
            stock = of(batch, STOCK_CHAIN, kind, nodes) if nodes and chains else of(batch, BASELINE, kind, 0)
            cells = ["" if kind == "chain" else str(batch), label, spread(stock, ".2f")]
            for ours in (of(batch, OURS, kind, nodes), of(batch, OURS, "tree", nodes)):
                against = [a / b for a, b in zip(ours, stock, strict=False)]
                cells += [spread(ours, ".2f"), spread(against, ".3f")]
            result.rows.append(cells)
    return result
