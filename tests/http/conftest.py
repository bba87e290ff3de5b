"""Two servers for the whole session: stock vLLM, and ours as a user would start it. They start side by side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from serving import COMPARABLE, Server, client, serving

OURS = (
    *("--speculative-model", "[prompt_lookup]"),
    *("--middleware", "vllm_lookahead.middleware.PredictedOutputs"),
)


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def servers(demo_model: str, logs: Path) -> Iterator[tuple[Server, Server]]:
    # the stock one doesn't even load the plugin
    with (
        serving(demo_model, logs / "stock.log", *COMPARABLE, VLLM_PLUGINS="") as stock,
        serving(demo_model, logs / "ours.log", *COMPARABLE, *OURS) as ours,
    ):
        stock.wait_until_ready()
        ours.wait_until_ready()
        yield stock, ours


@pytest.fixture(scope="session")
def server(servers: tuple[Server, Server]) -> Server:
    return servers[1]


@pytest.fixture(scope="session")
def stock(servers: tuple[Server, Server]) -> OpenAI:
    return client(servers[0])


@pytest.fixture(scope="session")
def ours(servers: tuple[Server, Server]) -> OpenAI:
    return client(servers[1])
