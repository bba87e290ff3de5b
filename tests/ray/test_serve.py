"""``serve run configs/ray-serve.yaml``: ready when its probe says so, and answers as stock vLLM would; an engine that
is killed is replaced.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import Cluster, kill, running, wait_until
from docs.blocks import pieces
from jobs import ENGINE, ROWS, SAMPLING
from openai import OpenAI, OpenAIError

pytestmark = pytest.mark.ray

CONFIG = Path(__file__).parents[2] / "configs" / "ray-serve.yaml"
PORT = 8127


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A machine of two cores: what the file asks for has to fit."""
    with running(cpus=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def served(cluster: Cluster, demo_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The shipped file, with small engines and another port, by the documents' command; yields what it printed."""
    folder = tmp_path_factory.mktemp("serve")
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": PORT}
    (llm,) = config["applications"][0]["args"]["llm_configs"]
    llm["model_loading_config"]["model_source"] = demo_model
    llm["engine_kwargs"].update(ENGINE)
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    log = folder / "serve.log"
    (piece,) = pieces("bash serve run")
    serve, *words = piece.words(**{"configs/ray-serve.yaml": str(folder / "serve.yaml")})
    command = [str(Path(sys.executable).parent / serve), *words]
    assert command[-1] == str(folder / "serve.yaml")
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=cluster.environment
        )
    try:
        wait_until(lambda: ready() or process.poll() is not None, "an answer")
        assert process.poll() is None, log.read_text()[-5000:]
        yield log
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        kill(process.pid)
        process.wait()


def ready() -> bool:
    """Whether the probe that the file names succeeds."""
    comment = "\n".join(line[1:] for line in CONFIG.read_text().splitlines() if line.startswith("#"))
    probe = comment[comment.index("curl") :].split("\n\n")[0].replace("8000", str(PORT))
    done = subprocess.run(shlex.split(probe.replace("\\\n", " ")), capture_output=True, check=False)
    if done.returncode:
        time.sleep(1)
    return done.returncode == 0


@pytest.fixture(scope="module")
def client(served: Path) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", timeout=120, max_retries=0)


def complete(client: OpenAI, row: dict[str, Any]) -> str:
    answer = client.completions.create(model="demo", prompt=row["prompt"], **SAMPLING)
    return answer.choices[0].text


TEXTS = [row for row in ROWS if "prompt" in row][:8]


def test_completions(client: OpenAI, expected: dict[str, dict[str, Any]]) -> None:
    assert [complete(client, row) for row in TEXTS] == [expected[row["id"]]["generated_text"] for row in TEXTS]


def test_chat(client: OpenAI, expected: dict[str, dict[str, Any]]) -> None:
    (row, *_) = [row for row in ROWS if "messages" in row]
    answer = client.chat.completions.create(model="demo", messages=row["messages"], **SAMPLING)
    assert answer.choices[0].message.content == expected[row["id"]]["generated_text"]


def test_stream(client: OpenAI, expected: dict[str, dict[str, Any]]) -> None:
    stream = client.completions.create(model="demo", prompt=TEXTS[0]["prompt"], stream=True, **SAMPLING)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected[TEXTS[0]["id"]]["generated_text"]


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]


@pytest.mark.slow
def test_an_engine_that_is_killed_is_replaced(
    client: OpenAI, cluster: Cluster, expected: dict[str, dict[str, Any]]
) -> None:
    engines = cluster.processes("ServeReplica:lookahead:LLMServer")
    assert engines
    for pid in engines:
        kill(pid)
    with contextlib.suppress(OpenAIError):  # it may come too early
        complete(client, TEXTS[0])
    wait_until(ready, "an answer of the new engine")
    assert complete(client, TEXTS[0]) == expected[TEXTS[0]["id"]]["generated_text"]
    assert not set(engines) & set(cluster.processes("ServeReplica:lookahead:LLMServer"))
