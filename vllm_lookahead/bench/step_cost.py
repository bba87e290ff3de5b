"""What a step costs by nodes and batch size: stock vLLM verifying a chain, ours verifying a chain, ours a tree.

Nothing is ever accepted (``junk_chain``), so that every step does the same work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_lookahead.bench import junk_chain
from vllm_lookahead.bench.measure import Answers
from vllm_lookahead.bench.methods import BASELINE, Method
from vllm_lookahead.bench.stats import Spread, ratios
from vllm_lookahead.bench.tables import Table
from vllm_lookahead.bench.worker import Say, silent

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
    """

    engine: str
    kind: str
    batch: int
    nodes: int
    round: int
    ms: float


@dataclass
class StepTimes:
    """All times, and whether the steps did what they should.

    Attributes:
        times: every round.
        accepted: draft tokens that were accepted. Should be 0: an accepted token is one that junk got right.
        asked, verified: draft nodes proposed, and those that the scheduler let through.
    """

    times: list[StepTime] = field(default_factory=list)
    accepted: int = 0
    asked: int = 0
    verified: int = 0

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
    chain = {"method": "custom_class", "model": junk_chain.STOCK_CHAIN, "num_speculative_tokens": nodes}
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
    workers: Mapping[str, Answers],
    *,
    nodes: Sequence[int],
    batches: Sequence[int],
    rounds: int,
    context: int,
    steps: int,
    seconds: float,
    say: Say = silent,
) -> StepTimes:
    """Time the engines in turns.

    Args:
        workers: by name, as in ``methods``.
        nodes: per request.
        batches: numbers of requests.
        rounds: how often.
        context: length of the prompts.
        steps: to time for each number of nodes.
        seconds: time limit for each.
        say: is told before each measurement.
    """
    names, found = list(workers), StepTimes()
    for number in range(-1, rounds):  # the first time warms up
        for batch in batches:
            for name in names[number % len(names) :] + names[: number % len(names)]:
                say(f"round {number + 1} of {rounds}, batch {batch}" if number >= 0 else "warm-up", name)
                chosen = shapes(name, nodes)
                few = number < 0
                answer = workers[name].call(
                    "step_times",
                    batch=batch,
                    context=context,
                    shapes=chosen,
                    steps=2 if few else steps,
                    seconds=0.0 if few else seconds,
                )
                if few:
                    continue
                found.times.append(StepTime(name, "prefill", batch, 0, number, answer["prefill_ms"]))
                found.times += [
                    StepTime(name, kind, batch, n, number, Spread.of(ms).median)
                    for (n, kind), ms in zip(chosen, answer["step_ms"], strict=True)
                ]
                found.accepted += answer["accepted"]
                found.verified += answer["nodes"]
                found.asked += answer["asked"]
    return found


def table(measured: StepTimes, context: int) -> Table:
    """Rows by batch size and nodes; ratios round by round."""
    result = Table(
        f"time per step, in ms, by nodes per request; context {context}",
        ["batch", "nodes", "stock", "ours, chain", "ratio", "ours, tree", "ratio"],
        notes=[
            "prefill and 0 nodes: stock without speculation against our engine with nothing drafted; else stock "
            "verifies a chain of as many tokens (custom_class). Medians (min - max) of the rounds",
        ],
        left=2,
    )
    if measured.warning is not None:
        result.notes.insert(0, measured.warning)
    times = measured.times
    for batch in sorted({t.batch for t in times}):
        if result.rows:
            result.rows.append([])
        first = True
        for label, cells in _rows([t for t in times if t.batch == batch]):
            result.rows.append([str(batch) if first else "", label, *cells])
            first = False
    return result


def _rows(times: Sequence[StepTime]) -> Iterator[tuple[str, list[str]]]:
    def by_round(engine: str, kind: str, nodes: int) -> dict[int, float]:
        return {t.round: t.ms for t in times if (t.engine, t.kind, t.nodes) == (engine, kind, nodes)}

    for label, kind, nodes in [
        ("prefill", "prefill", 0),
        *((str(n), "chain", n) for n in sorted({t.nodes for t in times})),
    ]:
        stock = by_round(STOCK_CHAIN if nodes else BASELINE, kind, nodes)
        cells = [Spread.of(list(stock.values())).show(".2f") if stock else "-"]
        for ours in (by_round(OURS, kind, nodes), by_round(OURS, "tree", nodes) if kind == "chain" else {}):
            against = ratios(ours, stock)
            cells.append(f"{Spread.of(list(ours.values())).median:.2f}" if ours else "-")
            cells.append(Spread.of(against).show(".3f") if against else "-")
        yield label, cells


def to_json(measured: StepTimes) -> dict[str, Any]:
    """For the result file."""
    return asdict(measured)


def from_json(data: dict[str, Any]) -> StepTimes:
    """What ``to_json`` gave."""
    return StepTimes(**{**data, "times": [StepTime(**t) for t in data["times"]]})
