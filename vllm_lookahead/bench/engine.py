"""One engine under measurement, in a process of its own: ``python -m vllm_lookahead.bench.engine LOG``.

Reads commands from its standard input and answers on its standard output, one JSON object per line; what vLLM prints
goes to the log. The engine core runs in this same process (VLLM_ENABLE_V1_MULTIPROCESSING=0): it computes only while a
command is being carried out, and its model runner can be watched.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vllm_lookahead.bench import junk_chain
from vllm_lookahead.bench.stats import Latency
from vllm_lookahead.bench.watch import NodeCounter, StepTimers


class Engine:
    """A ``vllm.LLM`` and what can be asked of it. Every public method is a command; arguments and answers are JSON."""

    def __init__(self) -> None:
        self.llm: Any = None
        self.nodes = NodeCounter()

    # ---- commands

    def start(
        self,
        model: str,
        speculative_config: dict[str, Any] | None,
        arguments: dict[str, Any],
        imports: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Build the engine."""
        for module in imports:
            importlib.import_module(module)
        import torch
        from vllm import LLM

        self.llm = LLM(model, speculative_config=speculative_config, **arguments)
        self.nodes.attach(self._runner)
        config = self.llm.llm_engine.vllm_config
        return {
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_model_len": config.model_config.max_model_len,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "compilation": str(config.compilation_config.mode),
            "runner": type(self._runner).__name__,
            "threads": torch.get_num_threads(),
        }

    def encode(self, prompts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Prompts (the fields of ``prompts.Prompt``) as token ids, chats through the chat template if there is one."""
        tokenizer = self.llm.get_tokenizer()
        ids = []
        for prompt in prompts:
            text = prompt["text"]
            if prompt["chat"] and getattr(tokenizer, "chat_template", None):
                messages = [{"role": "user", "content": text}]
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                ids.append(list(tokenizer.encode(text, add_special_tokens=False)))
            else:
                ids.append(list(tokenizer.encode(text)))
        return {"ids": ids}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        batch: int,
        max_tokens: int,
        temperature: float = 0.0,
        seeds: Sequence[int] = (),
        ignore_eos: bool = True,
        profile: bool = False,
    ) -> dict[str, Any]:
        """Continue all prompts with ``batch`` of them in the engine at a time: one ends, the next one enters.

        Args:
            prompts: token ids.
            batch: most requests in the engine.
            max_tokens: per request.
            temperature: 0 is greedy.
            seeds: one per prompt, for sampling.
            ignore_eos: always generate ``max_tokens``.
            profile: also time the parts of each step (this costs a little).
        """
        params = [
            self._params(max_tokens, temperature, seeds[i] if temperature else None, ignore_eos)
            for i in range(len(prompts))
        ]
        timers = StepTimers()
        with timers.on(self._runner) if profile else _nothing():
            return self._run(prompts, params, batch, timers)

    def step_times(
        self, batch: int, context: int, shapes: Sequence[tuple[int, str]], steps: int, seconds: float
    ) -> dict[str, Any]:
        """Time steps that verify junk (``junk_chain``): ``batch`` requests, for each shape the same ones.

        Args:
            batch: number of requests.
            context: length of their prompts, random tokens.
            shapes: nodes per request, and "chain" or "tree".
            steps: how many to time for each shape.
            seconds: a shape's time limit; at least 4 steps are timed.
        """
        import numpy as np

        engine, warm_up, least = self.llm.llm_engine, 3, 4
        vocabulary = self.llm.llm_engine.vllm_config.model_config.get_vocab_size()
        rng = np.random.default_rng(0)
        junk_chain.choose(0, "chain", vocabulary)
        params = self._params(len(shapes) * (steps + warm_up) + 64, 0.0, None, True)
        names = [f"step-{i}" for i in range(batch)]
        for name in names:
            tokens = rng.integers(vocabulary // 16, vocabulary // 2, context).tolist()
            engine.add_request(name, {"prompt_token_ids": tokens}, params)
        begin, started = time.perf_counter(), set[str]()
        while len(started) < batch:
            started |= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
        prefill = time.perf_counter() - begin
        times: list[list[float]] = []
        emitted, asked = 0, 0
        self.nodes.reset()
        for nodes, kind in shapes:
            junk_chain.choose(nodes, kind, vocabulary)
            for _ in range(warm_up):  # the first step verifies what was proposed for the shape before
                emitted += _emitted(engine.step())
            spent: list[float] = []
            while len(spent) < steps and (len(spent) < least or sum(spent) < seconds):
                begin = time.perf_counter()
                outputs = engine.step()
                spent.append(time.perf_counter() - begin)
                emitted += _emitted(outputs)
            times.append([1e3 * value for value in spent])
            asked += batch * nodes * (warm_up + len(spent))
        rows = batch * sum(len(spent) + warm_up for spent in times)
        engine.abort_request(names)
        return {
            "prefill_ms": 1e3 * prefill,
            "step_ms": times,
            "accepted": emitted - rows,
            "asked": asked,
            "nodes": self.nodes.nodes,
        }

    # ---- how

    @property
    def _runner(self) -> Any:
        """The model runner, or None where it lives in another process."""
        core = getattr(self.llm.llm_engine.engine_core, "engine_core", None)
        driver = getattr(getattr(core, "model_executor", None), "driver_worker", None)
        return getattr(getattr(driver, "worker", None), "model_runner", None)

    def _params(self, max_tokens: int, temperature: float, seed: int | None, ignore_eos: bool) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            output_kind=RequestOutputKind.DELTA,
        )

    def _run(
        self, prompts: Sequence[Sequence[int]], params: Sequence[Any], batch: int, timers: StepTimers
    ) -> dict[str, Any]:
        engine = self.llm.llm_engine
        waiting = deque(range(len(prompts)))
        outputs: list[list[int]] = [[] for _ in prompts]
        last: dict[int, float] = {}  # when a running request got its last tokens
        running = 0
        pauses: list[tuple[float, int]] = []
        steps, decode_steps, decode_seconds = 0, 0, 0.0
        self.nodes.reset()
        start = time.perf_counter()
        while waiting or running:
            while waiting and running < batch:
                i = waiting.popleft()
                engine.add_request(str(i), {"prompt_token_ids": list(prompts[i])}, params[i])
                running += 1
            decoding = len(last) == running
            begin = time.perf_counter()
            results = engine.step()
            now = time.perf_counter()
            steps += 1
            if decoding:
                decode_steps += 1
                decode_seconds += now - begin
            timers.end_step(now - begin, counts=decoding)
            for result in results:
                i, tokens = int(result.request_id), result.outputs[0].token_ids
                if tokens:
                    if i in last:
                        pauses.append((now - last[i], len(tokens)))
                    last[i] = now
                    outputs[i].extend(tokens)
                if result.finished:
                    running -= 1
                    last.pop(i, None)
        seconds = time.perf_counter() - start
        latency = Latency.of(pauses)
        return {
            "seconds": seconds,
            "outputs": outputs,
            "request_steps": len(pauses),
            "nodes": self.nodes.nodes,
            "steps": steps,
            "decode_steps": decode_steps,
            "decode_seconds": decode_seconds,
            "itl_p50_ms": latency.itl_p50,
            "itl_p99_ms": latency.itl_p99,
            "pause_p50_ms": latency.pause_p50,
            "pause_p99_ms": latency.pause_p99,
            "profile": timers.report(),
        }


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _emitted(outputs: Sequence[Any]) -> int:
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def serve(engine: Engine, commands: Any, answers: Any) -> None:
    """Carry out one command after the other, until there are no more."""
    for line in commands:
        request = json.loads(line)
        try:
            answer = {"answer": getattr(engine, request["command"])(**request["arguments"])}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def main(log_path: str) -> None:
    """Keep the pipes for commands and answers, and give everybody else the log."""
    with (
        os.fdopen(os.dup(0)) as commands,
        os.fdopen(os.dup(1), "w") as answers,
        open(log_path, "a") as log,
        open(os.devnull) as nothing,
    ):
        for stream in (commands, answers):
            os.set_inheritable(stream.fileno(), False)
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        serve(Engine(), commands, answers)


if __name__ == "__main__":
    main(sys.argv[1])
