"""What steps cost on this machine: the times that the budget controller learns from."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.logger import init_logger

from vllm_lookahead.config import LookaheadConfig
from vllm_lookahead.drafting.policy import AutoBudget, DraftPolicy, FixedBudget, measure_step_cost

if TYPE_CHECKING:
    from vllm.config import SchedulerConfig
    from vllm.v1.core.sched.output import SchedulerOutput

logger = init_logger(f"vllm.{__name__}")

MOST_MEASURED_TOKENS = 512
"""The step cost is measured up to this many tokens and extrapolated beyond."""

TIME_EVERY, TIME_EVERY_LATER, LATER = 4, 16, 512
"""One in so many steps is timed, at first and after ``LATER`` steps: it costs about as much as proposing does."""


class _TimedStep(NamedTuple):
    start: float
    num_tokens: int
    num_nodes: int
    req_ids: frozenset[str]


class StepTimer:
    """Times from step to step, where both decode only and nothing was idle in between.

    Args:
        agree: returns the first rank's value on every rank: clocks differ, decisions must not.
    """

    def __init__(self, agree: Callable[[Any], Any]) -> None:
        self._agree = agree
        self._steps = 0
        self._last: _TimedStep | None = None

    def start(self, step: SchedulerOutput, policy: DraftPolicy) -> None:
        """A step begins.

        Args:
            step: what it computes.
            policy: is told how long the last one took, and when it is time to think again.
        """
        self._steps += 1
        last, self._last = self._last, None
        if last is None and self._steps % (TIME_EVERY if self._steps < LATER else TIME_EVERY_LATER):
            return
        now = time.perf_counter()
        req_ids = step.num_scheduled_tokens
        if last is not None:
            if not last.req_ids.isdisjoint(req_ids):
                policy.observe_step(last.num_tokens, last.num_nodes, now - last.start)
            return
        if policy.refit_due():
            policy.adopt(self._agree(policy.fit()))
        num_tokens = step.total_num_scheduled_tokens
        # every row has at least one token beside its drafts; only a decoding row has no more
        num_nodes = sum(map(len, step.scheduled_spec_decode_tokens.values()))
        if req_ids and num_tokens == len(req_ids) + num_nodes:
            self._last = _TimedStep(now, num_tokens, num_nodes, frozenset(req_ids))


def policy_for(
    config: LookaheadConfig,
    scheduler: SchedulerConfig,
    forward: Callable[[int], float],
    agree: Callable[[Any], Any],
) -> DraftPolicy:
    """The policy that the user asked for; for ``budget: auto`` it measures what steps cost.

    Args:
        config: the user's.
        scheduler: vLLM's.
        forward: runs one forward pass over that many tokens and returns its seconds.
        agree: returns the first rank's value on every rank.
    """
    if isinstance(config.budget, int):
        return FixedBudget(config.budget)
    most = min(scheduler.max_num_batched_tokens, MOST_MEASURED_TOKENS)
    policy = AutoBudget(measure_step_cost(forward, most, agree))
    logger.info("[%s] budget: auto; %s", config.method, policy.cost)
    return policy
