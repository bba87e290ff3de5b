"""The kernels on the device itself: checked against float64, then timed.

python benchmarks/gpu_kernels.py OUT.json
python benchmarks/gpu_kernels.py --cpu OUT.json      # a few of the checks under TRITON_INTERPRET=1, no times
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    if options.cpu:
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    import torch
    import triton

    result: dict[str, Any] = {
        "kind": "kernels",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": "cpu" if options.cpu else torch.cuda.get_device_name(),
        "checks": 0,
        "failed": [],
        "times": [],
    }
    for name, check in checks(few=options.cpu):
        result["checks"] += 1
        try:
            check()
        except Exception as error:  # the rest is worth knowing, too
            traceback.print_exc()
            result["failed"].append(f"{name}: {type(error).__name__}: {error}")
    print(f"{result['checks'] - len(result['failed'])} of {result['checks']} checks passed", flush=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    if not options.cpu:
        for point in times():
            result["times"].append(point)
            print(json.dumps(point), flush=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["failed"] else 0


def checks(*, few: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is checked, by name."""
    import torch
    from gpu_checks import DTYPES, GROUPS, HEAD_SIZES, check_commit, check_merge, check_place, check_tree, check_walk

    device = "cpu" if few else "cuda"
    # every combination is a compilation: all head sizes for one group of heads, all groups for one head size
    sizes = [(head_size, *GROUPS[2]) for head_size in HEAD_SIZES]
    sizes += [(HEAD_SIZES[3], *group) for group in GROUPS if group != GROUPS[2]]
    for dtype in DTYPES:
        for head_size, heads, kv_heads in sizes[::3] if few or dtype == torch.float32 else sizes:
            for seed in range(1 if few else 4):
                arguments = (seed, device, dtype, heads, kv_heads, head_size)
                more = {} if few else {"rows": 1 + 5 * seed, "nodes": (40, 256, 8, 100)[seed]}
                name = f"{dtype}, {heads} heads, {kv_heads} kv heads of {head_size}, seed {seed}"
                yield f"tree: {name}", lambda a=arguments, m=more: check_tree(*a, **m)
                yield f"merge: {name}", lambda a=arguments, m=more: check_merge(*a, **m)
    for dtype in (*DTYPES, torch.uint8):
        for slots_first in (True, False):
            for seed in range(2 if few else 40):
                arguments = (seed, device, dtype)
                name = f"commit: {dtype}, slots first: {slots_first}, seed {seed}"
                yield name, lambda a=arguments, s=slots_first: check_commit(*a, slots_first=s)

    for seed in range(2 if few else 40):
        size = {} if few else {"rows": 1 + seed, "nodes": (24, 64, 256, 1024)[seed % 4]}
        yield f"place: seed {seed}", lambda s=seed, m=size: check_place(s, device, **m)
        for refuses in (False, True):
            name = f"walk: refuses: {refuses}, seed {seed}"
            yield name, lambda s=seed, r=refuses, m=size: check_walk(s, device, refuses=r, **m)


def times() -> Iterator[dict[str, Any]]:
    """For the 8B shape in bfloat16: the tree kernel with a prefix for a layer, the other kernels for a step."""
    import numpy as np
    import torch
    from gpu_checks import ROOT as TREE_ROOT
    from gpu_checks import random_qkv

    from proposers import DraftTree
    from vllm_lookahead.attention.packing import TreePacker
    from vllm_lookahead.attention.triton_tree import Prefix, tree_attention
    from vllm_lookahead.trees.step import StepTrees
    from vllm_lookahead.v2.kernels.commit import KVCommit
    from vllm_lookahead.v2.kernels.place import place
    from vllm_lookahead.v2.kernels.walk import walk

    device = torch.device("cuda")
    heads, kv_heads, head_size, layers, context = 32, 8, 128, 32, 1000
    for rows in (1, 4, 16):
        for nodes in (8, 32, 64, 128, 256):
            # three chains side by side; the second is accepted, 17 tokens at most
            tree = DraftTree.from_parents(range(nodes), np.maximum(np.arange(nodes) - 3, TREE_ROOT))
            names = [str(row) for row in range(rows)]
            step = StepTrees.build(names, {name: tree.token_ids.tolist() for name in names}, dict.fromkeys(names, tree))
            query_start = np.arange(rows + 1, dtype=np.int32) * (nodes + 1)
            ends = np.full(rows, context, np.int32)
            packer = TreePacker(device, int(query_start[-1]), rows, nodes)
            trees = packer(step, query_start, ends)
            packed = trees.packed
            assert packed is not None
            seq_lens = torch.from_numpy(ends).to(device)
            positions = torch.zeros(int(query_start[-1]), dtype=torch.int64, device=device)
            row = np.concatenate(([1], np.where(np.arange(nodes) < 48, np.arange(nodes) + 3, -1)))
            sampled = torch.from_numpy(np.tile(row.astype(np.int64), rows)).to(device)
            place(trees, seq_lens, positions)
            qkv = random_qkv(torch.Generator(), int(query_start[-1]), heads, kv_heads, head_size, torch.bfloat16)
            query, key, value = (part.to(device) for part in qkv)
            output, before = torch.empty_like(query), torch.randn_like(query)
            prefix = Prefix(before, torch.zeros(heads, len(query), device=device))
            walks = walk(sampled, trees, nodes + 1)
            caches = [
                torch.zeros(1024, 16, kv_heads, 2 * head_size, dtype=torch.bfloat16, device=device).transpose(1, 2)
                for _ in range(layers)
            ]
            commit, slots = KVCommit(caches), torch.arange(int(query_start[-1]), device=device)
            point = {"rows": rows, "nodes": nodes}
            attention = partial(tree_attention, query, key, value, packed, 0.1, output, prefix)
            for block_rows in (16, 32, 64):
                yield {
                    "kernel": "tree",
                    **point,
                    "block_rows": block_rows,
                    **timed(partial(attention, block_rows=block_rows)),
                }
            yield {"kernel": "place", **point, **timed(partial(place, trees, seq_lens, positions))}
            yield {"kernel": "walk", **point, **timed(partial(walk, sampled, trees, nodes + 1))}
            move = partial(commit, packed, walks.paths, walks.lengths, slots)
            accepted = int(walks.lengths[0]) - 1
            yield {"kernel": "commit", **point, "accepted": accepted, "layers": layers, **timed(move)}
            # its copy from pinned memory keeps it out of a graph
            yield {"kernel": "pack", **point, **timed(partial(packer, step, query_start, ends), graph=False)}


def timed(call: Callable[[], Any], calls: int = 50, *, graph: bool = True) -> dict[str, float]:
    """Microseconds of one call: to launch it, from call to call, and of the GPU alone (in a CUDA graph)."""
    import torch

    for _ in range(5):
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    launched = time.perf_counter() - begin
    torch.cuda.synchronize()
    result = {
        "launch_us": round(1e6 * launched / calls, 2),
        "call_us": round(1e6 * (time.perf_counter() - begin) / calls, 2),
    }
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for _ in range(calls):
                call()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        captured.replay()
        start.record()
        captured.replay()
        end.record()
        torch.cuda.synchronize()
        result["gpu_us"] = round(1e3 * start.elapsed_time(end) / calls, 2)
    return result


if __name__ == "__main__":
    sys.exit(main())
