"""The CUDA worker on a machine without a GPU: what it imports, what it relies on, and the switch it is behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from proposers import DraftTree
from vllm_lookahead import plugin
from vllm_lookahead.v1 import gpu_runner, gpu_worker
from vllm_lookahead.v1.branch import BranchRow
from vllm_lookahead.v1.gpu_runner import TREES_VARIABLE, LookaheadGPURunner, trees_are_off
from vllm_lookahead.v1.runner import LookaheadRunnerMixin

CUDA_ONLY = ("attention.flash", "attention.packing", "attention.triton_tree", "cuda_commit", "gpu_runner", "gpu_worker")


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TREES_VARIABLE, raising=False)


def test_nothing_of_cudas_is_imported_on_a_cpu() -> None:
    """Every module that a CPU engine or a command line loads."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import vllm_lookahead.cli, vllm_lookahead.v1.cpu_worker, vllm_lookahead.drafting.drafter, vllm_lookahead.plugin
vllm_lookahead.plugin.register()
loaded = [name for name in {CUDA_ONLY!r} if "vllm_lookahead." + name in sys.modules]
assert not loaded, loaded
import vllm_lookahead.v1.gpu_worker
lazy = [name for name in {CUDA_ONLY[:4]!r} if "vllm_lookahead." + name in sys.modules]
assert not lazy, lazy
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_plugin_names_this_worker() -> None:
    assert plugin.WORKERS["cuda"] == f"{gpu_worker.__name__}.{gpu_worker.GPULookaheadWorker.__name__}"
    assert gpu_worker.GPULookaheadWorker.runner_class is LookaheadGPURunner


def test_everything_that_a_device_has_to_do_is_there() -> None:
    for name, function in vars(LookaheadRunnerMixin).items():
        if "NotImplementedError" in getattr(getattr(function, "__code__", None), "co_names", ()):
            assert name in vars(LookaheadGPURunner), name


@pytest.mark.usefixtures("off")
def test_trees_have_to_be_asked_for() -> None:
    runner = object.__new__(LookaheadGPURunner)
    assert f"{TREES_VARIABLE}=1" in str(trees_are_off())
    assert runner.tree_support() == trees_are_off()


@pytest.mark.parametrize(("setting", "expected"), [("1", gpu_worker.BACKEND), ("0", None), ("", None)])
def test_the_backend_is_replaced_only_then(setting: str, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = AttentionBackendEnum.FLASH_ATTN.get_path()
    seen = []
    monkeypatch.setenv(TREES_VARIABLE, setting)
    monkeypatch.setattr(Worker, "load_model", lambda self: seen.append(AttentionBackendEnum.FLASH_ATTN.get_path()))
    object.__new__(gpu_worker.GPULookaheadWorker).load_model()
    assert seen == [expected or stock]
    assert AttentionBackendEnum.FLASH_ATTN.get_path() == stock


def test_the_backend_is_flash_attention_for_everybody_else() -> None:
    pytest.importorskip("triton")
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    from vllm_lookahead.attention import flash

    backend = flash.TreeFlashAttentionBackend
    assert backend.get_name() == "FLASH_ATTN"
    assert issubclass(backend, FlashAttentionBackend)
    assert f"{flash.__name__}.{backend.__name__}" == gpu_worker.BACKEND


@pytest.mark.parametrize("splitting", [True, False], ids=["piecewise compilation", "whole"])
@pytest.mark.parametrize("asked", list(CUDAGraphMode), ids=lambda mode: mode.name)
def test_no_full_graph_ever_stands_for_a_step_with_trees(
    asked: CUDAGraphMode, splitting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from vllm_lookahead.attention.flash import TreeFlashAttentionMetadataBuilder

    if not splitting and asked.requires_piecewise_compilation():
        pytest.skip("vLLM refuses this by itself")
    config = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_capture_sizes=[1, 2, 8])
    config.cudagraph_mode = asked
    monkeypatch.setattr(CompilationConfig, "splitting_ops_contain_attention", lambda self: splitting)
    support = TreeFlashAttentionMetadataBuilder.get_cudagraph_support(None, None)  # type: ignore[arg-type]
    mode = config.resolve_cudagraph_mode_and_sizes(support, "ours", 1)
    assert mode.mixed_mode() != CUDAGraphMode.FULL, "of all batches"
    assert mode.has_full_cudagraphs() == asked.has_full_cudagraphs(), "steps without drafts keep theirs"
    # what is uniform has one token per request: a tree row has at least three
    assert GPUModelRunner._is_uniform_decode(1, 1, 5, 5)
    assert not GPUModelRunner._is_uniform_decode(3, 1, 15, 5)


@pytest.mark.parametrize(("setting", "length"), [("1", 1), ("0", 29)])
def test_full_graphs_are_for_steps_without_drafts(setting: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(self: Any, vllm_config: Any, device: Any) -> None:
        self.uniform_decode_query_len = 29
        self.cudagraph_dispatcher = SimpleNamespace(uniform_decode_query_len=29)

    monkeypatch.setenv(TREES_VARIABLE, setting)
    monkeypatch.setattr(LookaheadRunnerMixin, "__init__", init)
    runner = LookaheadGPURunner(None, None)  # type: ignore[arg-type]
    assert runner.uniform_decode_query_len == length
    assert runner.cudagraph_dispatcher.uniform_decode_query_len == length


def test_memory_is_set_aside_for_the_logits_of_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    runner = object.__new__(LookaheadGPURunner)
    monkeypatch.setattr(GPUModelRunner, "_dummy_sampler_run", lambda self, hidden_states: hidden_states)
    vars(runner).update(
        max_num_tokens=8192,
        max_num_reqs=16,
        num_spec_tokens=64,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8192),
        model=SimpleNamespace(compute_logits=lambda hidden: hidden),
        tree_sampler=SimpleNamespace(argmax=lambda logits: sizes.append(logits.shape)),
        drafter=SimpleNamespace(config=SimpleNamespace(budget="auto")),
    )
    hidden = torch.zeros(3, 8)
    assert runner._dummy_sampler_run(hidden) is hidden
    runner.max_num_reqs = 256
    runner._dummy_sampler_run(hidden)
    assert sizes == [(16 * 65, 8), (gpu_runner.MOST_LOGITS, 8)]
    for rows in (1, 16, 100, 256, 5000):
        limit = runner._node_limit(rows)
        assert 0 <= limit <= 64
        assert rows * (1 + limit) <= max(rows, gpu_runner.MOST_LOGITS)
    assert runner._node_limit(16) == 64


def test_branches_run_in_passes_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[list[int]] = []

    def run_branches(runner: Any, rows: list[BranchRow], common: Any) -> list[int]:
        passes.append([row.row for row in rows])
        assert sum(len(row.comb) + 1 for row in rows) <= 100 or len(rows) == 1
        return passes[-1]

    monkeypatch.setattr(gpu_runner, "run_branches", run_branches)
    runner = object.__new__(LookaheadGPURunner)
    runner.max_num_tokens = 100
    sizes = [30, 40, 26, 1, 200, 99, 3]
    rows = [BranchRow(i, 50, 7, DraftTree.chain([1] * size)) for i, size in enumerate(sizes)]
    assert runner.run_branches(rows, None) == list(range(len(sizes)))  # type: ignore[arg-type]
    assert passes == [[0, 1, 2], [3], [4], [5], [6]]
