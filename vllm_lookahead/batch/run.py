"""A batch job from the command line to its results. Everything that can be checked is, before an engine starts."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vllm_lookahead.batch.folder import Folder
from vllm_lookahead.batch.results import Results
from vllm_lookahead.batch.rows import Input, read_rows, take_input
from vllm_lookahead.batch.settings import Settings
from vllm_lookahead.demo.run import check_method

SECONDS = 1.0
"""Between two looks at what is done."""
ENGINE_ERROR = re.compile(r"ERROR [^]\n]*\] ((?:\w+\.)*\w*(?:Error|Exception): [^\n]*)")
"""How vLLM logs an error that ends an engine core."""


class BatchError(RuntimeError):
    """The job can't run, or broke off. The message is for the user."""


@dataclass(frozen=True)
class Plan:
    """How a job is spread over a cluster.

    Attributes:
        replicas: engines.
        resources: of each engine's worker, as Ray counts them; None: a GPU where the cluster has any. A CPU is added if
            nothing is said of CPUs.
        block_rows: rows that are written, and remembered as done, together; None: see ``usual_block``.
        address: the cluster's; None: what ``ray.init`` finds, or a cluster on this machine for this job alone.
    """

    replicas: int
    resources: dict[str, float] | None = None
    block_rows: int | None = None
    address: str | None = None


def run_batch(console: Console, source: Path, target: Path, settings: Settings, plan: Plan) -> Results:
    """Generate for every row of a file that has no result yet.

    Returns:
        The account of the job.

    Raises:
        InputError: the input is wrong.
        FolderError: the folder belongs to another job, or can't be written.
        ConfigError: nobody has the method, or one of ours can't have these options.
        BatchError: other settings are wrong, there is no Ray, or the job broke off.
    """
    check(settings, plan)
    for _ in read_rows(source):
        pass
    folder = Folder(target)
    with folder.opened(settings.fingerprint()):
        rows = take_input(source, folder.input)
        results = Results(folder, rows.keys)
        if results.done:
            console.print(f"{results.done} of {len(rows.keys)} rows are done already")
        results.retry()
        if results.missing:
            with printed_to(folder.log) as terminal:
                work(terminal, settings, rows, folder, plan, results)
            results.refresh()
        results.assemble()
    return results


def check(settings: Settings, plan: Plan) -> None:
    """Find mistakes that would otherwise show when an engine starts, minutes later and once per machine.

    Raises:
        ConfigError, BatchError: what is wrong.
    """
    if importlib.util.find_spec("ray") is None:
        raise BatchError("batch needs Ray: pip install 'vllm-lookahead[ray]'")
    if settings.speculative_config is not None:
        check_method(settings.speculative_config)
    if settings.model.startswith(("/", "./", "../", "~")) and not Path(settings.model).is_dir():
        raise BatchError(f"--model {settings.model}: there is no such folder")
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    unknown = settings.engine.keys() - inspect.signature(AsyncEngineArgs).parameters.keys()
    if unknown:
        raise BatchError(f"--engine: vLLM's engine has no argument {', '.join(sorted(unknown))}")
    for name in settings.engine.keys() & {"model", "speculative_config"}:
        raise BatchError(f"--engine: {name} has an option of its own")
    for name, amount in (plan.resources or {}).items():
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not amount > 0:
            raise BatchError(f"--resources: {name} = {json.dumps(amount)}: must be a number above 0")
    if settings.sampling.get("n", 1) != 1:
        raise BatchError("--sampling: a row has one result; for n of them put the row into the input n times")
    given = dict(settings.sampling)
    try:
        if given.get("structured_outputs"):
            given["structured_outputs"] = StructuredOutputsParams(**given["structured_outputs"])
        SamplingParams(**given)
    except Exception as error:  # which kinds vLLM raises depends on its version
        raise BatchError(f"--sampling: {error}") from None


def work(console: Console, settings: Settings, rows: Input, folder: Folder, plan: Plan, results: Results) -> None:
    """Connect to Ray, run the job there, and leave.

    Raises:
        BatchError: Ray can't be reached, or the job broke off.
    """
    # Ray and torch take seconds to import
    from vllm_lookahead.batch import pipeline

    block_rows = plan.block_rows or usual_block(results.missing, plan.replicas)
    replicas = min(plan.replicas, math.ceil(results.missing / block_rows))
    try:
        with console.status("connecting to Ray"):
            pipeline.connect(plan.address)
    except Exception as error:  # Ray has many ways to say it
        raise BatchError(
            f"can't connect to Ray: {reason(error)} ({folder.log} says more)\n"
            "RAY_ADDRESS or --address says where the cluster is; one with a token wants RAY_AUTH_MODE=token"
        ) from error
    try:
        # the actor of an engine of several workers needs a CPU beside their GPUs
        resources = {"CPU": 1.0, **(plan.resources or pipeline.usual_resources())}
        per_engine = settings.engine.get("tensor_parallel_size", 1) * settings.engine.get("pipeline_parallel_size", 1)
        room = pipeline.room({name: amount * per_engine for name, amount in resources.items()})
        if room < replicas:
            console.print(f"the cluster has room for {room} of {replicas} engines; the others start once it has more")
        with progress(console, results):
            pipeline.run(settings, rows, folder, pipeline.Cluster(replicas, resources, block_rows))
    except Exception as error:  # whatever it is, what was written until then stays
        raise BatchError(
            f"the job broke off: {root_cause(reason(error), folder.log)} ({folder.log} says more)\n"
            f"{results.done} rows are done; the same command goes on from there"
        ) from error
    finally:
        pipeline.disconnect()


def usual_block(rows: int, replicas: int) -> int:
    """Rows per block: what a crash can cost, against the number of files.

    At least four blocks per replica, where there are so many rows, so that all end at about the same time; at most
    10,000 files.
    """
    return max(min(math.ceil(rows / (4 * replicas)), 32), math.ceil(rows / 10_000))


def reason(error: Exception) -> str:
    """What went wrong, in one line. Ray puts a traceback into the message; its last line is what counts."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if len(lines) > 1 else f"{type(error).__name__}: {''.join(lines)}"


def root_cause(heard: str, log: Path) -> str:
    """Why an engine didn't start, from the log: what Ray hears of is only the error that follows from it."""
    if "root cause" not in heard:
        return heard
    found = ENGINE_ERROR.findall(log.read_text(errors="replace"))
    return found[-1] if found else heard


@contextmanager
def printed_to(log: Path) -> Iterator[Console]:
    """Within the block everything that this process prints goes into a file; yields a console on the real stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with log.open("ab") as file, os.fdopen(os.dup(2), "w") as terminal:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield Console(file=terminal)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for real, number in zip(kept, (1, 2), strict=True):
                os.dup2(real, number)
                os.close(real)


@contextmanager
def progress(console: Console, results: Results) -> Iterator[None]:
    """A progress bar of the rows that are written, for as long as the block takes."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("engines start", total=results.done + results.missing)
        over = threading.Event()

        def show() -> None:
            before = results.done
            while True:
                last = over.wait(SECONDS)
                results.refresh()
                through = results.done + results.failed
                failed = f", {results.failed} failed" if results.failed else ""
                bar.update(task, completed=through, description=f"generating{failed}" if through > before else None)
                if last:
                    return

        watcher = threading.Thread(target=show, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
