"""Which of the proposed nodes are verified: all that fit (a fixed budget), or those that pay (``budget: auto``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from proposers import DraftTree
from proposers.numba_cache import CACHE
from vllm_lookahead.drafting.budget import NO_CHANCES, REFIT_EVERY, Confidence, StepCost

UNKNOWN_CHANCE = 0.5
"""A node of a proposer that gives no probabilities is assumed to hold this often if its parent does, at first; then
``Confidence`` corrects it."""
REST_AFTER = 4
LONGEST_REST = 8
SELDOM = 0.1
"""After ``REST_AFTER`` proposals in a row that brought no node worth verifying, a request's proposer is asked only in
every second step, after twice as many in every third, and so on, but at least once in ``LONGEST_REST`` steps. Already
after each single one, as long as no more than ``SELDOM`` of the engine's proposals have brought such a node lately."""
USEFUL_RATE = 1 / 64
"""How fast that share follows."""

MEASURE_SECONDS = 1.0
MEASURE_ROUNDS = 4
MEASURE_LEAST = 64
"""So many tokens are measured however long it takes: a guess for them would rule every step of a slow model."""

EXPLORE_STEPS = 24
MOST_GAIN = 1.0
"""Tokens per step that a lookahead branch may add at best; where even these would not pay, none is tried."""
EXPLORE_SECONDS = 0.1
EXPLORE_SHARE = 0.01
"""What trying out branches that may not pay may cost: so much time, and this share of the time spent decoding."""
RATE_SECONDS = 0.5
"""Over about how much decoding the tokens per second are averaged that a branch's time is weighed against."""
GIVEN_UP = -1


class DraftPolicy(ABC):
    """Decides about nodes. Deterministic: all ranks of a tensor-parallel group must decide alike."""

    def wants_proposal(self, req_id: str) -> bool:
        """Whether it is worth asking this request's proposer at all."""
        return True

    @abstractmethod
    def choose(self, req_ids: Sequence[str], trees: Sequence[DraftTree | None], limit: int) -> list[int]:
        """How long a prefix of each tree's guesses to verify.

        Args:
            req_ids: the batch's requests.
            trees: what was proposed for each.
            limit: most nodes for one request.
        """

    def may_branch(self, req_id: str) -> bool:
        """Whether ``keeps_branch`` may still say yes for this request."""
        return True

    def keeps_branch(self, req_id: str, tree: DraftTree, gain: float | None) -> bool:
        """Whether this step also computes the tree's lookahead branch.

        Args:
            req_id: the request.
            tree: what was proposed for it.
            gain: tokens per step that the branch has been adding, if known.
        """
        return True

    def observe_walk(self, req_id: str, tree: DraftTree, num_nodes: int, path: NDArray[np.int32]) -> None:  # noqa: B027 - a policy need not learn
        """Take note of a walk down the first ``num_nodes`` nodes of a tree."""

    def observe_token(self, req_id: str, tree: DraftTree, token: int) -> None:  # noqa: B027 - a policy need not learn
        """Take note of the token that really followed, where a tree was proposed but not verified."""

    def observe_step(self, num_tokens: int, num_nodes: int, seconds: float) -> None:  # noqa: B027 - a policy need not learn
        """Take note of the wall time of a decoding step that computed so many tokens, so many of them draft nodes."""

    def refit_due(self) -> bool:
        """Count a timed step; whether ``fit`` and ``adopt`` are to be called now."""
        return False

    def fit(self) -> tuple[float, ...]:
        """See ``StepCost.fit``."""
        raise NotImplementedError

    def adopt(self, fitted: tuple[float, ...]) -> None:
        """See ``StepCost.adopt``."""
        raise NotImplementedError

    def finish(self, req_ids: Iterable[str]) -> None:  # noqa: B027 - a policy need not learn
        """Forget requests."""


