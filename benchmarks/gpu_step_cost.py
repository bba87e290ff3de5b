"""Milliseconds per step against nodes, batch size and context, beside stock vLLM's decoding of one token.

    python benchmarks/gpu_step_cost.py OUT.json --model 8b --engine ours
    python benchmarks/gpu_step_cost.py --cpu OUT.json --model tiny --engine ours

Weights are random: a step's time does not depend on them. Drafts are junk that is never accepted
(``vllm_lookahead.bench.junk_tree``), so every step emits one token per request. What random weights would accept says
nothing about any model, so nothing here is a speed-up.

A time is that of ``LLMEngine.step`` with the engine core in this process, from step to step, the scheduler included.
The engines: ``stock`` as vLLM comes (asynchronous scheduling, full CUDA graphs), ``stock-sync`` without asynchronous
scheduling, and ``ours``, where 0 nodes is a step without drafts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
NODES = (0, 1, 8, 16, 32, 64, 128)
BATCHES = (16, 4, 1)
CONTEXTS = (1024, 8192)
WINDOWS, WINDOW = 3, 8
"""How many groups of steps are timed for each point, and how many steps a group has."""

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 16384,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def shape(
    hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    """A Llama's config.json."""
    return {
        **LLAMA,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        **more,
    }


FP8 = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}
MODELS = {
    "tiny": shape(256, 2, 4, 2, 512, 4096),
    "1b": shape(2048, 16, 32, 8, 8192, 128256, tie_word_embeddings=True),
    "8b": shape(4096, 32, 32, 8, 14336, 128256),
    "32b-fp8": shape(5120, 64, 40, 8, 27648, 152064, **FP8),
}


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--engine", choices=("stock", "stock-sync", "ours"), default="ours")
    parser.add_argument("--nodes", type=numbers, default=NODES)
    parser.add_argument("--batches", type=numbers, default=BATCHES)
    parser.add_argument("--contexts", type=numbers, default=CONTEXTS)
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--window", type=int, default=WINDOW)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    begin = time.perf_counter()
    prepare(options)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[options.model]))
        llm = start(folder, options)
    result: dict[str, Any] = {
        "kind": "step-cost",
        "model": options.model,
        "engine": options.engine,
        "start_seconds": round(time.perf_counter() - begin, 1),
        **about(llm),
        "points": [],
    }
    for context in options.contexts:
        result["points"] += measure(llm, context, options)
        result["seconds"] = round(time.perf_counter() - begin, 1)
        options.out.write_text(json.dumps(result, indent=1) + "\n")  # what there is, in case the next one fails
    return 0


def room(options: argparse.Namespace) -> int:
    """Most tokens that a request is given to generate."""
    return len(options.nodes) * len(options.batches) * (options.windows * options.window + 8) + 16


def numbers(text: str) -> tuple[int, ...]:
    """Numbers separated by commas."""
    return tuple(map(int, text.split(",")))


