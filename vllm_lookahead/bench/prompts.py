"""Where prompts come from: the bundled ones, random words, or a file in one of the formats that people have."""

from __future__ import annotations

import gzip
import json
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEMO, RANDOM = "demo", "random"
RANDOM_PROMPTS = 128
RANDOM_WORDS = 60


class PromptError(ValueError):
    """The prompts can't be had. The message is one sentence for the user."""


@dataclass(frozen=True)
class Prompt:
    """What is to be continued; ``chat`` if it is a user's message that belongs into the model's chat template."""

    text: str
    chat: bool = False


def read_prompts(source: str) -> list[Prompt]:
    """The prompts of a source.

    Args:
        source: "demo", "random", or the path of a file: JSONL, a JSON array, either of them gzipped.

    Raises:
        PromptError: there are none, or a record has none of the known fields.
    """
    if source == DEMO:
        from vllm_lookahead.demo.run import load_prompts

        return [Prompt(prompt.text, prompt.kind == "chat") for prompt in load_prompts()]
    if source == RANDOM:
        return random_words(RANDOM_PROMPTS, RANDOM_WORDS)
    path = Path(source)
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"prompts: can't read {path}: {error}") from error
    prompts = [prompt for where, record in _records(path, text) for prompt in _parse(f"{path}, {where}", record)]
    if not prompts:
        raise PromptError(f"prompts: {path} holds none")
    return prompts


def random_words(count: int, length: int, seed: int = 0) -> list[Prompt]:
    """Prompts in which nothing repeats: words of random letters."""
    rng = random.Random(seed)

    def word() -> str:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 9)))

    return [Prompt(" ".join(word() for _ in range(length))) for _ in range(count)]


def _records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        if text.lstrip().startswith("["):
            for number, record in enumerate(json.loads(text), 1):
                yield f"record {number}", record
            return
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"line {number}", json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(f"prompts: {path} is neither JSONL nor a JSON array: {error}") from error


def _parse(where: str, record: Any) -> Iterator[Prompt]:
    """The prompt of one record; none if it is a conversation in which no user speaks (ShareGPT has some)."""
    match record:
        case {"turns": [str(first), *_]}:
            yield Prompt(first, chat=True)
        case {"conversations": list(conversation)}:
            said = (turn.get("value") for turn in conversation if turn.get("from") in ("human", "user"))
            yield from (Prompt(text, chat=True) for text in list(said)[:1] if text)
        case {"prompt": str(prompt)}:
            yield Prompt(prompt)
        case _:
            raise PromptError(
                f"prompts: {where}: no usable field; known are 'prompt' (text to continue: HumanEval), 'turns' (list "
                "of messages, the first is used: Spec-Bench) and 'conversations' (list of {'from', 'value'}: ShareGPT)"
            )


def order(available: int, start: int, needed: int, seed: int = 0) -> list[int]:
    """Indices of prompts, shuffled once, so that a few of them stand for the whole file.

    Args:
        available: how many there are.
        start: where to begin: rounds that use other prompts begin further on.
        needed: how many indices to return. A smaller number gives a prefix; they repeat if there aren't enough.
        seed: of the shuffle.
    """
    shuffled = random.Random(seed).sample(range(available), available)
    return [shuffled[(start + i) % available] for i in range(needed)]
