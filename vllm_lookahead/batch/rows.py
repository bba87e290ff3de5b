"""The rows of a job: read, checked, and recognised again in the output.

A row is a JSON object with ``prompt`` (a text) or ``messages`` (a chat). Whatever else it holds comes out again with
the result. ``id`` is checked, or made: the number of the line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULT_FIELDS = (
    "generated_text",
    "generated_tokens",
    "num_input_tokens",
    "num_generated_tokens",
    "logprobs",
    "prompt_logprobs",
    "error",
)
"""What a job adds to a row. Left out of a row that comes in, so that ``errors.jsonl`` can go in again."""

Row = dict[str, Any]


class InputError(ValueError):
    """The input can't be used. The message is one sentence for the user."""


@dataclass(frozen=True)
class Input:
    """A checked input, copied to where every machine reads it.

    Attributes:
        path: the copy: one row per line, each with an id and without ``RESULT_FIELDS``.
        keys: ``row_key`` of every row, in order.
        offsets: where each row begins in ``path``, in bytes, and where the last one ends.
    """

    path: Path
    keys: list[str]
    offsets: list[int]

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        """The byte ranges of blocks of so many rows (the last may have fewer)."""
        starts = self.offsets[:-1:rows]
        return list(zip(starts, [*starts[1:], self.offsets[-1]], strict=True))


def row_key(row: Mapping[str, Any]) -> str:
    """What tells a row from all others, the same for the row and for its result: a hash of the id and the content.

    Not the id alone: a row that was corrected is another row, and runs again.
    """
    own = {name: value for name, value in row.items() if name not in RESULT_FIELDS}
    return hashlib.sha256(to_line(own)).hexdigest()[:32]


def to_line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of JSON, always the same for the same row."""
    return json.dumps(row, ensure_ascii=False, sort_keys=True).encode() + b"\n"


def take_input(source: Path, target: Path) -> Input:
    """Check every row of ``source`` and copy it to ``target``.

    Raises:
        InputError: what is wrong, with the number of the line.
        OSError: ``target`` can't be written.
    """
    keys: list[str] = []
    offsets = [0]
    unfinished = target.with_suffix(".unfinished")
    with unfinished.open("wb") as copy:
        for row in read_rows(source):
            line = to_line(row)
            copy.write(line)
            keys.append(row_key(row))
            offsets.append(offsets[-1] + len(line))
    unfinished.replace(target)
    return Input(target, keys, offsets)


def read_rows(source: Path) -> Iterator[Row]:
    """The rows of a file, each with an id and without ``RESULT_FIELDS``. Empty lines are skipped.

    Raises:
        InputError: what is wrong, with the number of the line.
    """
    seen: dict[str, int] = {}
    given: bool | None = None
    for number, line in enumerate(_lines(source), start=1):
        if not line.strip():
            continue
        try:
            row = _checked(line)
            if given is None:
                given = "id" in row
            if given != ("id" in row):
                raise InputError("all rows have an id, or none" if given else "has an id, but rows before it have none")
            name = _id(row, number)
            if name in seen:
                raise InputError(f"the id {row['id']!r} is that of line {seen[name]}")
        except InputError as error:
            raise InputError(f"{source}, line {number}: {error}") from None
        seen[name] = number
        yield row
    if not seen:
        raise InputError(f"{source} holds no rows")


def _lines(source: Path) -> Iterator[bytes]:
    try:
        with source.open("rb") as file:
            yield from file
    except FileNotFoundError:
        raise InputError(f"{source} does not exist") from None
    except OSError as error:
        raise InputError(f"{source} can't be read: {error.strerror}") from None


def _checked(line: bytes) -> Row:
    try:
        row = json.loads(line)
        to_line({"row": row})
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error.msg} (column {error.pos + 1})") from None
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise InputError(f"not UTF-8: {error.reason}") from None
    if not isinstance(row, dict):
        raise InputError('a row must be an object: {"prompt": ...} or {"messages": [...]}')
    row = {name: value for name, value in row.items() if name not in RESULT_FIELDS}
    if ("prompt" in row) == ("messages" in row):
        raise InputError('a row needs "prompt" or "messages", and not both')
    if "prompt" in row and not isinstance(row["prompt"], str):
        raise InputError(f'"prompt" must be a text, not {json.dumps(row["prompt"])[:80]}')
    if "messages" in row and not _is_chat(row["messages"]):
        raise InputError('"messages" must be a list of objects with "role" and "content"')
    return row


def _is_chat(messages: Any) -> bool:
    if not isinstance(messages, list) or not messages:
        return False
    return all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages)


def _id(row: Row, number: int) -> str:
    """The row's id as a text; a row without one gets the number of its line."""
    name = row.setdefault("id", number)
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise InputError(f'"id" must be a text or an integer, not {json.dumps(name)[:80]}')
    return str(name)
