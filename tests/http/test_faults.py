"""What clients see when the machine fails the server: as with stock vLLM, an error, and then the server is gone."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import NamedTuple

import psutil
from serving import COMPARABLE, PROMPTS, Server, serving
from soaking.asking import Request
from soaking.client import Outcome
from soaking.load import ask
from soaking.specs import COMPLETIONS, Spec

LONG = ("--max-model-len", "2048", "--kv-cache-memory-bytes", "128M")


class Death(NamedTuple):
    """What is seen of a server whose engine dies.

    Attributes:
        answers: of each request: how it ended, the HTTP status, the kind and code of the error.
        status: of the server's process.
    """

    answers: list[tuple[str, int | None, str, int]]
    status: int


def engine_of(server: Server) -> psutil.Process:
    """The process that runs the model."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    (engine,) = [child for child in children if "EngineCore" in " ".join([child.name(), *child.cmdline()])]
    return engine


def kill_engine(server: Server) -> Death:
    """Kill the engine of a server while it answers four streams and a plain request."""
    engine = engine_of(server)
    bodies = [
        {"model": "demo", "prompt": prompt, "max_tokens": 1900, "temperature": 0, "ignore_eos": True}
        for prompt in [*PROMPTS, PROMPTS[0]]
    ]
    requests = [Request(f"killed-{i}", Spec("long", COMPLETIONS, body), stream=i < 4) for i, body in enumerate(bodies)]

    async def ask_and_kill() -> list[Outcome]:
        asked = asyncio.create_task(ask(server.url, requests, len(requests)))
        while (await asyncio.to_thread(server.metrics))["vllm:num_requests_running"] < len(requests):
            assert not asked.done(), "the requests are too short to be killed"
            await asyncio.sleep(0.02)
        engine.kill()
        return await asyncio.wait_for(asked, 60)

    outcomes = asyncio.run(ask_and_kill())
    return Death([what_came(outcome) for outcome in outcomes], server.process.wait(timeout=60))


def what_came(outcome: Outcome) -> tuple[str, int | None, str, int]:
    assert all(choice.finish_reason is None for choice in outcome.choices.values()), "cut off, but said to be complete"
    error = json.loads(outcome.message)
    error = error.get("error", error)
    return outcome.ending, outcome.status, error["type"], error["code"]


def test_killed_engine(demo_model: str, logs: Path) -> None:
    ours = ("--speculative-model", "[prompt_lookup]")
    with (
        serving(demo_model, logs / "killed-stock.log", *COMPARABLE, *LONG, VLLM_PLUGINS="") as stock,
        serving(demo_model, logs / "killed.log", *COMPARABLE, *LONG, *ours) as server,
    ):
        stock.wait_until_ready()
        server.wait_until_ready()
        expected, found = kill_engine(stock), kill_engine(server)
        assert found == expected
        assert {ending for ending, *_ in found.answers} == {"failed"}
