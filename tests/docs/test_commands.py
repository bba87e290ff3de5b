"""Commands that can be judged without starting what they start, and the files that they are given."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import engine_args
from vllm import envs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from docs.blocks import DOCUMENTS, FENCE, ROOT, Piece, all_pieces, pieces, write_files
from vllm_lookahead import plugin
from vllm_lookahead.cli import app
from vllm_lookahead.config import LookaheadConfig

SERVE = pieces("bash vllm serve")
BLOCKS: dict[str, list[Piece]] = defaultdict(list)
for _piece in SERVE:
    BLOCKS[_piece.where].append(_piece)


def served(parser: FlexibleArgumentParser, model: str, piece: Piece) -> LookaheadConfig:
    """What ``vllm serve`` makes of a command before it starts an engine."""
    vllm, serve, *words = piece.words(**{"MODEL": model, "vllm_lookahead/demo/model": model})
    assert (vllm, serve) == ("vllm", "serve")
    config = engine_args(parser, *words).create_engine_config()
    assert plugin.is_ours(config.speculative_config)
    return LookaheadConfig.from_vllm_config(config)


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize("block", BLOCKS)
def test_serve(
    parser: FlexibleArgumentParser, demo_model: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM accepts each command, and those of one block mean the same."""
    write_files(BLOCKS[block][0].document, tmp_path)
    monkeypatch.chdir(tmp_path)
    # not setenv: vLLM may have cached its variables
    monkeypatch.setitem(vars(envs), "VLLM_CACHE_ROOT", str(tmp_path))
    first, *others = (served(parser, demo_model, piece) for piece in BLOCKS[block])
    for other in others:
        assert other == first


def test_ways_to_ask_are_compared() -> None:
    assert max(map(len, BLOCKS.values())) >= 6


@pytest.mark.parametrize("piece", pieces("bash make"), ids=lambda piece: piece.text.split("#")[0].strip())
def test_make(piece: Piece) -> None:
    """Not run: these very tests are behind one of them."""
    _, target, *more = piece.words()
    assert not more
    assert f"\n{target}:" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("piece", pieces("json"), ids=lambda piece: piece.where)
def test_data(piece: Piece) -> None:
    """It is what it says it is, and some command of the document reads it."""
    assert all(isinstance(json.loads(line), dict) for line in piece.text.splitlines())
    assert piece.title
    others = [
        other.text for other in all_pieces() if other.document == piece.document and other.kind.startswith("bash")
    ]
    assert any(piece.title in text for text in others)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_the_text_exist(document: Path) -> None:
    """Of ``make`` and ``vllm-lookahead``, wherever a sentence names them."""
    command: Any = typer.main.get_command(app)
    makefile = (ROOT / "Makefile").read_text()
    text = FENCE.sub("", document.read_text())
    for program, name in re.findall(r"`(?:\.venv/bin/)?(make|vllm-lookahead)\s+([a-z-]+)", text):
        assert name in command.commands if program == "vllm-lookahead" else f"\n{name}:" in makefile
