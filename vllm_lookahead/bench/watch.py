"""Looking into an engine's model runner: how many draft nodes it verifies, and where the time of a step goes.

Methods of the runner object are wrapped, in the benchmark's own process and for as long as it measures; vLLM's classes
and the plugin's stay as they are.
"""

from __future__ import annotations

import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PARTS: dict[str, tuple[tuple[str, str], ...]] = {
    "forward": (("", "_model_forward"), ("model", "compute_logits")),
    "sample": (("", "_sample"),),
    "commit": (("", "commit_kv"),),
    "propose": (("", "propose_draft_token_ids"), ("", "_draft")),
}
"""The parts of a step: which methods of the runner, or of an attribute of it, belong to each."""

REST = "rest"
"""Scheduling, input preparation, output processing: what no part accounts for."""


class NodeCounter:
    """Counts the draft nodes that an engine computes: those that the scheduler hands to the runner, and those of
    lookahead branches that get a forward of their own. Costs about a microsecond per step.
    """

    def __init__(self) -> None:
        self.nodes = 0

    def reset(self) -> None:
        """Count from zero."""
        self.nodes = 0

    def attach(self, runner: Any) -> None:
        """Watch a runner from now on (None: there is none in this process)."""
        if runner is None:
            return
        execute = runner.execute_model

        @functools.wraps(execute)
        def counted(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            drafts = scheduler_output.scheduled_spec_decode_tokens
            if drafts:
                self.nodes += sum(map(len, drafts.values()))
            return execute(scheduler_output, *args, **kwargs)

        runner.execute_model = counted
        run_branches = getattr(runner, "run_branches", None)
        if run_branches is None:
            return

        @functools.wraps(run_branches)
        def counted_branches(rows: Any, *args: Any, **kwargs: Any) -> Any:
            self.nodes += sum(len(row.comb) for row in rows)
            return run_branches(rows, *args, **kwargs)

        runner.run_branches = counted_branches


class StepTimers:
    """Where the time of decoding steps goes. A part's time excludes that of parts within it (commit within sample)."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.steps = 0
        self._clock = clock
        self._step: defaultdict[str, float] = defaultdict(float)
        self._inner: list[float] = []  # for each part that is running, the time of the parts within it

    @contextmanager
    def on(self, runner: Any) -> Iterator[None]:
        """Watch a runner within a block (None: there is none in this process, and everything is the rest)."""
        wrapped = []
        for part, methods in PARTS.items():
            for attribute, name in methods:
                owner = getattr(runner, attribute, None) if attribute else runner
                if owner is not None and hasattr(owner, name):
                    setattr(owner, name, self.timed(part, getattr(owner, name)))
                    wrapped.append((owner, name))
        try:
            yield
        finally:
            for owner, name in wrapped:
                delattr(owner, name)  # the class's own method comes to light again

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted for a part."""

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = self._clock()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                _wait_for_device()
                spent = self._clock() - start
                self._step[part] += spent - self._inner.pop()
                if self._inner:
                    self._inner[-1] += spent

        return wrapper

    def end_step(self, seconds: float, *, counts: bool) -> None:
        """A step is over.

        Args:
            seconds: its time.
            counts: whether to keep it (steps that also compute prompts say nothing about decoding).
        """
        parts, self._step = self._step, defaultdict(float)
        if counts:
            self.steps += 1
            for part, spent in parts.items():
                self.seconds[part] += spent
            self.seconds[REST] += seconds - sum(parts.values())

    def report(self) -> dict[str, float]:
        """Milliseconds per step of each part; empty if nothing was watched."""
        if not self.steps or len(self.seconds) == 1:
            return {}
        return {part: 1e3 * self.seconds[part] / self.steps for part in (*PARTS, REST)}


def _wait_for_device() -> None:
    """On a GPU, time is spent where the work is launched only if somebody waits for it there."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