class FixedBudget(DraftPolicy):
    """Verify whatever was proposed, up to a fixed number of nodes per request."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes

    def choose(self, req_ids: Sequence[str], trees: Sequence[DraftTree | None], limit: int) -> list[int]:
        """See ``DraftPolicy.choose``."""
        most = min(self.nodes, limit)
        return [0 if tree is None else min(tree.num_guesses, most) for tree in trees]


class AutoBudget(DraftPolicy):
    """Verify the nodes that raise expected tokens per second (``vllm_lookahead.drafting.budget``).

    Args:
        cost: what a step costs.
    """

    def __init__(self, cost: StepCost) -> None:
        self.cost = cost
        self.steps = 0
        self._confidence: dict[str, Confidence] = {}
        self._idle: dict[str, int] = {}  # proposals in a row that brought no node worth verifying
        self._rested: dict[str, int] = {}  # steps since the last proposal
        self._useful = 0.5  # share of the proposals that bring a node worth verifying
        self._prior = Confidence()
        self._tokens = self._nodes = 0  # of the step that is being planned
        self._average_rate = 0.0  # tokens per second that the last steps promised
        self._branch_steps: dict[str, int] = {}
        self._branch_average = 0.5  # tokens per step that branches add
        self._branch_nodes = 0  # of the largest branch so far
        self._explorer: str | None = None  # the request that tries a branch which may not pay
        # seconds, both by the cost model, so that all ranks agree
        self._decoded = 0.0
        self._explored = 0.0
        self._seen: list[tuple[int, int, float]] = []  # steps since the last fit: taking them in together is cheaper

    def wants_proposal(self, req_id: str) -> bool:
        """See ``DraftPolicy.wants_proposal``."""
        idle = self._idle.get(req_id, 0)
        patience = REST_AFTER if self._useful > SELDOM else 1
        if idle >= patience:
            rested = self._rested.get(req_id, 0) + 1
            if rested <= min(idle // patience, LONGEST_REST - 1):
                self._rested[req_id] = rested
                return False
            self._rested[req_id] = 0
        # until ``choose`` finds a node worth verifying
        self._idle[req_id] = idle + 1
        self._useful -= USEFUL_RATE * self._useful
        return True

    def choose(self, req_ids: Sequence[str], trees: Sequence[DraftTree | None], limit: int) -> list[int]:
        """See ``DraftPolicy.choose``."""
        values = [
            NO_CHANCES if tree is None else self._chances(req_id, tree)[:limit]
            for req_id, tree in zip(req_ids, trees, strict=True)
        ]
        counts, rate = self.cost.allocate(values, len(req_ids))
        self._nodes = sum(counts)
        self._tokens = len(req_ids) + self._nodes
        seconds = self.cost.seconds(self._tokens, self._nodes)
        # what a step promises weighs as long as it takes
        weight = seconds / (seconds + min(RATE_SECONDS, self._decoded))
        self._average_rate += weight * (rate - self._average_rate)
        self._decoded += seconds
        for req_id, count in zip(req_ids, counts, strict=True):
            if count:
                self._idle[req_id] = 0
                self._useful += USEFUL_RATE
        return counts

    def may_branch(self, req_id: str) -> bool:
        """See ``DraftPolicy.may_branch``."""
        return self._branch_steps.get(req_id) != GIVEN_UP

    def keeps_branch(self, req_id: str, tree: DraftTree, gain: float | None) -> bool:
        """The branch pays if what it adds to a step outweighs the tokens that could be had in the time it takes.

        A request is judged by its own gain once it has run its branch for ``EXPLORE_STEPS`` steps, before that by the
        engine's average. Where that speaks against a branch, one request at a time tries its own all the same if the
        time that this may cost allows it, so that the average follows what is being served.
        """
        steps = self._branch_steps.get(req_id, 0)
        if steps == GIVEN_UP:
            return False
        # a branch grows during its first steps: judge it by what it will be
        self._branch_nodes = max(self._branch_nodes, tree.num_branch)
        with_branch = self.cost.seconds(self._tokens + self._branch_nodes, self._nodes + self._branch_nodes)
        extra = with_branch - self.cost.seconds(self._tokens, self._nodes)
        price = self._average_rate * extra
        if gain is not None:
            self._branch_average += 0.01 * (gain - self._branch_average)
        proven = steps >= EXPLORE_STEPS and gain is not None
        keep = (gain if proven and gain is not None else self._branch_average) > price
        if not keep and not proven and self._may_explore(req_id, price):
            self._explorer = req_id
            self._explored += extra
            keep = True
        elif self._explorer == req_id:
            self._explorer = None
        if keep:
            self._idle[req_id] = 0  # the window must move
            self._tokens += tree.num_branch
            self._nodes += tree.num_branch
        self._branch_steps[req_id] = steps + 1 if keep else GIVEN_UP
        return keep

    def _may_explore(self, req_id: str, price: float) -> bool:
        allowed = EXPLORE_SECONDS + EXPLORE_SHARE * self._decoded
        return self._explorer in (None, req_id) and price < MOST_GAIN and self._explored < allowed

    def observe_walk(self, req_id: str, tree: DraftTree, num_nodes: int, path: NDArray[np.int32]) -> None:
        """See ``DraftPolicy.observe_walk``."""
        if tree.chances is None:  # else the proposer learns by itself
            n = min(num_nodes, tree.num_guesses)
            self._observe(req_id, *_promises(tree.parents[:n], self._chances(req_id, tree)[:n], path))

    def observe_token(self, req_id: str, tree: DraftTree, token: int) -> None:
        """See ``DraftPolicy.observe_token``."""
        if tree.chances is None:
            n = tree.num_guesses
            self._observe(
                req_id, *_promises_at_root(tree.parents[:n], self._chances(req_id, tree), tree.token_ids, token)
            )

    def observe_step(self, num_tokens: int, num_nodes: int, seconds: float) -> None:
        """See ``DraftPolicy.observe_step``."""
        self._seen.append((num_tokens, num_nodes, seconds))

    def finish(self, req_ids: Iterable[str]) -> None:
        """See ``DraftPolicy.finish``."""
        for req_id in req_ids:
            self._confidence.pop(req_id, None)
            self._idle.pop(req_id, None)
            self._rested.pop(req_id, None)
            self._branch_steps.pop(req_id, None)
            if self._explorer == req_id:
                self._explorer = None

    def refit_due(self) -> bool:
        """See ``DraftPolicy.refit_due``."""
        self.steps += 1
        return self.steps % REFIT_EVERY == 0

    def fit(self) -> tuple[float, ...]:
        """See ``DraftPolicy.fit``."""
        for num_tokens, num_nodes, seconds in self._seen:
            self.cost.observe(num_tokens, num_nodes, seconds)
        self._seen.clear()
        return self.cost.fit()

    def adopt(self, fitted: tuple[float, ...]) -> None:
        """See ``DraftPolicy.adopt``."""
        self.cost.adopt(fitted)

    def _chances(self, req_id: str, tree: DraftTree) -> NDArray[np.float32]:
        """float32 [guesses]: the chance of each guess to be accepted; assumed if the proposer doesn't say."""
        if tree.chances is not None:
            return tree.chances
        return np.float32(UNKNOWN_CHANCE * self._of(req_id).factor) ** tree.depths[: tree.num_guesses]

    def _of(self, req_id: str) -> Confidence:
        confidence = self._confidence.get(req_id)
        if confidence is None:
            confidence = self._confidence[req_id] = Confidence(self._prior.factor)
        return confidence

    def _observe(self, req_id: str, promised: float, held: float) -> None:
        confidence = self._of(req_id)
        promised /= confidence.factor  # as it was before any correction
        if promised > 0.0:
            confidence.observe(promised, held)
            self._prior.observe(promised / 16, held / 16)  # slower than any one request


