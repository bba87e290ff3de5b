"""Which full CUDA graphs of trees are captured, and which steps replay them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.v1.worker.cpu.shm  # noqa: F401 - vLLM on a CPU needs it before its V2 modules
from hypothesis import given
from hypothesis import strategies as st
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

from vllm_lookahead.v2 import cuda_runner, self_check
from vllm_lookahead.v2.cuda_graphs import MOST_TOKENS, SPACING, TreeGraphManager, is_tree_graph, tree_graph_sizes
from vllm_lookahead.v2.cuda_runner import LookaheadCUDARunner

VLLMS_SIZES = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: rank)
    monkeypatch.setattr(type(cudagraph_utils.current_platform), "_global_graph_pool", (0, 0))


def manager(
    rows: int, nodes: int, sizes: list[int] = VLLMS_SIZES, loras: list[int] | None = None, *, captured: bool = True
) -> TreeGraphManager:
    config: Any = SimpleNamespace(
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=sizes[-1]),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
        scheduler_config=SimpleNamespace(max_num_seqs=rows),
        speculative_config=None,
    )
    mode = CUDAGraphMode.FULL_AND_PIECEWISE
    made = TreeGraphManager(config, torch.device("cpu"), mode, loras or [0], nodes)
    made._graphs_captured = captured
    return made


@given(st.sets(st.integers(1, 600), min_size=1), st.integers(2, 600))
def test_a_few_sizes_that_reach_as_far_as_they_have_to(sizes: set[int], most: int) -> None:
    chosen = tree_graph_sizes(sizes, most)
    assert set(chosen) <= sizes - {1}
    assert chosen == sorted(chosen)
    for size in sizes - {1}:
        if size < max(chosen, default=0) and size not in chosen:
            assert SPACING * size < (SPACING + 1) * max(other for other in chosen if other < size)
    assert max(chosen, default=0) >= min(most, max(sizes - {1}, default=0)) * SPACING / (SPACING + 1)
    assert sum(size >= most for size in chosen) <= 1


def test_vllms_sizes() -> None:
    sizes = tree_graph_sizes(VLLMS_SIZES, MOST_TOKENS)
    assert sizes[:8] == [2, 4, 8, 16, 24, 32, 40, 48]
    assert sizes[-1] == 272, "the first that holds the most"
    assert len(sizes) <= 22
    assert tree_graph_sizes(VLLMS_SIZES, 65)[-1] == 72, "one request of 64 nodes"


def test_steps_find_their_graphs() -> None:
    graphs = manager(16, 64)

    def found(rows: int, tokens: int, uniform: int | None, longest: int | None) -> tuple[str, int, int | None]:
        desc = graphs.dispatch(rows, tokens, uniform, 0, max_query_len=longest)
        return ("trees" if is_tree_graph(desc) else desc.cg_mode.name), desc.num_tokens, desc.num_reqs

    assert found(3, 3, 1, 1) == ("FULL", 4, 4), "no drafts"
    assert found(16, 16, 1, 1) == ("FULL", 16, 16)
    assert found(1, 2, 2, 2) == ("trees", 2, 2)
    assert found(1, 65, 65, 65) == ("trees", 72, 16)
    assert found(3, 65, None, 40) == ("trees", 72, 16)
    assert found(4, 20, 5, 5) == ("trees", 24, 16), "as many each"
    assert found(16, 264, None, 65) == ("trees", 272, 16)
    assert found(16, 273, None, 65) == ("PIECEWISE", 288, None), "too many"
    assert found(3, 65, None, None) == ("PIECEWISE", 72, None), "a prompt among them"
    assert found(1, 8, 8, None) == ("PIECEWISE", 8, None), "a short prompt"
    assert found(2, 600, None, 65) == ("NONE", 600, 2)


def test_a_step_without_drafts_never_takes_a_graph_of_trees() -> None:
    """Not even where vLLM has none: stock runs it piecewise."""
    graphs = manager(6, 20)
    for rows in range(1, 7):
        desc = graphs.dispatch(rows, rows, 1, 0, max_query_len=1)
        assert not is_tree_graph(desc)
    assert graphs.dispatch(5, 5, 1, 0, max_query_len=1).cg_mode == CUDAGraphMode.PIECEWISE


def test_before_they_are_captured_nothing_is_found() -> None:
    assert manager(4, 20, captured=False).dispatch(2, 9, None, 0, max_query_len=8).cg_mode == CUDAGraphMode.NONE


def test_each_number_of_adapters_has_its_own() -> None:
    graphs = manager(8, 20, loras=[0, 1, 3])
    for active, case in ((0, 0), (1, 1), (2, 3), (3, 3)):
        desc = graphs.dispatch(2, 9, None, active, max_query_len=8)
        assert is_tree_graph(desc)
        assert desc.num_active_loras == case


@pytest.mark.parametrize(
    ("rows", "nodes", "sizes"), [(1, 64, VLLMS_SIZES), (6, 6, [1, 2, 4, 100]), (256, 16, VLLMS_SIZES)]
)
def test_vllm_captures_them(rows: int, nodes: int, sizes: list[int]) -> None:
    """Largest first, each once, all of those that a step can find; its dummy batches fit in."""
    graphs = manager(rows, nodes, sizes)
    descs = graphs._capture_descs[CUDAGraphMode.FULL]
    assert [desc.num_tokens for desc in descs] == sorted((desc.num_tokens for desc in descs), reverse=True)
    assert len(set(descs)) == len(descs)
    of_trees = [desc for desc in descs if is_tree_graph(desc)]
    assert sorted(desc.num_tokens for desc in of_trees) == graphs.tree_sizes
    assert any(desc.uniform_token_count == 1 for desc in descs)
    buffers = InputBuffers(max_num_reqs=rows, max_num_tokens=sizes[-1], device=torch.device("cpu"))
    for desc in of_trees:
        assert desc.num_reqs is not None
        InputBatch.make_dummy(desc.num_reqs, desc.num_tokens, buffers, max_query_len=desc.max_query_len)
    for tokens in range(2, min(graphs.tree_sizes[-1], MOST_TOKENS) + 1):
        for step in {1, min(rows, tokens - 1)}:
            desc = graphs.dispatch(step, tokens, None, 0, max_query_len=min(tokens, nodes + 1))
            assert desc in of_trees


# ---- whether there are any


def runner(mode: CUDAGraphMode, *versions: int) -> LookaheadCUDARunner:
    made = object.__new__(LookaheadCUDARunner)
    vars(made).update(
        _layers=[SimpleNamespace(impl=SimpleNamespace(vllm_flash_attn_version=version)) for version in versions],
        _builders=[SimpleNamespace(dummy_trees=None)],
        _packer=SimpleNamespace(tile_queries=8),
        _with_builders=[],
        cudagraph_manager=SimpleNamespace(cudagraph_mode=mode),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        lora_capture_cases=[0],
        num_speculative_steps=6,
        vllm_config=None,
    )
    return made


@pytest.mark.parametrize("mode", list(CUDAGraphMode), ids=lambda mode: mode.name)
def test_only_where_vllm_captures_decoding(mode: CUDAGraphMode) -> None:
    reason = runner(mode, 3)._why_no_tree_graphs()
    if mode in (CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.FULL_DECODE_ONLY):
        assert reason is None
    else:
        assert reason == f"vLLM's mode is {mode.name}"


def test_only_with_flash_attention_3() -> None:
    assert runner(CUDAGraphMode.FULL_AND_PIECEWISE, 2, 2)._why_no_tree_graphs() == "they need FlashAttention 3, not 2"


@pytest.mark.parametrize("problem", [None, "a replay is off by 1"])
def test_what_the_check_finds_decides(problem: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "graph_problem", lambda *arguments: problem)
    monkeypatch.setattr(cuda_runner, "TreeGraphManager", lambda *arguments: SimpleNamespace(tree_sizes=[2, 4]))
    monkeypatch.setattr(cuda_runner, "get_tp_group", lambda: SimpleNamespace(world_size=1))
    made = runner(CUDAGraphMode.FULL_AND_PIECEWISE, 3, 3)
    stock = made.cudagraph_manager
    made._capture_trees()
    (builder,) = made._builders
    assert (made.cudagraph_manager is stock) == (problem is not None)
    assert (builder.dummy_trees is None) == (problem is not None)


def test_a_device_without_graphs_has_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever goes wrong in the check: the engine starts."""
    layer = SimpleNamespace(impl=SimpleNamespace(num_heads=1), kv_cache=torch.zeros(1, 1, 16, 32))
    reason = self_check.graph_problem([(layer, None)], torch.float32, 8)
    assert str(reason).startswith("it can't be captured on this device (")
