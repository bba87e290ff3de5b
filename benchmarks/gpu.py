"""What has to be seen on a GPU beside ``vllm-lookahead bench``. ``gpu.sh`` runs all of it in order.

    python benchmarks/gpu.py shape 8b FOLDER            a model of that shape; weights are random when it is loaded
    python benchmarks/gpu.py about stock FOLDER         what the engine is made of here
    python benchmarks/gpu.py graphs FOLDER              full CUDA graphs of trees, captured once, replayed for others
    python benchmarks/gpu.py outputs stock STOCK.json   greedy and seeded, every request alone and in a batch
    python benchmarks/gpu.py outputs lookahead OURS.json
    python benchmarks/gpu.py compare STOCK.json OURS.json

A step with draft trees computes other shapes than one without, and 16-bit numbers round differently then: where two
tokens are nearly as likely, the output may change, as it does when stock vLLM changes its batch size. So ``compare``
reports the gap between stock's two likeliest tokens where a greedy output first differs: a tiny one is rounding, a
large one is an error. In float32 everything has to be equal.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engines run in this process
app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 16384,
    "torch_dtype": "bfloat16",
}
SHAPES = {  # hidden size, layers, heads, kv heads, feed-forward size, vocabulary
    "tiny": (256, 1, 4, 2, 512, 4096),
    "1b": (2048, 16, 32, 8, 8192, 128256),
    "8b": (4096, 32, 32, 8, 14336, 128256),
}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
METHODS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "prompt_lookup": {"method": "prompt_lookup", "num_speculative_tokens": 28, "budget": 28},
    "lookahead": {
        **{"method": "lookahead", "window_size": 5, "ngram_size": 4, "guess_set_size": 5},
        **{"num_speculative_tokens": 28, "budget": 28},
    },
}
"""With a budget that is a number, since what is drafted must not depend on times."""

GAPS = {"float32": 0.0, "float16": 0.1, "bfloat16": 0.5}
"""Log-probability gaps up to which a difference can be rounding: a few units in the last place of a logit near 20."""

Cpu = Annotated[bool, typer.Option("--cpu", help="Small and in eager mode, on a machine without a GPU.")]


@app.command()
def shape(name: Annotated[str, typer.Argument(help=", ".join(SHAPES))], folder: Path) -> None:
    """Write the config.json of a Llama of a given size."""
    sizes = dict(zip((*SIZES, "vocab_size"), SHAPES[name], strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **sizes}))


@app.command()
def about(method: Annotated[str, typer.Argument(help=", ".join(METHODS))], folder: Path, cpu: Cpu = False) -> None:
    """Versions, device, and what an engine is made of."""
    import torch

    from vllm_lookahead.bench.engine import Engine
    from vllm_lookahead.bench.machine import describe

    print(json.dumps(describe(), indent=1))
    if torch.cuda.is_available():
        print(torch.cuda.get_device_properties(0), "CUDA", torch.version.cuda)
    settings = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 1024, **_small(cpu)}
    engine = Engine(str(folder), METHODS[method], settings, ())
    compilation = engine.llm.llm_engine.vllm_config.compilation_config
    layer, caches = next(iter(compilation.static_forward_context.values())), engine.runner.kv_caches
    found = {
        **engine.info(),
        "graph_sizes": compilation.cudagraph_capture_sizes,
        "captured": _captured(engine.runner),
        "kv_cache": {"shape": list(caches[0].shape), "stride": list(caches[0].stride())},
        "attention": type(layer.impl).__name__,
        "flash_attention": getattr(layer.impl, "vllm_flash_attn_version", None),
    }
    print(method, json.dumps(found, indent=1), flush=True)


@app.command()
def graphs(folder: Path, cpu: Cpu = False, rounds: int = 10) -> None:
    """Replay attention for trees of other lengths and masks than at its capture, and count the steps that graphs serve.

    Ends with status 1 if a replay differs from dense attention, or if no step was a replay of a graph of trees.
    """
    from collections import Counter

    if cpu:
        _graphs_on_cpu()
    from vllm import SamplingParams, TokensPrompt

    from vllm_lookahead.bench.engine import Engine
    from vllm_lookahead.v2 import self_check
    from vllm_lookahead.v2.cuda_graphs import is_tree_graph

    settings = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 256, **_small(cpu)}
    method = {"method": "prompt_lookup", "num_speculative_tokens": 6, "budget": 6} if cpu else METHODS["prompt_lookup"]
    engine = Engine(str(folder), method, settings, ())
    runner = engine.runner
    manager = runner.cudagraph_manager
    print(json.dumps({"mode": manager.cudagraph_mode.name, "captured": _captured(runner)}), flush=True)
    for seed in range(1 if cpu else rounds):
        layers, queries = runner._with_builders, runner._packer.tile_queries
        problem = self_check.graph_problem(layers, runner.dtype, queries, seed)
        print(f"replays of attention, seed {seed}: {problem or 'as dense attention'}", flush=True)
        if problem:
            raise typer.Exit(1)

    steps: Counter[str] = Counter()

    def dispatch(*args: Any, dispatch: Any = manager.dispatch, **kwargs: Any) -> Any:
        desc = dispatch(*args, **kwargs)
        steps[f"{'trees' if is_tree_graph(desc) else desc.cg_mode.name} of {desc.num_tokens}"] += 1
        return desc

    manager.dispatch = dispatch
    prompts = [TokensPrompt(prompt_token_ids=[i, 7, 8, i, 7, 9, i] * 3) for i in range(3, 5 if cpu else 11)]
    length = 6 if cpu else 64
    engine.llm.generate(prompts, SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False))
    print("steps:", json.dumps(steps))
    raise typer.Exit(int(not any(name.startswith("trees") for name in steps)))


@app.command()
def sizes(
    method: Annotated[str, typer.Argument(help=", ".join(METHODS))], folder: Path, cpu: Cpu = False, most: int = 257
) -> None:
    """Time forward passes of 1 to 257 tokens with nothing around them: what graphs are captured for shows as steps."""
    import time

    import torch

    from vllm_lookahead.bench.engine import Engine

    settings = {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 1024, **_small(cpu)}
    runner = Engine(str(folder), METHODS[method], settings, ()).runner
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    print(f"{method}: ms of a forward pass by tokens, best of 5")
    for tokens in sorted({1, 2, 4, *(8 * i + j for i in range(1, 33) for j in (0, 1) if i < 5 or i % 4 == 0)}):
        if tokens > most:
            break
        best = float("inf")
        for _ in range(5):
            wait()
            start = time.perf_counter()
            runner._dummy_run(tokens)
            wait()
            best = min(best, time.perf_counter() - start)
        print(f"{tokens:4d} {1e3 * best:8.3f}", flush=True)


@app.command()
def outputs(
    method: Annotated[str, typer.Argument(help=", ".join(METHODS))],
    out: Path,
    dtype: str = "bfloat16",
    max_tokens: int = 64,
    cpu: Cpu = False,
) -> None:
    """Write what the bundled model says to the demo's prompts."""
    from vllm import LLM, SamplingParams

    from vllm_lookahead.demo.run import MODEL, load_prompts

    small = _small(cpu)
    llm = LLM(MODEL, dtype="float32" if cpu else dtype, max_model_len=1024, speculative_config=METHODS[method], **small)
    prompts = [prompt.text * 2 for prompt in load_prompts()][: 2 if cpu else None]  # what repeats itself has deep trees
    found: dict[str, Any] = {"method": method, "dtype": str(llm.llm_engine.vllm_config.model_config.dtype)[6:]}
    for kind, temperature in (("greedy", 0.0), ("seeded", 0.8)):
        params = [
            SamplingParams(
                temperature=temperature,
                seed=seed if temperature else None,
                max_tokens=12 if cpu else max_tokens,
                ignore_eos=True,
                logprobs=2 if method == "stock" else None,
            )
            for seed in range(len(prompts))
        ]
        alone = [llm.generate(prompt, p, use_tqdm=False)[0] for prompt, p in zip(prompts, params, strict=True)]
        for how, answers in (("alone", alone), ("batched", llm.generate(prompts, params, use_tqdm=False))):
            completions = [answer.outputs[0] for answer in answers]
            found[f"{kind}, {how}"] = [list(completion.token_ids) for completion in completions]
            if method == "stock":
                found[f"{kind}, {how}, gaps"] = [list(map(_gap, completion.logprobs)) for completion in completions]
    out.write_text(json.dumps(found))


