"""The main benchmark: rounds in which methods take turns on the same requests, and the table that compares them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from vllm_lookahead.bench.engines import Ask, EngineFailedError, Say
from vllm_lookahead.bench.methods import BASELINE
from vllm_lookahead.bench.prompts import order
from vllm_lookahead.bench.tables import Table, spread

WARM_UP_TOKENS = 12

Outputs = list[list[int]]


@dataclass(frozen=True)
class Load:
    """What the engines are given to do.

    Attributes:
        prompts: where the prompts come from.
        batches: most requests at a time; each number is measured.
        temperatures: likewise. 0 is greedy; above, the i-th prompt has the seed ``seed + i``.
        rounds: how often, the methods taking turns, with other prompts each time.
        per_round: prompts in a round (a larger batch takes as many as it has places).
        max_tokens: output length.
        ignore_eos: always generate ``max_tokens``.
        seed: of the prompts' order, and of the requests.
    """

    prompts: str = "demo"
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    temperatures: tuple[float, ...] = (0.0,)
    rounds: int = 5
    per_round: int = 8
    max_tokens: int = 256
    ignore_eos: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Measurement:
    """One method, temperature, batch size and round.

    Attributes:
        tokens_per_second: of all prompts, their prefill included.
        tokens_per_step: what a request got per decoding step.
        nodes_per_step: draft nodes verified per request and decoding step.
        ms_per_step: of steps that only decode.
        identical: how many outputs equal the baseline's at the same batch size; the baseline's own are compared with
            those that it gives at the smallest one: what differs there differs by rounding alone.
        compared: how many were compared.
    """

    method: str
    temperature: float
    batch: int
    round: int
    tokens_per_second: float
    tokens_per_step: float
    nodes_per_step: float
    ms_per_step: float
    identical: int = 0
    compared: int = 0


def measure(
    engines: Mapping[str, Ask], prompts: Sequence[list[int]], load: Load, say: Say
) -> tuple[list[Measurement], dict[str, str]]:
    """Run the load with every engine.

    Args:
        engines: by name of the method.
        prompts: token ids.
        load: what to do.
        say: is told before each measurement.

    Returns:
        Every measurement, and why engines failed on the way, by name.
    """
    running, failed, found = dict(engines), dict[str, str](), list[Measurement]()

    def in_turns(number: int, **arguments: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        names = list(running)
        at = number % max(1, len(names))
        for name in names[at:] + names[:at]:
            try:
                yield name, running[name]("generate", **arguments)
            except EngineFailedError as error:
                failed[name] = str(error)
                del running[name]

    for batch in sorted({min(load.batches), max(load.batches)}):
        say(f"warm-up, batch {batch}")
        for _ in in_turns(0, **request(load, prompts, 0, batch, 0.0, WARM_UP_TOKENS)):
            pass
    for number in range(load.rounds):
        for temperature in load.temperatures:
            alone: Outputs | None = None
            for batch in sorted(load.batches):
                say(f"round {number + 1} of {load.rounds}, temperature {temperature:g}, batch {batch}")
                asked = request(load, prompts, number, batch, temperature, load.max_tokens)
                answers = dict(in_turns(number, **asked))
                baseline = answers[BASELINE]["outputs"] if BASELINE in answers else None
                for name in (name for name in engines if name in answers):
                    expected = alone if name == BASELINE else baseline
                    measured = measurement(name, temperature, batch, number, answers[name])
                    if expected is not None:
                        pairs = list(zip(answers[name]["outputs"], expected, strict=False))
                        measured = replace(measured, identical=sum(a == b for a, b in pairs), compared=len(pairs))
                    found.append(measured)
                alone = baseline if alone is None else alone
    return found, failed


def request(
    load: Load, prompts: Sequence[list[int]], number: int, batch: int, temperature: float, max_tokens: int
) -> dict[str, Any]:
    """The arguments of ``engine.Engine.generate`` for one round."""
    chosen = order(len(prompts), number * load.per_round, max(batch, load.per_round), load.seed)
    return {
        "prompts": [prompts[i] for i in chosen],
        "batch": batch,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seeds": [load.seed + i for i in chosen] if temperature else [],
        "ignore_eos": load.ignore_eos,
    }


def measurement(method: str, temperature: float, batch: int, number: int, answer: Mapping[str, Any]) -> Measurement:
    """From an engine's answer."""
    tokens, steps = sum(map(len, answer["outputs"])), answer["request_steps"]
    first = sum(1 for output in answer["outputs"] if output)  # the prompt's step gives a request its first token
    return Measurement(
        method=method,
        temperature=temperature,
        batch=batch,
        round=number,
        tokens_per_second=tokens / answer["seconds"],
        tokens_per_step=(tokens - first) / steps if steps else 1.0,
        nodes_per_step=answer["nodes"] / steps if steps else 0.0,
        ms_per_step=answer["ms_per_step"],
    )


