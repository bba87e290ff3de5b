"""Does the CUDA worker give what stock vLLM gives? Greedy and seeded, every request alone and in a batch.

    python benchmarks/gpu_exactness.py OUT.json          # on a GPU: all engines at once, each in a process of its own
    python benchmarks/gpu_exactness.py --cpu OUT.json    # the same worker and kernels in one process (``gpu_on_cpu``)

With draft trees a step computes other shapes than without, and 16-bit numbers round differently then: where two tokens
are nearly as likely, the output may change, as it does when stock vLLM changes its batch size. So for every greedy
output that differs the gap between stock's two likeliest tokens at the first difference is reported: a large gap is an
error, a tiny one is rounding. In float32 on the CPU everything has to be equal. (On a GPU FlashAttention has no
float32: drafts are chains then, and equal, too.)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "vllm_lookahead" / "demo" / "model"
BATCH = 16
SECONDS = 240
"""Engines that take longer are given up."""
GAPS = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
"""Log-probability gaps up to which a difference can be rounding: a few units in the last place of a logit near 20."""

OURS: dict[str, dict[str, Any]] = {
    "prompt_lookup": {"method": "prompt_lookup", "num_speculative_tokens": 28, "budget": 28},
    "lookahead": {
        "method": "lookahead",
        "window_size": 5,
        "ngram_size": 4,
        "guess_set_size": 5,
        "num_speculative_tokens": 28,
        "budget": 28,
    },
    "lookahead-separate": {
        "method": "lookahead",
        "window_size": 5,
        "ngram_size": 4,
        "guess_set_size": 5,
        "branch": "separate",
        "budget": 28,
    },
}
ENGINES: dict[str, dict[str, Any] | None] = {"stock": None, **OURS}


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--prompts", type=int, default=0, help="default: 24 on a GPU, 2 on the CPU")
    parser.add_argument("--max-tokens", type=int, default=0, help="default: 64 on a GPU, 10 on the CPU")
    parser.add_argument("--engines", default=",".join(OURS))
    parser.add_argument("--one", nargs=2, metavar=("ENGINE", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.prompts = options.prompts or (2 if options.cpu else 24)
    options.max_tokens = options.max_tokens or (10 if options.cpu else 64)
    if options.one:
        prepare(options.cpu)
        options.out.write_text(json.dumps(run_engine(*options.one, options)))
        return 0
    ours = options.engines.split(",")
    results = on_cpu(options, ours) if options.cpu else on_gpu(options, ours)
    options.out.write_text(json.dumps({"kind": "exactness", "cpu": options.cpu, "results": results}, indent=1) + "\n")
    for result in results:
        print(json.dumps(result))
    return 0 if results and all(result.get("ok") for result in results) else 1


def prepare(cpu: bool) -> None:
    """What has to be set before vLLM is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_LOOKAHEAD_CUDA_TREES"] = "1"
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]
    if cpu:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        import gpu_on_cpu

        gpu_on_cpu.use()
    from vllm_lookahead import plugin

    plugin.register()
    import proposers.lookahead
    import proposers.prompt_lookup  # noqa: F401 - registers itself, also where the package isn't installed


def on_cpu(options: argparse.Namespace, ours: list[str]) -> list[dict[str, Any]]:
    """All engines in this process."""
    prepare(cpu=True)
    found = {name: run_engine(name, "float32", options) for name in ["stock", *ours]}
    return [compare(name, "float32", found["stock"], found[name]) for name in ours]


