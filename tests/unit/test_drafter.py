"""The drafter shields the engine from proposers that hang. Other faults: ``tests/engine/test_lifecycle.py``."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
from vllm.engine.arg_utils import EngineArgs

from proposers import NO_INFO, DraftTree, Proposer, RequestInfo, RequestProposer, registry
from vllm_lookahead import plugin
from vllm_lookahead.drafting.drafter import MOST_TIMEOUTS, Drafter

CONTEXT = np.arange(8, dtype=np.int32)


class SlowProposer(Proposer):
    """Takes a second for requests whose name begins with "slow"."""

    time_limit = 0.25
    asked: ClassVar[list[str]] = []

    def start(self, request_id: str, prompt: Any, info: RequestInfo = NO_INFO) -> RequestProposer:
        return SlowRequest(request_id)


class SlowRequest(RequestProposer):
    def __init__(self, request_id: str) -> None:
        self.request_id = request_id

    def propose(self, context: Any, budget: int) -> DraftTree:
        SlowProposer.asked.append(self.request_id)
        if self.request_id.startswith("slow"):
            time.sleep(1.0)
        return DraftTree.chain([7])


@pytest.fixture
def config(model: str) -> Iterator[Any]:
    """vLLM's config for an engine with the slow proposer."""
    plugin.register()
    registry.register("slow_in_tests")(SlowProposer)
    SlowProposer.asked.clear()
    args = EngineArgs(model=model, skip_tokenizer_init=True, speculative_config={"method": "slow_in_tests"})
    yield args.create_engine_config()
    del registry._registered["slow_in_tests"]


def propose(drafter: Drafter, request_id: str) -> list[int] | None:
    tree = drafter.propose_tree(request_id, CONTEXT, 4, 8, 8)
    return None if tree is None else tree.token_ids.tolist()


def test_a_request_whose_proposal_hangs_goes_on_without_drafts(config: Any, caplog: pytest.LogCaptureFixture) -> None:
    drafter = Drafter(config)
    assert propose(drafter, "fast") == [7]
    assert propose(drafter, "slow") is None
    assert propose(drafter, "slow") is None
    assert SlowProposer.asked.count("slow") == 1, "it isn't asked again"
    assert propose(drafter, "fast") == [7], "others are"
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert "no answer within 0.25 seconds" in str(errors[0].exc_info and errors[0].exc_info[1])


def test_a_proposer_that_hangs_again_and_again_is_given_up(config: Any, caplog: pytest.LogCaptureFixture) -> None:
    drafter = Drafter(config)
    assert propose(drafter, "fast") == [7]
    for i in range(MOST_TIMEOUTS):
        assert propose(drafter, f"slow {i}") is None
    asked = len(SlowProposer.asked)
    assert propose(drafter, "fast") is None
    assert propose(drafter, "another") is None
    assert len(SlowProposer.asked) == asked
    assert f"took too long {MOST_TIMEOUTS} times; it is not asked any more" in caplog.text


def test_ranks_of_a_tensor_parallel_group_do_not_look_at_their_clocks(config: Any) -> None:
    config.parallel_config.tensor_parallel_size = 2
    assert propose(Drafter(config), "slow") == [7]
