"""CUDA's runner on a machine without a GPU, with its kernels in Triton's interpreter.

vLLM's FlashAttention functions are replaced by plain torch; the runner, the metadata builder, the attention layer, the
kernels, the packing and the KV commit are CUDA's. Slow, in float32 exact, good for small models.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm.v1.worker.cpu.shm  # noqa: F401 - vLLM on a CPU needs it before its V2 modules
from vllm.v1.attention.backends import fa_utils, flash_attn
from vllm.v1.worker.cpu.model_runner import CPUModelRunner

from vllm_lookahead import plugin
from vllm_lookahead.v2.cpu_worker import CPULookaheadV2Worker
from vllm_lookahead.v2.cuda_runner import LookaheadCUDARunner
from vllm_lookahead.v2.cuda_worker import BACKEND

FA_VERSION = 2


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    block_table: torch.Tensor,
    max_seqlen_q: int = 0,
    out: torch.Tensor | None = None,
    return_softmax_lse: bool = False,
    scheduler_metadata: torch.Tensor | None = None,
    num_splits: int = 0,
    **_: Any,
) -> Any:
    """What vLLM's function of this name computes over a paged cache, one sequence after the other.

    FlashAttention 3 leaves out rows that are not in its schedule; here a schedule that isn't this call's is an error.

    Args:
        q: [tokens, heads, head_size].
        k: [blocks, block_size, kv_heads, head_size].
        v: [blocks, block_size, kv_heads, head_size].
        cu_seqlens_q: int32 [rows + 1].
        seqused_k: int32 [rows].
        softmax_scale: factor of the scores.
        causal: the last query sees all keys, the one before it one less.
        block_table: int32 [rows, most blocks].
        max_seqlen_q: at least as many as a sequence has queries.
        out: [tokens, heads, head_size], written if given.
        return_softmax_lse: also return the log-sum-exp, float32 [heads, tokens].
        scheduler_metadata: what ``get_scheduler_metadata`` returned.
        num_splits: as it was for ``get_scheduler_metadata``.
    """
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
    if scheduler_metadata is not None:
        expected = _schedule(cu_seqlens_q, seqused_k, max_seqlen_q, causal, num_splits)
        assert torch.equal(scheduler_metadata, expected), "another step's schedule"
    out = torch.empty_like(q) if out is None else out
    lse = torch.full((q.shape[1], q.shape[0]), torch.inf)  # as FlashAttention 2 has it where there are no keys
    per_kv = q.shape[1] // k.shape[2]
    starts = cu_seqlens_q.tolist()
    for row, keys in enumerate(seqused_k.tolist()):
        here = slice(starts[row], starts[row + 1])
        length = here.stop - here.start
        if keys == 0:
            out[here] = 0
            continue
        blocks = block_table[row, : -(-keys // k.shape[1])].long()
        key, value = (
            part[blocks].flatten(0, 1)[:keys].repeat_interleave(per_kv, 1).to(torch.float32) for part in (k, v)
        )
        scores = torch.einsum("ihd,jhd->hij", q[here].to(torch.float32), key) * softmax_scale
        if causal:
            hidden = torch.ones(length, keys, dtype=torch.bool).triu(keys - length + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        out[here] = torch.einsum("hij,jhd->ihd", scores.softmax(-1).nan_to_num(), value).to(out.dtype)
        lse[:, here] = scores.logsumexp(-1)
    return (out, lse) if return_softmax_lse else out


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    cache_seqlens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    causal: bool,
    num_splits: int,
    **_: Any,
) -> torch.Tensor:
    """int32 [n]: FlashAttention 3's schedule; here what it is made of."""
    assert len(cache_seqlens) == batch_size == len(cu_seqlens_q) - 1
    assert int(cache_seqlens.max()) <= max_seqlen_k
    return _schedule(cu_seqlens_q, cache_seqlens, max_seqlen_q, causal, num_splits)


def _schedule(
    cu_seqlens_q: torch.Tensor, seqused_k: torch.Tensor, max_seqlen_q: int, causal: bool, num_splits: int
) -> torch.Tensor:
    numbers = torch.tensor([max_seqlen_q, causal, num_splits], dtype=torch.int32)
    return torch.cat((numbers, cu_seqlens_q.diff(), seqused_k))


def reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *_: Any,
) -> None:
    """Write keys and values to their slots, as vLLM's operator does."""
    tokens = (slot_mapping >= 0).nonzero()[:, 0]
    slots = slot_mapping[tokens]
    block, offset = slots // key_cache.shape[1], slots % key_cache.shape[1]
    key_cache[block, offset] = key[tokens]
    value_cache[block, offset] = value[tokens]


STAND_INS = {
    "flash_attn_varlen_func": flash_attn_varlen_func,
    "get_scheduler_metadata": get_scheduler_metadata,
    "reshape_and_cache_flash": reshape_and_cache_flash,
    "get_flash_attn_version": lambda *args, **kwargs: FA_VERSION,
}
"""What takes the place of the functions of these names in both modules (``fa_utils`` and ``flash_attn``)."""


def use() -> None:
    """Have this process's engines on Model Runner V2 run CUDA's runner over the functions above."""
    for module in (fa_utils, flash_attn):
        for name, function in STAND_INS.items():
            setattr(module, name, function)
    plugin.WORKERS["cpu", "v2"] = f"{__name__}.Worker"


class Runner(LookaheadCUDARunner, CPUModelRunner):
    """CUDA's runner over vLLM's V2 runner for CPUs."""


class Worker(CPULookaheadV2Worker):
    """CUDA's runner and attention backend in a CPU worker."""

    runner_class = Runner
    backend = BACKEND
