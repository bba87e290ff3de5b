"""The servers of these tests, and requests to them."""

from __future__ import annotations

from typing import Any

from openai import OpenAI
from soaking.server import VLLM, Server, serving

__all__ = ["COMPARABLE", "PROMPTS", "VLLM", "Server", "chat", "client", "complete", "serving", "texts"]

COMPARABLE = ("--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16", "--enforce-eager")
"""Arguments of servers whose outputs are compared: float32, and quick to start."""


PROMPTS = [
    "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n    def ",
    "import unittest\n\n\nclass ListTest(unittest.TestCase):\n    def test_append(self):\n",
    "for i in range(10):\n    print(i)\n\nfor j in range(20):\n    ",
]


def client(server: Server) -> OpenAI:
    """The ``openai`` client for a server."""
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0)


def complete(client: OpenAI, prompt: Any, **options: Any) -> Any:
    """A completion, greedy unless told otherwise."""
    return client.completions.create(model="demo", prompt=prompt, **{"max_tokens": 64, "temperature": 0, **options})


def chat(client: OpenAI, text: str, **options: Any) -> Any:
    """The answer to one message, greedy unless told otherwise."""
    messages: Any = [{"role": "user", "content": text}]
    return client.chat.completions.create(
        model="demo", messages=messages, **{"max_tokens": 64, "temperature": 0, **options}
    )


def texts(answer: Any) -> list[tuple[str, str | None]]:
    """What a completion says, and why it ended there."""
    return [(choice.text, choice.finish_reason) for choice in answer.choices]
