"""CUDA's worker and runner on a machine without a GPU: what they import, and what they tell vLLM.

What they compute is tested in Triton's interpreter (``tests/v2/test_cuda_path.py``).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import vllm.v1.worker.cpu.shm  # noqa: F401 - vLLM on a CPU needs it before its V2 modules
from kernel_runs import compiles, launched_nowhere
from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from proposers import DraftTree
from vllm_lookahead import plugin
from vllm_lookahead.attention import flash
from vllm_lookahead.attention.flash import TreeFlashAttentionMetadataBuilder
from vllm_lookahead.attention.packing import TreePacker
from vllm_lookahead.contract import UnsupportedVLLMError
from vllm_lookahead.trees.step import StepTrees
from vllm_lookahead.v2 import cuda_runner, cuda_worker
from vllm_lookahead.v2.cuda_runner import LookaheadCUDARunner
from vllm_lookahead.v2.runner import LookaheadV2RunnerMixin

CUDA_ONLY = ("attention.flash", "attention.packing", "attention.triton_tree", "v2.cuda_runner", "v2.kernels.walk")


def test_nothing_of_cudas_is_imported_on_a_cpu() -> None:
    """Every module that a CPU engine or a command line loads."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import vllm_lookahead.cli, vllm_lookahead.v1.cpu_worker, vllm_lookahead.drafting.drafter, vllm_lookahead.plugin
vllm_lookahead.plugin.register()
loaded = [name for name in {CUDA_ONLY!r} if "vllm_lookahead." + name in sys.modules]
assert not loaded, loaded
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_plugin_names_this_worker() -> None:
    assert plugin.WORKERS["cuda", "v2"] == f"{cuda_worker.__name__}.{cuda_worker.CUDALookaheadWorker.__name__}"
    assert ("cuda", "v1") not in plugin.WORKERS


def test_everything_that_a_device_has_to_do_is_there() -> None:
    missing = {
        name
        for name, function in vars(LookaheadV2RunnerMixin).items()
        if "NotImplementedError" in getattr(getattr(function, "__code__", None), "co_names", ())
    }
    assert len(missing) > 5
    assert missing <= vars(LookaheadCUDARunner).keys()


def worker(**attributes: Any) -> cuda_worker.CUDALookaheadWorker:
    """A worker that nobody has initialised."""
    made = object.__new__(cuda_worker.CUDALookaheadWorker)
    vars(made).update(attributes)
    return made


def test_model_runner_v1_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_worker, "check_contract", lambda runner: None)
    with pytest.raises(UnsupportedVLLMError, match="needs Model Runner V2"):
        worker(use_v2_model_runner=False)._make_model_runner()


