"""What the documents claim about options, presets, metrics and memory is what the code has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from docs.blocks import ROOT
from proposers import PromptLookupOptions, registry
from proposers.base import NO_INFO
from proposers.guesses import Guesses, RequestGuesses
from proposers.recycled_tokens import RecycledTokens
from proposers.shared_text import SharedText
from proposers.text_index import CAPACITY
from vllm_lookahead.batch.run import usual_block
from vllm_lookahead.config import describe
from vllm_lookahead.drafting import budget, policy, timing
from vllm_lookahead.metrics import WINDOW
from vllm_lookahead.support import REFUSALS

README = (ROOT / "README.md").read_text()
OPTIONS, COMPATIBILITY, OPERATIONS, SCALING_OUT = (
    (ROOT / "docs" / f"{name}.md").read_text() for name in ("options", "compatibility", "operations", "scaling-out")
)


def option_rows(method: str) -> list[str]:
    """The rows of a method's table, as they have to stand in the document; inherited options aren't repeated."""
    model = registry.get(method).Options
    inherited = model.__mro__[1].model_fields
    schema = model.model_json_schema()["properties"]
    return [
        f"| `{name}` | `{json.dumps(field.default)}` | {describe(schema[name])} | {field.description} |"
        for name, field in model.model_fields.items()
        if name not in inherited or field.default != inherited[name].default
    ]


@pytest.mark.parametrize("method", ["prompt_lookup", "lookahead", "token_recycling"])
def test_options(method: str) -> None:
    missing = [row for row in option_rows(method) if row not in OPTIONS]
    assert not missing, "not in docs/options.md:\n" + "\n".join(missing)


def test_options_of_the_readme_are_those_of_the_document() -> None:
    table = README[README.index("## Options") : README.index("## What works")]
    rows = [row for row in table.splitlines() if row.startswith("| `")]
    assert len(rows) >= 4
    for row in rows:
        assert f"\n{row}\n" in OPTIONS


def test_presets() -> None:
    for preset in (ROOT / "configs").glob("*.yaml"):
        assert f"`{preset.name}`" in OPTIONS


def test_refusals() -> None:
    told = " ".join(COMPATIBILITY[COMPATIBILITY.index("## What is refused") :].split())
    for row in REFUSALS:
        assert row.feature in told, row.feature


def test_sampling_parameters() -> None:
    """Every field has an answer in the table."""
    from vllm import SamplingParams

    internal = {"skip_clone", "output_text_buffer_length"}
    fields = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")} - internal
    table = COMPATIBILITY[COMPATIBILITY.index("## What works with what") : COMPATIBILITY.index("## What is refused")]
    assert not {name for name in fields if f"`{name}`" not in table}


def test_metrics() -> None:
    from vllm.v1.spec_decode import metrics

    source = Path(metrics.__file__).read_text()
    for name in ("drafts", "draft_tokens", "accepted_tokens", "accepted_tokens_per_pos"):
        assert f"vllm:spec_decode_num_{name}_total" in OPERATIONS
        assert f"vllm:spec_decode_num_{name}" in source


def test_sources() -> None:
    """Those of the counters are explained where the metrics are, and by what option each is had."""
    told = (ROOT / "docs" / "how-it-works.md").read_text()
    for source in (*registry.get("lookahead").sources, WINDOW):
        assert f"`{source}`" in OPERATIONS
        assert f"`{source}`" in told


def test_memory_of_a_request() -> None:
    """From its first token to the moment when its index is made anew."""
    low, high = map(int, re.search(r"token of a running request \| (\d+) to (\d+) \|", OPERATIONS).groups())  # type: ignore[union-attr]
    guesses = Guesses(PromptLookupOptions(shared_tokens=0))
    for length in (4096, 10_000, 22_000, 43_700, 100_000):
        index = RequestGuesses(guesses, np.zeros(length, np.int32), NO_INFO)._local
        assert low <= index.nbytes / index[CAPACITY]
        assert index.nbytes / length <= high


def test_memory_of_what_is_remembered() -> None:
    size = SharedText(1 << 20, 4).state.nbytes / (1 << 20)
    assert f"| about {size:.0f}, taken at start-up |" in OPERATIONS
    for document in (OPERATIONS, OPTIONS):
        assert f"{RecycledTokens(8).state.nbytes / 2**20:.1f} MiB for 8 of them" in document


def test_block_of_a_job() -> None:
    assert f"a block of up to {usual_block(5000, 1)} rows" in SCALING_OUT


def test_figures_of_the_budget() -> None:
    """Those that are said in words."""
    told = " ".join((ROOT / "docs" / "how-it-works.md").read_text().split())
    assert f"promises {budget.GAIN - 1:.0%} more than plain decoding" in told
    numbers = {4: "four", 8: "eighth", 16: "sixteen"}
    assert f"One step in {numbers[timing.TIME_EVERY]}, later one in {numbers[timing.TIME_EVERY_LATER]}," in told
    assert f"down to every {numbers[policy.LONGEST_REST]} step" in told


def test_log_lines() -> None:
    """Those that are quoted are what the code prints, but for figures and names."""
    source = "\n".join(path.read_text() for path in (ROOT / "vllm_lookahead").rglob("*.py"))
    quoted = re.findall(r"`(\[prompt_lookup\] [^`]+|Proposer [^`]+)`", OPERATIONS)
    assert len(quoted) >= 6
    for line in quoted:
        parts = re.split(r"\[prompt_lookup\]|'prompt_lookup'|\d+|\.\.\.|;", line)
        assert all(part.strip() in source for part in parts), line
