"""The demo itself: stock vLLM and ours, one after the other, on the same prompts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from vllm_lookahead.config import LookaheadConfig, method_names, requested_method
from vllm_lookahead.demo.engine import Job, Output, Prompt, Run
from vllm_lookahead.demo.report import Comparison, show
from vllm_lookahead.plugin import stock_methods

MODEL = str(files("vllm_lookahead.demo") / "model")
"""The model that comes with the package."""


class EngineFailedError(RuntimeError):
    """An engine of the demo ended without a result."""


def load_prompts() -> list[Prompt]:
    """The demo's prompts."""
    data = tomllib.loads((files("vllm_lookahead.demo") / "prompts.toml").read_text())
    return [Prompt(**prompt) for prompt in data["prompt"]]


def run_demo(
    console: Console,
    *,
    model: str,
    method: str,
    options: dict[str, Any],
    max_tokens: int,
    temperature: float,
    engine: dict[str, Any],
    show_texts: int,
) -> bool:
    """Run both engines, print the comparison, and say whether all outputs were identical.

    Args:
        console: where to print.
        model: folder or name of the model.
        method: one of our methods, like "[prompt_lookup]" (a method of vLLM's works as well).
        options: further entries of the speculative config.
        max_tokens: tokens per prompt.
        temperature: 0 is greedy.
        engine: further arguments for ``vllm.LLM``.
        show_texts: how many generated texts to print.

    Raises:
        ConfigError: nobody has the method, or one of ours can't have these options.
        EngineFailedError: an engine did not start or died; the message says why, or ends with its last log lines.
    """
    name = f"[{method.strip('[]')}]"
    prompts = load_prompts()
    ours: dict[str, Any] = {**options, "method": method.strip("[]")}
    check_method(ours)
    console.print(f"{len(prompts)} prompts, {max_tokens} tokens each, temperature {temperature:g}, model {model}")
    results = []
    with progress_bars(console) as progress:
        # both lines at once: what is still to come should be seen
        tasks = [progress.add_task(f"{label}: waiting", total=None) for label in ("stock vLLM", name)]
        for label, config, task in zip(("stock vLLM", name), (None, ours), tasks, strict=True):
            job = Job(model, config, prompts, max_tokens, temperature, engine)
            results.append(run_engine(job, label, progress, task))
    (stock_alone, stock_together), (our_alone, our_together) = results
    comparison = Comparison(name, prompts, stock_alone, our_alone, stock_together, our_together)
    show(console, comparison, show_texts)
    return comparison.identical


def check_method(speculative_config: dict[str, Any]) -> None:
    """Find mistakes now, not when the stock engine has run for a minute.

    Raises:
        ConfigError: what is wrong.
    """
    ours = method_names()
    # importing vLLM takes seconds
    stock = () if speculative_config["method"] in ours else stock_methods()
    requested = requested_method(speculative_config, ours, stock)
    if requested is not None:
        LookaheadConfig.parse(*requested)


@contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    """Progress bars for the two engines."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield progress


def run_engine(job: Job, label: str, progress: Progress, task: TaskID) -> tuple[list[Run], Run]:
    """Run one engine in a process of its own.

    Returns:
        The runs of each prompt alone, and the run of all together.

    Raises:
        EngineFailedError: it died.
    """
    progress.update(task, description=f"{label}: starting")
    progress.reset(task, total=None)
    with tempfile.TemporaryDirectory(prefix="vllm-lookahead-") as folder:
        job_path, log_path = Path(folder, "job.json"), Path(folder, "engine.log")
        job.save(job_path)
        command = [sys.executable, "-m", "vllm_lookahead.demo.engine", str(job_path), str(log_path)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(stock=job.speculative_config is None),
            start_new_session=True,  # so that the engine's own processes can be ended with it
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "ready":
                    progress.update(task, description=label, total=event["total"])
                elif event["event"] == "progress":
                    progress.update(task, completed=event["tokens"])
                elif event["event"] == "result":
                    together = _run(event["together"])
                    alone = [_run(run) for run in event["alone"]]
                    total = together.num_tokens + sum(run.num_tokens for run in alone)
                    progress.update(task, completed=total, total=total)
                    return alone, together
                elif event["event"] == "refused":
                    raise EngineFailedError(f"{label} did not start: {event['reason']}")
            process.wait()
            raise EngineFailedError(f"{label} ended without a result; the end of its log:\n{_tail(log_path)}")
        finally:
            _end(process)


def environment(*, stock: bool) -> dict[str, str]:
    """The environment of an engine. The stock one doesn't even load our plugin."""
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    if stock:
        allowed = environment.get("VLLM_PLUGINS")
        names = [entry.name for entry in entry_points(group="vllm.general_plugins")]
        names = names if allowed is None else allowed.split(",")
        environment["VLLM_PLUGINS"] = ",".join(name for name in names if name != "lookahead")
    return environment


def _run(data: dict[str, Any]) -> Run:
    return Run([Output(**output) for output in data["outputs"]], data["seconds"])


def _tail(log: Path, lines: int = 25) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "(no log)"


def _end(process: subprocess.Popen[str]) -> None:
    """End an engine and the processes that it started."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    with suppress(ProcessLookupError):  # nothing is left, as it should be
        os.killpg(process.pid, signal.SIGKILL)
