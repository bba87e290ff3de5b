"""A whole comparison: start the engines, run one or several loads with all of them, collect what there is to say."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from vllm_lookahead.bench.measure import encode, measure
from vllm_lookahead.bench.methods import Method
from vllm_lookahead.bench.prompts import read_prompts
from vllm_lookahead.bench.results import Load, Results
from vllm_lookahead.bench.worker import EngineFailedError, EngineSettings, Say, engines, silent


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
