"""Running servers side by side under an HTTP client: ``vllm bench serve`` drives them in turns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from vllm_lookahead.bench.engines import Say
from vllm_lookahead.bench.prompts import Prompt
from vllm_lookahead.bench.tables import Table, spread
from vllm_lookahead.demo.run import environment


class ServerError(RuntimeError):
    """``vllm bench serve`` failed."""


def drive(
    servers: Mapping[str, str],
    prompts: Sequence[Prompt],
    options: Sequence[str],
    rounds: int,
    say: Say,
    rates: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Let the servers take turns.

    Args:
        servers: names in the table, and base URLs.
        prompts: what is sent unless the options have a ``--dataset-name``: as ShareGPT conversations, the one format
            that vLLM reads without pandas.
        options: further options of ``vllm bench serve``.
        rounds: how often.
        say: is told before each measurement.
        rates: values for ``--request-rate``; each is measured in every round. Empty: what the options say.

    Returns:
        What ``vllm bench serve`` wrote each time, with ``server``, ``rate`` and ``round``.

    Raises:
        ServerError: it failed.
    """
    found, names = [], list(servers)
    with TemporaryDirectory() as folder:
        result, dataset = Path(folder, "result.json"), Path(folder, "prompts.json")
        turns = [[{"from": "human", "value": prompt.text}, {"from": "gpt", "value": ""}] for prompt in prompts]
        dataset.write_text(json.dumps([{"conversations": conversation} for conversation in turns]))
        given = any(option.split("=")[0] == "--dataset-name" for option in options)
        ours = [] if given else ["--dataset-name", "sharegpt", "--dataset-path", str(dataset)]
        for number, rate in product(range(rounds), rates or ("",)):
            at_rate = ["--request-rate", rate] if rate else []
            for name in names[number % len(names) :] + names[: number % len(names)]:
                say(f"round {number + 1} of {rounds}, {f'{rate} requests/s, ' if rate else ''}{name}")
                command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
                command += ["--base-url", servers[name], "--save-result", "--save-detailed", "--disable-tqdm"]
                command += ["--result-dir", folder, "--result-filename", result.name, *ours, *options, *at_rate]
                done = subprocess.run(command, capture_output=True, text=True, env=environment(stock=True))
                if done.returncode:
                    raise ServerError(f"vllm bench serve against {name}:\n{(done.stdout + done.stderr)[-2000:]}")
                found.append({"server": name, "round": number, "rate": rate, **json.loads(result.read_text())})
                result.unlink()
    return found


def table(found: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each rate and server; ratios to the first server, round by round, all of them the higher the better."""
    result = Table(
        "servers, by vllm bench serve",
        [
            *(
                "server",
                "rate",
                "tokens/s",
                "ratio",
                "TTFT p50",
                "p99, ms",
                "TPOT p50, ms",
                "ratio",
                "p99, ms",
                "ratio",
            ),
            *("tokens/step", "failed", "identical"),
        ],
        notes=[
            "medians (min - max) of the rounds; TTFT: time to the first token; TPOT: time per token after it; ratios: "
            "above 1 is faster than the first server",
            "tokens/step: of steps that verified drafts, by the server's counters; identical: texts equal to the "
            "first server's (at a temperature, give the requests a seed: --extra-body '{\"seed\": 1}')",
        ],
    )
    names = list(dict.fromkeys(r["server"] for r in found))
    for rate in dict.fromkeys(r["rate"] for r in found):
        rounds = {
            name: sorted((r for r in found if (r["server"], r["rate"]) == (name, rate)), key=lambda r: r["round"])
            for name in names
        }
        for name, own in rounds.items():
            result.rows.append([name, rate or "-", *_cells(own, rounds[names[0]], first_row=name == names[0])])
    return result


def _cells(own: Sequence[Mapping[str, Any]], first: Sequence[Mapping[str, Any]], *, first_row: bool) -> list[str]:
    """What the table says of one server at one rate, next to the first one."""
    pairs, speed = list(zip(own, first, strict=True)), "output_throughput"
    texts = [
        a == b for mine, other in pairs for a, b in zip(mine["generated_texts"], other["generated_texts"], strict=True)
    ]
    lengths = [r["spec_decode_acceptance_length"] for r in own if "spec_decode_acceptance_length" in r]

    def middle(name: str) -> str:
        return f"{median(r[name] for r in own):.1f}"

    def ratio(name: str) -> str:  # of times: the lower the better
        return spread([other[name] / mine[name] for mine, other in pairs if mine[name]], ".3f")

    return [
        spread([r[speed] for r in own], ".0f"),
        # a server that died answers nothing
        spread([mine[speed] / other[speed] for mine, other in pairs if other[speed]], ".3f"),
        *(middle("median_ttft_ms"), middle("p99_ttft_ms")),
        *(middle("median_tpot_ms"), ratio("median_tpot_ms"), middle("p99_tpot_ms"), ratio("p99_tpot_ms")),
        spread(lengths, ".2f"),
        str(sum(r["failed"] for r in own)),
        "-" if first_row else f"{sum(texts)} of {len(texts)}",
    ]
