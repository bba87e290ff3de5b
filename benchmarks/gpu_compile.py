"""Compile the CUDA kernels for a given GPU generation; no GPU is needed."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_lookahead.attention.cuda_commit import commit_kernel
from vllm_lookahead.attention.triton_tree import BLOCK_ROWS, WORD_BITS, tree_kernel

POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}


def compile_tree_kernel(capability: int, dtype: str, head_size: int, per_kv: int = 4) -> Any:
    """As a step with tree rows calls it: with a prefix, strides and addresses as they are in a model."""
    tensors = dict.fromkeys(("query", "key", "value", "output", "prefix_output"), POINTERS[dtype])
    numbers = dict.fromkeys(("lse", "offsets", "firsts", "prefixes", "mask"), "*i32")
    constants = {
        "PER_KV": per_kv,
        "HEAD_SIZE": head_size,
        "BLOCK_D": triton.next_power_of_2(head_size),
        "BLOCK_M": BLOCK_ROWS,
        "BLOCK_N": WORD_BITS,
        "MERGE": True,
        "STORE_LSE": False,
        "WIDEN": False,
    }
    return _compile(
        tree_kernel,
        capability,
        {**tensors, **numbers, "prefix_lse": "*fp32", "scale": "fp32"},
        constants,
        unknown={"words", "prefix_lse_head", "prefix_lse_token", "lse_head", "lse_token"},
        num_warps=4,
        num_stages=2,
    )


def compile_commit_kernel(capability: int, width: int = 64) -> Any:
    """For entries of ``width`` times 8 bytes."""
    pointers = {"addresses": "*i64", "slots": "*i64", "begins": "*i32", "sources": "*i32", "targets": "*i32"}
    return _compile(commit_kernel, capability, pointers, {"WIDTH": width, "BLOCK": width}, unknown=set(), num_warps=1)


def _compile(
    kernel: Any, capability: int, types: dict[str, str], constants: dict[str, Any], *, unknown: set[str], **options: int
) -> Any:
    """Whatever is no constant and not ``unknown`` is a multiple of 16, as Triton finds out when it is called."""
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in unknown and signature[name] not in ("constexpr", "fp32")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
