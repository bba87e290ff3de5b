"""The account of a job: which rows are done, which failed, and all of them in order at the end."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vllm_lookahead.batch.folder import Folder, replace
from vllm_lookahead.batch.rows import row_key


class Place(NamedTuple):
    """Where a result is: the part, the offset of its line, and whether it is an error."""

    part: Path
    offset: int
    failed: bool


class Results:
    """What a folder's parts hold of the rows of a job.

    A part counts once Ray has put the checkpoint beside it in place: before, it may be half written, and after a crash
    Ray deletes it. Results of rows that are no longer in the input don't count.
    """

    def __init__(self, folder: Folder, keys: Sequence[str]) -> None:
        self._folder = folder
        self._keys = keys
        self._wanted = frozenset(keys)
        self._read: set[str] = set()
        self._places: dict[str, Place] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the parts that have come since."""
        for checkpoint in self._folder.checkpoint.glob("*.parquet"):
            name = checkpoint.name.removesuffix(".parquet")
            if name.endswith(".pending") or name in self._read:
                continue
            self._read.add(name)
            part = self._folder.parts / f"{name}.jsonl"
            offset = 0
            with part.open("rb") as file:
                for line in file:
                    row = json.loads(line)
                    self._note(row_key(row), Place(part, offset, "error" in row))
                    offset += len(line)

    def _note(self, key: str, place: Place) -> None:
        known = self._places.get(key)
        # a row that failed once may have been done since, and a part of that run may be read first
        if key in self._wanted and (known is None or known.failed):
            self._places[key] = place

    def retry_failed(self) -> None:
        """Forget what failed: it will run again."""
        self._places = {key: place for key, place in self._places.items() if not place.failed}

    @property
    def failed(self) -> int:
        """How many rows have an error, and no result."""
        return sum(place.failed for place in self._places.values())

    @property
    def done(self) -> int:
        """How many rows have a result."""
        return len(self._places) - self.failed

    @property
    def missing(self) -> int:
        """How many rows have neither."""
        return len(self._keys) - len(self._places)

    def assemble(self) -> None:
        """Write ``results.jsonl`` and ``errors.jsonl``, each in the order of the input."""
        replace(self._folder.results, self._lines(failed=False))
        if self.failed:
            replace(self._folder.errors, self._lines(failed=True))
        else:
            self._folder.errors.unlink(missing_ok=True)

    def _lines(self, *, failed: bool) -> Iterator[bytes]:
        places = (self._places[key] for key in self._keys if key in self._places)
        # rows that follow each other mostly lie in the same part
        for part, group in itertools.groupby((p for p in places if p.failed == failed), key=lambda place: place.part):
            with part.open("rb") as file:
                for place in group:
                    file.seek(place.offset)
                    yield file.readline()
