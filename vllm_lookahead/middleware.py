"""OpenAI's predicted outputs for ``vllm serve``: ``--middleware vllm_lookahead.middleware.PredictedOutputs``.

A chat completion's ``prediction`` becomes a parameter that vLLM hands through (``vllm_xargs``), and the answer's usage
says how much of it was right. All other requests pass as they are.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_lookahead.predictions import PREDICTION, PredictionError, count_accepted, tokenised

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

PATH = "/v1/chat/completions"
TOKENS = ("token_ids", "prompt_token_ids")
"""Fields that only answers to ``return_token_ids`` have."""


class TextPart(BaseModel):
    """A part of a prediction's text."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class Prediction(BaseModel):
    """The field as OpenAI defines it (platform.openai.com/docs/api-reference/chat/create, "prediction")."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["content"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The parts in one."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class PredictedOutputs:
    """ASGI middleware that serves the field ``prediction`` of chat completions.

    Args:
        app: the application behind it.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle one connection; see the ASGI specification for the arguments."""
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].endswith(PATH):
            await self._app(scope, receive, send)
            return
        body = await read_body(receive)
        if body is None:  # the client is gone
            return
        request = parse(body)
        if request is None or request.get(PREDICTION) is None:
            await self._app(scope, replay(body, receive), send)
            return
        engine = scope["app"].state.engine_client
        try:
            text = Prediction.model_validate(request.pop(PREDICTION)).text
            if PREDICTION in (request.get("vllm_xargs") or {}):
                raise PredictionError(f"{PREDICTION}: can't be in vllm_xargs, too")
            # it may be as long as the context: other requests shall not wait for it
            prediction = await asyncio.to_thread(tokenised, text, engine)
        except ValueError as error:
            await refuse(send, explain(error))
            return
        wanted = bool(request.get("return_token_ids"))
        request |= {
            "return_token_ids": True,
            "vllm_xargs": {**(request.get("vllm_xargs") or {}), PREDICTION: prediction},
        }
        changed = json.dumps(request).encode()
        answer = Answer(send, Usage(prediction), keep_tokens=wanted)
        await self._app(with_length(scope, len(changed)), replay(changed, receive), answer)


class Usage:
    """How much of a prediction an answer said.

    Args:
        prediction: its token ids.
    """

    def __init__(self, prediction: list[int]) -> None:
        self._prediction = prediction
        self._outputs: dict[int, list[int]] = {}

    def add(self, choices: list[dict[str, Any]]) -> None:
        """Take in the tokens of an answer's choices, or of a chunk's."""
        for choice in choices:
            self._outputs.setdefault(choice["index"], []).extend(choice.get("token_ids") or ())

    async def write(self, usage: dict[str, Any]) -> None:
        """Add the figures to an answer's usage."""
        accepted = 0
        for output in self._outputs.values():
            accepted += await asyncio.to_thread(count_accepted, self._prediction, output)
        rejected = len(self._prediction) * len(self._outputs) - accepted
        usage["completion_tokens_details"] = {
            **(usage.get("completion_tokens_details") or {}),
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": rejected,
        }


class Answer:
    """Sends an answer on, with the figures in its usage and without token ids that nobody asked for.

    Args:
        send: the server's.
        usage: counts.
        keep_tokens: the client wants the token ids.
    """

    def __init__(self, send: Send, usage: Usage, *, keep_tokens: bool) -> None:
        self._send = send
        self._usage = usage
        self._keep_tokens = keep_tokens
        self._start: Message = {}
        self._streams = False
        self._rest = b""

    async def __call__(self, message: Message) -> None:
        """An ASGI ``send``."""
        if message["type"] == "http.response.start":
            self._start = message
            headers = {name.lower(): value for name, value in message["headers"]}
            self._streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            if self._streams:
                await self._send(message)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._streams:
            await self._pass_events(message)
        else:
            self._rest += message.get("body", b"")
            if not message.get("more_body", False):
                await self._pass_whole()

    async def _pass_whole(self) -> None:
        answer = parse(self._rest) if self._start["status"] == 200 else None
        body = self._rest
        if answer is not None:
            body = json.dumps(await self._changed(answer), ensure_ascii=False, separators=(",", ":")).encode()
        await self._send(with_length(self._start, len(body)))
        await self._send({"type": "http.response.body", "body": body})

    async def _pass_events(self, message: Message) -> None:
        *events, self._rest = (self._rest + message.get("body", b"")).split(b"\n\n")
        more = message.get("more_body", False)
        if not more and self._rest:
            events.append(self._rest)
            self._rest = b""
        out = b"".join([await self._event(event) for event in events])
        if out or not more:
            await self._send({**message, "body": out})

    async def _event(self, event: bytes) -> bytes:
        chunk = parse(event.removeprefix(b"data: ")) if event.startswith(b"data: ") else None
        if chunk is None:
            return event + b"\n\n" if event else b""
        chunk = await self._changed(chunk)
        choices = chunk.get("choices")
        # vLLM sends those for the token ids alone
        empty = choices and all(not any(v for k, v in c.items() if k not in ("index", *TOKENS)) for c in choices)
        if empty and not self._keep_tokens and not chunk.get("usage"):
            return b""
        return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"

    async def _changed(self, answer: dict[str, Any]) -> dict[str, Any]:
        choices = answer.get("choices") or []
        self._usage.add(choices)
        if answer.get("usage") and (not self._streams or not choices):
            await self._usage.write(answer["usage"])
        if not self._keep_tokens:
            for part in (answer, *choices):
                for name in TOKENS:
                    if self._streams:
                        part.pop(name, None)
                    elif name in part:
                        part[name] = None
        return answer


async def read_body(receive: Receive) -> bytes | None:
    """A request's whole body; None if the client went away."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


def replay(body: bytes, receive: Receive) -> Receive:
    """An ASGI ``receive`` that gives this body first."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def parse(body: bytes) -> dict[str, Any] | None:
    """The JSON object in a body; None if it is something else, which is not ours to complain about."""
    try:
        value = json.loads(body)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def with_length(message: MutableMapping[str, Any], length: int) -> dict[str, Any]:
    """A scope or a response's start with another content-length."""
    headers = [(name, value) for name, value in message["headers"] if name.lower() != b"content-length"]
    return {**message, "headers": [*headers, (b"content-length", str(length).encode())]}


def explain(error: ValueError) -> str:
    """One line that names the field and what is allowed."""
    allowed = 'must be {"type": "content", "content": a text or a list of {"type": "text", "text": ...}}'
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in (PREDICTION, *first["loc"]))
    return f"{PREDICTION}: {allowed} ({where}: {first['msg']})"


async def refuse(send: Send, message: str) -> None:
    """Answer with status 400, as vLLM does."""
    error = {"message": message, "type": "BadRequestError", "param": PREDICTION, "code": 400}
    body = json.dumps({"error": error}).encode()
    start = {"type": "http.response.start", "status": 400, "headers": [(b"content-type", b"application/json")]}
    await send(with_length(start, len(body)))
    await send({"type": "http.response.body", "body": body})
