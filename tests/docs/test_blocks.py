"""No block without a test that runs it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.blocks import DOCUMENTS, FENCE, NOT_RUN, ROOT, RUN_BY, Piece, all_pieces, commands, pieces


def test_every_block_is_run_by_a_test() -> None:
    lost = [f"{piece.where}: {piece.text}" for piece in all_pieces() if not piece.kind]
    assert not lost, "nothing runs these; tests/docs/blocks.py says what to do:\n" + "\n".join(lost)


@pytest.mark.parametrize("kind", RUN_BY)
def test_the_tests_that_run_them_are_there(kind: str) -> None:
    assert pieces(kind), "no document has this kind any more"
    assert f'pieces("{kind}")' in (ROOT / RUN_BY[kind]).read_text()


@pytest.mark.parametrize("command", NOT_RUN)
def test_what_is_not_run_is_still_written(command: str) -> None:
    assert pieces(command)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_code_outside_of_blocks(document: Path) -> None:
    """Indented code has no language, so nothing could tell what runs it."""
    text = FENCE.sub("", document.read_text())
    assert "```" not in text
    assert not re.findall(r"^(?: {4}|\t).*", text, re.MULTILINE)


def test_a_block_is_taken_apart_into_commands() -> None:
    body = "# nothing\na 'b\nc' \\\n    d  # e\n\nf\n"
    assert list(commands(body)) == ["a 'b\nc' \\\n    d  # e", "f"]
    first, _ = (Piece(ROOT, 0, "", command) for command in commands(body))
    assert first.words(b="B", d="D") == ["a", "b\nc", "D"]
    with pytest.raises(ValueError, match="doesn't end"):
        list(commands("a 'b\n"))
