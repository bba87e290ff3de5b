"""Driving running servers: requests arrive at random at a given rate, answers are streamed and timed token by token.

``vllm bench serve`` does something similar, but reads prompt files only with pandas installed, takes an ``n``-token
chunk of a speculating server for one token when it reports inter-token latency, and drives one server at a time. This
is small and has none of these limits. It needs the ``openai`` package, which vLLM brings.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_lookahead.bench.prompts import Prompt
from vllm_lookahead.bench.stats import Latency, Spread, percentile
from vllm_lookahead.bench.tables import Table
from vllm_lookahead.bench.worker import Say, silent

DRAFTS = "vllm:spec_decode_num_drafts_total"
DRAFT_TOKENS = "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"


class ServerError(RuntimeError):
    """A server doesn't answer as it should."""


@dataclass(frozen=True)
class Server:
    """Where a server listens: ``name`` in tables, and ``http://host:port``."""

    name: str
    url: str

    @classmethod
    def parse(cls, text: str) -> Server:
        """From ``NAME=URL`` or a URL."""
        name, equals, url = text.partition("=")
        if not equals or "/" in name:
            name = url = text
        return cls(name, url.rstrip("/").removesuffix("/v1"))

    def fetch(self, path: str) -> str:
        """What the server says at a path.

        Raises:
            ServerError: nothing.
        """
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as answer:
                return str(answer.read().decode())
        except OSError as error:
            raise ServerError(f"{self.url}{path}: {error}") from error


@dataclass(frozen=True)
class Traffic:
    """What is sent.

    Attributes:
        requests: how many, per rate.
        max_tokens, temperature, ignore_eos: sampling parameters.
        seed: of the arrival times; at a temperature the i-th request has the seed ``seed + i``.
    """

    requests: int
    max_tokens: int = 256
    temperature: float = 0.0
    ignore_eos: bool = True
    seed: int = 0


@dataclass
class Answer:
    """One request's life, in seconds of one clock.

    Attributes:
        sent: when the request was.
        arrivals: when chunks came, and how many tokens the answer had by then.
        text: all of it.
        error: what went wrong, or "".
    """

    sent: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    text: str = ""
    error: str = ""

    @property
    def tokens(self) -> int:
        """The length of the answer."""
        return self.arrivals[-1][1] if self.arrivals else 0

    def pauses(self) -> list[tuple[float, int]]:
        """Between chunks: the pause, and the number of tokens that came after it."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [(at - before, count - had) for (before, had), (at, count) in pairs if count > had]


@dataclass(frozen=True)
class Served:
    """One server at one rate, in one round.

    Attributes:
        rate: requests per second; 0 stands for all at once.
        tokens_per_draft, nodes_per_draft: per request and step that verified drafts, from the server's own counters.
        identical: how many texts equal the first server's. None: nothing to compare with.
    """

    server: str
    rate: float
    round: int
    requests: int
    errors: int
    seconds: float
    tokens: int
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    pause_p50_ms: float
    pause_p99_ms: float
    counters: dict[str, float]
    identical: int | None = None

    @property
    def tokens_per_second(self) -> float:
        """Throughput."""
        return self.tokens / self.seconds

    @classmethod
    def of(
        cls,
        server: str,
        rate: float,
        number: int,
        answers: Sequence[Answer],
        seconds: float,
        counters: dict[str, float],
        first: Sequence[Answer] | None,
    ) -> Served:
        """From all answers, the deltas of the server's counters, and the first server's answers."""
        good = [answer for answer in answers if answer.arrivals and not answer.error]
        waits = [1e3 * (answer.arrivals[0][0] - answer.sent) for answer in good]
        ones = [1.0] * len(waits)
        latency = Latency.of([pause for answer in good for pause in answer.pauses()])
        same = None if first is None else sum(a.text == b.text for a, b in zip(answers, first, strict=True))
        return cls(
            server=server,
            rate=rate,
            round=number,
            requests=len(answers),
            errors=len(answers) - len(good),
            seconds=seconds,
            tokens=sum(answer.tokens for answer in good),
            ttft_p50_ms=percentile(waits, ones, 50),
            ttft_p99_ms=percentile(waits, ones, 99),
            itl_p50_ms=latency.itl_p50,
            itl_p99_ms=latency.itl_p99,
            pause_p50_ms=latency.pause_p50,
            pause_p99_ms=latency.pause_p99,
            counters=counters,
            identical=same,
        )


def drive(
    servers: Sequence[Server],
    prompts: Sequence[Prompt],
    rates: Sequence[float],
    traffic: Traffic,
    rounds: int,
    say: Say = silent,
) -> list[Served]:
    """Drive servers in turns, at each rate, with the same requests at the same moments.

    Raises:
        ServerError: a server doesn't answer.
    """
    return asyncio.run(_drive(servers, prompts, rates, traffic, rounds, say))


async def _drive(
    servers: Sequence[Server],
    prompts: Sequence[Prompt],
    rates: Sequence[float],
    traffic: Traffic,
    rounds: int,
    say: Say,
) -> list[Served]:
    clients = {server: await _client(server) for server in servers}
    found = []
    for server in servers:
        say("warm-up", server.name)
        await asyncio.gather(*(_ask(*clients[server], prompts[i % len(prompts)], traffic, i) for i in range(2)))
    for number in range(rounds):
        for rate in rates:
            first: Sequence[Answer] | None = None
            for server in servers:
                say(f"round {number + 1} of {rounds}, {_rate(rate)}", server.name)
                before = counters(server.fetch("/metrics"))
                begin = time.perf_counter()
                answers = await _send(*clients[server], prompts, rate, traffic)
                seconds = time.perf_counter() - begin
                after = counters(server.fetch("/metrics"))
                delta = {name: value - before.get(name, 0.0) for name, value in after.items()}
                found.append(Served.of(server.name, rate, number, answers, seconds, delta, first))
                first = answers if first is None else first
    return found


async def _client(server: Server) -> tuple[Any, str]:
    from openai import AsyncOpenAI, OpenAIError

    client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600, max_retries=0)
    try:
        models = await client.models.list()
    except OpenAIError as error:
        raise ServerError(f"{server.url}: {error}") from error
    return client, models.data[0].id


async def _send(client: Any, model: str, prompts: Sequence[Prompt], rate: float, traffic: Traffic) -> list[Answer]:
    rng = random.Random(traffic.seed)
    tasks = []
    for i in range(traffic.requests):
        if rate and i:
            await asyncio.sleep(rng.expovariate(rate))
        tasks.append(asyncio.create_task(_ask(client, model, prompts[i % len(prompts)], traffic, i)))
    return list(await asyncio.gather(*tasks))


async def _ask(client: Any, model: str, prompt: Prompt, traffic: Traffic, number: int) -> Answer:
    from openai import OpenAIError

    options: dict[str, Any] = {
        "model": model,
        "max_tokens": traffic.max_tokens,
        "temperature": traffic.temperature,
        "stream": True,
        # vLLM then tells with each chunk how many tokens there are: a chunk may hold several
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "extra_body": {"ignore_eos": traffic.ignore_eos},
    }
    if traffic.temperature:
        options["seed"] = traffic.seed + number
    answer = Answer(time.perf_counter())
    try:
        if prompt.chat:
            messages = [{"role": "user", "content": prompt.text}]
            stream = await client.chat.completions.create(messages=messages, **options)
        else:
            stream = await client.completions.create(prompt=prompt.text, **options)
        async for chunk in stream:
            now = time.perf_counter()
            for choice in chunk.choices:
                answer.text += (choice.delta.content if prompt.chat else choice.text) or ""
            if chunk.usage is not None and chunk.usage.completion_tokens > answer.tokens:
                answer.arrivals.append((now, chunk.usage.completion_tokens))
    except OpenAIError as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


def counters(metrics: str) -> dict[str, float]:
    """vLLM's speculative decoding counters in the text of ``/metrics``, summed over labels."""
    found = dict.fromkeys((DRAFTS, DRAFT_TOKENS, ACCEPTED), 0.0)
    for name, value in re.findall(r"^(vllm:\w+)(?:\{[^}]*\})? (\S+)$", metrics, re.MULTILINE):
        if name in found:
            found[name] += float(value)
    return found


