"""One engine under measurement: what runs in its process, where ``engines.py`` calls it.

The engine core runs in this same process (VLLM_ENABLE_V1_MULTIPROCESSING=0): it computes only while it is asked to.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from vllm_lookahead.bench import junk_chain
from vllm_lookahead.bench.prompts import Prompt

PART = "part of a step: "
RUNNER_PARTS = (
    *("execute_model", "prepare_inputs", "_prepare_inputs", "_model_forward", "sample_tokens", "sample", "_sample"),
    *("serve_trees", "walk", "commit_kv"),
)
"""What the model runners, vLLM's and ours, V1 and V2, call their parts of a step."""


def described(averages: Any, wall_ms: Sequence[float]) -> str:
    """What a profiler saw of some steps: the whole, its parts, and what takes longest.

    Args:
        averages: ``torch.profiler.profile.key_averages()``.
        wall_ms: how long each step took.
    """
    import torch

    steps, cuda = len(wall_ms), torch.cuda.is_available()
    busy = sum(event.self_device_time_total for event in averages if not event.key.startswith(PART)) / 1e3 / steps
    lines = [f"a step: {sum(wall_ms) / steps:.2f} ms, device busy for {busy:.2f} ms" if cuda else f"{steps} steps"]
    for event in sorted(averages, key=lambda event: -event.cpu_time_total):
        if event.key.startswith(PART):
            name = event.key.removeprefix(PART)
            host, device = (time / 1e3 / steps for time in (event.cpu_time_total, event.device_time_total))
            lines.append(f"  {name}: {host:.3f} ms on the host" + (f", {device:.3f} ms on the device" if cuda else ""))
    by = f"self_{'cuda' if cuda else 'cpu'}_time_total"
    return "\n".join([*lines, averages.table(sort_by=by, row_limit=25)])


