"""Which of the proposed nodes are verified: all that fit (a fixed budget), or those that pay (``budget: auto``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from proposers import DraftTree
from vllm_lookahead.budget import REFIT_EVERY, Confidence, StepCost

UNKNOWN_CHANCE = 0.5
"""A node of a proposer that gives no probabilities is assumed to hold this often, if its parent does."""
REST_AFTER = 4
"""After so many proposals in a row without a node worth verifying, a request's proposer is asked more rarely: the less
its guesses have held, the more rarely (one in ten steps if they hold a tenth as often as promised)."""

MEASURE_SECONDS = 1.0

EXPLORE_STEPS = 24
MOST_GAIN = 2.0
"""Tokens per step that a lookahead branch may add at best; where even these would not pay, none is tried."""
EXPLORE_SECONDS = 0.1
EXPLORE_SHARE = 0.01
"""What trying out branches that may not pay may cost: so much time, and this share of the time spent decoding."""
GIVEN_UP = -1
NO_CHANCES = np.empty(0, np.float32)


class DraftPolicy(ABC):
    """Decides about nodes. Deterministic: all ranks of a tensor-parallel group must decide alike."""

    def wants_proposal(self, req_id: str) -> bool:
        """Whether it is worth asking this request's proposer at all."""
        return True

    def confidence(self, req_id: str) -> float:
        """The factor by which this request's proposer should trust its guesses."""
        return 1.0

    @abstractmethod
    def choose(self, req_ids: Sequence[str], trees: Sequence[DraftTree | None], limit: int) -> list[int]:
        """How long a prefix of each tree's guesses to verify.

        Args:
            req_ids: the batch's requests.
            trees: what was proposed for each.
            limit: most nodes for one request.
        """

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

    def observe_step(self, num_tokens: int, drafted: bool, seconds: float) -> None:  # noqa: B027 - a policy need not learn
        """Take note of the wall time of a decoding step that computed so many tokens, drafts among them or not."""

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
    """Verify the nodes that raise expected tokens per second (``vllm_lookahead.budget``).

    Args:
        cost: what a step costs.
    """

    def __init__(self, cost: StepCost) -> None:
        self.cost = cost
        self.steps = 0
        self._confidence: dict[str, Confidence] = {}
        self._idle: dict[str, int] = {}  # proposals in a row without a node worth verifying
        self._rested: dict[str, int] = {}  # steps since the last proposal
        self._prior = Confidence()
        self._tokens = 0  # of the step that is being planned
        self._rate = 0.0  # tokens per second that it promises
        self._branch_steps: dict[str, int] = {}
        self._branch_average = 0.5
        # seconds, both by the cost model, so that all ranks agree
        self._decoded = 0.0
        self._explored = 0.0
        self._seen: list[tuple[int, bool, float]] = []  # steps since the last fit: taking them in together is cheaper

    def wants_proposal(self, req_id: str) -> bool:
        """See ``DraftPolicy.wants_proposal``."""
        if self._idle.get(req_id, 0) < REST_AFTER:
            return True
        rested = self._rested.get(req_id, 0) + 1
        wanted = rested * self._of(req_id).factor >= 1.0
        self._rested[req_id] = 0 if wanted else rested
        return wanted

    def confidence(self, req_id: str) -> float:
        """See ``DraftPolicy.confidence``."""
        return self._of(req_id).factor

    def choose(self, req_ids: Sequence[str], trees: Sequence[DraftTree | None], limit: int) -> list[int]:
        """See ``DraftPolicy.choose``."""
        if not any(trees):
            counts = [0] * len(trees)
            self._tokens = len(req_ids)
            self._rate = self._tokens / self.cost.seconds(self._tokens)
        else:
            values = [NO_CHANCES if tree is None else chances_of(tree)[:limit] for tree in trees]
            counts, self._rate = self.cost.allocate(values, len(req_ids))
            self._tokens = len(req_ids) + sum(counts)
        self._decoded += self.cost.seconds(self._tokens, drafts=any(counts))
        for req_id, tree, count in zip(req_ids, trees, counts, strict=True):
            if tree is not None:
                self._idle[req_id] = 0 if count else self._idle.get(req_id, 0) + 1
        return counts

    def keeps_branch(self, req_id: str, tree: DraftTree, gain: float | None) -> bool:
        """The branch pays if what it adds to a step outweighs the tokens that could be had in the time it takes.

        A new request is judged by the engine's average. Where that speaks against a branch, one is tried for
        ``EXPLORE_STEPS`` steps all the same if the time that this may cost allows it, so that the average follows what
        is being served; then each request is judged by its own gain.
        """
        steps = self._branch_steps.get(req_id)
        if steps == GIVEN_UP:
            return False
        extra = self.cost.seconds(self._tokens + tree.num_branch) - self.cost.seconds(self._tokens)
        price = self._rate * extra
        if steps is None:
            steps = 0 if self._branch_average > price or self._explores(price, extra) else GIVEN_UP
        elif gain is not None:
            self._branch_average += 0.01 * (gain - self._branch_average)
            if steps >= EXPLORE_STEPS and gain <= price:
                steps = GIVEN_UP
        keep = steps != GIVEN_UP
        if keep:
            steps += 1
            self._tokens += tree.num_branch
        self._branch_steps[req_id] = steps
        return keep

    def _explores(self, price: float, extra: float) -> bool:
        """Whether to try out a branch that would not pay by the engine's average, at ``extra`` seconds a step."""
        if price >= MOST_GAIN or self._explored > EXPLORE_SECONDS + EXPLORE_SHARE * self._decoded:
            return False
        self._explored += EXPLORE_STEPS * extra
        return True

    def observe_walk(self, req_id: str, tree: DraftTree, num_nodes: int, path: NDArray[np.int32]) -> None:
        """See ``DraftPolicy.observe_walk``."""
        n = min(num_nodes, tree.num_guesses)
        promised, held = _promises(tree.parents[:n], chances_of(tree)[:n], path)
        self._observe(req_id, promised, held)

    def observe_token(self, req_id: str, tree: DraftTree, token: int) -> None:
        """See ``DraftPolicy.observe_token``."""
        n = tree.num_guesses
        promised, held = _promises_at_root(tree.parents[:n], chances_of(tree), tree.token_ids, token)
        self._observe(req_id, promised, held)

    def observe_step(self, num_tokens: int, drafted: bool, seconds: float) -> None:
        """See ``DraftPolicy.observe_step``."""
        self._seen.append((num_tokens, drafted, seconds))

    def finish(self, req_ids: Iterable[str]) -> None:
        """See ``DraftPolicy.finish``."""
        for req_id in req_ids:
            self._confidence.pop(req_id, None)
            self._idle.pop(req_id, None)
            self._rested.pop(req_id, None)
            self._branch_steps.pop(req_id, None)

    def refit_due(self) -> bool:
        """See ``DraftPolicy.refit_due``."""
        self.steps += 1
        return self.steps % REFIT_EVERY == 0

    def fit(self) -> tuple[float, ...]:
        """See ``DraftPolicy.fit``."""
        for num_tokens, drafted, seconds in self._seen:
            self.cost.observe(num_tokens, drafted, seconds)
        self._seen.clear()
        return self.cost.fit()

    def adopt(self, fitted: tuple[float, ...]) -> None:
        """See ``DraftPolicy.adopt``."""
        self.cost.adopt(fitted)

    def _of(self, req_id: str) -> Confidence:
        confidence = self._confidence.get(req_id)
        if confidence is None:
            confidence = self._confidence[req_id] = Confidence(self._prior.factor)
        return confidence

    def _observe(self, req_id: str, promised: float, held: float) -> None:
        confidence = self._of(req_id)
        promised /= confidence.factor  # the proposer's own promise, before it was told how far to trust itself
        if promised > 0.0:
            confidence.observe(promised, held)
            self._prior.observe(promised / 16, held / 16)  # slower than any one request


