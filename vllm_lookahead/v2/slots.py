"""Places for draft tokens: how many the scheduler reserves per request, and giving back those that a step doesn't need.

Under asynchronous scheduling vLLM plans step n + 1 before the tokens of step n are known: every decoding request gets
the same number of places (``v1/core/sched/async_scheduler.py``). What isn't used counts as rejected afterwards, but the
places do take a share of the token budget, and their KV blocks, while the step is planned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

SHARE = 4
"""Draft tokens of all requests together take at most one in so many of a step's tokens: the rest is for prompts."""
PLACEHOLDER = -1
"""vLLM's draft token that stands for none."""


def most_nodes(limit: int, num_requests: int, max_num_batched_tokens: int) -> int:
    """Most draft tokens of each of so many requests.

    Args:
        limit: what the user allows one request.
        num_requests: of the step.
        max_num_batched_tokens: tokens of a step.
    """
    return max(0, min(limit, max_num_batched_tokens // (SHARE * num_requests) - 1))


def schedule(limit: int, max_num_seqs: int, max_num_batched_tokens: int) -> list[tuple[int, int, int]]:
    """``most_nodes`` as vLLM's ``num_speculative_tokens_per_batch_size``: (first batch size, last, draft tokens).

    Few ranges: each is a shape of its own for vLLM.
    """
    ranges = []
    first = 1
    while first <= max_num_seqs:
        last = min(max_num_seqs, 2 * first - 1)
        ranges.append((first, last, most_nodes(limit, last, max_num_batched_tokens)))
        first = last + 1
    return ranges


def used_places(scheduled: Sequence[int]) -> int:
    """How many of a request's scheduled draft tokens are tokens."""
    return next((i for i, token in enumerate(scheduled) if token == PLACEHOLDER), len(scheduled))


def trimmed(
    output: SchedulerOutput, drafts: Mapping[str, list[int]], keeps_places: Callable[[str], bool]
) -> SchedulerOutput:
    """What the scheduler planned, without the places that no draft token takes.

    A copy: in a single process the object is the scheduler's own, which has to count what it planned.

    Args:
        output: vLLM's plan for the step.
        drafts: the draft tokens by request; a request without an entry has none.
        keeps_places: whether a request's places stay, filled up with ``PLACEHOLDER``: a grammar's mask has a row for
            each.
    """
    if not output.scheduled_spec_decode_tokens:
        return output
    num_tokens = dict(output.num_scheduled_tokens)
    tokens: dict[str, list[int]] = {}
    for req_id, places in output.scheduled_spec_decode_tokens.items():
        used = drafts.get(req_id, [])[: len(places)]
        if keeps_places(req_id):
            used = used + [PLACEHOLDER] * (len(places) - len(used))
        num_tokens[req_id] -= len(places) - len(used)
        if used:
            tokens[req_id] = used
    return replace(
        output,
        num_scheduled_tokens=num_tokens,
        scheduled_spec_decode_tokens=tokens,
        total_num_scheduled_tokens=sum(num_tokens.values()),
    )
