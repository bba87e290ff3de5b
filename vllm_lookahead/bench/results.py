"""What was measured, as data that goes to a JSON file and comes back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_lookahead.bench.methods import BASELINE
from vllm_lookahead.bench.stats import Spread, ratios

SCHEMA = 1


@dataclass(frozen=True)
class Load:
    """What the engines are given to do.

    Attributes:
        prompts: where the prompts come from.
        batches: most requests at a time; each number is measured.
        rounds: how often, the methods taking turns.
        per_round: prompts in a round (a larger batch takes as many as it has places).
        max_tokens: output length.
        temperature: 0 is greedy; above, the i-th prompt has the seed ``seed + i``.
        ignore_eos: always generate ``max_tokens``.
        seed: of the prompts' order, and of the requests.
        rotate: each round uses other prompts.
    """

    prompts: str = "demo"
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    rounds: int = 5
    per_round: int = 8
    max_tokens: int = 256
    temperature: float = 0.0
    ignore_eos: bool = True
    seed: int = 0
    rotate: bool = True


@dataclass(frozen=True)
class Measurement:
    """One method, batch size and round.

    Attributes:
        seconds: for all prompts, their prefill included.
        tokens: generated.
        tokens_per_step: what a request got per decoding step.
        nodes_per_step: draft nodes verified per request and decoding step.
        ms_per_step: of steps that only decode.
        itl_p50_ms, itl_p99_ms: inter-token latency; k tokens after a pause of d took d / k each.
        pause_p50_ms, pause_p99_ms: between two steps of a request.
        identical: how many outputs equal those that they were compared with. None: they were not.
        compared: how many were.
        compared_with: with what.
    """

    method: str
    batch: int
    round: int
    seconds: float
    tokens: int
    tokens_per_step: float
    nodes_per_step: float
    ms_per_step: float
    itl_p50_ms: float
    itl_p99_ms: float
    pause_p50_ms: float
    pause_p99_ms: float
    identical: int | None = None
    compared: int = 0
    compared_with: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Throughput."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Profile:
    """Where a step's time went: milliseconds per decoding step by part (``watch.PARTS``), in a pass of its own."""

    method: str
    batch: int
    ms: dict[str, float]


@dataclass
class Results:
    """One load's measurements.

    Attributes:
        load: what was asked.
        measurements: every round.
        profiles: at most one per method and batch.
        failed: methods whose engine failed on the way, and why.
    """

    load: Load
    measurements: list[Measurement] = field(default_factory=list)
    profiles: list[Profile] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """The methods' names, in the order in which they were given."""
        return list(dict.fromkeys(m.method for m in self.measurements))

    @property
    def batches(self) -> list[int]:
        """Batch sizes, ascending."""
        return sorted({m.batch for m in self.measurements})

    @property
    def baseline(self) -> str | None:
        """What the others are compared with: stock vLLM, or the first method."""
        names = self.methods
        return BASELINE if BASELINE in names else next(iter(names), None)

    def of(self, method: str, batch: int) -> list[Measurement]:
        """A method's measurements at a batch size."""
        return [m for m in self.measurements if m.method == method and m.batch == batch]

    def profile(self, method: str, batch: int) -> dict[str, float]:
        """Where a step's time goes; empty if it wasn't measured."""
        return next((p.ms for p in self.profiles if p.method == method and p.batch == batch), {})

    def summary(self) -> Iterator[Summary]:
        """Per batch size and method, over all rounds."""
        for batch in self.batches:
            baseline = {m.round: m.tokens_per_second for m in self.of(self.baseline or "", batch)}
            for method in self.methods:
                rounds = self.of(method, batch)
                if rounds:
                    yield Summary.of(rounds, baseline)

    def to_json(self) -> dict[str, Any]:
        """Everything, and the summary for those who only want that."""
        return {**asdict(self), "summary": [asdict(line) for line in self.summary()]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Results:
        """What ``to_json`` gave."""
        load = {**data["load"], "batches": tuple(data["load"]["batches"])}
        return cls(
            Load(**load),
            [Measurement(**m) for m in data["measurements"]],
            [Profile(**p) for p in data["profiles"]],
            data["failed"],
        )


@dataclass(frozen=True)
class Summary:
    """What a table says about one method at one batch size."""

    method: str
    batch: int
    tokens_per_second: Spread
    ratio: Spread | None
    tokens_per_step: float
    nodes_per_step: float
    ms_per_step: Spread
    itl_p50_ms: float
    itl_p99_ms: float
    identical: int | None
    compared: int
    compared_with: str

    @classmethod
    def of(cls, rounds: Sequence[Measurement], baseline: dict[int, float]) -> Summary:
        """From one method's measurements at one batch size, and the baseline's tokens per second by round."""

        def middle(values: Iterable[float]) -> float:
            return Spread.of(list(values)).median

        ours = {m.round: m.tokens_per_second for m in rounds}
        against = ratios(ours, baseline)
        checked = [m for m in rounds if m.identical is not None]
        return cls(
            method=rounds[0].method,
            batch=rounds[0].batch,
            tokens_per_second=Spread.of(list(ours.values())),
            ratio=Spread.of(against) if against else None,
            tokens_per_step=middle(m.tokens_per_step for m in rounds),
            nodes_per_step=middle(m.nodes_per_step for m in rounds),
            ms_per_step=Spread.of([m.ms_per_step for m in rounds]),
            itl_p50_ms=middle(m.itl_p50_ms for m in rounds),
            itl_p99_ms=middle(m.itl_p99_ms for m in rounds),
            identical=sum(m.identical or 0 for m in checked) if checked else None,
            compared=sum(m.compared for m in checked),
            compared_with=checked[0].compared_with if checked else "",
        )


def save(path: Path, kind: str, context: dict[str, Any], content: dict[str, Any]) -> None:
    """Write a result file.

    Args:
        path: where to.
        kind: which benchmark it is.
        context: ``machine.describe()``.
        content: the benchmark's own entries.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": SCHEMA, "kind": kind, **context, **content}, indent=1) + "\n")
