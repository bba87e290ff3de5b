"""What has to be true of the server: its counters fit what it was asked, and nothing is left when all is done."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from soaking.checks import Check
from soaking.client import Outcome
from soaking.counters import Counters
from soaking.memory import MIB, Growth

SUCCESS = "vllm:request_success_total"
GENERATED = "vllm:generation_tokens_total"
DRAFTED, ACCEPTED = "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


def check_counters(moved: Counters, outcomes: Sequence[Outcome], max_nodes: int) -> list[Check]:
    """Whether the counters moved as the requests tell.

    Args:
        moved: how far.
        outcomes: of all requests that the server got meanwhile.
        max_nodes: how many draft tokens a step may verify for a request.
    """
    return [
        _requests_add_up(moved, outcomes),
        _tokens_add_up(moved, outcomes, max_nodes),
        _drafts_add_up(moved, outcomes, max_nodes),
    ]


def _requests_add_up(moved: Counters, outcomes: Sequence[Outcome]) -> Check:
    """vLLM counts every choice as a request when it ends by itself; one whose client has gone it doesn't count."""
    counted = moved.by(SUCCESS, "finished_reason")
    seen = Counter(c.finish_reason for o in outcomes if o.ending == "answered" for c in o.choices.values())
    unsure = sum(o.request.spec.choices for o in outcomes if o.ending == "left")
    more = {reason: counted.get(reason, 0) - seen[reason] for reason in {*counted, *seen} if reason is not None}
    ok = all(extra >= 0 for extra in more.values()) and sum(more.values()) <= unsure
    ok &= all(more[reason] == 0 for reason in more if reason not in ("stop", "length"))
    details = ", ".join(f"{reason} {count:.0f}" for reason, count in sorted(counted.items()) if count)
    details += f"; seen: {seen['stop']} and {seen['length']}; {sum(more.values()):.0f} of {unsure} abandoned ended"
    return Check("requests counted by reason", ok, details)


def _tokens_add_up(moved: Counters, outcomes: Sequence[Outcome], max_nodes: int) -> Check:
    """vLLM counts tokens as steps emit them: those past a stop string, too, and those that nobody waited for."""
    low = high = 0
    for outcome in outcomes:
        spec = outcome.request.spec
        if outcome.ending == "answered":
            low += outcome.num_tokens
            high += min(spec.max_tokens, outcome.num_tokens + spec.choices * max_nodes * spec.stops)
        elif outcome.ending == "left":
            low += outcome.events > 0
            high += spec.max_tokens
    counted = moved.total(GENERATED)
    return Check("generated tokens counted", low <= counted <= high, f"{counted:.0f}, from {low} to {high} possible")


def _drafts_add_up(moved: Counters, outcomes: Sequence[Outcome], max_nodes: int) -> Check:
    """The worker counts by source what it verified; the scheduler, in total, what it still had a request for."""
    drafted, accepted = moved.total(f"{DRAFTED}_total"), moved.total(f"{ACCEPTED}_total")
    per_place = moved.total(f"{ACCEPTED}_per_pos_total")
    sources = [sum(moved.by(f"{name}_by_source_total", "source").values()) for name in (DRAFTED, ACCEPTED)]
    unsure = max_nodes * sum(o.request.spec.choices for o in outcomes if o.ending == "left")
    ok = 0 < accepted == per_place and accepted <= drafted
    ok &= all(0 <= by_source - total <= unsure for by_source, total in zip(sources, (drafted, accepted), strict=True))
    details = f"{drafted:.0f} drafted, {accepted:.0f} accepted; by place {per_place:.0f}; by source {sources[0]:.0f}"
    return Check("draft tokens counted", ok, f"{details} and {sources[1]:.0f}")


def check_preempted(moved: Counters) -> Check:
    """Whether requests had to give up their place, as a soak under a small KV cache means them to."""
    count = moved.total("vllm:num_preemptions_total")
    return Check("requests were preempted", count > 0, f"{count:.0f} times")


def check_idle(url: str, patience: float = 30.0) -> Check:
    """Whether nothing is left in the engine, a little later at most."""
    deadline = time.monotonic() + patience
    while True:
        counters = Counters.read(url)
        left = {gauge.removeprefix("vllm:"): counters.total(gauge) for gauge in GAUGES}
        if not any(left.values()) or time.monotonic() > deadline:
            details = ", ".join(f"{name} {value:g}" for name, value in left.items())
            return Check("nothing is left in the engine", not any(left.values()), details)
        time.sleep(0.2)


def check_memory(growth: Growth | None, limit: float) -> Check:
    """Whether memory is flat: MiB of growth that are allowed."""
    if growth is None:
        return Check("memory is flat", False, "too short to tell")
    details = f"{growth.before / MIB:.0f} MiB, then {growth.after / MIB:.0f}: {growth.mib:+.1f}; {limit:g} allowed"
    return Check("memory is flat", growth.mib <= limit, details)


def check_log(log: Path, begin: int = 0) -> Check:
    """Whether the server complained.

    Args:
        log: what it printed.
        begin: where to begin reading, in characters.
    """
    lines = log.read_text(errors="replace")[begin:].splitlines()
    wrong = [line for line in lines if "ERROR" in line or "Traceback" in line]
    return Check("no error in the server's log", not wrong, wrong[0] if wrong else f"{len(lines)} lines")
