"""vLLM's Model Runner V2 on a machine without a GPU, for tests: its kernels run in Triton's interpreter.

With this folder's parent on ``PYTHONPATH`` and ``TRITON_INTERPRET=1``, Triton has a backend called "cpu"
(``compiler.py``, ``driver.py``: they compile nothing, the interpreter takes every launch), so vLLM finds Triton usable
and takes V2, as it does on CUDA. Slow: 0.05 to 0.4 s per step. ``register`` runs in every process of vLLM.
"""

from __future__ import annotations

import inspect
from typing import Any


def register() -> None:
    """Replace the kernels that the interpreter can't run, and keep asynchronous scheduling on where CUDA has it.

    For stock vLLM and ours alike.
    """
    from vllm.triton_utils.dispatcher import register_kernels
    from vllm.v1.sample.ops.topk_topp_triton import _topk_topp_kernel

    from vllm_lookahead.numba_guard import guard

    guard()
    # vLLM hands over the arguments by name, launch options too, if this is the kernel's signature
    names = _topk_topp_kernel.arg_names
    keywords = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    top_k_top_p.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    register_kernels(
        {
            "vllm.v1.sample.ops.topk_topp_triton._topk_topp_kernel": top_k_top_p,
            "vllm.v1.worker.gpu.structured_outputs._apply_grammar_bitmask_kernel": apply_grammar,
        }
    )
    _keep_asynchronous_scheduling()


def top_k_top_p(**arguments: Any) -> None:
    """By vLLM's own function for machines without Triton (the interpreter has no ``tl.range`` of tensors)."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    k = arguments["K"] if arguments["TOPK_ENABLED"] else None
    p = arguments["P"] if arguments["TOPP_ENABLED"] else None
    logits = arguments["LOGITS"]
    logits.copy_(apply_top_k_top_p_pytorch(logits, k, p))


def apply_grammar(
    logits: Any,
    stride: Any,
    indices: Any,
    cu_num_logits: Any,
    bitmask: Any,
    bitmask_stride: Any,
    vocab_size: int,
    MASK_STRIDE: int,
    BLOCK_SIZE: int,
) -> None:
    """Forbid the tokens whose bits are not set (the interpreter: "mask has unsupported dtype")."""
    import torch

    allowed = (bitmask.unsqueeze(-1) >> torch.arange(32)) & 1
    forbidden = allowed.reshape(len(bitmask), -1)[:, :vocab_size] == 0
    for mask, at in zip(forbidden, indices.tolist(), strict=True):
        request, position = divmod(at, MASK_STRIDE)
        first, end = cu_num_logits[request : request + 2].tolist()
        if position < end - first:
            logits[first + position].masked_fill_(mask, -float("inf"))


def _keep_asynchronous_scheduling() -> None:
    """vLLM's CPU platform turns it off: nothing would overlap there. What it does to requests is the same."""
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config.__func__
    if getattr(stock, "keeps_async", False):
        return

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        stock(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    check_and_update_config.keeps_async = True
    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