class Engine:
    """A ``vllm.LLM`` and what can be asked of it. What comes and goes is plain data."""

    def __init__(
        self, model: str, speculative_config: dict[str, Any] | None, arguments: dict[str, Any], imports: Sequence[str]
    ) -> None:
        for module in imports:
            importlib.import_module(module)
        from vllm import LLM

        self.llm = LLM(model, speculative_config=speculative_config, **arguments)
        self.nodes = 0
        self._calls = 0
        self._count_nodes()

    @property
    def runner(self) -> Any:
        """The model runner, or None where it lives in another process."""
        core = getattr(self.llm.llm_engine.engine_core, "engine_core", None)
        driver = getattr(getattr(core, "model_executor", None), "driver_worker", None)
        return getattr(getattr(driver, "worker", None), "model_runner", None)

    def info(self) -> dict[str, Any]:
        """What the engine made of its settings."""
        import torch

        config = self.llm.llm_engine.vllm_config
        return {
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_model_len": config.model_config.max_model_len,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "compilation": str(config.compilation_config.mode),
            "cudagraphs": str(config.compilation_config.cudagraph_mode),
            "runner": type(self.runner).__name__,
            "threads": torch.get_num_threads(),
            "eager": config.model_config.enforce_eager,
            "device": str(config.device_config.device_type),
        }

    def drafting(self, batches: Sequence[int]) -> dict[str, Any] | None:
        """What the first worker says about its drafting (``DraftingReport``), or None: it isn't ours."""
        from vllm_lookahead.plugin import WORKERS

        if self.llm.llm_engine.vllm_config.parallel_config.worker_cls not in WORKERS.values():
            return None
        return self.llm.collective_rpc("drafting_report", args=(tuple(batches),))[0]

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Prompts as token ids, chats through the chat template if there is one."""
        tokenizer = self.llm.get_tokenizer()
        ids = []
        for prompt in prompts:
            if prompt.chat and getattr(tokenizer, "chat_template", None):
                messages = [{"role": "user", "content": prompt.text}]
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                ids.append(list(tokenizer.encode(text, add_special_tokens=False)))
            else:
                ids.append(list(tokenizer.encode(prompt.text)))
        return ids

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        batch: int,
        max_tokens: int,
        temperature: float = 0.0,
        seeds: Sequence[int] = (),
        ignore_eos: bool = True,
    ) -> dict[str, Any]:
        """Continue all prompts with ``batch`` of them in the engine at a time: one ends, the next one enters.

        Every call has a cache salt of its own: the same prompts were asked before, and nobody shall know the answers.

        Args:
            prompts: token ids.
            batch: most requests in the engine.
            max_tokens: per request.
            temperature: 0 is greedy.
            seeds: one per prompt, for sampling.
            ignore_eos: always generate ``max_tokens``.

        Returns:
            ``outputs`` and ``seconds`` for all of it; of decoding, ``request_steps`` (steps in which a request got
            tokens), ``nodes`` verified, and ``ms_per_step`` of steps that only decode.
        """
        engine = self.llm.llm_engine
        waiting = deque(range(len(prompts)))
        outputs: list[list[int]] = [[] for _ in prompts]
        started = set[int]()  # running requests that have their first token
        running, request_steps, decode_steps, decode_seconds = 0, 0, 0, 0.0
        self.nodes = 0
        self._calls += 1
        salt = f"call {self._calls}"
        start = time.perf_counter()
        while waiting or running:
            while waiting and running < batch:
                i = waiting.popleft()
                params = self._params(max_tokens, temperature, seeds[i] if temperature else None, ignore_eos)
                engine.add_request(str(i), {"prompt_token_ids": list(prompts[i]), "cache_salt": salt}, params)
                running += 1
            decoding = len(started) == running
            begin = time.perf_counter()
            results = engine.step()
            if decoding:
                decode_seconds += time.perf_counter() - begin
                decode_steps += bool(results)  # with asynchronous scheduling a call may return nothing
            for result in results:
                i, tokens = int(result.request_id), result.outputs[0].token_ids
                if tokens:
                    request_steps += i in started
                    started.add(i)
                    outputs[i].extend(tokens)
                if result.finished:
                    running -= 1
                    started.discard(i)
        return {
            "seconds": time.perf_counter() - start,
            "outputs": outputs,
            "request_steps": request_steps,
            "nodes": self.nodes,
            "ms_per_step": 1e3 * decode_seconds / max(1, decode_steps),
        }

    def step_times(
        self, batch: int, context: int, shapes: Sequence[tuple[int, str]], steps: int, profile: bool = False
    ) -> dict[str, Any]:
        """Time steps that verify junk (``junk_chain``): ``batch`` requests, for each shape the same ones.

        Args:
            batch: number of requests.
            context: length of their prompts, random tokens.
            shapes: nodes per request, and "chain" or "tree".
            steps: how many to time for each shape.
            profile: also list the operators (kernels, on a GPU) that take longest, from steps of their own.

        Returns:
            ``step_ms``: for each shape, the time from tokens to tokens, ``steps`` times; ``prefill_ms`` of all prompts
            together; ``asked``, ``verified`` and ``accepted`` nodes; ``operators``, a text for each shape.
        """
        import numpy as np
        import torch

        engine, warm_up, profiled = self.llm.llm_engine, 4, 5
        config = engine.vllm_config.model_config
        vocabulary, rng = config.get_vocab_size(), np.random.default_rng(0)
        junk_chain.choose(0, "chain", vocabulary)
        most = len(shapes) * (steps + warm_up + profiled) + 64
        if context + most + max(nodes for nodes, _ in shapes) > config.max_model_len:
            raise ValueError(f"a context of {context} and {most} steps need more than {config.max_model_len} positions")
        params = self._params(most, 0.0, None, True)
        names = [f"step-{i}" for i in range(batch)]
        for name in names:
            tokens = rng.integers(vocabulary // 16, vocabulary // 2, context).tolist()
            engine.add_request(name, {"prompt_token_ids": tokens}, params)
        begin, started = time.perf_counter(), set[str]()
        while len(started) < batch:
            started |= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
        found: dict[str, Any] = {"prefill_ms": 1e3 * (time.perf_counter() - begin), "step_ms": [], "operators": []}
        rows = emitted = asked = 0
        self.nodes = 0

        def step() -> float:
            nonlocal rows, emitted
            begin = time.perf_counter()
            while not (outputs := engine.step()):
                pass
            rows += len(outputs)
            emitted += sum(len(output.outputs[0].token_ids) for output in outputs)
            return 1e3 * (time.perf_counter() - begin)

        for nodes, kind in shapes:
            junk_chain.choose(nodes, kind, vocabulary)
            for _ in range(warm_up):  # the first steps verify what was proposed for the shape before
                step()
            found["step_ms"].append([step() for _ in range(steps)])
            asked += batch * nodes * (warm_up + steps)
            if profile:
                with self._parts_named(), torch.profiler.profile() as profiler:
                    wall = [step() for _ in range(profiled)]
                asked += batch * nodes * profiled
                found["operators"].append(described(profiler.key_averages(), wall))
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()
        return {**found, "asked": asked, "verified": self.nodes, "accepted": emitted - rows}

    @contextmanager
    def _parts_named(self) -> Iterator[None]:
        """Give the parts of a step names in the profiler's tables. Parts that an engine doesn't have are left out."""
        from torch.profiler import record_function

        core, runner = getattr(self.llm.llm_engine.engine_core, "engine_core", None), self.runner
        places = [
            *((getattr(core, "scheduler", None), name) for name in ("schedule", "update_from_output")),
            *((runner, name) for name in RUNNER_PARTS),
            (getattr(runner, "planner", None), "plan"),
        ]
        with ExitStack() as stack:
            for owner, name in places:
                function = getattr(owner, name, None)
                if function is not None:
                    stack.enter_context(patch.object(owner, name, record_function(PART + name)(function)))
            yield

    def _count_nodes(self) -> None:
        """Count the draft nodes that steps are prepared for. Costs about a microsecond per step.

        Not what the scheduler hands out: with asynchronous scheduling that is places, of which our runner uses some.
        """
        if self.runner is None:
            return
        name = "prepare_inputs" if hasattr(self.runner, "prepare_inputs") else "_prepare_inputs"  # V2, V1
        prepare = getattr(self.runner, name)

        @functools.wraps(prepare)
        def counted(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self.nodes += sum(map(len, scheduler_output.scheduled_spec_decode_tokens.values()))
            return prepare(scheduler_output, *args, **kwargs)

        setattr(self.runner, name, counted)

    def _params(self, max_tokens: int, temperature: float, seed: int | None, ignore_eos: bool) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
            detokenize=not self.llm.llm_engine.vllm_config.model_config.skip_tokenizer_init,
            output_kind=RequestOutputKind.DELTA,
        )
