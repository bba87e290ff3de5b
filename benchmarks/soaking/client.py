"""Sends one request and writes down all that came back, whatever it is."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from soaking.asking import Request
from soaking.specs import CHAT

Ending = Literal["answered", "refused", "left", "failed"]
DONE = "[DONE]"


@dataclass
class Choice:
    """One of the texts of an answer, in whole or as far as it came.

    Attributes:
        text: what it says.
        finish_reason: why it ended; None while it hasn't.
        tokens: its tokens as text, where logprobs were asked for.
        logprobs: one for each of them, None where the server gave none.
        prompt_logprobs: of the prompt's tokens, where these were asked for.
    """

    text: str = ""
    finish_reason: str | None = None
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)


@dataclass
class Outcome:
    """What became of a request.

    Attributes:
        request: the request.
        ending: "answered" completely, "refused" with a status from 400 to 499, "left" by the client before it was
            complete, or "failed" in any other way.
        status: of the HTTP response, if there was one.
        choices: the answer, by index.
        events: how many pieces of a stream brought a choice.
        usage: the server's count of tokens, if it gave one.
        message: what the server or the client said about a refusal or a failure.
        problems: what is wrong with the form of the answer.
    """

    request: Request
    ending: Ending = "failed"
    status: int | None = None
    choices: dict[int, Choice] = field(default_factory=dict)
    events: int = 0
    usage: dict[str, Any] | None = None
    message: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def texts(self) -> list[tuple[str, str | None]]:
        """Text and finish reason of each choice, in order."""
        return [(choice.text, choice.finish_reason) for _, choice in sorted(self.choices.items())]

    @property
    def num_tokens(self) -> int:
        """Tokens of all choices, by the server's count; 0 if it gave none."""
        return 0 if self.usage is None else int(self.usage["completion_tokens"])


def connect(url: str, timeout: float = 300.0) -> httpx.AsyncClient:
    """A client without a limit on connections: whoever waits shall wait in the server."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    return httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits)


async def send(client: httpx.AsyncClient, request: Request) -> Outcome:
    """Send a request and wait for its end, or leave when it says so."""
    outcome = Outcome(request)
    try:
        async with asyncio.timeout(request.leave_after_seconds):
            await _exchange(client, request, outcome)
    except TimeoutError:
        if outcome.ending == "failed":  # nothing was complete yet
            outcome.ending = "left"
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        outcome.ending, outcome.message = "failed", f"{type(error).__name__}: {error}"
    return outcome


async def _exchange(client: httpx.AsyncClient, request: Request, outcome: Outcome) -> None:
    headers = {"X-Request-Id": request.id, "Content-Type": "application/json"}
    sent = client.stream("POST", request.spec.path, content=request.content, headers=headers)
    async with sent as response:
        outcome.status = response.status_code
        if response.status_code != 200:
            _read_refusal(outcome, await response.aread())
        elif request.stream:
            await _read_events(outcome, response)
        else:
            _read_answer(outcome, json.loads(await response.aread()))
            outcome.ending = "answered"


def _read_refusal(outcome: Outcome, body: bytes) -> None:
    outcome.message = body.decode(errors="replace")
    outcome.ending = "refused" if outcome.status is not None and 400 <= outcome.status < 500 else "failed"
    if outcome.ending == "refused" and not json.loads(body)["error"]["message"]:
        outcome.problems.append("refused without a message")


def _read_answer(outcome: Outcome, answer: dict[str, Any]) -> None:
    _check_id(outcome, answer)
    outcome.usage = answer["usage"]
    for choice in answer["choices"]:
        if choice["index"] in outcome.choices:
            outcome.problems.append(f"choice {choice['index']} comes twice")
        _add(outcome, choice, "message")
    _check_complete(outcome)


async def _read_events(outcome: Outcome, response: httpx.Response) -> None:
    done = False
    async for line in response.aiter_lines():
        if not line:
            continue
        if done:
            outcome.problems.append(f"the stream goes on after {DONE}: {line[:80]}")
        if not line.startswith("data: "):
            outcome.problems.append(f"no event of a stream: {line[:80]}")
            continue
        data = line.removeprefix("data: ")
        if data == DONE:
            done = True
            continue
        event = json.loads(data)
        if "error" in event:
            outcome.message = json.dumps(event["error"])
            return
        _check_id(outcome, event)
        if event.get("usage"):
            if outcome.usage is not None:
                outcome.problems.append("the usage comes twice")
            outcome.usage = event["usage"]
        for choice in event["choices"]:
            _add(outcome, choice, "delta")
        outcome.events += bool(event["choices"])
        if outcome.events == outcome.request.leave_after_events:
            outcome.ending = "left"
            return
    if not done:
        outcome.message = f"the stream ends without {DONE}"
        return
    _check_complete(outcome)
    outcome.ending = "answered"


def _check_id(outcome: Outcome, answer: dict[str, Any]) -> None:
    kind = "chatcmpl" if outcome.request.spec.path == CHAT else "cmpl"
    if answer["id"] != f"{kind}-{outcome.request.id}":
        outcome.problems.append(f"answered as {answer['id']}")


def _check_complete(outcome: Outcome) -> None:
    expected = set(range(outcome.request.spec.choices))
    if set(outcome.choices) != expected:
        outcome.problems.append(f"has the choices {sorted(outcome.choices)}, not {sorted(expected)}")
    if outcome.usage is None:
        outcome.problems.append("has no usage")
    outcome.problems += [f"choice {i} has no end" for i, c in outcome.choices.items() if c.finish_reason is None]


def _add(outcome: Outcome, piece: dict[str, Any], chat: str) -> None:
    """Take in a choice, or a piece of one."""
    choice = outcome.choices.setdefault(piece["index"], Choice())
    is_chat = outcome.request.spec.path == CHAT
    text = (piece[chat].get("content") if is_chat else piece["text"]) or ""
    if choice.finish_reason is not None and text:
        outcome.problems.append(f"choice {piece['index']} goes on after its end")
    choice.text += text
    if piece.get("finish_reason") is not None:
        if choice.finish_reason is not None:
            outcome.problems.append(f"choice {piece['index']} ends twice")
        choice.finish_reason = piece["finish_reason"]
    logprobs = piece.get("logprobs") or {}
    if is_chat:
        choice.tokens += [entry["token"] for entry in logprobs.get("content") or ()]
        choice.logprobs += [entry["logprob"] for entry in logprobs.get("content") or ()]
    else:
        choice.tokens += logprobs.get("tokens") or []
        choice.logprobs += logprobs.get("token_logprobs") or []
    # of each place the prompt's own token comes first
    given = [next(iter(place.values()))["logprob"] if place else None for place in piece.get("prompt_logprobs") or ()]
    choice.prompt_logprobs += given
