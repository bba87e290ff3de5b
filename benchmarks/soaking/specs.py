"""What may be asked of a server: a pool of requests of every kind that there is, made from a seed.

A ``Spec`` says what the answer is, nothing of how it is sent: whether it streams, who leaves early, what was predicted
and under which salt changes no answer, so one answer of stock vLLM's stands for all of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MODEL = "demo"


@dataclass(frozen=True, eq=False)
class Spec:
    """One request.

    Attributes:
        kind: a word for people.
        path: where it is posted to.
        body: what is posted, as JSON; shared, so nobody may write into it. As bytes: sent as they are.
        repeatable: the answer is always the same: greedy, or with a seed.
        streams: whether it may also be asked to stream.
        bad: nobody should answer it.
        choices: how many answers it asks for.
        tokens: about how many tokens of prompt it brings along, all choices together.
    """

    kind: str
    path: str
    body: dict[str, Any] | bytes
    repeatable: bool = True
    streams: bool = True
    bad: bool = False
    choices: int = 1
    tokens: int = 64

    @property
    def max_tokens(self) -> int:
        """The most tokens that all choices together can have."""
        assert isinstance(self.body, dict)
        return int(self.body["max_tokens"]) * self.choices

    @property
    def stops(self) -> bool:
        """Whether it has stop strings, past which a step may go."""
        return isinstance(self.body, dict) and "stop" in self.body


OPENINGS = [
    "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n    def ",
    "import unittest\n\n\nclass ListTest(unittest.TestCase):\n    def test_append(self):\n",
    "for i in range(10):\n    print(i)\n\nfor j in range(20):\n    ",
    "import os\nimport sys\n\n\ndef main():\n    path = os.path.join(sys.argv[1], ",
    "try:\n    value = int(text)\nexcept ValueError:\n    ",
]
QUESTIONS = [
    "Write a function that adds two numbers.",
    "What does print(len(items)) do?",
    "Explain a for loop.",
    "Rename the variable x to total in: x = x + 1",
]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
GRAMMAR = 'root ::= name " = " number\nname ::= [a-z]+\nnumber ::= [0-9] [0-9]?\n'
STOPS: list[list[str]] = [["\n\n"], ["return"], [":", "("], ["self.", "\n    def "], ["e"]]

BAD: list[dict[str, Any]] = [
    *({"temperature": value} for value in (-1, "hot")),
    *({"top_p": value} for value in (0, 1.5)),
    *({"top_k": value} for value in (-5, "all")),
    {"min_p": 2},
    *({"n": value} for value in (0, -1, 1_000_000)),
    *({"max_tokens": value} for value in (-1, "many")),
    *({"presence_penalty": 3}, {"frequency_penalty": -3}, {"repetition_penalty": 0}),
    *({"logprobs": 1000}, {"prompt_logprobs": -5}),
    *({"stop": [""]}, {"stop": [7]}),
    *({"seed": "x"}, {"seed": 1 << 80}),
    *({"structured_outputs": {"regex": "("}}, {"structured_outputs": {"grammar": "root ::= ("}}),
    *({"structured_outputs": {"json": "{"}}, {"structured_outputs": {"regex": "a", "choice": ["b"]}}),
    *({"logit_bias": {"99999": 1}}, {"logit_bias": {"word": 1}}),
    *({"allowed_token_ids": []}, {"allowed_token_ids": [99999]}),
    {"min_tokens": 1000},
    *({"prompt": [99999]}, {"prompt": [-1]}, {"prompt": {"a": 1}}, {"prompt": None}),
    *({"cache_salt": ""}, {"cache_salt": 5}),
    {"model": "nobody"},
    {"stream_options": {"include_usage": True}},
]
"""Parameters of a completion of which each alone makes it wrong."""
BAD_PREDICTIONS: list[Any] = [
    "text",
    {"content": "text"},
    {"type": "content", "content": 7},
    {"type": "content", "content": "many words " * 2000},
]
"""What our middleware refuses in a chat; a server without it knows no such field."""


def pool(seed: int, count: int, context: int) -> list[Spec]:
    """Specs of every kind, no two of the good ones alike.

    Args:
        seed: the same one gives the same specs.
        count: how many; at least one of each kind.
        context: the server's ``max_model_len``.
    """
    rng = random.Random(seed)
    makers = [maker for maker, weight in _weighted(context) for _ in range(weight)]
    kinds = [maker for maker, _ in _weighted(context)]
    found: dict[str, Spec] = {}
    while len(found) < count:
        maker = kinds.pop() if kinds else rng.choice(makers)
        spec = maker(rng)
        found[repr((spec.path, spec.body))] = spec
    specs = list(found.values())
    rng.shuffle(specs)
    return specs


def bad_predictions() -> list[Spec]:
    """Requests that only a server with our middleware refuses."""
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    bodies = [{"messages": messages, "prediction": value} for value in BAD_PREDICTIONS]
    chats = [Spec("bad prediction", CHAT, _body(8, body), bad=True) for body in bodies]
    ids = {"prompt": OPENINGS[0], "vllm_xargs": {"prediction": [1, -1]}}
    # in a stream, vLLM's way is to answer 200, to send the error as an event and to log it
    return [*chats, Spec("bad prediction", COMPLETIONS, _body(8, ids), streams=False, bad=True)]


Maker = Callable[[random.Random], Spec]


def _weighted(context: int) -> list[tuple[Maker, int]]:
    """What makes a spec of one kind, and how often it is asked to."""
    return [
        (_greedy, 8),
        (_seeded, 8),
        (_chat, 6),
        (_penalties, 3),
        (_stop, 4),
        (_several_choices, 3),
        (_several_prompts, 2),
        (_structured, 5),
        (_structured_chat, 2),
        (_logprobs, 3),
        (_chat_logprobs, 2),
        (_prompt_logprobs, 1),
        (_unseeded, 2),
        (_empty, 1),
        (_bad, 6),
        (_bad_chat, 1),
        (lambda rng: _long(rng, context), 2),
        (lambda rng: _too_long(rng, context), 1),
    ]


def _body(max_tokens: int, *parts: dict[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = {"model": MODEL, "max_tokens": max_tokens, "temperature": 0}
    for part in parts:
        body |= part
    return body


def _text(rng: random.Random) -> str:
    """A prompt like many, unlike all others."""
    return f"# {rng.randrange(10_000)}\n" * rng.choice([0, 1, 1]) + rng.choice(OPENINGS) * rng.choice([1, 1, 1, 3])


def _length(rng: random.Random) -> int:
    """Mostly short, now and then long."""
    return rng.choice([1, 2, 8, 16, 16, 32, 32, 48, 64, 64, 160])


def _sampling(rng: random.Random) -> dict[str, Any]:
    """A temperature and a seed, and some of what goes with them."""
    options: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}, {"top_p": 0.8, "top_k": 50}]
    return {"temperature": rng.choice([0.5, 0.8, 1.2]), "seed": rng.randrange(1 << 31), **rng.choice(options)}


def _maybe_sampling(rng: random.Random) -> dict[str, Any]:
    return _sampling(rng) if rng.random() < 0.5 else {}


def _greedy(rng: random.Random) -> Spec:
    ignore = {"ignore_eos": True} if rng.random() < 0.3 else {}
    return Spec("greedy", COMPLETIONS, _body(_length(rng), {"prompt": _text(rng)}, ignore))


def _seeded(rng: random.Random) -> Spec:
    return Spec("seeded", COMPLETIONS, _body(_length(rng), {"prompt": _text(rng)}, _sampling(rng)))


def _chat(rng: random.Random) -> Spec:
    text = rng.choice(QUESTIONS) + f" ({rng.randrange(10_000)})" * rng.choice([0, 1])
    messages = [{"role": "user", "content": text}]
    return Spec("chat", CHAT, _body(_length(rng), {"messages": messages}, _maybe_sampling(rng)))


def _penalties(rng: random.Random) -> Spec:
    options: list[dict[str, Any]] = [
        {"presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.2},
        {"logit_bias": {"300": 2.0, "301": -100}},
        {"min_tokens": 8},
        {"bad_words": ["self", "return"]},
        {"allowed_token_ids": list(range(200, 900))},
    ]
    body = _body(32, {"prompt": _text(rng)}, rng.choice(options), _maybe_sampling(rng))
    return Spec("penalties", COMPLETIONS, body)


def _stop(rng: random.Random) -> Spec:
    stop = {"stop": rng.choice(STOPS), "include_stop_str_in_output": rng.random() < 0.3}
    return Spec("stop strings", COMPLETIONS, _body(64, {"prompt": _text(rng)}, stop, _maybe_sampling(rng)))


def _several_choices(rng: random.Random) -> Spec:
    body = _body(rng.choice([8, 32]), {"prompt": _text(rng), "n": 4}, _sampling(rng))
    return Spec("n=4", COMPLETIONS, body, choices=4, tokens=4 * 64)


def _several_prompts(rng: random.Random) -> Spec:
    prompts = [_text(rng) for _ in range(3)]
    body = _body(rng.choice([8, 32]), {"prompt": prompts}, _maybe_sampling(rng))
    return Spec("3 prompts", COMPLETIONS, body, choices=3, tokens=3 * 64)


def _structured(rng: random.Random) -> Spec:
    ways: list[dict[str, Any]] = [
        {"regex": r"[a-z]{3,8} = [0-9]{1,4}"},
        {"grammar": GRAMMAR},
        {"json": SCHEMA},
        {"choice": ["left", "right", "neither"]},
    ]
    body = _body(48, {"prompt": _text(rng), "structured_outputs": rng.choice(ways)}, _maybe_sampling(rng))
    return Spec("structured", COMPLETIONS, body)


def _structured_chat(rng: random.Random) -> Spec:
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    messages = [{"role": "user", "content": f"Name a thing. ({rng.randrange(10_000)})"}]
    body = _body(48, {"messages": messages, "response_format": form}, _maybe_sampling(rng))
    return Spec("structured", CHAT, body)


def _logprobs(rng: random.Random) -> Spec:
    body = _body(24, {"prompt": _text(rng), "logprobs": rng.choice([0, 2, 5])}, _maybe_sampling(rng))
    return Spec("logprobs", COMPLETIONS, body)


def _chat_logprobs(rng: random.Random) -> Spec:
    messages = [{"role": "user", "content": f"{rng.choice(QUESTIONS)} ({rng.randrange(10_000)})"}]
    body = _body(24, {"messages": messages, "logprobs": True, "top_logprobs": 2}, _maybe_sampling(rng))
    return Spec("logprobs", CHAT, body)


def _prompt_logprobs(rng: random.Random) -> Spec:
    body = _body(8, {"prompt": _text(rng), "prompt_logprobs": 1, "logprobs": 1})
    return Spec("prompt logprobs", COMPLETIONS, body, streams=False)


def _unseeded(rng: random.Random) -> Spec:
    body = _body(_length(rng), {"prompt": _text(rng), "temperature": 1.0})
    return Spec("no seed", COMPLETIONS, body, repeatable=False)


def _empty(rng: random.Random) -> Spec:
    prompts: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, {"prompt": ""}),
        (COMPLETIONS, {"prompt": []}),
        (CHAT, {"messages": [{"role": "user", "content": ""}]}),
    ]
    path, prompt = rng.choice(prompts)
    return Spec("empty", path, _body(rng.randrange(4, 24), prompt), bad=path == COMPLETIONS)


def _bad(rng: random.Random) -> Spec:
    return Spec("bad", COMPLETIONS, _body(16, {"prompt": OPENINGS[0]}, rng.choice(BAD)), streams=False, bad=True)


def _bad_chat(rng: random.Random) -> Spec:
    bodies: list[dict[str, Any]] = [
        {"messages": []},
        {"messages": [{"role": "nobody", "content": "x"}]},
        {"messages": [{"role": "user", "content": {"a": 1}}]},
        {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "poem"}},
        {"messages": "x"},
    ]
    if rng.random() < 0.2:
        return Spec("bad", CHAT, json.dumps({"model": MODEL})[:-1].encode(), streams=False, bad=True)
    return Spec("bad", CHAT, _body(16, rng.choice(bodies)), streams=False, bad=True)


def _long(rng: random.Random, context: int) -> Spec:
    """A prompt that leaves little of the context, often less than it asks for."""
    body = _body(
        rng.choice([1, 16, 64]), {"prompt": _tokens(rng, context - rng.choice([1, 8, 40]))}, _maybe_sampling(rng)
    )
    return Spec("long", COMPLETIONS, body, tokens=context)


def _too_long(rng: random.Random, context: int) -> Spec:
    if rng.random() < 0.5:
        messages = [{"role": "user", "content": "word " * (2 * context)}]
        return Spec("too long", CHAT, _body(8, {"messages": messages}), bad=True)
    body = _body(8, {"prompt": _tokens(rng, context + rng.randrange(1, 100))})
    return Spec("too long", COMPLETIONS, body, bad=True)


def _tokens(rng: random.Random, length: int) -> list[int]:
    """A passage over and over."""
    passage = [rng.randrange(300, 3000) for _ in range(rng.randrange(40, 120))]
    return (passage * (1 + length // len(passage)))[:length]
