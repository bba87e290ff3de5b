"""Tree rows in FlashAttention's place: vLLM's own metadata builder and layer code, over plain torch instead of CUDA.

The Triton kernel has tests of its own (``test_triton_tree.py``) and is replaced by a reference here; all of it together
runs in ``tests/v2/test_cuda_path.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1]))

import flash_on_cpu
from kernel_checks import Batch, dense, pack, random_batch, random_qkv, random_tree, tree_mask
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import fa_utils, flash_attn

from vllm_lookahead.attention import flash
from vllm_lookahead.attention.packing import PackedTrees
from vllm_lookahead.attention.triton_tree import Prefix
from vllm_lookahead.trees.rows import TreeRows
from vllm_lookahead.trees.step import StepTrees

HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 4, 2, 32, 16
SCALE = HEAD_SIZE**-0.5


def reference_tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    trees: PackedTrees,
    scale: float,
    output: torch.Tensor,
    prefix: Prefix | None = None,
) -> None:
    """What the Triton kernel computes."""
    bits = np.unpackbits(trees.mask.numpy().view(np.uint8), axis=1, bitorder="little").astype(np.bool_)
    for row, length in enumerate(trees.prefixes.tolist()):
        packed = slice(int(trees.offsets[row]), int(trees.offsets[row + 1]))
        tokens = trees.tokens[packed]
        sees = torch.from_numpy(bits[packed, : len(tokens)])
        part, lse = dense(query[tokens], key[tokens], value[tokens], sees, scale)
        if prefix is not None and length:
            before = prefix.lse[:, packed].double()
            weight = torch.sigmoid(before - lse).T[..., None]
            part = weight * prefix.output[packed].double() + (1 - weight) * part
        output[tokens] = part.to(output.dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Torch in the place of CUDA; records the arguments of every call of FlashAttention."""
    made: list[dict[str, Any]] = []

    def flash_attn_varlen_func(**arguments: Any) -> Any:
        made.append(arguments)
        return flash_on_cpu.flash_attn_varlen_func(**arguments)

    stand_ins = {**flash_on_cpu.STAND_INS, "flash_attn_varlen_func": flash_attn_varlen_func}
    for module in (fa_utils, flash_attn):
        for name, function in stand_ins.items():
            monkeypatch.setattr(module, name, function, raising=False)
    monkeypatch.setattr(flash, "tree_attention", reference_tree_attention)
    return made


@pytest.fixture
def impl(calls: list[dict[str, Any]]) -> flash.TreeFlashAttentionImpl:
    return flash.TreeFlashAttentionImpl(HEADS, HEAD_SIZE, SCALE, KV_HEADS, None, None, "auto")


def new_builder(*, schedules: bool = False) -> flash.TreeFlashAttentionMetadataBuilder:
    """A builder with what vLLM's ``build`` reads; the real constructor wants a whole engine.

    ``schedules``: as with FlashAttention 3.
    """
    builder = object.__new__(flash.TreeFlashAttentionMetadataBuilder)
    vars(builder).update(
        aot_schedule=schedules,
        aot_sliding_window=(-1, -1) if schedules else None,
        block_size=BLOCK_SIZE,
        cache_config=SimpleNamespace(cache_dtype="auto"),
        dcp_world_size=1,
        kv_cache_dtype=torch.float32,
        dummy_trees=None,
        headdim=HEAD_SIZE,
        kv_cache_spec=SimpleNamespace(sliding_window=None),
        max_cudagraph_size=None,
        max_num_splits=0,
        mm_prefix_query_ranges_np=None,
        model_config=SimpleNamespace(is_mm_prefix_lm=False),
        num_heads_kv=KV_HEADS,
        num_heads_q=HEADS,
        rswa_window=None,
        trees=None,
        use_full_cuda_graph=False,
    )
    return builder


