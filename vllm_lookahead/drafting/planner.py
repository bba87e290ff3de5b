"""From guesses to what is verified, and from there to better guesses: one step of drafting, on any runner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from proposers import DraftTree, Verified
from vllm_lookahead.drafting.drafter import Drafter
from vllm_lookahead.drafting.policy import DraftPolicy
from vllm_lookahead.trees.step import StepTrees, Walks

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

NO_TREE = DraftTree.empty()
NO_PATH = np.empty(0, np.int32)


class Planner:
    """Asks the proposers, keeps the nodes that are worth verifying, and tells both sides how they fared.

    Args:
        drafter: one proposer per request.
        policy: how many nodes are worth verifying.

    Attributes:
        proposed: the trees that wait to be verified, by request id.
    """

    def __init__(self, drafter: Drafter, policy: DraftPolicy) -> None:
        self.drafter = drafter
        self.policy = policy
        self.proposed: dict[str, DraftTree] = {}
        self._unverified: dict[str, DraftTree] = {}  # trees of which no node was worth it

    def plan(
        self,
        req_ids: Sequence[str],
        rows: Iterable[int],
        propose: Callable[[int, int], DraftTree | None],
        limit: int,
    ) -> list[DraftTree | None]:
        """Guess the next trees; they are added to ``proposed``, too.

        Args:
            req_ids: the batch's requests.
            rows: those of them that can be asked for a tree.
            propose: makes a row's tree of at most so many nodes, or None.
            limit: most nodes of one request.

        Returns:
            A tree or None for every request of the batch; an empty list if there is no tree at all.
        """
        asked = [row for row in rows if self.policy.wants_proposal(req_ids[row])]
        trees: list[DraftTree | None] = [None] * len(req_ids)
        for row in asked:
            trees[row] = propose(row, limit)
        # where the branch runs by itself, its price depends on what the policy plans, also where that is nothing
        if not any(trees) and not self.drafter.proposer.separate_branch:
            return []
        counts = self.policy.choose(req_ids, trees, limit)
        for row, (req_id, tree, count) in enumerate(zip(req_ids, trees, counts, strict=True)):
            if tree is None:
                continue
            keep_branch = tree.num_branch > 0 and self.policy.keeps_branch(
                req_id, tree, self.drafter.branch_gain(req_id)
            )
            chosen = tree.trimmed(count, keep_branch=keep_branch)
            if len(chosen):
                trees[row] = self.proposed[req_id] = chosen
            else:
                trees[row] = None
                if tree.chances is None:
                    self._unverified[req_id] = tree
        return trees

    def observe(
        self,
        req_ids: Sequence[str],
        sampled: Sequence[Sequence[int]],
        step: StepTrees | None,
        walks: Walks | None,
        argmax: NDArray[np.integer] | None,
        top: NDArray[np.int32] | None = None,
    ) -> None:
        """Feed back what a step said about its trees.

        Args:
            req_ids: the batch's requests when the step ran.
            sampled: the tokens that each of them emitted.
            step: the step's trees, if it had any.
            walks: where their walks ended.
            argmax: int [nodes + rows], the argmax of every logits row (see ``StepTrees``), if a proposer needs it.
            top: int32 [nodes + rows, k], its likeliest tokens, if a proposer needs them; also of a step without trees.
        """
        if self._unverified:
            unverified, self._unverified = self._unverified, {}
            for req_id, tokens in zip(req_ids, sampled, strict=True):
                if len(tokens) and (dropped := unverified.get(req_id)) is not None:
                    self.policy.observe_token(req_id, dropped, int(tokens[0]))
        if top is not None:
            self._observe_roots(req_ids, sampled, step, top)
        if step is None or walks is None:
            return
        for row, (req_id, tokens) in enumerate(zip(req_ids, sampled, strict=True)):
            tree = step.trees[row]
            if tree is None or not len(tokens):
                continue
            n = step.num_nodes(row)
            path = walks.path(row)
            self.drafter.counts.add(tree, n, path)
            if tree.chances is not None and not self.drafter.observes(req_id):
                continue
            first = int(step.starts[row]) + row
            verified = Verified(
                tokens=np.array(tokens, np.int32),
                path=path,
                argmax=None if argmax is None else argmax[first : first + n + 1].astype(np.int32),
                num_nodes=n,
                top=None if top is None else top[first : first + n + 1],
            )
            self.policy.observe_walk(req_id, tree, n, path)
            self.drafter.observe(req_id, tree, verified)

    def _observe_roots(
        self,
        req_ids: Sequence[str],
        sampled: Sequence[Sequence[int]],
        step: StepTrees | None,
        top: NDArray[np.int32],
    ) -> None:
        """Feed back what a step said at the roots of requests without a tree."""
        roots = range(len(req_ids)) if step is None else step.root_logits_rows().tolist()
        for row, (req_id, tokens, root) in enumerate(zip(req_ids, sampled, roots, strict=True)):
            if len(tokens) and (step is None or step.trees[row] is None) and self.drafter.observes(req_id):
                verified = Verified(np.array(tokens, np.int32), NO_PATH, None, 0, top[root : root + 1])
                self.drafter.observe(req_id, NO_TREE, verified)

    def forget_scheduled(self, scheduled: Mapping[str, int]) -> None:
        """Drop the trees of requests that took part in a step; the scheduler keeps the others' drafts, so we do too."""
        if self.proposed:
            self.proposed = {req_id: tree for req_id, tree in self.proposed.items() if req_id not in scheduled}

    def finish(self, req_ids: Iterable[str]) -> None:
        """Forget requests that are gone for good."""
        self.drafter.finish(req_ids)
        self.policy.finish(req_ids)
        for req_id in req_ids:
            self.proposed.pop(req_id, None)
            self._unverified.pop(req_id, None)


def room_for(
    params: SamplingParams | None, num_tokens: int, num_prompt_tokens: int, max_model_len: int, limit: int
) -> tuple[int, int]:
    """Most nodes and greatest depth of a request's next tree; nothing is drafted where one of them is below 1.

    Args:
        params: how the request samples.
        num_tokens: its tokens so far.
        num_prompt_tokens: how many of them are the prompt.
        max_model_len: the engine's.
        limit: most nodes that anybody may have.
    """
    limit = min(limit, max_model_len - num_tokens - 1)
    if params is None or params.max_tokens is None:
        return limit, limit
    # a step's last token is never a guess
    return limit, params.max_tokens - (num_tokens - num_prompt_tokens) - 1
