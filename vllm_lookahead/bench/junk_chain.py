"""Drafts that are never accepted, for stock vLLM: what does it cost to verify a chain of n tokens?

No import of ours here: the stock engine loads this file (through vLLM's ``custom_class``), and must not load more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STOCK_CHAIN = "vllm_lookahead.bench.junk_chain.JunkChain"
"""The class, as vLLM's ``custom_class`` method wants it."""


@dataclass
class Shape:
    """What to propose at the moment: so many nodes, a "chain" or a "tree" of the last tokens of the vocabulary."""

    nodes: int = 0
    kind: str = "chain"
    vocabulary: int = 64

    def tokens(self) -> list[int]:
        """The tokens: rare ones, the same neither twice in a row nor for siblings."""
        return [self.vocabulary - 1 - i % 32 for i in range(self.nodes)]


shape = Shape()


def choose(nodes: int, kind: str, vocabulary: int) -> None:
    """Set what all proposers of this process propose."""
    shape.nodes, shape.kind, shape.vocabulary = nodes, kind, vocabulary


class JunkChain:
    """A proposer for vLLM's own runner."""

    def __init__(self, vllm_config: Any) -> None:
        pass

    def load_model(self, target_model: Any) -> None:
        """Nothing to load: part of vLLM's interface."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """The same chain for every row that decodes."""
        tokens = shape.tokens()
        return [list(tokens) if sampled else [] for sampled in sampled_token_ids]
