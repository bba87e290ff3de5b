"""The examination: one engine, started as a user would, and a few steps with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm_lookahead.bench.engines import EngineSettings, engine
from vllm_lookahead.bench.methods import Method
from vllm_lookahead.bench.prompts import read_prompts
from vllm_lookahead.config import ConfigError, method_names
from vllm_lookahead.demo.run import check_method
from vllm_lookahead.drafting.report import DraftingReport

BATCHES = (1, 8, 64)
"""The numbers of requests that are looked at."""
TOKENS = 48
"""How many each of these requests generates, so that the cost model sees real steps."""
PATIENCE = 15.0
"""No larger number of requests is tried after one that took so many seconds."""


@dataclass(frozen=True)
class Findings:
    """What came out.

    Attributes:
        engine: ``Engine.info`` of vLLM's engine.
        drafting: how its worker drafts; None if the worker isn't ours.
    """

    engine: dict[str, Any]
    drafting: DraftingReport | None


def examine(speculative_config: dict[str, Any], settings: EngineSettings, say: Callable[[str], None]) -> Findings:
    """Start an engine, let it decode, and ask it.

    Args:
        speculative_config: as for ``LLM``; ``method`` is one of ours.
        settings: of the engine.
        say: is told what is being done.

    Raises:
        ConfigError: the method can't have these options.
        EngineFailedError: the engine was refused or didn't start.
    """
    check_method(speculative_config)
    name = speculative_config["method"]
    if name not in method_names():
        raise ConfigError(f"{name!r} is vLLM's own method; there is something to say about {sorted(method_names())}")
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "lookahead" not in plugins.split(","):
        raise ConfigError(f"VLLM_PLUGINS={plugins!r} keeps vLLM from loading this plugin: add lookahead to it")
    method = Method(name, speculative_config, plugin=True)
    with TemporaryDirectory(prefix="vllm-lookahead-doctor-") as temporary:
        say("starting an engine")
        with engine(method, settings, (settings.logs or Path(temporary)) / "engine.log") as ask:
            about = ask("info")
            prompts = ask("encode", prompts=read_prompts("demo"))
            room = about["max_model_len"] - TOKENS
            prompts = [prompt[:room] for prompt in prompts]
            for batch in BATCHES:
                if batch > about["max_num_seqs"]:
                    break
                say(f"{batch} request{'s' * (batch > 1)} at a time")
                chosen = [prompts[i % len(prompts)] for i in range(batch)]
                if ask("generate", prompts=chosen, batch=batch, max_tokens=TOKENS)["seconds"] > PATIENCE:
                    break
            drafting = ask("drafting", batches=BATCHES)
    return Findings(about, None if drafting is None else DraftingReport(**drafting))
