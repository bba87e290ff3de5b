"""The code blocks of README.md and docs/, taken apart, and which test runs each of them.

A block that nobody runs makes ``test_blocks.py`` fail: give it a kind in ``RUN_BY`` and a test that asks for it by
``pieces(kind)``, or name its command in ``NOT_RUN``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

RUN_BY = {
    "bash curl": "tests/http/test_documented_requests.py",
    "bash make": "tests/docs/test_commands.py",
    "bash pip install ./examples/echo_proposer": "tests/docs/conftest.py",
    "bash serve run": "tests/ray/test_serve.py",
    "bash vllm serve": "tests/docs/test_commands.py",
    "bash vllm-lookahead batch": "tests/ray/test_documented_jobs.py",
    "bash vllm-lookahead doctor": "tests/http/test_doctor.py",
    "json": "tests/docs/test_commands.py",
    "promql": "tests/docs/test_dashboard.py",
    "python echo_proposer": "tests/docs/test_example.py",
    "python openai": "tests/http/test_documented_requests.py",
    "python proposers": "tests/docs/test_example.py",
    "python vllm": "tests/docs/test_programs.py",
    "toml": "tests/docs/test_example.py",
}
"""Kind: the file that runs all pieces of it. A kind is the block's language and, of bash, how a command begins, of
Python, what is imported."""

NOT_RUN = (
    "pip install .",
    "pip install '.[cuda]'",
    "pip install '.[ray]'",
    "ray start --head",
)
"""Commands that would change this machine: an installation, a cluster that outlives the test."""

FENCE = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
BIN = ".venv/bin/"


class Piece(NamedTuple):
    """A command, or a block in another language.

    Attributes:
        document: where it stands.
        line: where its block begins.
        kind: a key of ``RUN_BY``, or "" if nothing runs it.
        text: as it is written.
        title: the name of the file that a block of data stands for.
    """

    document: Path
    line: int
    kind: str
    text: str
    title: str | None = None

    @property
    def where(self) -> str:
        """For messages and test ids."""
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    def words(self, **replaced: str) -> list[str]:
        """A command's words.

        Args:
            replaced: words that stand for others, such as MODEL.
        """
        words = shlex.split(self.text.replace("\\\n", " "), comments=True)
        return [replaced.get(word, word) for word in [words[0].removeprefix(BIN), *words[1:]]]


def pieces(kind: str) -> list[Piece]:
    """All pieces of a kind."""
    return [piece for piece in all_pieces() if piece.kind == kind]


def all_pieces() -> Iterator[Piece]:
    """Everything that stands in a block of some document."""
    for document in DOCUMENTS:
        text = document.read_text()
        for match in FENCE.finditer(text):
            language, title, body = match.groups()
            line = text.count("\n", 0, match.start()) + 1
            if language == "bash":
                for command in commands(body):
                    yield Piece(document, line, kind_of_command(command), command)
            elif language == "python":
                yield Piece(document, line, kind_of_program(body), body)
            else:
                yield Piece(document, line, language if language in RUN_BY else "", body, title)


def commands(body: str) -> Iterator[str]:
    """The commands of a block: a line each, or several where a quotation or a backslash goes on."""
    pending = ""
    for line in body.splitlines(keepends=True):
        pending += line
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:
            continue
        if pending.endswith("\\\n"):
            continue
        if words:
            yield pending.strip()
        pending = ""
    if pending.strip():
        raise ValueError(f"a command that doesn't end: {pending}")


def kind_of_command(command: str) -> str:
    """The kind, or what of ``NOT_RUN`` it is, or ""."""
    text = command.removeprefix(BIN)
    for known in NOT_RUN:
        if re.fullmatch(re.escape(known) + r"(\s+#.*)?", text):
            return known
    found = [kind for kind in RUN_BY if f"bash {text} ".startswith(f"{kind} ")]
    return max(found, key=len, default="")


def kind_of_program(body: str) -> str:
    """The kind by the first import that tells it, or ""."""
    imported = re.findall(r"^(?:from|import) (\w+)", body, re.MULTILINE)
    return next((kind for name in imported if (kind := f"python {name}") in RUN_BY), "")


def write_files(document: Path, folder: Path) -> None:
    """Write the files that a document shows, and let its commands find what a checkout has."""
    for piece in all_pieces():
        if piece.document == document and piece.title:
            (folder / piece.title).write_text(piece.text)
    (folder / "configs").symlink_to(ROOT / "configs")
