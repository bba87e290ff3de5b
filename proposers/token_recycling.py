"""Token recycling: after each token come the tokens that the target model found likely when it last saw that token.

The idea is that of "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling"
(Luo et al., arXiv 2408.08696). Different from the paper, the tree has no fixed shape: its nodes are the likeliest by
what the ranks have been worth so far (``best_first``, ``calibration``).
"""

from __future__ import annotations

from pydantic import Field

from proposers.base import NO_INFO, Proposer, ProposerOptions, RequestInfo, RequestProposer
from proposers.calibration import MOST_RANKS, SOURCES
from proposers.guesses import Guesses, PromptLookupOptions
from proposers.prompt_lookup import RecyclingRequest, warm_up
from proposers.registry import register
from proposers.tree import IntArray


class TokenRecyclingOptions(ProposerOptions):
    """What ``token_recycling`` can be told."""

    recycled_tokens: int = Field(
        8,
        ge=1,
        le=MOST_RANKS,
        description="How many of the model's own likeliest tokens are remembered after each token.",
    )
    max_draft_tokens: int = Field(64, ge=1, le=1024, description="Most nodes of the draft tree.")
    max_depth: int = Field(16, ge=1, le=128, description="Longest guess, in tokens.")
    min_probability: float = Field(
        0.002, ge=0.0, le=1.0, description="Nodes estimated to be accepted less often than this are left out."
    )

    @property
    def max_nodes(self) -> int:
        """Most nodes that a proposed tree has."""
        return self.max_draft_tokens


@register("token_recycling")
class TokenRecycling(Proposer):
    """Guesses from what the target model itself said before, and from nothing else: no text is looked into."""

    Options = TokenRecyclingOptions
    options: TokenRecyclingOptions
    sources = SOURCES
    time_limit = None

    def __init__(self, options: TokenRecyclingOptions) -> None:
        super().__init__(options)
        self.num_top = options.recycled_tokens
        self.guesses = Guesses(PromptLookupOptions(**options.model_dump(), shared_tokens=0, max_matches=1))

    def start(self, request_id: str, prompt: IntArray, info: RequestInfo = NO_INFO) -> RequestProposer:
        """Begin a request with what others of its namespace have taught."""
        return RecyclingRequest(self.guesses, prompt, info, texts=False)

    def warm_up(self) -> None:
        """Compile the kernels, or load them from numba's cache, so that the first request doesn't wait for it."""
        warm_up(self)