def test_drafting_is_prepared_before_vllm_reports_compilations(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    monkeypatch.setattr(Worker, "_maybe_activate_jit_monitor", lambda self: order.append("monitor"))
    runner = SimpleNamespace(prepare_drafting=lambda: order.append("drafting"))
    worker(model_runner=runner)._maybe_activate_jit_monitor()
    assert order == ["drafting", "monitor"]


@compiles
@pytest.mark.parametrize("most", [1, 2, 48, 123, 1024])
def test_warm_up_compiles_for_the_largest_tree_of_the_engine(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask has a word for 32 nodes, and the walk a thread or more for each."""
    monkeypatch.setattr(LookaheadV2RunnerMixin, "prepare_drafting", lambda self: self.warm_up_trees())
    buffers = SimpleNamespace(input_ids=torch.zeros(4096).int(), positions=torch.zeros(4096).long())
    cpu = torch.device("cpu")
    packer = TreePacker(cpu, 4096, 3, most)
    runner = object.__new__(LookaheadCUDARunner)
    vars(runner).update(
        device=cpu, input_buffers=buffers, num_speculative_steps=most, _packer=packer, _texts={}, _graph=None
    )
    tree = DraftTree.from_parents(range(most), [max(-1, i - 2) for i in range(most)])
    tokens = tree.token_ids.tolist()
    step = StepTrees.build(["a", "b", "c"], {"a": tokens, "b": tokens[:1], "c": tokens}, {"a": tree, "c": tree})
    query_start = np.array([0, most + 1, most + 3, 2 * most + 4], np.int32)
    batch: Any = SimpleNamespace(
        query_start_loc_np=query_start,
        query_start_loc=torch.from_numpy(query_start),
        seq_lens=torch.full((3,), 2000).int(),
        **vars(buffers),
    )
    monkeypatch.setattr(LookaheadCUDARunner, "seq_lens", lambda self, step, batch: batch.seq_lens.numpy())
    runner._builders = []
    with launched_nowhere() as compiled_for:
        runner.prepare_drafting()
        warm = dict(compiled_for)
        runner.place_drafts(step, batch)
        runner.serve_trees(step, batch)
        for forbidden in (None, torch.zeros(2 * most + 4, dtype=torch.bool)):
            runner.walk(torch.zeros(2 * most + 4, dtype=torch.int64), forbidden)
        assert {name: keys for name, keys in compiled_for.items() if name in warm} == warm
        assert most == 1 or compiled_for.keys() == {"place_kernel", "place_tokens_kernel", "walk_kernel"} == warm.keys()


def test_the_backend_is_replaced_for_our_model_only(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = AttentionBackendEnum.FLASH_ATTN.get_path()
    seen = []
    monkeypatch.setattr(Worker, "load_model", lambda self: seen.append(AttentionBackendEnum.FLASH_ATTN.get_path()))
    worker().load_model()
    assert seen == [cuda_worker.BACKEND]
    assert AttentionBackendEnum.FLASH_ATTN.get_path() == stock


def test_the_backend_is_flash_attention_for_everybody_else() -> None:
    backend = flash.TreeFlashAttentionBackend
    assert backend.get_name() == "FLASH_ATTN"
    assert issubclass(backend, FlashAttentionBackend)
    assert f"{flash.__name__}.{backend.__name__}" == cuda_worker.BACKEND


@pytest.mark.parametrize("splitting", [True, False], ids=["piecewise compilation", "whole"])
@pytest.mark.parametrize("asked", list(CUDAGraphMode), ids=lambda mode: mode.name)
def test_no_full_graph_ever_stands_for_a_step_with_trees(
    asked: CUDAGraphMode, splitting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")

    if not splitting and asked.requires_piecewise_compilation():
        pytest.skip("vLLM refuses this by itself")
    config = CompilationConfig(mode=CompilationMode.VLLM_COMPILE, cudagraph_capture_sizes=[1, 2, 8])
    config.cudagraph_mode = asked
    monkeypatch.setattr(CompilationConfig, "splitting_ops_contain_attention", lambda self: splitting)
    support = TreeFlashAttentionMetadataBuilder.get_cudagraph_support(None, None)  # type: ignore[arg-type]
    mode = config.resolve_cudagraph_mode_and_sizes(support, "ours", 1)
    assert mode.mixed_mode() != CUDAGraphMode.FULL, "of all batches"
    assert mode.has_full_cudagraphs() == asked.has_full_cudagraphs(), "steps without drafts keep theirs"


def test_vllms_full_graphs_are_for_steps_without_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    monkeypatch.setattr(
        LookaheadV2RunnerMixin, "initialize_kv_cache", lambda self, config: lengths.append(self.decode_query_len)
    )
    runner = object.__new__(LookaheadCUDARunner)
    runner.decode_query_len, runner.trees_verifiable = 49, False
    runner.initialize_kv_cache(None)
    assert lengths == [1], "what vLLM captures graphs for"
    assert runner.decode_query_len == 49, "what a request's logits take at most"


def test_memory_is_set_aside_for_the_logits_of_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    runner = object.__new__(LookaheadCUDARunner)
    monkeypatch.setattr(GPUModelRunner, "_dummy_sampler_run", lambda self, hidden_states: None)

    def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return hidden

    vars(runner).update(
        max_num_tokens=8192,
        max_num_reqs=16,
        num_speculative_steps=64,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8192),
        model=SimpleNamespace(compute_logits=compute_logits),
        drafter=SimpleNamespace(config=SimpleNamespace(budget="auto")),
    )
    for rows in (1, 16, 100, 256, 5000):
        limit = runner.node_limit(rows)
        assert 0 <= limit <= 64
        assert rows * (1 + limit) <= max(rows, cuda_runner.MOST_LOGITS)
        assert rows * (1 + limit) <= max(rows, 8192 // 4), "drafts leave room for prompts"
    assert runner.node_limit(16) == 64
    for rows in (1, 16, 256):
        runner.max_num_reqs = rows
        runner._dummy_sampler_run(torch.zeros(3, 8))
        assert sizes[-1] >= rows * (1 + runner.node_limit(rows))
        assert sizes[-1] <= cuda_runner.MOST_LOGITS
