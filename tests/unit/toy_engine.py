"""An engine in twenty lines: a deterministic toy language model, and the loop that verifies draft trees with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from proposers import DraftTree, Verified
from proposers.base import RequestProposer

Tokens = list[int]
Model = Callable[[Tokens], int]


def toy_model(seed: int, vocabulary: int = 6, order: int = 2) -> Model:
    """Greedy decoding of a language model that looks at ``order`` tokens: so it falls into loops, as small ones do."""

    def next_token(tokens: Tokens) -> int:
        state = seed
        for token in tokens[-order:]:
            state = (state * 1_000_003 + token + 1) % 2_147_483_647
        return state // 7 % vocabulary

    return next_token


def decode(model: Model, prompt: Tokens, length: int) -> Tokens:
    """Plain greedy decoding: the prompt and ``length`` tokens more."""
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(model(tokens))
    return tokens


def argmax_of(model: Model, context: Tokens, tree: DraftTree) -> np.ndarray:
    """int32 [n + 1]: what the model says after the root and after every node, as one forward over the tree would."""
    said = [model(context)]
    paths: list[Tokens] = []
    for token, parent in zip(tree.token_ids.tolist(), tree.parents.tolist(), strict=True):
        paths.append(([] if parent < 0 else paths[parent]) + [token])
        said.append(model(context + paths[-1]))
    return np.array(said, np.int32)


@dataclass
class Step:
    """One verification step: the root's context, the tree, the nodes that were verified, and what came out."""

    context: Tokens
    tree: DraftTree
    num_nodes: int
    emitted: Tokens


def generate(
    request: RequestProposer,
    model: Model,
    prompt: Tokens,
    length: int,
    *,
    budget: Callable[[], int] = lambda: 1000,
    keep: Callable[[int], int] = lambda nodes: nodes,
    branch: bool = False,
    num_top: int = 0,
) -> Iterator[Step]:
    """Decode with drafts, step by step, until ``length`` tokens came after the prompt.

    Args:
        request: the proposer under test.
        model: the language model.
        prompt: where to begin.
        length: how many tokens to decode, at least.
        budget: nodes that the next tree may have.
        keep: how many of a tree's nodes the scheduler lets through; the rest is cut off before verification. With
            none, the tree is dropped: its proposer hears nothing.
        branch: run the lookahead branch as a forward of its own.
        num_top: tell the request so many likeliest tokens, of steps without a tree, too. Which follow the argmax is of
            no matter.
    """
    context = [*prompt, model(prompt)]
    while len(context) < len(prompt) + length:
        array = np.array(context, np.int32)
        if branch:
            comb = request.propose_branch(array, budget())  # type: ignore[attr-defined]
            if len(comb):
                request.observe_branch(comb, argmax_of(model, context, comb))  # type: ignore[attr-defined]
        limit = budget()
        tree = request.propose(array, limit)
        tree.validate()
        assert len(tree) <= limit
        num_nodes = min(len(tree), keep(len(tree)))
        argmax = argmax_of(model, context, tree.prefix(num_nodes))
        path = tree.walk(argmax)
        emitted = [*tree.token_ids[path].tolist(), int(argmax[path[-1] + 1 if len(path) else 0])]
        if num_nodes or num_top:
            top = argmax[:, None] + np.arange(num_top, dtype=np.int32) if num_top else None
            seen = tree if num_nodes else DraftTree.empty()
            request.observe(seen, Verified(np.array(emitted, np.int32), path, argmax, num_nodes, top))
        yield Step(list(context), tree, num_nodes, emitted)
        context += emitted