def measure_step_cost(forward: Callable[[int], float], most: int, agree: Callable[[Any], Any]) -> StepCost:
    """Time the forward pass at growing sizes, for at most about ``MEASURE_SECONDS``.

    Args:
        forward: runs one forward pass over that many tokens and returns its seconds.
        most: largest size of interest.
        agree: returns the first rank's value on every rank, so that all run the same passes.
    """
    forward(1)
    sizes: list[int] = []
    times: list[float] = []
    spent, size = 0.0, 1
    while True:
        runs = sorted(forward(size) for _ in range(3))
        sizes.append(size)
        times.append(agree(runs[0]))
        spent += agree(sum(runs))
        if size >= most or spent > MEASURE_SECONDS:
            return StepCost(sizes, times)
        size = min(most, max(size + 1, size * 3 // 2))


def chances_of(tree: DraftTree) -> NDArray[np.float32]:
    """float32 [guesses]: the chance of each guess to be accepted; assumed if the proposer doesn't say."""
    if tree.chances is not None:
        return tree.chances
    return np.float32(UNKNOWN_CHANCE) ** tree.depths[: tree.num_guesses]


@numba.njit(cache=True)
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


@numba.njit(cache=True)
def _promises_at_root(parents, chances, token_ids, token):  # type: ignore[no-untyped-def]
    """As ``_promises``, of a walk that ends at the root because ``token`` was sampled there and no node verified."""
    promised, held = 0.0, 0.0
    for node in range(len(parents)):
        if parents[node] == -1:
            promised += chances[node]
            if token_ids[node] == token:
                held = 1.0
    return min(1.0, promised), held
