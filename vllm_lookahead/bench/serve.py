"""Running servers side by side under an HTTP client: ``vllm bench serve`` drives them in turns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
    servers: Mapping[str, str], prompts: Sequence[Prompt], options: Sequence[str], rounds: int, say: Say
) -> list[dict[str, Any]]:
    """Let the servers take turns.

    Args:
        servers: names in the table, and base URLs.
        prompts: what is sent unless the options have a ``--dataset-name``: as ShareGPT conversations, the one format
            that vLLM reads without pandas.
        options: further options of ``vllm bench serve``.
        rounds: how often.
        say: is told before each measurement.

    Returns:
        What ``vllm bench serve`` wrote each time, with ``server`` and ``round``.

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
        for number in range(rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                say(f"round {number + 1} of {rounds}, {name}")
                command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
                command += ["--base-url", servers[name], "--save-result", "--save-detailed", "--disable-tqdm"]
                command += ["--result-dir", folder, "--result-filename", result.name, *ours, *options]
                done = subprocess.run(command, capture_output=True, text=True, env=environment(stock=True))
                if done.returncode:
                    raise ServerError(f"vllm bench serve against {name}:\n{(done.stdout + done.stderr)[-2000:]}")
                found.append({"server": name, "round": number, **json.loads(result.read_text())})
                result.unlink()
    return found


def table(found: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each server; ratios to the first one, round by round."""
    result = Table(
        "servers, by vllm bench serve",
        [
            *("server", "tokens/s", "ratio", "TTFT p50", "p99, ms", "TPOT p50", "p99, ms", "tokens/step"),
            *("failed", "identical"),
        ],
        notes=[
            "medians (min - max) of the rounds; TTFT: time to the first token; TPOT: time per token after it",
            "tokens/step: of steps that verified drafts, by the server's counters; identical: texts equal to the "
            "first server's (at a temperature, give the requests a seed: --extra-body '{\"seed\": 1}')",
        ],
    )
    names = list(dict.fromkeys(r["server"] for r in found))
    rounds = {name: sorted((r for r in found if r["server"] == name), key=lambda r: r["round"]) for name in names}
    first = rounds[names[0]]
    for name, own in rounds.items():
        texts = [
            a == b
            for mine, theirs in zip(own, first, strict=True)
            for a, b in zip(mine["generated_texts"], theirs["generated_texts"], strict=True)
        ]
        lengths = [r["spec_decode_acceptance_length"] for r in own if "spec_decode_acceptance_length" in r]
        result.rows.append(
            [
                name,
                spread([r["output_throughput"] for r in own], ".0f"),
                spread(
                    [a["output_throughput"] / b["output_throughput"] for a, b in zip(own, first, strict=True)], ".3f"
                ),
                *(
                    f"{median(r[f'{place}_{what}_ms'] for r in own):.1f}"
                    for what in ("ttft", "tpot")
                    for place in ("median", "p99")
                ),
                spread(lengths, ".2f"),
                str(sum(r["failed"] for r in own)),
                "-" if name == names[0] else f"{sum(texts)} of {len(texts)}",
            ]
        )
    return result
