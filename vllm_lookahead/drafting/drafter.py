"""The object behind ``runner.drafter``: it keeps one proposer per request and shields the engine from their errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger

from proposers import DraftTree, RequestInfo, RequestProposer, Verified
from proposers.tree import warm_up as warm_up_trees
from vllm_lookahead.config import LookaheadConfig
from vllm_lookahead.drafting.time_limit import TimeLimit, TimeLimitError
from vllm_lookahead.metrics import SourceCounts, served_name

logger = init_logger(f"vllm.{__name__}")

T = TypeVar("T")
IntArray = NDArray[np.int32]
MOST_TIMEOUTS = 3
"""After so many calls that took too long the proposer isn't asked any more: each of them kept all requests waiting."""
UNKNOWN = RequestInfo(namespace=None)
"""Of a request whose runner tells nothing: it shares with nobody."""


class Drafter:
    """Makes the guesses for every request of one worker.

    vLLM builds it through its ``custom_class`` hook (``vllm/v1/spec_decode/custom_class_proposer.py``).

    Args:
        vllm_config: vLLM's config; ours is in ``additional_config["lookahead"]``.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.config = LookaheadConfig.from_vllm_config(vllm_config)
        self.proposer = self.config.build_proposer()
        parallel = vllm_config.parallel_config
        model = served_name(vllm_config.model_config)
        self.counts = SourceCounts(self.proposer.sources, parallel.data_parallel_index, model, first=parallel.rank == 0)
        self.max_nodes = self.config.num_speculative_tokens
        self._vocab_size = vllm_config.model_config.get_vocab_size()
        # the ranks of a tensor-parallel group have to give up the same requests, and their clocks differ
        limit = self.proposer.time_limit if parallel.tensor_parallel_size == 1 else None
        self._limit = None if limit is None else TimeLimit(limit)
        self._timeouts = 0
        self._requests: dict[str, RequestProposer | None] = {}  # None: its proposer failed, no more drafts
        self._error_logged = False

    def load_model(self, target_model: nn.Module) -> None:
        """Nothing to load: part of vLLM's interface for drafters."""

    def warm_up(self) -> None:
        """Let the proposer compile what its first request would wait for. If it fails, requests will tell."""
        warm_up_trees()
        try:
            self.proposer.warm_up()
        except Exception as error:
            self._log_error(error)

    def __len__(self) -> int:
        """How many requests have state here."""
        return len(self._requests)

    def propose_tree(
        self,
        req_id: str,
        context: IntArray,
        num_prompt_tokens: int,
        budget: int,
        depth: int,
        *,
        chain: bool = False,
        branch: bool = True,
        info: Callable[[], RequestInfo] = lambda: UNKNOWN,
    ) -> DraftTree | None:
        """The next tree of one request.

        Args:
            req_id: vLLM's request id.
            context: int32 [t], prompt and output so far.
            num_prompt_tokens: how much of ``context`` is the prompt.
            budget: most nodes.
            depth: no guess may be deeper: the request ends there.
            chain: only a chain can be verified: the tree's first path is returned.
            branch: whether a lookahead branch may pay.
            info: says what else is known of the request; called once, at its first proposal.

        Returns:
            The tree, or None if there is no guess (or the proposer failed: that is logged once per worker).
        """
        try:
            request = self._request(req_id, context[:num_prompt_tokens], info)
            if request is None:
                return None
            request.without_branch = chain or not branch
            tree = self._ask(request.propose, context, budget)
            self._check(tree, budget)
            if chain:
                tree = tree.as_chain()
            tree = tree.up_to(depth)
            return tree if len(tree) else None
        except Exception as error:
            self._give_up(req_id, error)
            return None

    def propose_branch(
        self,
        req_id: str,
        context: IntArray,
        num_prompt_tokens: int,
        budget: int,
        info: Callable[[], RequestInfo] = lambda: UNKNOWN,
    ) -> DraftTree | None:
        """A request's lookahead branch for a forward of its own, or None; arguments as for ``propose_tree``."""
        try:
            request = self._request(req_id, context[:num_prompt_tokens], info)
            if request is None:
                return None
            comb = self._ask(request.propose_branch, context, budget)
            self._check(comb, budget)
            return comb if len(comb) else None
        except Exception as error:
            self._give_up(req_id, error)
            return None

    def observe_branch(self, req_id: str, tree: DraftTree, argmax: IntArray) -> None:
        """Tell a request's proposer what came out of its branch."""
        request = self._requests.get(req_id)
        if request is None:
            return
        try:
            self._ask(request.observe_branch, tree, argmax)
        except Exception as error:
            self._give_up(req_id, error)

    def observes(self, req_id: str) -> bool:
        """Whether ``observe`` would tell anybody: a proposer may learn from the text alone."""
        request = self._requests.get(req_id)
        return request is not None and type(request).observe is not RequestProposer.observe

    def observe(self, req_id: str, tree: DraftTree, verified: Verified) -> None:
        """Tell a request's proposer how its last tree fared."""
        request = self._requests.get(req_id)
        if request is None:
            return
        try:
            self._ask(request.observe, tree, verified)
        except Exception as error:
            self._give_up(req_id, error)

    def branch_gain(self, req_id: str) -> float | None:
        """Tokens per step that this request's lookahead branch adds, by its proposer's own account."""
        request = self._requests.get(req_id)
        return None if request is None else request.branch_gain

    def finish(self, req_ids: Iterable[str]) -> None:
        """Free the state of requests that are gone for good."""
        for req_id in req_ids:
            request = self._requests.pop(req_id, None)
            if request is None:
                continue
            try:
                self._ask(request.finish)
            except Exception as error:
                self._log_error(error)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: NDArray[np.int32],
        token_ids_cpu: NDArray[np.int32],
        slot_mappings: object = None,
    ) -> list[list[int]]:
        """Chains for vLLM's own runner and rejection sampler.

        Only reached when the user insists on another ``--worker-cls``: that interface knows rows, not requests, so
        each guess starts from nothing but the context.
        """
        drafts: list[list[int]] = []
        for row, sampled in enumerate(sampled_token_ids):
            num_tokens = int(num_tokens_no_spec[row])
            tree = None
            if sampled and num_tokens < token_ids_cpu.shape[1]:
                req_id = f"row {row}"
                context = token_ids_cpu[row, :num_tokens]
                tree = self.propose_tree(req_id, context, num_tokens, self.max_nodes, self.max_nodes)
                self.finish([req_id])
            drafts.append([] if tree is None else tree.as_chain().token_ids.tolist())
        return drafts

    def _request(self, req_id: str, prompt: IntArray, info: Callable[[], RequestInfo]) -> RequestProposer | None:
        if req_id not in self._requests:
            given_up = self._timeouts >= MOST_TIMEOUTS
            self._requests[req_id] = None if given_up else self._ask(self.proposer.start, req_id, prompt, info())
        return self._requests[req_id]

    def _ask(self, call: Callable[..., T], *arguments: object) -> T:
        return call(*arguments) if self._limit is None else self._limit.run(call, *arguments)

    def _check(self, tree: DraftTree, budget: int) -> None:
        if not isinstance(tree, DraftTree):
            raise TypeError(f"a proposal is a DraftTree, not a {type(tree).__name__}")
        if len(tree) > budget:
            raise ValueError(f"the tree has {len(tree)} nodes, the budget was {budget}")
        tree.check(self._vocab_size, len(self.proposer.sources))

    def _give_up(self, req_id: str, error: Exception) -> None:
        self._log_error(error)
        self._requests[req_id] = None

    def _log_error(self, error: Exception) -> None:
        """Called while ``error`` is handled."""
        if not self._error_logged:
            self._error_logged = True
            logger.exception(
                "Proposer '%s' failed; the request goes on without drafts. Further errors are not logged.",
                self.config.method,
            )
        if isinstance(error, TimeLimitError):
            self._timeouts += 1
            if self._timeouts == MOST_TIMEOUTS:
                self._requests = dict.fromkeys(self._requests)
                logger.error(
                    "Proposer '%s' took too long %d times; it is not asked any more.", self.config.method, MOST_TIMEOUTS
                )