def prepare(options: argparse.Namespace) -> None:
    """What has to be set before vLLM is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    if options.cpu:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if options.engine != "ours":
        os.environ["VLLM_PLUGINS"] = ""  # stock is stock
        return
    os.environ["VLLM_LOOKAHEAD_CUDA_TREES"] = "1"
    if options.cpu:
        import gpu_on_cpu

        gpu_on_cpu.use()
    from vllm_lookahead import plugin
    from vllm_lookahead.bench import junk_tree  # noqa: F401 - registers itself

    plugin.register()


def start(model: str, options: argparse.Namespace) -> Any:
    """The engine."""
    from vllm import LLM

    most_nodes, most_rows = max(options.nodes), max(options.batches)
    settings: dict[str, Any] = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": max(options.contexts) + most_nodes + room(options),
        "max_num_seqs": most_rows,
        "max_num_batched_tokens": max(8192, most_rows * (1 + most_nodes)),
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "gpu_memory_utilization": 0.92,
        "seed": 0,
    }
    if options.cpu:
        settings |= {"enforce_eager": True, "dtype": "float32", "max_num_batched_tokens": 2048}
    else:
        # the sizes that vLLM captures are multiples of 8; take those that will be met
        sizes = {-(-rows * (1 + nodes) // 8) * 8 for rows in options.batches for nodes in options.nodes}
        sizes = {1, 2, 4, *options.batches, *(size for size in sizes if size <= 512)}
        settings["compilation_config"] = {"cudagraph_capture_sizes": sorted(sizes)}
    if options.engine == "ours":
        settings["speculative_config"] = {
            "method": "bench_junk",
            "max_draft_tokens": most_nodes,
            "num_speculative_tokens": most_nodes,
            "budget": most_nodes,
        }
    elif options.engine == "stock-sync":
        settings["async_scheduling"] = False
    return LLM(model, **settings)


def about(llm: Any) -> dict[str, Any]:
    """What the engine made of its settings."""
    import torch
    import vllm

    config = llm.llm_engine.vllm_config
    runner = runner_of(llm)
    return {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "runner": type(runner).__name__,
        "trees": getattr(runner, "trees_verifiable", None),
        "kv_cache_tokens": config.cache_config.num_gpu_blocks * config.cache_config.block_size,
    }


def runner_of(llm: Any) -> Any:
    """The only worker's model runner."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def measure(llm: Any, context: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All batch sizes and numbers of nodes at one context length.

    The prompts are prefilled once, for the largest batch; for the next smaller one requests are aborted.
    """
    import numpy as np
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    config = engine.vllm_config
    vocabulary = config.model_config.get_vocab_size()
    tokens_each = context + max(options.nodes) + room(options)
    fits = config.cache_config.num_gpu_blocks * config.cache_config.block_size // tokens_each
    batches = [batch for batch in options.batches if batch <= fits]
    skipped = [batch for batch in options.batches if batch > fits]
    points: list[dict[str, Any]] = [
        {"context": context, "batch": batch, "skipped": "the KV cache is too small"} for batch in skipped
    ]
    if not batches:
        return points
    rng = np.random.default_rng(0)
    params = SamplingParams(
        temperature=0.0,
        max_tokens=room(options),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    choose(0, vocabulary)
    running = [f"{context}-{i}" for i in range(max(batches))]
    for name in running:
        tokens = rng.integers(vocabulary // 16, vocabulary // 2, context).tolist()
        engine.add_request(name, {"prompt_token_ids": tokens}, params)
    begin, started = time.perf_counter(), set()
    while len(started) < len(running):
        started |= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
    prefill = time.perf_counter() - begin
    for batch in sorted(batches, reverse=True):
        engine.abort_request(running[batch:])
        running = running[:batch]
        for nodes in options.nodes if options.engine == "ours" else (0,):
            choose(nodes, vocabulary)
            run_steps(engine, batch, 4)
            times = [run_steps(engine, batch, options.window) for _ in range(options.windows)]
            points.append(
                {
                    "context": context,
                    "batch": batch,
                    "nodes": nodes,
                    "ms": round(median(ms for ms, _ in times), 4),
                    "windows_ms": [round(ms, 4) for ms, _ in times],
                    "tokens_per_step": round(sum(tokens for _, tokens in times) / len(times), 3),
                }
            )
            print(json.dumps(points[-1]), flush=True)
    points.append({"context": context, "batch": max(batches), "prefill_s": round(prefill, 3)})
    engine.abort_request(running)
    while engine.has_unfinished_requests():
        engine.step()
    return points


def choose(nodes: int, vocabulary: int) -> None:
    """What our engine drafts from now on (nothing happens in a stock one)."""
    if "vllm_lookahead.bench.junk_tree" in sys.modules:
        from vllm_lookahead.bench import junk_chain

        junk_chain.choose(nodes, "tree", vocabulary)


def run_steps(engine: Any, batch: int, steps: int) -> tuple[float, float]:
    """Milliseconds per step, and tokens per request and step, over so many steps.

    With asynchronous scheduling a call of ``step`` may return nothing, so steps are counted by the tokens.
    """
    done, tokens = 0, 0
    begin = time.perf_counter()
    while done < steps * batch:
        outputs: Sequence[Any] = engine.step()
        done += len(outputs)
        tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
    elapsed = time.perf_counter() - begin
    return 1e3 * elapsed * batch / done, tokens / done


if __name__ == "__main__":
    sys.exit(main())
