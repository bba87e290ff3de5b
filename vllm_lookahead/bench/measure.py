"""The measurement: rounds in which the methods take turns, and a short pass that looks into the steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from vllm_lookahead.bench.prompts import Prompt, PromptError, order
from vllm_lookahead.bench.results import Load, Measurement, Profile, Results
from vllm_lookahead.bench.worker import EngineFailedError, Say, silent

WARM_UP_TOKENS = 12
PROFILE_TOKENS = 64

Outputs = list[list[int]]


class Answers(Protocol):
    """What a ``Worker`` offers; tests have something simpler."""

    def call(self, command: str, **arguments: Any) -> Any:
        """Have a command carried out."""


def encode(worker: Answers, prompts: Sequence[Prompt], room: int) -> list[list[int]]:
    """The prompts as token ids, without those that are longer than ``room`` or empty.

    Raises:
        PromptError: none is left.
    """
    answer = worker.call("encode", prompts=[{"text": p.text, "chat": p.chat} for p in prompts])
    fitting = [ids for ids in answer["ids"] if 0 < len(ids) <= room]
    if not fitting:
        raise PromptError(f"prompts: none of {len(prompts)} has between 1 and {room} tokens")
    return fitting


def measure(
    workers: Mapping[str, Answers],
    prompts: Sequence[list[int]],
    load: Load,
    *,
    profile: bool = True,
    warm_up: bool = True,
    say: Say = silent,
) -> Results:
    """Run the load with every method.

    Args:
        workers: by name of the method, in the order in which they take turns (each round begins with another one).
        prompts: token ids.
        load: what to do.
        profile: also find out where the time goes.
        warm_up: run a few tokens first, untimed.
        say: is told before each measurement.
    """
    results = Results(load)
    turns = _Turns(workers, results, say)
    if warm_up:
        for batch in sorted({min(load.batches), max(load.batches)}):
            for _ in turns.take("warm-up", batch, request(load, prompts, 0, batch, WARM_UP_TOKENS)):
                pass
    for number in range(load.rounds):
        outputs: dict[tuple[str, int], Outputs] = {}
        for batch in load.batches:
            asked = request(load, prompts, number, batch, load.max_tokens)
            for name, answer in turns.take(f"round {number + 1} of {load.rounds}", batch, asked, begin=number):
                outputs[name, batch] = answer["outputs"]
                results.measurements.append(measurement(name, batch, number, answer))
        compare(results, outputs, number)
    if profile:
        tokens = min(load.max_tokens, PROFILE_TOKENS)
        for batch in load.batches:
            asked = request(load, prompts, 0, batch, tokens, count=batch)
            for name, answer in turns.take("profile", batch, {**asked, "profile": True}):
                if answer["profile"]:
                    results.profiles.append(Profile(name, batch, answer["profile"]))
    places = {name: place for place, name in enumerate(workers)}
    results.measurements.sort(key=lambda m: (m.round, m.batch, places[m.method]))
    return results


class _Turns:
    """Lets the engines take turns; one that fails is left out from then on."""

    def __init__(self, workers: Mapping[str, Answers], results: Results, say: Say) -> None:
        self.workers = dict(workers)
        self.results = results
        self.say = say

    def take(
        self, what: str, batch: int, arguments: Mapping[str, Any], begin: int = 0
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The answer of each engine to ``generate``."""
        names = list(self.workers)
        at = begin % len(names) if names else 0
        for name in names[at:] + names[:at]:
            self.say(f"{what}, batch {batch}", name)
            try:
                yield name, self.workers[name].call("generate", **arguments)
            except EngineFailedError as error:
                self.results.failed[name] = str(error)
                del self.workers[name]


def request(
    load: Load, prompts: Sequence[list[int]], number: int, batch: int, max_tokens: int, count: int | None = None
) -> dict[str, Any]:
    """The arguments of ``engine.Engine.generate`` for one round."""
    needed = max(batch, load.per_round) if count is None else count
    chosen = order(len(prompts), number, load.per_round, needed, rotate=load.rotate, seed=load.seed)
    return {
        "prompts": [prompts[i] for i in chosen],
        "batch": batch,
        "max_tokens": max_tokens,
        "temperature": load.temperature,
        "seeds": [load.seed + i for i in chosen] if load.temperature else [],
        "ignore_eos": load.ignore_eos,
    }


def measurement(method: str, batch: int, number: int, answer: Mapping[str, Any]) -> Measurement:
    """From an engine's answer."""
    tokens = sum(map(len, answer["outputs"]))
    first = sum(1 for output in answer["outputs"] if output)  # the prompt's step gives a request its first token
    steps = answer["request_steps"]
    return Measurement(
        method=method,
        batch=batch,
        round=number,
        seconds=answer["seconds"],
        tokens=tokens,
        tokens_per_step=(tokens - first) / steps if steps else 1.0,
        nodes_per_step=answer["nodes"] / steps if steps else 0.0,
        ms_per_step=1e3 * answer["decode_seconds"] / max(1, answer["decode_steps"]),
        itl_p50_ms=answer["itl_p50_ms"],
        itl_p99_ms=answer["itl_p99_ms"],
        pause_p50_ms=answer["pause_p50_ms"],
        pause_p99_ms=answer["pause_p99_ms"],
    )


def compare(results: Results, outputs: Mapping[tuple[str, int], Outputs], number: int) -> None:
    """Note in a round's measurements how many outputs are identical to the baseline's at the same batch size.

    The baseline's own are compared with those that it gives at the smallest batch size: what differs there differs by
    rounding alone, since stock vLLM is what changes its mind.
    """
    baseline, smallest = results.baseline, min(results.load.batches)
    for at, m in enumerate(results.measurements):
        if m.round != number or baseline is None:
            continue
        batch = smallest if m.method == baseline else m.batch
        if (m.method, m.batch) == (baseline, smallest) or (baseline, batch) not in outputs:
            continue
        same, of = identical(outputs[m.method, m.batch], outputs[baseline, batch])
        with_what = f"{baseline} at batch {batch}" if m.method == baseline else f"{baseline} at the same batch"
        results.measurements[at] = replace(m, identical=same, compared=of, compared_with=with_what)


def identical(ours: Outputs, theirs: Outputs) -> tuple[int, int]:
    """How many of the outputs that both have are equal, and how many both have."""
    pairs = list(zip(ours, theirs, strict=False))
    return sum(a == b for a, b in pairs), len(pairs)
