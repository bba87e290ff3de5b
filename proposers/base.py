"""What a proposer is: the interface between the algorithms and the engine. No vllm, no torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from proposers.tree import DraftTree, IntArray


class ProposerOptions(BaseModel):
    """Options that every proposer has; a proposer's own model derives from it. Unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(slots=True)  # not frozen: see DraftTree
class Verified:
    """What the target model said about one request's tree in one step.

    Attributes:
        tokens: int32 [a + 1], the tokens that this step emitted: the accepted path's, then the new root.
        path: int32 [a], indices of the accepted nodes, from the root down.
        argmax: int32 [m + 1] or None, the argmax of the target's logits after the root (entry 0) and after node i
            (entry i + 1), for the first m nodes of the tree; m < n if the scheduler truncated the tree. None unless
            the proposer's ``needs_argmax`` is set.
        num_nodes: m, how many nodes were verified.
        top: int32 [m + 1, k] or None, the k most likely tokens by the target's logits, likeliest first, after the root
            (entry 0) and after node i (entry i + 1). k is the proposer's ``num_top``; None if that is 0.
    """

    tokens: IntArray
    path: IntArray
    argmax: IntArray | None
    num_nodes: int
    top: IntArray | None = None


@dataclass(slots=True, frozen=True)
class RequestInfo:
    """What is known of a request beside its prompt.

    Attributes:
        namespace: requests of different namespaces never learn from each other's text. None: this one learns from
            nobody and nobody learns from it.
        prediction: int32 [p], what the caller expects the output to be, or None.
    """

    namespace: str | None = ""
    prediction: IntArray | None = None


NO_INFO = RequestInfo()
"""Of a request that has nothing of its own to say and shares with all others like it."""


class RequestProposer(ABC):
    """The guesses for one request, from its first token to its last.

    Attributes:
        without_branch: set by the engine before each ``propose``: a lookahead branch would be wasted, because it does
            not pay or because the request's trees are cut down to their first path. Once set, it stays.
        branch_gain: tokens per step that the lookahead branch has been adding lately, measured by the proposer; None
            if it has no branch or nothing is known yet.
    """

    without_branch: bool = False
    branch_gain: float | None = None

    @abstractmethod
    def propose(self, context: IntArray, budget: int) -> DraftTree:
        """Guess what follows ``context``.

        Args:
            context: int32 [t], prompt and output so far; the last entry is the root. A view: don't keep it.
                Between two calls it only grows.
            budget: most nodes that the tree may have, at least 0.
        """

    def propose_branch(self, context: IntArray, budget: int) -> DraftTree:
        """The lookahead branch alone, for a forward of its own on the root; empty if there is none to run now.

        Called, before ``propose``, only for a proposer with ``separate_branch``; see there for the arguments.
        """
        return DraftTree.empty()

    def observe_branch(self, tree: DraftTree, argmax: IntArray) -> None:  # noqa: B027 - only for those with a branch
        """Learn from the forward over ``propose_branch``'s tree.

        Args:
            tree: that tree.
            argmax: int32 [m + 1], the argmax after the root (entry 0) and after node i (entry i + 1), for the first
                m nodes.
        """

    def observe(self, tree: DraftTree, verified: Verified) -> None:  # noqa: B027 - learning is optional
        """Learn from the verification of the last proposed tree. Not called for a tree that was dropped unverified, but
        where the proposer's ``num_top`` is set, also with an empty tree after a step of the request without any.
        """

    def finish(self) -> None:  # noqa: B027 - most hold nothing but memory
        """Free what this request holds. Called once, however the request ends."""


class Proposer(ABC):
    """One per worker process: options, shared tables, and the maker of per-request proposers."""

    Options: ClassVar[type[ProposerOptions]] = ProposerOptions
    needs_argmax: bool = False
    num_top: int = 0
    """How many of the target's likeliest tokens ``Verified.top`` shall hold."""
    sources: tuple[str, ...] = ()
    """Names of what guesses come from, where its trees say so (``DraftTree.sources``)."""
    separate_branch: bool = False
    """Whether the lookahead branch runs in forwards of its own, not in the verification's."""

    time_limit: float | None = 1.0
    """Seconds that each call of a request's methods may take before the request goes on without drafts. The calls run
    on a thread of their own then, which costs some 20 microseconds each. None: they always end, and fast."""

    def __init__(self, options: ProposerOptions) -> None:
        self.options = options

    @abstractmethod
    def start(self, request_id: str, prompt: IntArray, info: RequestInfo = NO_INFO) -> RequestProposer:
        """Begin a request. All randomness must come from ``request_id``: every tensor-parallel rank must agree.

        Args:
            request_id: vLLM's id of the request.
            prompt: int32 [p], its prompt tokens. A view: don't keep it.
            info: what else is known of it.
        """

    def use_corpus(self, index: Path) -> None:
        """Guess from a corpus, too, whose index ``proposers.corpus`` wrote. Only asked of those with the option."""
        raise NotImplementedError

    def warm_up(self) -> None:  # noqa: B027 - not every proposer compiles
        """Compile or load what the first request would otherwise wait for. Called at engine start."""