def measure_step_cost(forward: Callable[[int], float], most: int, agree: Callable[[Any], Any]) -> StepCost:
    """Time the forward pass at growing sizes: for about ``MEASURE_SECONDS``, or ten passes of a slow model.

    The sizes are gone through several times, and the fastest pass of each counts: a machine that is busy for a moment
    spoils one round, not one size.

    Args:
        forward: runs one forward pass over that many tokens and returns its seconds.
        most: largest size of interest.
        agree: returns the first rank's value on every rank, so that all run the same passes.
    """
    forward(1)
    sizes: list[int] = []
    times: list[float] = []
    size, share = 1, MEASURE_SECONDS / MEASURE_ROUNDS
    while not sizes or (sizes[-1] < most and (sum(times) < share or sizes[-1] < MEASURE_LEAST)):
        sizes.append(size)
        # twice: how far the sizes go must not depend on a moment either
        times.append(agree(min(forward(size), forward(size))))
        size = min(most, max(size + 1, size * 3 // 2) if sum(times) < share else 4 * size)
    for _ in range(MEASURE_ROUNDS - 1):
        if sum(times) > 2 * share:
            break
        times = [min(before, agree(forward(size))) for size, before in zip(sizes, times, strict=True)]
    return StepCost(sizes, times)


@numba.njit(cache=CACHE)
def _promises(parents, chances, path):  # type: ignore[no-untyped-def]
    """What a tree promised at the nodes that a walk visited, and how many of these promises held.

    A node's promise is the chance that one of its children follows, given that the walk has reached it.
    """
    promised, held = 0.0, 0
    here, reached = -1, 1.0
    for visited in range(len(path) + 1):
        mass = 0.0
        for node in range(here + 1, len(parents)):
            if parents[node] == here:
                mass += chances[node]
        if mass == 0.0:
            break  # a leaf promises nothing
        promised += min(1.0, mass / reached)
        if visited == len(path) or path[visited] >= len(parents):
            break
        held += 1
        here = path[visited]
        reached = max(chances[here], 1e-6)
    return promised, float(held)


@numba.njit(cache=CACHE)
def _promises_at_root(parents, chances, token_ids, token):  # type: ignore[no-untyped-def]
    """As ``_promises``, of a walk that ends at the root because ``token`` was sampled there and no node verified."""
    promised, held = 0.0, 0.0
    for node in range(len(parents)):
        if parents[node] == -1:
            promised += chances[node]
            if token_ids[node] == token:
                held = 1.0
    return min(1.0, promised), held
