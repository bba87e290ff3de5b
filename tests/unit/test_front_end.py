"""Who may share with whom: as vLLM's prefix cache decides it."""

from __future__ import annotations

from itertools import combinations

import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from vllm_lookahead.drafting.request_info import NAMESPACE, PREDICTION, request_info
from vllm_lookahead.front_end import namespace_of

ADAPTERS = (None, LoRARequest("one", 1, "/one"), LoRARequest("two", 2, "/one"), LoRARequest("one", 1, "/moved"))


def test_salt_and_adapter_tell_namespaces_apart() -> None:
    keys = [(salt, adapter) for salt in (None, "a", "b", '", ["one", "/one"]') for adapter in ADAPTERS]
    names = [namespace_of(*key) for key in keys]
    for one, other in combinations(names, 2):
        assert one != other
    assert names == [namespace_of(*key) for key in keys]


def test_without_salt_and_adapter_all_share() -> None:
    assert namespace_of(None, None) == namespace_of("", None) == ""


def test_a_salt_does_not_show() -> None:
    assert "secret" not in namespace_of("secret", None)


@pytest.mark.parametrize("params", [None, SamplingParams(), SamplingParams(extra_args={"other": 1})])
def test_a_request_that_came_another_way_shares_with_nobody(params: SamplingParams | None) -> None:
    info = request_info(params)
    assert info.namespace is None
    assert info.prediction is None


def test_what_the_front_end_wrote_is_read() -> None:
    info = request_info(SamplingParams(extra_args={NAMESPACE: "x", PREDICTION: [1, 2]}))
    assert info.namespace == "x"
    assert info.prediction is not None
    assert info.prediction.tolist() == [1, 2]