def ratios(found: Sequence[Measurement], method: str, baseline: str) -> list[float]:
    """A method's tokens per second over the baseline's, round by round, among measurements of one load."""
    speed = {(m.method, m.round): m.tokens_per_second for m in found}
    rounds = sorted({m.round for m in found})
    return [speed[method, n] / speed[baseline, n] for n in rounds if (method, n) in speed and (baseline, n) in speed]


def table(found: Sequence[Measurement], load: Load, about: Mapping[str, Mapping[str, Any]]) -> Table:
    """Rows by temperature, batch size and method; ``about``: what ``engines.engines`` says about the methods."""
    length = f"{load.max_tokens} tokens" + ("" if load.ignore_eos else " at most")
    result = Table(
        f"prompts: {Path(load.prompts).name}, {length}",
        [
            *("decoding", "batch", "method", "tokens/s", "x stock", "x vLLM's best", "tokens/step", "nodes/step"),
            *("ms/step", "identical"),
        ],
        words=3,
    )
    for temperature, batch in product(load.temperatures, sorted(load.batches)):
        group = [m for m in found if (m.temperature, m.batch) == (temperature, batch)]
        by_method = {name: [m for m in group if m.method == name] for name in dict.fromkeys(m.method for m in group)}
        speeds = {name: median(m.tokens_per_second for m in own) for name, own in by_method.items()}
        rivals = [name for name in speeds if about[name]["speculative_config"] and not about[name]["plugin"]]
        best = max(rivals, key=speeds.__getitem__, default=None)
        for at, (name, own) in enumerate(by_method.items()):
            decoding = f"temperature {temperature:g}" if temperature else "greedy"
            result.rows.append(
                [
                    *((decoding, str(batch)) if at == 0 else ("", "")),
                    name,
                    spread([m.tokens_per_second for m in own], ".1f"),
                    "1" if name == BASELINE else spread(ratios(group, name, BASELINE), ".3f"),
                    f"{spread(ratios(group, name, best), '.3f')} {best}" if best and about[name]["plugin"] else "-",
                    f"{median(m.tokens_per_step for m in own):.2f}",
                    f"{median(m.nodes_per_step for m in own):.1f}",
                    f"{median(m.ms_per_step for m in own):.2f}",
                    _agreement(own),
                ]
            )
    result.notes = list(_notes(found, load, about))
    return result


def _agreement(own: Sequence[Measurement]) -> str:
    compared, identical = sum(m.compared for m in own), sum(m.identical for m in own)
    if not compared:
        return "-"
    return f"yes ({compared})" if identical == compared else f"{identical} of {compared}"


def _notes(found: Sequence[Measurement], load: Load, about: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What has to be known to judge the figures."""
    yield f"median (min - max) of {load.rounds} rounds, methods taking turns; ratios are taken round by round"
    yield (
        f"identical: outputs equal to {BASELINE}'s at the same batch size; in {BASELINE}'s own rows, to those it gives "
        f"at batch {min(load.batches)}"
    )
    if any(m.identical < m.compared for m in found):
        yield (
            "not all identical: in bfloat16, rounding may flip two tokens whose logits are nearly equal, in stock vLLM "
            "from one batch size to another as well; --dtype float32 is the fair test of exactness"
        )
        if any(load.temperatures):
            yield (
                "temperature above 0: stock speculative methods give other samples of the same distribution; ours give "
                "the samples of stock vLLM without speculation, seed by seed"
            )
    starts = [f"{name} {entry['start_seconds']:.1f}" for name, entry in about.items() if "start_seconds" in entry]
    yield f"start-up, in s: {', '.join(starts)}"
    for name, entry in about.items():
        if "failed" in entry:
            yield f"{name}: not available: {entry['failed'].strip()}"
