"""Full CUDA graphs of steps with trees, in a real engine: a replay sees what the capture's metadata points at.

``graphs_on_cpu`` says what stands for graphs here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import graphs_on_cpu
import pytest
import torch
from engine.cases import Encode
from engine.engines import TreeSpy, assert_same, engine, run, runner_of
from vllm import LLM

from vllm_lookahead.attention.flash import TreeFlashAttentionMetadataBuilder
from vllm_lookahead.attention.packing import TreePacker
from vllm_lookahead.v2 import self_check
from vllm_lookahead.v2.cuda_graphs import TreeGraphManager, is_tree_graph

from .conftest import SMALL
from .test_cuda_path import requests_of
from .test_exactness import TREES


@pytest.fixture(scope="module", autouse=True)
def graphs(cuda_runner: None) -> Iterator[None]:
    """CUDA's runner with functions for graphs."""
    with pytest.MonkeyPatch.context() as patch:
        graphs_on_cpu.use(patch)
        yield


@pytest.fixture(scope="module")
def in_graphs(demo_model: str, graphs: None) -> Iterator[LLM]:
    with engine(demo_model, TREES, **SMALL) as llm:
        yield llm


def test_replays_give_stock_vllms_output(in_graphs: LLM, stock: LLM, encode: Encode) -> None:
    """Batches grow and shrink, so that graphs of every size meet steps with fewer rows, tokens and masks."""
    manager = runner_of(in_graphs).cudagraph_manager
    assert isinstance(manager, TreeGraphManager)
    assert manager.tree_sizes == [2, 4, 8, 16, 32, 48], "6 requests of 7 tokens"
    runner_of(in_graphs)._dummy_run(20, skip_eplb=True)  # what it leaves behind is no step's
    assert [is_tree_graph(desc) for desc in manager.replays] == [True]
    requests = requests_of(encode, 6, 12)
    with TreeSpy.on(in_graphs) as spy:
        got = run(in_graphs, requests, in_flight=5)
    assert_same(run(stock, requests, in_flight=5), got, ["in graphs"] * len(requests))
    assert spy.verified >= 5
    assert spy.moved >= 1, "the KV commit had something to do"
    of_trees = {desc.num_tokens: times for desc, times in manager.replays.items() if is_tree_graph(desc)}
    assert len(of_trees) >= 3, of_trees
    assert any(desc.uniform_token_count == 1 for desc in manager.replays), "steps without drafts keep vLLM's graphs"


# ---- the check at start-up


def found_in(llm: LLM) -> str | None:
    """What the check says of an engine's layers."""
    runner = runner_of(llm)
    return self_check.graph_problem(runner._with_builders, torch.float32, runner._packer.tile_queries)


def test_nothing_is_found_where_nothing_is_wrong(in_graphs: LLM) -> None:
    assert found_in(in_graphs) is None


def own_schedule(self: Any, schedule: torch.Tensor) -> torch.Tensor:
    """Where no graph looks for it."""
    return schedule


def own_memory(self: TreePacker, *arguments: Any, packed: Any = TreePacker._captured) -> Any:
    """A mask at a new address in every step."""
    trees = packed(self, *arguments)
    return replace(trees, mask=trees.mask.clone())


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        ((TreeFlashAttentionMetadataBuilder, "_store_scheduler_metadata"), own_schedule),
        ((TreePacker, "_captured"), own_memory),
    ],
    ids=["schedule", "mask"],
)
def test_what_does_not_stay_in_its_place_is_found(
    place: tuple[Any, str], wrong: Any, in_graphs: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*place, wrong)
    found = str(found_in(in_graphs))
    assert "off by" in found or "another step's schedule" in found


def test_where_nothing_can_be_captured_trees_run_without_graphs(
    demo_model: str, stock: LLM, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those of vLLM stay."""

    def fail(run: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(self_check, "recorded", fail)
    requests = requests_of(encode, 2, 8)
    with engine(demo_model, TREES, **SMALL) as ours, TreeSpy.on(ours) as spy:
        manager = runner_of(ours).cudagraph_manager
        assert not isinstance(manager, TreeGraphManager)
        assert runner_of(ours).trees_verifiable
        got = run(ours, requests, in_flight=2)
        assert all(desc.uniform_token_count == 1 for desc in manager.replays)
    assert_same(run(stock, requests, in_flight=2), got, ["without"] * len(requests))
    assert spy.drafts_accepted >= 1