def run(
    impl: flash.TreeFlashAttentionImpl, batch: Batch, seed: int, *, trees: bool = True, schedules: bool = False
) -> tuple[torch.Tensor, torch.Tensor, flash.FlashAttentionMetadata]:
    """Attention for a batch through vLLM's code, and what it should be; root and nodes see a tree, others a chain."""
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    starts, rows = batch.query_start, len(batch.prefixes)
    total = int(starts[-1])
    lengths = np.diff(starts)
    before = lengths - 1 - np.diff(batch.step.starts) * batch.step.branched
    before[~batch.step.branched] = lengths[~batch.step.branched] - 1
    # the chains' tokens and those before a root count as computed in this step
    contexts = batch.prefixes - np.where(batch.step.branched, before, 0)
    ends = contexts + lengths
    most = int(-(-ends.max() // BLOCK_SIZE))
    table = torch.from_numpy(rng.permutation(rows * most).reshape(rows, most).astype(np.int32))
    cache = torch.full((rows * most, BLOCK_SIZE, KV_HEADS, 2 * HEAD_SIZE), torch.nan).transpose(1, 2)
    query, key, value = random_qkv(generator, total, HEADS, KV_HEADS, HEAD_SIZE, torch.float32)
    slots, history = [], []
    for row in range(rows):
        positions = torch.arange(int(ends[row]))
        slot = table[row, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        old = random_qkv(generator, int(contexts[row]), HEADS, KV_HEADS, HEAD_SIZE, torch.float32)[1:]
        impl.do_kv_cache_update(LAYER, *old, cache, slot[: int(contexts[row])])
        slots.append(slot[int(contexts[row]) :])
        history.append(old)
    slot_mapping = torch.cat(slots)
    impl.do_kv_cache_update(LAYER, key, value, cache, slot_mapping)
    common = CommonAttentionMetadata(
        query_start_loc=torch.from_numpy(starts),
        query_start_loc_cpu=torch.from_numpy(starts),
        seq_lens=torch.from_numpy(ends.astype(np.int32)),
        num_reqs=rows,
        num_actual_tokens=total,
        max_query_len=int(lengths.max()),
        max_seq_len=int(ends.max()),
        block_table_tensor=table,
        slot_mapping=slot_mapping,
    )
    builder = new_builder(schedules=schedules)
    builder.trees = pack(batch, torch.device("cpu")) if trees else None
    metadata = builder.build(0, common)
    assert builder.trees is None, "trees are good for one step"
    output = torch.full((total, HEADS, HEAD_SIZE), torch.nan)
    assert impl.forward(LAYER, query, key, value, cache, metadata, output) is output

    expected = torch.empty_like(output, dtype=torch.float64)
    tree_of = {int(row): i for i, row in enumerate(batch.trees.rows)}
    for row in range(rows):
        mine = slice(int(starts[row]), int(starts[row + 1]))
        length, context = mine.stop - mine.start, int(contexts[row])
        among = torch.ones(length, length, dtype=torch.bool).tril()
        if row in tree_of and trees:
            own = tree_mask(batch.trees, tree_of[row])
            among[-len(own) :, -len(own) :] = own
        sees = torch.cat((torch.ones(length, context, dtype=torch.bool), among), 1)
        old_key, old_value = history[row]
        expected[mine] = dense(
            query[mine], torch.cat((old_key, key[mine])), torch.cat((old_value, value[mine])), sees, SCALE
        )[0]
    return output, expected, metadata


LAYER = SimpleNamespace(_q_scale=torch.ones(1), _k_scale=torch.ones(1), _v_scale=torch.ones(1))


@pytest.mark.parametrize("seed", range(12))
def test_a_batch_of_everything(seed: int, impl: flash.TreeFlashAttentionImpl) -> None:
    """Trees, prompts, chains and single tokens; some rows also compute tokens before their root."""
    batch = random_batch(np.random.default_rng(seed), 6, 30)
    output, expected, metadata = run(impl, batch, seed)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=3e-6)
    assert isinstance(metadata, flash.TreeFlashAttentionMetadata)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_but_trees_needs_no_call_for_the_rest(
    seed: int, impl: flash.TreeFlashAttentionImpl, calls: list[dict[str, Any]]
) -> None:
    batch = random_batch(np.random.default_rng(seed), 3, 40, mixed=False)
    batch.prefixes[:] += 1
    batch.trees.prefixes[:] += 1
    output, expected, _ = run(impl, batch, seed)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=3e-6)
    (call,) = calls
    assert not call["causal"]
    assert call["return_softmax_lse"]
    assert call["max_seqlen_k"] == batch.prefixes.max(), "the root is the tree's"
    assert call["q"].data_ptr() != 0
    assert call["q"].shape[0] == len(batch.trees.tokens)
    assert call["q"]._is_view(), "neighbouring rows need no gathering"


@pytest.mark.parametrize("mixed", [False, True])
def test_both_calls_have_schedules_of_their_own(
    mixed: bool, impl: flash.TreeFlashAttentionImpl, calls: list[dict[str, Any]]
) -> None:
    """Made once for all layers; ``flash_on_cpu`` takes no other call's."""
    batch = random_batch(np.random.default_rng(1), 5, 20, mixed=mixed)
    output, expected, metadata = run(impl, batch, 1, schedules=True)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=3e-6)
    assert isinstance(metadata, flash.TreeFlashAttentionMetadata)
    assert len(calls) == 1 + mixed
    assert all(call["scheduler_metadata"] is not None for call in calls)
    assert calls[-1]["scheduler_metadata"] is metadata.tree_schedule


