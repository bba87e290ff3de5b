"""Sends many requests at mixed rates: one after the other, in bursts, at random moments, always so many at a time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle

import httpx

from soaking.asking import Request
from soaking.client import Outcome, connect, send

Finished = Callable[[Outcome], None]
"""Is told of each outcome when it is there."""


async def drive(
    url: str, requests: Sequence[Request], seats: int, rate: float, rng: random.Random, finished: Finished
) -> list[Outcome]:
    """Send requests, a few dozen in each way, and then in the next.

    Args:
        url: the server.
        requests: what is sent, in order.
        seats: how many requests the server runs at a time.
        rate: of requests that come at random moments, per second.
        rng: decides about the moments.
        finished: see there.

    Returns:
        One outcome for each request, in the order in which they came.
    """
    found: list[Outcome] = []

    async def one(client: httpx.AsyncClient, request: Request) -> None:
        outcome = await send(client, request)
        found.append(outcome)
        finished(outcome)

    async with connect(url) as client:

        async def together(part: Iterable[Request]) -> None:
            async with asyncio.TaskGroup() as group:
                for request in part:
                    group.create_task(one(client, request))

        async def at_random(part: Iterable[Request]) -> None:
            async with asyncio.TaskGroup() as group:
                for request in part:
                    await asyncio.sleep(rng.expovariate(rate))
                    group.create_task(one(client, request))

        async def so_many(part: Iterable[Request], most: int) -> None:
            waiting = iter(part)

            async def worker() -> None:
                for request in waiting:
                    await one(client, request)

            async with asyncio.TaskGroup() as group:
                for _ in range(most):
                    group.create_task(worker())

        left = list(requests)
        ways = cycle(
            [
                (seats // 2, lambda part: so_many(part, 1)),
                (4 * seats, together),
                (4 * seats, at_random),
                (6 * seats, lambda part: so_many(part, seats)),
                (6 * seats, lambda part: so_many(part, 2 * seats)),
            ]
        )
        while left:
            size, way = next(ways)
            await way(left[:size])
            del left[:size]
    return found


async def ask(
    url: str, requests: Sequence[Request], most: int, finished: Finished = lambda outcome: None
) -> list[Outcome]:
    """Send requests, at most so many at a time; outcomes in the order of the requests."""
    places = asyncio.Semaphore(most)

    async def one(client: httpx.AsyncClient, request: Request) -> Outcome:
        async with places:
            outcome = await send(client, request)
            finished(outcome)
            return outcome

    async with connect(url) as client:
        return await asyncio.gather(*(one(client, request) for request in requests))
