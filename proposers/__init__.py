"""Guesses for speculative decoding: draft token trees, and the algorithms that make them. No vllm, no torch."""

from pathlib import Path

from proposers.base import NO_INFO, Proposer, ProposerOptions, RequestInfo, RequestProposer, Verified
from proposers.guesses import PromptLookupOptions
from proposers.lookahead import Lookahead, LookaheadOptions, LookaheadRequest
from proposers.numba_cache import drop_stale
from proposers.prompt_lookup import PromptLookup
from proposers.registry import get, names, register
from proposers.token_recycling import TokenRecycling, TokenRecyclingOptions
from proposers.tree import ROOT, DraftTree, TrieBuilder, merge

__all__ = [
    "NO_INFO",
    "ROOT",
    "DraftTree",
    "Lookahead",
    "LookaheadOptions",
    "LookaheadRequest",
    "PromptLookup",
    "PromptLookupOptions",
    "Proposer",
    "ProposerOptions",
    "RequestInfo",
    "RequestProposer",
    "TokenRecycling",
    "TokenRecyclingOptions",
    "TrieBuilder",
    "Verified",
    "get",
    "merge",
    "names",
    "register",
]

drop_stale(Path(__file__).parent)  # kernels are loaded when they are first called
