"""One engine of the demo, in a process of its own: clean memory, and vLLM's log where it doesn't disturb.

Started as ``python -m vllm_lookahead.demo.engine JOB LOG``: reads the job from a JSON file, sends vLLM's output to the
log, and reports on its standard output, one JSON object per line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True)
class Prompt:
    """One prompt: its name in the table, ``code`` or ``chat``, and the text."""

    name: str
    kind: str
    text: str


@dataclass(frozen=True)
class Job:
    """What an engine shall do.

    Attributes:
        model: folder or name of the model.
        speculative_config: as for ``LLM``; None for stock vLLM.
        prompts: what to continue.
        max_tokens: output length per prompt.
        temperature: 0 for greedy; above, each prompt has a seed, so that outputs can be compared.
        engine: further arguments for ``LLM``.
    """

    model: str
    speculative_config: dict[str, Any] | None
    prompts: list[Prompt]
    max_tokens: int
    temperature: float
    engine: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the job as JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Job:
        """Read what ``save`` wrote."""
        data = json.loads(path.read_text())
        return cls(**{**data, "prompts": [Prompt(**prompt) for prompt in data["prompts"]]})


@dataclass
class Output:
    """What became of one prompt, step by step.

    Attributes:
        steps: the token ids that each engine step emitted.
        texts: the text of each step.
    """

    steps: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """All token ids."""
        return [token for step in self.steps for token in step]


@dataclass
class Run:
    """One pass over prompts: all outputs, and how long it took."""

    outputs: list[Output]
    seconds: float

    @property
    def num_tokens(self) -> int:
        """How many tokens were generated."""
        return sum(len(output.tokens) for output in self.outputs)

    @property
    def tokens_per_second(self) -> float:
        """Throughput, prefill included."""
        return self.num_tokens / self.seconds

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a request got per decoding step; its first token comes from the prompt's step and is left out."""
        steps = sum(len(output.steps) - 1 for output in self.outputs)
        return (self.num_tokens - len(self.outputs)) / steps if steps else 1.0


class Reporter:
    """Sends events to the parent, progress at most ten times a second."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._last = 0.0

    def send(self, kind: str, **values: Any) -> None:
        """Send one event."""
        print(json.dumps({"event": kind, **values}), file=self.stream, flush=True)

    def progress(self, tokens: int) -> None:
        """Say how many tokens there are so far, now and then."""
        now = time.monotonic()
        if now - self._last > 0.1:
            self._last = now
            self.send("progress", tokens=tokens)


def generate(
    llm: Any, prompts: list[list[int]], params: list[Any], salt: str, on_tokens: Any = lambda tokens: None
) -> Run:
    """Continue prompts, all of them at once, and keep what every single step emitted.

    Args:
        llm: a ``vllm.LLM``.
        prompts: token ids.
        params: a ``SamplingParams`` per prompt, whose ``output_kind`` is ``DELTA``.
        salt: what was said under another cache salt helps nobody here.
        on_tokens: called after every step with the number of tokens so far.
    """
    engine = llm.llm_engine
    outputs = {str(i): Output() for i in range(len(prompts))}
    tokens = 0
    start = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), {"prompt_token_ids": prompt, "cache_salt": salt}, params[i])
    while engine.has_unfinished_requests():
        for result in engine.step():
            delta = result.outputs[0]
            if delta.token_ids:
                output = outputs[result.request_id]
                output.steps.append(list(delta.token_ids))
                output.texts.append(delta.text)
                tokens += len(delta.token_ids)
            elif delta.text:  # what the detokenizer held back until the end
                outputs[result.request_id].texts[-1] += delta.text
        on_tokens(tokens)
    return Run(list(outputs.values()), time.perf_counter() - start)


def token_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The prompt as tokens, chat prompts through the model's chat template (if it has one)."""
    if prompt.kind == "chat" and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt.text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(tokenizer.encode(text, add_special_tokens=False))
    return list(tokenizer.encode(prompt.text))


def work(job: Job, reporter: Reporter) -> None:
    """Start the engine, run every prompt alone and then all of them together, and report."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    start = time.perf_counter()
    try:
        llm = LLM(job.model, speculative_config=job.speculative_config, **job.engine)
    except (OSError, ValueError) as error:  # how vLLM and transformers say that an argument is wrong
        reporter.send("refused", reason=str(error))
        raise
    prompts = [token_ids(llm.get_tokenizer(), prompt) for prompt in job.prompts]

    def params(seed: int, max_tokens: int) -> Any:
        return SamplingParams(
            temperature=job.temperature,
            seed=seed if job.temperature else None,
            max_tokens=max_tokens,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )

    # the first steps compile and allocate
    generate(llm, prompts, [params(i, 16) for i in range(len(prompts))], "warm-up")
    reporter.send("ready", seconds=time.perf_counter() - start, total=2 * len(prompts) * job.max_tokens)

    alone: list[Run] = []
    done = 0
    for i, prompt in enumerate(prompts):
        run = generate(
            llm, [prompt], [params(i, job.max_tokens)], "alone", lambda n, done=done: reporter.progress(done + n)
        )
        alone.append(run)
        done += run.num_tokens
    together = generate(
        llm,
        prompts,
        [params(i, job.max_tokens) for i in range(len(prompts))],
        "together",
        lambda n: reporter.progress(done + n),
    )
    reporter.send("result", alone=[asdict(run) for run in alone], together=asdict(together))


def main(job_path: str, log_path: str) -> None:
    """Run a job; the process's standard output and error go to the log, reports to what was standard output."""
    with (
        os.fdopen(os.dup(sys.stdout.fileno()), "w") as stream,
        open(log_path, "a") as log,
    ):
        os.set_inheritable(stream.fileno(), False)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        work(Job.load(Path(job_path)), Reporter(stream))


if __name__ == "__main__":
    main(*sys.argv[1:])
