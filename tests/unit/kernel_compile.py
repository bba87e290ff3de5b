"""Compile the CUDA kernels for a given GPU generation; no GPU is needed."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_lookahead.attention.packing import WORD_BITS
from vllm_lookahead.attention.triton_tree import LEAST_ROWS, tile_queries, tree_kernel
from vllm_lookahead.v2.kernels.commit import MOVES, commit_kernel
from vllm_lookahead.v2.kernels.place import BLOCK_NODES, place_kernel
from vllm_lookahead.v2.kernels.walk import num_warps, walk_kernel

POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}


def compile_tree_kernel(capability: int, dtype: str, head_size: int, per_kv: int = 4) -> Any:
    """As a step with tree rows calls it: with a prefix, strides and addresses as they are in a model."""
    tensors = dict.fromkeys(("query", "key", "value", "output", "prefix_output"), POINTERS[dtype])
    numbers = dict.fromkeys(("lse", "tile_rows", "tile_starts", "offsets", "firsts", "prefixes", "mask"), "*i32")
    queries = tile_queries(per_kv)
    constants = {
        "PER_KV": per_kv,
        "HEAD_SIZE": head_size,
        "BLOCK_D": triton.next_power_of_2(head_size),
        "QUERIES": queries,
        "BLOCK_M": max(LEAST_ROWS, triton.next_power_of_2(queries * per_kv)),
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


def compile_walk_kernel(capability: int, width: int, *, refuses: bool = False) -> Any:
    """For trees of up to ``width`` - 1 nodes."""
    types = dict.fromkeys(("starts", "tokens", "parents", "paths", "lengths"), "*i32")
    types |= dict.fromkeys(("sampled", "walked", "order"), "*i64") | {"refused": "*u8" if refuses else "*i32"}
    block = triton.next_power_of_2(width - 1)
    return _compile(
        walk_kernel,
        capability,
        types,
        {"REFUSES": refuses, "BLOCK": block},
        unknown={"sampled", "refused", "width"},
        num_warps=num_warps(block),
    )


def compile_place_kernel(capability: int, width: int) -> Any:
    """For trees of up to ``width`` - 1 nodes."""
    words = triton.cdiv(width, WORD_BITS)
    types = dict.fromkeys(("starts", "parents", "offsets", "firsts", "whole", "seq_lens"), "*i32")
    types |= dict.fromkeys(("prefixes", "stock_lens", "mask"), "*i32")
    types |= dict.fromkeys(("rows", "tokens", "positions"), "*i64")
    constants = {"WORDS": triton.next_power_of_2(words), "WORD_BITS": WORD_BITS, "BLOCK": BLOCK_NODES}
    unknown = {"seq_lens", "positions", "words"}
    return _compile(place_kernel, capability, types, constants, unknown=unknown, num_warps=1 if words <= 4 else 4)


def compile_commit_kernel(capability: int, width: int = 64) -> Any:
    """For entries of ``width`` times 8 bytes."""
    types = dict.fromkeys(("addresses", "rows", "slots"), "*i64")
    types |= dict.fromkeys(("firsts", "paths", "lengths"), "*i32")
    constants = {"WIDTH": width, "BLOCK": triton.next_power_of_2(width), "MOVES": MOVES}
    unknown = {"paths", "lengths", "slots", "path_stride"}
    return _compile(commit_kernel, capability, types, constants, unknown=unknown, num_warps=1)


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