def table(results: Sequence[Served]) -> Table:
    """Rows by rate and server, medians over the rounds."""
    result = Table(
        "servers",
        [
            *("rate", "server", "tokens/s", "TTFT p50", "p99, ms", "ITL p50", "p99, ms"),
            *("drafts", "nodes/draft", "tokens/draft", "errors", "identical"),
        ],
        notes=[
            "ITL: a chunk of k tokens after a pause of d is k tokens that took d / k each",
            "drafts: steps of a request that verified drafts, by the server's counters; tokens/draft: accepted + 1",
        ],
    )
    for rate in dict.fromkeys(r.rate for r in results):
        if result.rows:
            result.rows.append([])
        for at, name in enumerate(dict.fromkeys(r.server for r in results)):
            rounds = [r for r in results if r.rate == rate and r.server == name]
            result.rows.append([_rate(rate) if at == 0 else "", name, *_cells(rounds)])
    return result


def _cells(rounds: Sequence[Served]) -> list[str]:
    def middle(field: str) -> str:
        return f"{Spread.of([getattr(r, field) for r in rounds]).median:.1f}"

    drafts, nodes, accepted = (sum(r.counters[name] for r in rounds) for name in (DRAFTS, DRAFT_TOKENS, ACCEPTED))
    checked = [r for r in rounds if r.identical is not None]
    return [
        Spread.of([r.tokens_per_second for r in rounds]).show(".0f"),
        middle("ttft_p50_ms"),
        middle("ttft_p99_ms"),
        middle("itl_p50_ms"),
        middle("itl_p99_ms"),
        f"{drafts:.0f}",
        f"{nodes / drafts:.1f}" if drafts else "-",
        f"{1 + accepted / drafts:.2f}" if drafts else "-",
        str(sum(r.errors for r in rounds)),
        f"{sum(r.identical or 0 for r in checked)} of {sum(r.requests for r in checked)}" if checked else "-",
    ]


def _rate(rate: float) -> str:
    return f"{rate:g}/s" if rate else "all at once"


def from_json(data: Sequence[dict[str, Any]]) -> list[Served]:
    """What ``to_json`` gave."""
    return [Served(**{name: value for name, value in r.items() if name != "tokens_per_second"}) for r in data]


def to_json(results: Sequence[Served]) -> list[dict[str, Any]]:
    """For the result file."""
    return [{**asdict(r), "tokens_per_second": r.tokens_per_second} for r in results]
