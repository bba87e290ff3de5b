"""The folder of a job: whose it is, and who may write to it.

results.jsonl   when the job is through: every row that is done, in the order of the input
errors.jsonl    then, too: the rows that failed, each with its error; can be the input of another job
parts/          while it runs: the same rows as they come, one file per block
state/          the job's fingerprint, a copy of its input, and what Ray remembers as done
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_lookahead.batch.settings import differences


class FolderError(ValueError):
    """The folder can't be used for this job. The message is one sentence for the user."""


class Folder:
    """The paths in a job's folder.

    Attributes:
        root: the folder itself.
        results, errors, parts, log: see above.
        input: the copy of the input.
        checkpoint: Ray's.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.results = self.root / "results.jsonl"
        self.errors = self.root / "errors.jsonl"
        self.parts = self.root / "parts"
        self.log = self.root / "job.log"
        self._state = self.root / "state"
        self._job = self._state / "job.json"
        self.input = self._state / "input.jsonl"
        self.checkpoint = self._state / "checkpoint"

    @contextmanager
    def opened(self, fingerprint: dict[str, Any]) -> Iterator[None]:
        """Make the folder, or take it up again if it belongs to the same job, and keep others out within the block.

        Raises:
            FolderError: it belongs to another job or to no job, another process works on it, or it can't be written.
        """
        if self.root.is_dir() and not self._state.is_dir() and any(self.root.iterdir()):
            raise FolderError(f"{self.root} is not empty and holds no job; name a new folder")
        try:
            for folder in (self.parts, self.checkpoint):
                folder.mkdir(parents=True, exist_ok=True)
            lock = (self._state / "lock").open("w")
        except OSError as error:
            raise FolderError(f"can't write to the folder {self.root}: {error.strerror}") from None
        with lock:
            try:
                # released by the kernel, however this process ends
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise FolderError(f"another process is running the job in {self.root}") from None
            self._claim(fingerprint)
            yield

    def _claim(self, fingerprint: dict[str, Any]) -> None:
        if not any(self.checkpoint.iterdir()):  # nothing is done yet: there is nothing that could get mixed
            replace(self._job, [json.dumps(fingerprint, indent=2).encode()])
            return
        different = "; ".join(differences(json.loads(self._job.read_text()), fingerprint))
        if different:
            raise FolderError(f"{self.root} holds the results of another job ({different}); name a new folder")


def replace(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file so that it is there as a whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb") as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
