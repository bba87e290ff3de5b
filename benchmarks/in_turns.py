"""Our method against stock vLLM inside one engine, request by request in turns: the ratio without a process's luck.

    python benchmarks/in_turns.py --prompts HumanEval.jsonl.gz --temperature 0.8 --max-tokens 256
    python benchmarks/in_turns.py --prompts random --temperature 1.2 --batch 2
    python benchmarks/in_turns.py --prompts HumanEval.jsonl.gz --without-recycling

On a small or shared machine two processes with the same engine differ by several percent, because of the cores and the
memory that they got. Here one engine of one process serves every group of requests twice, in random order: as it is,
and with vLLM's own methods put back over those of our model runner and the speculative mode switched off. What stays
ours even then (the sampler's processors, the attention class, whose ``forward`` is vLLM's without trees) costs nothing
measurable; memory and caches are shared. Outputs have to be equal. One thread, float32, CPU. In a third turn, with
``--without-recycling``, there are no recycled tokens.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
from vllm import LLM, SamplingParams
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_lookahead.bench.prompts import order, read_prompts
from vllm_lookahead.demo.run import MODEL
from vllm_lookahead.v1.runner import LookaheadRunnerMixin

HOOKS = [name for name in vars(LookaheadRunnerMixin) if hasattr(CPUModelRunner, name) and not name.startswith("__")]
"""What our runner overrides of vLLM's."""


@contextmanager
def as_stock(llm: LLM) -> Iterator[None]:
    """Within the block the engine decodes as vLLM does without speculation. No request may be in it."""
    core: Any = llm.llm_engine.engine_core.engine_core
    runner = runner_of(llm)
    runner.set_trees(None)
    speculative, runner.speculative_config = runner.speculative_config, None
    use, core.use_spec_decode = core.use_spec_decode, False
    for name in HOOKS:
        setattr(runner, name, getattr(CPUModelRunner, name).__get__(runner))
    try:
        yield
    finally:
        for name in HOOKS:
            delattr(runner, name)
        runner.speculative_config, core.use_spec_decode = speculative, use


def runner_of(llm: LLM) -> Any:
    """The engine's model runner."""
    core: Any = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


@contextmanager
def without_recycling(llm: LLM) -> Iterator[None]:
    """Requests that begin within the block neither guess from recycled tokens nor look for any."""
    proposer = runner_of(llm).drafter.proposer
    kept = proposer.num_top, proposer.guesses.recycled
    proposer.num_top, proposer.guesses.recycled = 0, None
    try:
        yield
    finally:
        proposer.num_top, proposer.guesses.recycled = kept


def serve(llm: LLM, prompts: list[str], params: list[SamplingParams], salt: str) -> tuple[float, list[list[int]]]:
    """Seconds and outputs of one group of requests that arrive together; other salts' answers help nobody here."""
    salted: list[Any] = [{"prompt": prompt, "cache_salt": salt} for prompt in prompts]
    begin = time.perf_counter()
    outputs = llm.generate(salted, params, use_tqdm=False)
    return time.perf_counter() - begin, [list(output.outputs[0].token_ids) for output in outputs]


def main() -> None:
    """Parse the command line and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--method", default="prompt_lookup")
    parser.add_argument("--prompts", default="demo")
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--without-recycling", action="store_true", help="a third turn without recycled tokens")
    parser.add_argument("--compiled", action="store_true", help="vLLM's default; without it, eager mode")
    options = parser.parse_args()
    llm = LLM(
        options.model,
        dtype="float32",
        enforce_eager=not options.compiled,
        max_num_batched_tokens=32768,  # stock vLLM on a CPU fails on seeded requests that are prefilled in parts
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 30,
        speculative_config={"method": options.method},
    )
    texts = read_prompts(options.prompts)
    chosen = order(len(texts), 0, options.num_prompts)
    prompts = [texts[i].text for i in chosen]
    params = [
        SamplingParams(
            temperature=options.temperature,
            seed=i if options.temperature else None,
            max_tokens=options.max_tokens,
            ignore_eos=True,
        )
        for i in chosen
    ]
    groups = [slice(i, i + options.batch) for i in range(0, options.num_prompts, options.batch)]
    turns: dict[str, Callable[[LLM], AbstractContextManager[None]]] = {
        "stock": as_stock,
        "ours": lambda llm: nullcontext(),
    }
    if options.without_recycling:
        turns["without recycling"] = without_recycling
    for name, turn in turns.items():
        with turn(llm):
            serve(llm, prompts[:4], params[:4], f"{name}, warm-up")
    times: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(options.rounds):
        for group in groups:
            outputs = []
            for name in random.sample(list(turns), len(turns)):
                with turns[name](llm):
                    # one salt for each turn: answers of the others help nobody
                    seconds, tokens = serve(llm, prompts[group], params[group], f"{name}, round {number}")
                times[name].append(seconds)
                outputs.append(tokens)
            assert all(tokens == outputs[0] for tokens in outputs), "the outputs differ"
    taken = {name: np.array(seconds) for name, seconds in times.items()}
    print(
        f"[{options.method}], batch {options.batch}, temperature {options.temperature}, {options.max_tokens} tokens, "
        f"{'compiled' if options.compiled else 'eager'}; {len(taken['stock'])} groups, outputs identical:"
    )
    for other in taken:
        if other != "ours":
            low, median, high = np.percentile(taken[other] / taken["ours"], [25, 50, 75])
            print(
                f"{taken[other].sum() / taken['ours'].sum():.3f}x {other} in all, by group {median:.3f} "
                f"(quartiles {low:.3f} - {high:.3f})"
            )


if __name__ == "__main__":
    main()
