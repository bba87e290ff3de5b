"""A whole comparison: start the engines, run one or several loads with all of them, collect what there is to say."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.markup import escape

from vllm_lookahead.bench.measure import encode, measure
from vllm_lookahead.bench.methods import Method
from vllm_lookahead.bench.prompts import read_prompts
from vllm_lookahead.bench.results import Load, Results
from vllm_lookahead.bench.worker import EngineFailedError, EngineSettings, Say, engines, silent
from vllm_lookahead.config import LookaheadConfig


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Attributes:
        methods: by name, ``worker.Engines.about``'s entries.
        results: one for each load.
        num_prompts: how many prompts there were to choose from.
    """

    methods: dict[str, dict[str, Any]]
    results: list[Results]
    num_prompts: int

    def to_json(self) -> dict[str, Any]:
        """For the result file."""
        return {
            "methods": self.methods,
            "num_prompts": self.num_prompts,
            "results": [results.to_json() for results in self.results],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Comparison:
        """What ``to_json`` gave."""
        return cls(data["methods"], [Results.from_json(r) for r in data["results"]], data["num_prompts"])


def compare(
    methods: Sequence[Method],
    loads: Sequence[Load],
    settings: EngineSettings,
    *,
    starts: int = 1,
    profile: bool = True,
    say: Say = silent,
) -> Comparison:
    """Run loads, which share their prompts, with a number of methods.

    Raises:
        EngineFailedError: no engine started.
        PromptError: there are no prompts.
    """
    prompts = read_prompts(loads[0].prompts)
    with engines(methods, settings, starts=starts, say=say) as started:
        if not started.workers:
            raise EngineFailedError("\n".join(f"{name}: {reason}" for name, reason in started.failed.items()))
        first = next(iter(started.workers.values()))
        room = first.info["max_model_len"] - max(load.max_tokens for load in loads)
        ids = encode(first, prompts, room)
        results = []
        for load in loads:
            workers = {name: w for name, w in started.workers.items() if name not in started.failed}
            results.append(measure(workers, ids, load, profile=profile, say=say))
            started.failed.update(results[-1].failed)
        return Comparison(started.about(methods), results, len(ids))


@contextmanager
def progress(console: Console) -> Iterator[Say]:
    """Something that says what is being done: on a terminal a line that changes, else a line for each new subject."""
    begin = time.monotonic()
    if console.is_terminal:
        with console.status("") as status:
            yield lambda what, who: status.update(escape(f"{time.monotonic() - begin:.0f} s  {what}, {who}"))
        return
    last = ""

    def say(what: str, who: str) -> None:
        nonlocal last
        if what != last:
            console.print(f"{time.monotonic() - begin:4.0f} s  {what}", style="dim", highlight=False, markup=False)
        last = what

    yield say


def with_fixed_budget(settings: dict[str, Any]) -> dict[str, Any]:
    """One of our speculative configs, verifying in every step as many nodes as its tree can have."""
    options = {key: value for key, value in settings.items() if key != "method"}
    return {**settings, "budget": LookaheadConfig.parse(settings["method"], options).num_speculative_tokens}


# ---- the comparisons that issue a fixed question


def tokens_per_step_methods(max_draft_tokens: int, options: dict[str, Any]) -> list[Method]:
    """Lookahead alone, prompt lookup alone, both: all with the same number of guesses.

    Args:
        max_draft_tokens: guesses per step.
        options: of lookahead (window_size, ngram_size, ...).
    """
    ours = {"method": "lookahead", **options, "max_draft_tokens": max_draft_tokens}
    lookup = {"method": "prompt_lookup", "max_draft_tokens": max_draft_tokens}
    return [
        Method("stock", None, plugin=False),
        Method("prompt lookup alone", with_fixed_budget(lookup), plugin=True),
        Method("lookahead alone", with_fixed_budget({**ours, "prompt_lookup": False}), plugin=True),
        Method("both", with_fixed_budget({**ours, "prompt_lookup": True}), plugin=True),
    ]


def branch_methods(every: Sequence[int], options: dict[str, Any], *, fixed: bool) -> list[Method]:
    """Lookahead with its branch fused and separate, in every step and in every k-th.

    Args:
        every: the k's.
        options: of lookahead.
        fixed: verify and evaluate whatever there is, so that all do the same; else the budget controller decides.
    """
    methods = [Method("stock", None, plugin=False)]
    for where in ("fused", "separate"):
        for k in every:
            config = {"method": "lookahead", **options, "branch": where, "branch_every": k}
            name = where if k == 1 else f"{where}, every {k}"
            methods.append(Method(name, with_fixed_budget(config) if fixed else config, plugin=True))
    return methods


def with_temperature(load: Load, temperature: float) -> Load:
    """The same load at another temperature."""
    return replace(load, temperature=temperature)
