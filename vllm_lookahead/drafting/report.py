"""What a worker says about its drafting, as plain data that any process can read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_lookahead.drafting.policy import AutoBudget, DraftPolicy


@dataclass(frozen=True)
class DraftingReport:
    """How one worker drafts.

    Attributes:
        runner: name of the model runner's class.
        why_chains: why drafts are chains, or None: they are trees.
        most_nodes: most draft tokens of each request, by number of requests in a step.
        budget: "auto", or how many draft tokens a request may spend.
        forward: number of tokens and seconds of the forward passes that were timed at start-up; empty with a fixed
            budget.
        fitted: what ``StepCost.fit`` makes of the steps so far.
    """

    runner: str
    why_chains: str | None
    most_nodes: dict[int, int]
    budget: str | int
    forward: list[tuple[int, float]]
    fitted: tuple[float, ...]

    @classmethod
    def of(cls, runner: Any, batches: Sequence[int]) -> dict[str, Any]:
        """The report of a model runner of ours, as plain data.

        Args:
            runner: the model runner.
            batches: the numbers of requests of interest.
        """
        policy: DraftPolicy = runner.planner.policy
        limit: Callable[[int], int] = runner.node_limit
        auto = policy if isinstance(policy, AutoBudget) else None
        return asdict(
            cls(
                runner=type(runner).__name__,
                why_chains=runner.why_chains,
                most_nodes={batch: limit(batch) for batch in batches},
                budget=runner.drafter.config.budget,
                forward=[] if auto is None else auto.cost.measured,
                fitted=() if auto is None else auto.fit(),
            )
        )


class ReportsDrafting:
    """To be named before one of vLLM's workers that has a model runner of ours."""

    model_runner: Any

    def drafting_report(self, batches: Sequence[int]) -> dict[str, Any]:
        """How this worker drafts, for ``collective_rpc``; see ``DraftingReport.of``."""
        return DraftingReport.of(self.model_runner, batches)