def on_gpu(options: argparse.Namespace, ours: list[str]) -> list[dict[str, Any]]:
    """Every engine in a process of its own, all at the same time: nothing is timed here."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        for dtype in ("bfloat16", "float16", "float32"):
            for name in ["stock", *ours]:
                out = Path(folder) / f"{name}-{dtype}.json"
                log = out.with_suffix(".log")
                command = [sys.executable, __file__, str(out), "--one", name, dtype]
                command += ["--prompts", str(options.prompts), "--max-tokens", str(options.max_tokens)]
                with log.open("w") as stream:
                    process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
                jobs[name, dtype] = (process, out, log)
        deadline = time.monotonic() + SECONDS
        for process, _, _ in jobs.values():
            try:
                process.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        for (name, dtype), (_, out, log) in jobs.items():
            stock = jobs["stock", dtype][1]
            if name == "stock":
                continue
            if out.exists() and stock.exists():
                results.append(compare(name, dtype, json.loads(stock.read_text()), json.loads(out.read_text())))
            else:
                broken = log if not out.exists() else jobs["stock", dtype][2]
                tail = broken.read_text(errors="replace")[-3000:]
                results.append({"engine": name, "dtype": dtype, "ok": False, "error": tail})
    return results


def run_engine(name: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """One engine's outputs."""
    from engine.engines import Request, TreeSpy, run, start_engine, stop_engine, token_ids
    from engine.prompts import PROMPTS
    from vllm import SamplingParams

    begin = time.perf_counter()
    # compiled and with CUDA graphs for one type, without for the others
    settings: dict[str, Any] = {"dtype": dtype, "enforce_eager": options.cpu or dtype != "bfloat16"}
    if not options.cpu:
        settings |= {"max_num_seqs": BATCH, "gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 512 << 20}
    llm = start_engine(str(MODEL), ENGINES[name], **settings)
    encode = llm.get_tokenizer().encode
    # the repetitive ones first: they are where trees get deep
    texts = sorted(PROMPTS, key=lambda text: len(set(text)) / len(text))[: options.prompts]
    logprobs = 2 if name == "stock" else None
    greedy = [
        Request(tuple(encode(text)), SamplingParams(temperature=0.0, max_tokens=options.max_tokens, logprobs=logprobs))
        for text in texts
    ]
    seeded = [
        Request(
            tuple(encode(text)),
            SamplingParams(temperature=0.8, top_p=(1.0, 0.9)[i % 2], seed=i, max_tokens=options.max_tokens),
        )
        for i, text in enumerate(texts)
    ]
    answer: dict[str, Any] = {"start_seconds": time.perf_counter() - begin}
    with TreeSpy.on(llm) if name != "stock" else tempfile.TemporaryDirectory() as spy:
        for label, requests in (("greedy", greedy), ("seeded", seeded)):
            for how, in_flight in (("alone", 1), ("batched", BATCH)):
                outputs = run(llm, requests, in_flight=in_flight)
                answer[f"{label}, {how}"] = token_ids(outputs)
                if logprobs and label == "greedy":
                    answer[f"{label}, {how}, gaps"] = [gaps(output.outputs[0].logprobs) for output in outputs]
        if name != "stock":
            answer["trees"] = {key: value for key, value in vars(spy).items() if isinstance(value, int)}
    answer["seconds"] = time.perf_counter() - begin
    if options.cpu:
        stop_engine(llm)  # the next one runs in this process
    return answer


def gaps(logprobs: Any) -> list[float]:
    """For every position the distance between the two likeliest tokens."""
    result = []
    for position in logprobs:
        best = sorted((entry.logprob for entry in position.values()), reverse=True)
        result.append(best[0] - best[1] if len(best) > 1 else float("inf"))
    return result


def compare(name: str, dtype: str, stock: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Count what is identical, and look at what is not."""
    result: dict[str, Any] = {"engine": name, "dtype": dtype, "trees": ours["trees"], "seconds": ours["seconds"]}
    ok = True
    for kind in ("greedy, alone", "greedy, batched", "seeded, alone", "seeded, batched"):
        expected, got = stock[kind], ours[kind]
        same = [a == b for a, b in zip(expected, got, strict=True)]
        result[kind] = {"identical": sum(same), "of": len(same)}
        if kind == "greedy, alone" or dtype == "float32":
            baseline = stock[kind.replace("alone", "batched")]
            result[kind]["stock_alone_equals_batched"] = sum(a == b for a, b in zip(expected, baseline, strict=True))
        worst = 0.0
        for at, (a, b) in enumerate(zip(expected, got, strict=True)):
            if a != b and kind.startswith("greedy"):
                place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                known = stock[f"{kind}, gaps"][at]
                worst = max(worst, known[place] if place < len(known) else float("inf"))
        if kind.startswith("greedy"):
            result[kind]["largest_gap_at_a_difference"] = worst
            ok = ok and worst <= GAPS[dtype]
        elif dtype == "float32":
            ok = ok and all(same)
    result["ok"] = ok
    return result


if __name__ == "__main__":
    sys.exit(main())
