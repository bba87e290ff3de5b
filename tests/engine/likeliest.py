"""What proposers are told of the target model, next to what transformers says of the same tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from vllm import LLM

from .engines import runner_of

CLOSE = 1e-3
"""Logits that are nearer to each other than this may change places."""


@dataclass
class TopSpy:
    """Watches what an engine's proposers are told.

    Attributes:
        told: for every root and node the tokens up to it, and ``Verified.top``'s row.
        without_tree: how many of them are roots of steps without a tree.
    """

    told: list[tuple[list[int], list[int]]] = field(default_factory=list)
    without_tree: int = 0

    @classmethod
    @contextlib.contextmanager
    def on(cls, llm: LLM) -> Iterator[TopSpy]:
        """Watch an engine within a block, on either of vLLM's model runners."""
        spy, drafter = cls(), runner_of(llm).drafter
        propose, observe = drafter.propose_tree, drafter.observe
        contexts: dict[str, list[int]] = {}

        def watch_propose(req_id: str, context: Any, *arguments: Any, **options: Any) -> Any:
            contexts[req_id] = context.tolist()
            return propose(req_id, context, *arguments, **options)

        def watch_observe(req_id: str, tree: Any, verified: Any) -> None:
            if req_id in contexts:
                spy._note(contexts.pop(req_id), tree, verified)
            observe(req_id, tree, verified)

        drafter.propose_tree, drafter.observe = watch_propose, watch_observe
        try:
            yield spy
        finally:
            del drafter.propose_tree, drafter.observe

    def _note(self, context: list[int], tree: Any, verified: Any) -> None:
        assert verified.top.shape[0] == verified.num_nodes + 1
        assert verified.top.dtype == np.int32
        self.without_tree += verified.num_nodes == 0
        texts = [context]
        for token, parent in zip(tree.token_ids[: verified.num_nodes], tree.parents, strict=False):
            texts.append([*texts[parent + 1], int(token)])
        self.told += zip(texts, verified.top.tolist(), strict=True)

    def assert_it_is_the_models(self, model: str, at_least: int) -> None:
        """All that was told is what transformers says."""
        assert len(self.told) >= at_least
        target = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        with torch.inference_mode():
            for text, top in self.told:
                logits = target(torch.tensor([text])).logits[0, -1]
                values, tokens = logits.topk(len(top))
                assert torch.allclose(logits[top], values, rtol=0, atol=CLOSE), (top, tokens)
                if values[0] - values[1] > 2 * CLOSE:
                    assert top[0] == int(tokens[0])
