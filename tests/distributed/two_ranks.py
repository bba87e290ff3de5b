"""Run as a program: the same requests on two tensor-parallel ranks, with stock vLLM or one of our methods.

    python two_ranks.py MODEL SPECULATIVE_CONFIG_OR_null OUTPUT.json [PROMPTS TOKENS]

A process of its own, because vLLM keeps the state of one process group per process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # vLLM wants a NUMA node for each rank otherwise
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_memory_bytes
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # collective_rpc sends the functions below to the workers
sys.path.insert(0, str(Path(__file__).parents[1]))


def watch(worker: Any) -> None:
    """On every rank: note the trees that are verified, and how the walks went."""
    import numpy as np

    runner = worker.model_runner
    runner.watched = []

    def note(step: Any, walks: Any) -> None:
        rows = np.flatnonzero(step.branched).tolist()
        runner.watched.append([[step.tokens.tolist(), step.parents.tolist(), walks.path(row).tolist()] for row in rows])

    if hasattr(runner, "walk"):  # Model Runner V2
        from vllm_lookahead.trees.step import retrace

        walk = runner.walk

        def noted_walk(sampled: Any, forbidden: Any) -> Any:
            walked = walk(sampled, forbidden)
            note(runner.step, retrace(runner.step, walked.tokens.numpy(), walked.lengths.numpy()))
            return walked

        runner.walk = noted_walk
        return
    commit_kv = runner.commit_kv

    def noted_commit(step: Any, walks: Any) -> None:
        note(step, walks)
        commit_kv(step, walks)

    runner.commit_kv = noted_commit


def watched(worker: Any) -> list[Any]:
    """On every rank: what ``watch`` noted."""
    return worker.model_runner.watched


def main(model: str, config: dict[str, Any] | None, num_prompts: int, max_tokens: int) -> dict[str, Any]:
    """Run both kinds of decoding; return tokens and what the ranks saw."""
    from engine.cases import either
    from engine.prompts import PROMPTS
    from vllm import LLM

    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        tensor_parallel_size=2,
        max_model_len=512,
        max_num_seqs=16,
        block_size=32,
        kv_cache_memory_bytes=64 << 20,
        disable_log_stats=False,
        speculative_config=config,
        seed=0,
    )
    each_rank: Callable[..., list[Any]] = llm.collective_rpc
    if config is not None:
        each_rank(watch)
    prompts = list(PROMPTS[:num_prompts])
    params = [either(i, max_tokens=max_tokens) for i in range(len(prompts))]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    result: dict[str, Any] = {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}
    if config is not None:
        result["ranks"] = each_rank(watched)
        result["metrics"] = {
            m.name: m.value for m in llm.get_metrics() if "num_accepted_tokens" in m.name and hasattr(m, "value")
        }
    return result


if __name__ == "__main__":
    model_folder, config_json, output_file, *size = sys.argv[1:]
    num_prompts, max_tokens = map(int, size or (1000, 32))
    Path(output_file).write_text(json.dumps(main(model_folder, json.loads(config_json), num_prompts, max_tokens)))
