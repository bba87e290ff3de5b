"""What the README claims about options, presets and metrics is what the code has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proposers import registry
from vllm_lookahead.config import describe
from vllm_lookahead.support import REFUSALS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FLAT = " ".join(README.split())


def option_rows(method: str) -> list[str]:
    """The rows of a method's table, as they have to stand in the README; inherited options aren't repeated."""
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
    missing = [row for row in option_rows(method) if row not in README]
    assert not missing, "not in README.md:\n" + "\n".join(missing)


def test_presets() -> None:
    for preset in (ROOT / "configs").glob("*.yaml"):
        assert f"`{preset.name}`" in README


def test_refusals() -> None:
    for row in REFUSALS:
        assert row.feature in FLAT, row.feature


def test_sampling_parameters() -> None:
    """Every field has an answer in the table."""
    from vllm import SamplingParams

    internal = {"skip_clone", "output_text_buffer_length"}
    fields = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")} - internal
    table = README[README.index("## What works with what") : README.index("## Is it worth it?")]
    assert not {name for name in fields if f"`{name}`" not in table}


def test_metrics() -> None:
    from vllm.v1.spec_decode import metrics

    source = Path(metrics.__file__).read_text()
    for name in ("drafts", "draft_tokens", "accepted_tokens", "accepted_tokens_per_pos"):
        assert f"vllm:spec_decode_num_{name}_total" in README
        assert f"vllm:spec_decode_num_{name}" in source


def test_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in README
        assert f"\n{target}:" in makefile