@app.command()
def compare(stock: Path, ours: Path) -> None:
    """Count what is identical, and look at what is not. Ends with status 1 if rounding doesn't explain it."""
    expected, got = json.loads(stock.read_text()), json.loads(ours.read_text())
    allowed, wrong = GAPS[expected["dtype"]], 0
    for kind in ("greedy, alone", "greedy, batched", "seeded, alone", "seeded, batched"):
        pairs = list(zip(expected[kind], got[kind], expected[f"{kind}, gaps"], strict=True))
        gaps = [next(gap for x, y, gap in zip(a, b, known, strict=True) if x != y) for a, b, known in pairs if a != b]
        if not allowed:
            wrong += len(gaps)
        elif kind.startswith("greedy"):  # the noise of a seeded request may turn any gap around
            wrong += sum(gap > allowed for gap in gaps)
        between = sum(a == b for a, b in zip(expected[kind], expected[kind.replace("alone", "batched")], strict=True))
        print(
            f"{got['method']}, {expected['dtype']}, {kind}: {len(pairs) - len(gaps)} of {len(pairs)} identical, "
            f"largest gap at a difference {max(gaps, default=0.0):.3g}; stock's own with its batch: {between}"
        )
    raise typer.Exit(int(wrong > 0))


def _gap(place: Any) -> float:
    """How far the two likeliest tokens are apart."""
    best = sorted((entry.logprob for entry in place.values()), reverse=True)
    return float(best[0] - best[1])


def _captured(runner: Any) -> dict[str, list[int]]:
    """Tokens of every CUDA graph by what it is for."""
    descs = getattr(getattr(runner, "cudagraph_manager", None), "_capture_descs", {})
    found: dict[str, set[int]] = {}
    for desc in (desc for of_mode in descs.values() for desc in of_mode):
        one_each = "one token per request" if desc.uniform_token_count == 1 else "any"
        name = f"{desc.cg_mode.name}, {one_each if desc.max_query_len is None else 'trees'}"
        found.setdefault(name, set()).add(desc.num_tokens)
    return {name: sorted(sizes) for name, sizes in found.items()}


def _graphs_on_cpu() -> None:
    """Functions for graphs, torch for FlashAttention, Triton's interpreter for kernels: as in ``tests/v2``."""
    import sys

    import pytest

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import flash_on_cpu
    import graphs_on_cpu

    flash_on_cpu.use()
    graphs_on_cpu.use(pytest.MonkeyPatch())


def _small(cpu: bool) -> dict[str, Any]:
    """Settings under which several engines fit on one device."""
    if cpu:
        return {"enforce_eager": True, "max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20}
    return {"max_num_seqs": 16, "gpu_memory_utilization": 0.2}


if __name__ == "__main__":
    app()
