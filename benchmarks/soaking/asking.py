"""How a spec is asked for: streaming or not, to the end or not, with which prediction and under which cache salt."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from soaking.specs import CHAT, Spec

SALTS = ("red", "green", "blue")
JUNK = "zzz qqq " * 12


@dataclass(frozen=True, eq=False)
class Request:
    """One request as it is sent.

    Attributes:
        id: what the server has to call it: sent as X-Request-Id.
        spec: what is asked.
        stream: whether the answer is to come in pieces.
        leave_after_events: the client closes the connection after so many events of the stream.
        leave_after_seconds: the client closes the connection then, whatever has come.
        salt: the cache salt.
        prediction: what the client claims to expect.
    """

    id: str
    spec: Spec
    stream: bool = False
    leave_after_events: int | None = None
    leave_after_seconds: float | None = None
    salt: str | None = None
    prediction: str | None = None

    @property
    def leaves(self) -> bool:
        """Whether the client means to go before the answer is complete."""
        return self.leave_after_events is not None or self.leave_after_seconds is not None

    @property
    def content(self) -> bytes:
        """The body."""
        if isinstance(self.spec.body, bytes):
            return self.spec.body
        body = dict(self.spec.body)
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.salt is not None:
            body["cache_salt"] = self.salt
        if self.prediction is not None and self.spec.path == CHAT:
            body["prediction"] = {"type": "content", "content": self.prediction}
        elif self.prediction is not None:
            body["vllm_xargs"] = {"prediction": self.prediction}
        return json.dumps(body).encode()


def plan(specs: Sequence[Spec], texts: Mapping[Spec, str], count: int, rng: random.Random) -> list[Request]:
    """Requests for random specs, sent in random ways.

    Args:
        specs: each is asked for before any is asked for again.
        texts: what the answers will say, for those that may be predicted.
        count: how many.
        rng: decides.
    """
    found: list[Request] = []
    while len(found) < count:
        for spec in rng.sample(specs, len(specs)):
            found.append(_request(f"soak-{len(found)}", spec, texts.get(spec), rng))
    return found[:count]


def _request(name: str, spec: Spec, text: str | None, rng: random.Random) -> Request:
    request = Request(name, spec, stream=spec.streams and rng.random() < 0.5)
    if spec.bad:
        return request
    changes: dict[str, Any] = {}
    if rng.random() < 0.3:
        changes["salt"] = rng.choice(SALTS)
    if text and rng.random() < 0.3:
        changes["prediction"] = rng.choice([text, text[: len(text) // 2] + JUNK, JUNK])
    leaves = rng.random()
    if leaves < 0.08:  # often before the first token
        changes["leave_after_seconds"] = rng.choice([0.002, 0.01, 0.05, 0.2])
    elif leaves < 0.16 and request.stream:
        changes["leave_after_events"] = rng.choice([1, 1, 2, 3, 8])
    return replace(request, **changes)
