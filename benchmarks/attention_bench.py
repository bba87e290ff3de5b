"""Tree attention on the CPU against vLLM's kernel for a chain of as many tokens: microseconds for one layer.

    python benchmarks/attention_bench.py
    python benchmarks/attention_bench.py --heads 32 --kv-heads 8 --head-size 128 --nodes 16,64 --context 1000

One thread. The tree is random; the chain is what stock vLLM would verify. The fastest 5 % of the runs count.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from proposers import DraftTree
from vllm_lookahead.attention.cpu import READABLE_ISAS, cells_of, make_plan, tree_attention
from vllm_lookahead.trees.rows import TreeRows
from vllm_lookahead.trees.step import StepTrees

RUNS = 400


def fastest(run: Callable[[], None]) -> float:
    """Microseconds of the 5th percentile."""
    times = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return sorted(times)[RUNS // 20] * 1e6


def measure(options: argparse.Namespace, nodes: int, context: int, rows: int) -> tuple[float, float]:
    """Stock's time for ``rows`` chains, ours for as many trees."""
    heads, kv_heads, head_size, block_size = options.heads, options.kv_heads, options.head_size, options.block_size
    isa = _get_attn_isa(torch.float32, block_size, head_size, "auto")
    length, total = nodes + 1, context + nodes + 1
    blocks = -(-total // block_size)
    cache = torch.randn(1 + rows * blocks, kv_heads, block_size, 2 * head_size)
    table = torch.arange(1, 1 + rows * blocks, dtype=torch.int32).view(rows, blocks)
    query = torch.randn(rows * length, heads, head_size)
    output = torch.empty_like(query)
    starts = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    lengths = torch.full((rows,), total, dtype=torch.int32)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=rows, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_size, seq_lens=lengths,
        dtype=torch.float32, query_start_loc=starts, causal=True, sliding_window_size=-1, isa=isa,
        enable_kv_split=True, dynamic_causal=None, kv_cache_dtype="auto",
    )  # fmt: skip
    keys, values = cache.view(len(cache), kv_heads, 2 * block_size, -1).chunk(2, dim=2)

    def stock() -> None:
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=keys, value_cache=values, output=output, query_start_loc=starts, seq_lens=lengths,
            scale=head_size**-0.5, causal=True, alibi_slopes=None, sliding_window=-1, block_table=table, softcap=0.0,
            scheduler_metadata=plan, s_aux=None,
        )  # fmt: skip

    rng = np.random.default_rng(0)
    tree = DraftTree.from_parents(range(nodes), [-1, *(int(rng.integers(-1, node)) for node in range(1, nodes))])
    names = [str(row) for row in range(rows)]
    step = StepTrees.build(names, dict.fromkeys(names, tree.token_ids.tolist()), dict.fromkeys(names, tree))
    trees = TreeRows.of(step, starts.numpy(), lengths.numpy())
    assert trees is not None
    assert isa in READABLE_ISAS, f"trees can't be verified with the '{isa}' kernel"

    tree_plan, cells = make_plan(trees, table.numpy(), len(query)), cells_of(cache)

    def ours() -> None:
        tree_attention(query, cells, tree_plan, head_size**-0.5, output)

    return fastest(stock), fastest(ours)


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--nodes", default="4,8,16,32,64")
    parser.add_argument("--context", default="330,1500")
    parser.add_argument("--rows", default="1,8")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("rows  context  nodes   chain, stock   tree, ours   ratio")
    for rows in map(int, options.rows.split(",")):
        for context in map(int, options.context.split(",")):
            for nodes in map(int, options.nodes.split(",")):
                stock, ours = measure(options, nodes, context, rows)
                print(f"{rows:4}  {context:7}  {nodes:5}   {stock:9.0f} us   {ours:7.0f} us   {ours / stock:5.2f}")


if __name__ == "__main__":
    main()