def test_no_row_has_a_prefix(impl: flash.TreeFlashAttentionImpl, calls: list[dict[str, Any]]) -> None:
    batch = random_batch(np.random.default_rng(3), 3, 20, mixed=False, most_prefix=1)
    assert batch.prefixes.max() == 0
    output, expected, _ = run(impl, batch, 3)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=3e-6)
    assert not calls


def test_without_trees_everything_is_vllms(
    impl: flash.TreeFlashAttentionImpl, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = random_batch(np.random.default_rng(0), 5, 20)
    output, expected, metadata = run(impl, batch, 0, trees=False)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=3e-6)
    assert type(metadata) is flash_attn.FlashAttentionMetadata
    (call,) = calls
    assert call["causal"] is True
    # and without metadata (a profiling run) too
    out = torch.ones(2, HEADS, HEAD_SIZE)
    assert impl.forward(LAYER, out, out, out, torch.empty(0), None, out) is out  # type: ignore[arg-type]
    assert not out.any()


def test_a_tree_row_is_cheap_for_the_stock_call(
    impl: flash.TreeFlashAttentionImpl, calls: list[dict[str, Any]]
) -> None:
    """It has no context there, unless it also computes tokens before its root."""
    tree = random_tree(np.random.default_rng(0), 5)
    names = ["tree", "tree with tokens before", "prompt"]
    step = StepTrees.build(names, dict.fromkeys(names[:2], tree.token_ids.tolist()), dict.fromkeys(names, tree))
    starts = np.array([0, 6, 15, 22], np.int32)
    prefixes = np.array([100, 53, 31])
    trees = TreeRows.of(step, starts, np.array([106, 59, 38], np.int32))
    assert trees is not None
    output, expected, _ = run(impl, Batch(step, starts, prefixes, trees), 0)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=3e-6)
    stock, ours = calls
    assert stock["seqused_k"].tolist() == [6, 59, 38]
    assert ours["seqused_k"].tolist() == [100, 53]


PROBLEMS = {
    "sliding-window attention": {"sliding_window": (127, 0)},
    "ALiBi positions": {"alibi_slopes": torch.ones(2)},
    "soft-capped attention scores": {"logits_soft_cap": 30.0},
    "attention sinks": {"sinks": torch.ones(2)},
    "layers that share a KV cache": {"kv_sharing_target_layer_name": "model.layers.0"},
    "a head size of 72, not a multiple of 16 up to 256": {"head_size": 72},
    "a head size of 512, not a multiple of 16 up to 256": {"head_size": 512},
    "FlashAttention version None": {"vllm_flash_attn_version": None},
    "FlashAttention version 4": {"vllm_flash_attn_version": 4},
    "context parallelism": {"total_cp_world_size": 2},
    "encoder attention": {"attn_type": "encoder"},
}


@pytest.mark.parametrize("reason", PROBLEMS)
def test_layers_that_cannot_verify_trees(reason: str, impl: flash.TreeFlashAttentionImpl) -> None:
    cache = torch.empty(0)
    assert flash.unsupported_reason(impl, new_builder(), cache, torch.float32) is None
    vars(impl).update(PROBLEMS[reason])
    assert flash.unsupported_reason(impl, new_builder(), cache, torch.float32) == reason


def test_engines_that_cannot_verify_trees(impl: flash.TreeFlashAttentionImpl, monkeypatch: pytest.MonkeyPatch) -> None:
    builder, cache = new_builder(), torch.empty(0, dtype=torch.uint8)
    impl.kv_cache_dtype = "fp8"
    assert flash.unsupported_reason(impl, builder, cache, torch.bfloat16) == "a KV cache of type fp8"
    cache = torch.empty(0)
    assert "takes no ancestor mask" in str(flash.unsupported_reason(object(), builder, cache, torch.float32))
    builder.rswa_window = 64
    assert "sliding-window" in str(flash.unsupported_reason(impl, builder, cache, torch.float32))
    builder.rswa_window, builder.model_config.is_mm_prefix_lm = None, True
    assert "within images" in str(flash.unsupported_reason(impl, builder, cache, torch.float32))
    # not setenv: vLLM caches its variables once an engine has started in this process
    monkeypatch.setitem(vars(flash.envs), "VLLM_BATCH_INVARIANT", True)
    assert "batch-invariant" in str(flash.unsupported_reason(impl, builder, cache, torch.float32))
