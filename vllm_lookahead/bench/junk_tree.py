"""Drafts that are never accepted, for our runner: the method ``bench_junk``, registered when this file is imported."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from proposers import NO_INFO, DraftTree, Proposer, ProposerOptions, RequestInfo, RequestProposer, register
from proposers.tree import IntArray
from vllm_lookahead.bench.junk_chain import shape

NAME = "bench_junk"
BRANCHES = 3
"""A tree is this many chains under the root, node by node in turn."""


class JunkOptions(ProposerOptions):
    """How large a tree can get; how large it is at the moment says ``junk_chain.shape``."""

    max_draft_tokens: int = Field(128, ge=1, le=1024, description="Most nodes.")


class JunkRequest(RequestProposer):
    """The same tree in every step."""

    def propose(self, context: IntArray, budget: int) -> DraftTree:
        """See ``RequestProposer.propose``."""
        tokens = np.array(shape.tokens()[:budget], np.int32)
        if shape.kind == "chain":
            return DraftTree.chain(tokens)
        parents = np.maximum(np.arange(len(tokens), dtype=np.int32) - BRANCHES, -1)
        return DraftTree.from_parents(tokens, parents)


@register(NAME)
class Junk(Proposer):
    """Proposes ``junk_chain.shape``."""

    Options = JunkOptions
    time_limit = None

    def start(self, request_id: str, prompt: IntArray, info: RequestInfo = NO_INFO) -> RequestProposer:
        """See ``Proposer.start``."""
        return JunkRequest()
