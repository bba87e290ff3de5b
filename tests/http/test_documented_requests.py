"""The requests that README.md and docs/ show, sent to a server that was started as they say."""

from __future__ import annotations

import subprocess

import pytest
from docs.blocks import Piece, pieces
from docs.dashboard import DASHBOARD, METRIC, queries
from serving import Server

HERE = "http://localhost:8000"


def test_the_server_was_started_as_the_documents_say(server: Server) -> None:
    (piece,) = (piece for piece in pieces("bash vllm serve") if "--middleware" in piece.text)
    _, _, _, *arguments = piece.words()
    assert isinstance(server.process.args, list)
    assert server.process.args[-len(arguments) :] == arguments


@pytest.mark.parametrize("piece", pieces("bash curl"), ids=lambda piece: piece.where)
def test_curl(server: Server, piece: Piece) -> None:
    assert HERE in piece.text
    command = piece.text.replace(HERE, server.url)
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ('"choices"' if "/v1/" in command else "spec_decode") in done.stdout, done.stdout
    assert '"error"' not in done.stdout, done.stdout


@pytest.mark.parametrize("piece", pieces("python openai"), ids=lambda piece: piece.where)
def test_client(server: Server, piece: Piece, capsys: pytest.CaptureFixture[str]) -> None:
    assert HERE in piece.text
    exec(compile(piece.text.replace(HERE, server.url), piece.where, "exec"), {"__name__": "__main__"})
    assert "accepted_prediction_tokens" in capsys.readouterr().out


def test_metrics_are_served(server: Server) -> None:
    """Those of the dashboard and of the formulas, under the very names."""
    named = set(METRIC.findall("\n".join(queries(DASHBOARD) + [piece.text for piece in pieces("promql")])))
    assert not named - server.metrics().keys()
