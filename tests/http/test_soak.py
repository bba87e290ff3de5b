"""The short form of ``benchmarks/soak.py``: the same requests and checks, some hundreds of them, on the servers that
are there. What takes longer (memory, preemption) is left to the program.
"""

from __future__ import annotations

import asyncio
import random

from serving import Server
from soaking.asking import plan
from soaking.checks import check_answers
from soaking.counters import Counters
from soaking.load import drive
from soaking.reference import answers_of, texts_of
from soaking.server_checks import check_counters, check_idle, check_log
from soaking.specs import bad_predictions, pool

REQUESTS, SPECS, CONTEXT, SEATS, MAX_NODES = 350, 120, 1024, 16, 48


def test_some_hundred_requests_of_every_kind(servers: tuple[Server, Server]) -> None:
    stock_server, server = servers
    specs = pool(seed=1, count=SPECS, context=CONTEXT)
    stock = asyncio.run(answers_of(stock_server.url, specs))
    rng = random.Random(1)
    requests = plan([*specs, *bad_predictions()], texts_of(stock), REQUESTS, rng)
    log_so_far = len(server.log.read_text())
    before = Counters.read(server.url)
    outcomes = asyncio.run(drive(server.url, requests, SEATS, 40.0, rng, lambda outcome: None))
    checks = [*check_answers(requests, outcomes, stock), check_idle(server.url)]
    checks += check_counters(Counters.read(server.url).since(before), outcomes, MAX_NODES)
    checks.append(check_log(server.log, log_so_far))
    assert [check for check in checks if not check.ok] == []
    assert {outcome.ending for outcome in outcomes} == {"answered", "refused", "left"}
