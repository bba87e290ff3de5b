"""What a user may write, and what they are told when it's wrong. No vLLM here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel, Field

from proposers import PromptLookup, Proposer, ProposerOptions
from vllm_lookahead.config import (
    KEY,
    MAX_NODES,
    ConfigError,
    LookaheadConfig,
    describe,
    max_nodes,
    method_names,
    requested_method,
)

STOCK = {"ngram", "eagle", "suffix", "draft_model"}
OURS = {"prompt_lookup", "lookahead"}


def test_defaults_are_the_proposers_own() -> None:
    config = LookaheadConfig.parse("prompt_lookup", {})
    assert config.options == PromptLookup.Options().model_dump(mode="json")
    assert config.num_speculative_tokens == max_nodes(PromptLookup.Options())
    assert config.budget == "auto"


def test_options_reach_the_proposer() -> None:
    config = LookaheadConfig.parse("prompt_lookup", {"max_ngram": 4, "min_ngram": 2})
    proposer = config.build_proposer()
    assert isinstance(proposer, PromptLookup)
    assert (proposer.options.max_ngram, proposer.options.min_ngram) == (4, 2)


def test_travels_through_vllm_config_as_plain_json() -> None:
    config = LookaheadConfig.parse("prompt_lookup", {"max_ngram": 4, "num_speculative_tokens": 7, "budget": 3})
    additional = json.loads(json.dumps({"other": 1, **config.to_additional_config()}))
    assert LookaheadConfig.from_vllm_config(SimpleNamespace(additional_config=additional)) == config  # type: ignore[arg-type]


@pytest.mark.parametrize("additional", [{}, {"other": 1}, None, "text"])
def test_vllm_config_without_our_entry(additional: Any) -> None:
    with pytest.raises(ConfigError, match=KEY):
        LookaheadConfig.from_vllm_config(SimpleNamespace(additional_config=additional))  # type: ignore[arg-type]


def test_every_registered_method_has_usable_defaults() -> None:
    for name in method_names() & OURS:
        config = LookaheadConfig.parse(name, {})
        assert 1 <= config.num_speculative_tokens <= MAX_NODES
        assert isinstance(config.build_proposer(), Proposer)


# ---- num_speculative_tokens and budget


def test_num_speculative_tokens_widens_the_tree_unless_its_size_is_given() -> None:
    assert LookaheadConfig.parse("prompt_lookup", {"num_speculative_tokens": 100}).options["max_draft_tokens"] == 100
    both = LookaheadConfig.parse("prompt_lookup", {"num_speculative_tokens": 100, "max_draft_tokens": 8})
    assert (both.num_speculative_tokens, both.options["max_draft_tokens"]) == (8, 8)
    smaller = LookaheadConfig.parse("prompt_lookup", {"num_speculative_tokens": 3, "max_draft_tokens": 8})
    assert (smaller.num_speculative_tokens, smaller.options["max_draft_tokens"]) == (3, 8)


@pytest.mark.parametrize("value", [0, -1, MAX_NODES + 1, "5", 5.0, True, [5]])
def test_num_speculative_tokens_out_of_range(value: Any) -> None:
    with pytest.raises(ConfigError, match=f"num_speculative_tokens = .*an integer from 1 to {MAX_NODES}"):
        LookaheadConfig.parse("prompt_lookup", {"num_speculative_tokens": value})


@pytest.mark.parametrize("value", ["auto", 0, 5, 10])
def test_budget(value: Any) -> None:
    assert LookaheadConfig.parse("prompt_lookup", {"num_speculative_tokens": 10, "budget": value}).budget == value


@pytest.mark.parametrize("value", [-1, 11, "all", 2.0, True, None])
def test_budget_out_of_range(value: Any) -> None:
    with pytest.raises(ConfigError, match=r'budget = .*"auto" or an integer from 0 to 10'):
        LookaheadConfig.parse("prompt_lookup", {"num_speculative_tokens": 10, "budget": value})


# ---- options


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_ngram": 0}, r"\[prompt_lookup\]: max_ngram = 0: must be an integer from 1 to \d+"),
        ({"max_ngram": 10**6}, "max_ngram = 1000000: must be an integer from 1 to"),
        ({"max_ngram": "3"}, 'max_ngram = "3": must be an integer'),
        ({"max_ngram": True}, "max_ngram = true: must be an integer"),
        ({"max_ngram": 2.5}, r"max_ngram = 2\.5: must be an integer"),
        ({"max_ngram": None}, "max_ngram = null: must be an integer"),
        ({"max_ngram": 2, "min_ngram": 3}, r"min_ngram \(3\) must be at most max_ngram \(2\)"),
        ({"max_ngramm": 3}, r"unknown option 'max_ngramm' \(did you mean 'max_ngram'\?\).*max_draft_tokens"),
        (
            {"num_spec_tokens": 3},
            r"did you mean 'num_speculative_tokens'\?.*num_speculative_tokens \(an integer from 1",
        ),
        ({"budgt": 3}, r"did you mean 'budget'\?.*budget \("),
        ({"draft_tensor_parallel_size": 1}, "unknown option 'draft_tensor_parallel_size'"),
        ({"max_ngram": object()}, "plain JSON"),
    ],
)
def test_wrong_option_is_named_with_what_it_allows(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        LookaheadConfig.parse("prompt_lookup", settings)
    assert "\n" not in str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"max_ngram = 0.*min_ngram = 0.*unknown option 'x'"):
        LookaheadConfig.parse("prompt_lookup", {"max_ngram": 0, "min_ngram": 0, "x": 1})
    with pytest.raises(ConfigError, match=r"unknown option 'x'; unknown option 'y'; the options are:") as caught:
        LookaheadConfig.parse("prompt_lookup", {"x": 1, "y": 1})
    assert str(caught.value).count("the options are") == 1


def test_proposer_that_cannot_be_loaded() -> None:
    with pytest.raises(ConfigError, match="unknown proposer 'nobody'"):
        LookaheadConfig.parse("nobody", {})


def test_tree_size_comes_from_max_nodes_first() -> None:
    class Sized(ProposerOptions):
        max_draft_tokens: int = 4

        @property
        def max_nodes(self) -> int:
            return self.max_draft_tokens + 10

    assert max_nodes(Sized()) == 14
    assert max_nodes(ProposerOptions()) == MAX_NODES


def test_fields_in_words() -> None:
    class Fields(BaseModel):
        low: int = Field(0, ge=0)
        high: float = Field(0, le=2.5)
        both: int | None = Field(None, ge=1, le=3)
        choice: str = Field("a", json_schema_extra={"enum": ["a", "b"]})
        flag: bool = True
        above: float = Field(1, gt=0)

    properties = Fields.model_json_schema()["properties"]
    assert {name: describe(schema) for name, schema in properties.items()} == {
        "low": "an integer of at least 0",
        "high": "a number of at most 2.5",
        "both": "an integer from 1 to 3 or null",
        "choice": '"a" or "b"',
        "flag": "true or false",
        "above": "a number above 0",
    }


# ---- whose method is it?


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "prompt_lookup"},
        {"method": "[prompt_lookup]"},
        {"model": "[prompt_lookup]"},
        {"model": "[ prompt_lookup ]"},
        {"method": "prompt_lookup", "model": "[prompt_lookup]"},
        {"model": "prompt_lookup"},
        {"method": "prompt_lookup", "model": "prompt_lookup"},
    ],
)
def test_ours(settings: dict[str, Any]) -> None:
    assert requested_method({**settings, "max_ngram": 3}, OURS, STOCK) == ("prompt_lookup", {"max_ngram": 3})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_speculative_tokens": 3},
        {"method": "ngram", "max_ngram": 3},
        {"model": "[ngram]"},
        {"model": "ngram"},
        {"model": "prompt_lookupp"},
        {"model": "somebody/prompt_lookup"},
        {"model": "some/model", "method": "eagle"},
        {"model": "pkg.Class"},
        {"method": 3},
        {"model": 3},
    ],
)
def test_vllms(settings: dict[str, Any]) -> None:
    assert requested_method(settings, OURS, STOCK) is None


def test_folder_with_the_name_of_a_method_is_a_draft_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompt_lookup").mkdir()
    monkeypatch.chdir(tmp_path)
    assert requested_method({"model": "prompt_lookup"}, OURS, STOCK) is None
    assert requested_method({"model": "[prompt_lookup]"}, OURS, STOCK) == ("prompt_lookup", {})


def test_stock_names_are_never_taken_over() -> None:
    assert requested_method({"method": "ngram"}, OURS | {"ngram"}, STOCK) is None


@pytest.mark.parametrize("settings", [{"method": "prompt_lookupp"}, {"model": "[prompt_lookupp]"}])
def test_unknown_method_lists_ours_and_vllms(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="unknown speculative method 'prompt_lookupp'") as caught:
        requested_method(settings, OURS, STOCK)
    assert "did you mean 'prompt_lookup'?" in str(caught.value)
    assert all(re.search(rf"\b{name}\b", str(caught.value)) for name in OURS | STOCK)


def test_unknown_methods_are_vllms_to_judge_if_its_own_are_not_known() -> None:
    assert requested_method({"method": "new"}, OURS, ()) is None
    assert requested_method({"method": "lookahead"}, OURS, ()) == ("lookahead", {})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "eagle", "model": "[prompt_lookup]"}, "name one method"),
        ({"method": "prompt_lookup", "model": "some/model"}, r"\[prompt_lookup\] has no draft model"),
        ({"method": "prompt_lookup", "model": "[lookahead]"}, "name one method"),
    ],
)
def test_contradiction(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"contradict each other: {reason}"):
        requested_method(settings, OURS, STOCK)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, vllm_lookahead.config\n"
        "assert not {'vllm', 'torch', 'numba', 'proposers'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
