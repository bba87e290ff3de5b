"""What a separate forward over a lookahead branch is about; each device runs it in its own way."""

from __future__ import annotations

from dataclasses import dataclass

from proposers import DraftTree


@dataclass(slots=True, frozen=True)
class BranchRow:
    """One request's lookahead branch.

    Attributes:
        row: index in the batch.
        context_length: tokens so far; the root is the last of them.
        root: the root's token.
        comb: the branch.
    """

    row: int
    context_length: int
    root: int
    comb: DraftTree
