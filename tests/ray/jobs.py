"""Batch jobs on a cluster, with rows that keep small engines busy for a while."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cluster import TIMEOUT, Cluster, kill, wait_until

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine.prompts import CHATS, PROMPTS

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 256 << 20,
    "max_model_len": 512,
    "max_num_seqs": 4,
    "block_size": 32,
}
"""Small engines. Few requests at a time, so that a job takes long enough to be disturbed."""

SAMPLING = {"temperature": 0.8, "seed": 7, "max_tokens": 64}

ARGUMENTS = (
    *("--method", "lookahead", "--engine", json.dumps(ENGINE)),
    *(f"--{name.replace('_', '-')}={value}" for name, value in SAMPLING.items()),
)
"""Of every job."""

ROWS: list[dict[str, Any]] = [
    *({"id": f"prompt {i}", "prompt": prompt, "tag": {"n": i}} for i, prompt in enumerate(PROMPTS)),
    *({"id": f"chat {i}", "messages": [{"role": "user", "content": text}]} for i, text in enumerate(CHATS)),
    *({"id": f"again {i}", "prompt": f"# {i}\n{prompt}"} for i, prompt in enumerate(PROMPTS)),
]


class Job:
    """One run of ``vllm-lookahead batch``.

    Attributes:
        process: the driver.
        target: the job's folder.
    """

    def __init__(self, cluster: Cluster, source: Path, target: Path, model: str, *arguments: str) -> None:
        self.target = target
        command = [sys.executable, "-m", "vllm_lookahead.cli", "batch", str(source), str(target), "--model", model]
        self.process = subprocess.Popen(
            [*command, "--replicas", "2", "--block-rows", "4", *ARGUMENTS, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=cluster.environment,
        )

    def wait(self) -> tuple[int, str]:
        """Wait for the end; return the status and all that was printed."""
        printed, _ = self.process.communicate(timeout=TIMEOUT)
        return self.process.returncode, printed

    def wait_for_parts(self, count: int) -> None:
        """Wait until so many parts are there; fail if the job ends before."""

        def enough() -> bool:
            assert self.process.poll() is None, f"the job ended: {self.wait()}\n{log(self.target)}"
            return len(committed(self.target)) >= count

        wait_until(enough, f"{count} parts")

    def kill(self) -> None:
        """End the driver as the kernel would."""
        kill(self.process.pid)
        self.process.communicate()


def committed(target: Path) -> list[Path]:
    """The parts that Ray has committed."""
    names = [path.name.removesuffix(".parquet") for path in (target / "state" / "checkpoint").glob("*.parquet")]
    return [target / "parts" / f"{name}.jsonl" for name in names if not name.endswith(".pending")]


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows into a file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def log(target: Path) -> str:
    """The end of what Ray and the engines printed."""
    path = target / "job.log"
    return path.read_text(errors="replace")[-5000:] if path.exists() else "(no log)"
