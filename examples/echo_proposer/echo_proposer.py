"""A speculative method of your own: what followed the last tokens before follows again."""

import numpy as np
from pydantic import Field

from proposers import NO_INFO, DraftTree, Proposer, ProposerOptions, RequestInfo, RequestProposer, merge
from proposers.tree import IntArray


class EchoOptions(ProposerOptions):
    """What may stand beside ``"method": "echo"``."""

    suffix: int = Field(2, ge=1, le=16, description="So many of the last tokens have to be the same.")
    max_depth: int = Field(8, ge=1, le=128, description="Longest guess, in tokens.")
    max_draft_tokens: int = Field(24, ge=1, le=1024, description="Most nodes of the draft tree.")


class EchoRequest(RequestProposer):
    """The guesses for one request."""

    def __init__(self, options: EchoOptions) -> None:
        self._options = options

    def propose(self, context: IntArray, budget: int) -> DraftTree:
        """One guess for each earlier place, the latest first, merged into a tree."""
        o = self._options
        if len(context) <= o.suffix:
            return DraftTree.empty()
        earlier = np.lib.stride_tricks.sliding_window_view(context[:-1], o.suffix)
        places = np.flatnonzero((earlier == context[-o.suffix :]).all(axis=1)) + o.suffix
        guesses = (context[place : place + o.max_depth] for place in places[::-1])
        return merge(guesses, min(budget, o.max_draft_tokens))


class Echo(Proposer):
    """One per worker: it has the options and makes the requests' proposers."""

    Options = EchoOptions
    options: EchoOptions

    def start(self, request_id: str, prompt: IntArray, info: RequestInfo = NO_INFO) -> EchoRequest:
        """Begin a request. Here requests know nothing of each other."""
        return EchoRequest(self.options)
