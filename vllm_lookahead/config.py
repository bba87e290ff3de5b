"""What the user asked for: parsed, validated, and carried to every process as plain JSON.

No vllm import here: the API process validates with this file before anything is started, and unit tests run it alone.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from proposers.base import Proposer, ProposerOptions

KEY = "lookahead"
"""Where our part lives in vLLM's ``additional_config``."""

MAX_NODES = 1024
"""Largest tree that may be asked for: beyond it the ancestor masks alone cost more than any draft can save."""


SHARED_OPTIONS = {
    "num_speculative_tokens": f"an integer from 1 to {MAX_NODES}",
    "budget": '"auto" or an integer from 0 to num_speculative_tokens',
}
"""What every method allows beside its proposer's own options, in words."""


class ConfigError(ValueError):
    """A configuration that can't be served. The message is one sentence for the user."""


class LookaheadConfig(BaseModel):
    """One of our methods with its options, validated.

    Attributes:
        method: name of the registered proposer.
        options: its options, all of them, as plain JSON values.
        num_speculative_tokens: most nodes that a draft tree may have.
        budget: how many of them a step may spend per request: a number, or "auto" to let the measured gain decide.
        corpus_index: where the index of the corpus lies, if there is one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    options: dict[str, Any]
    num_speculative_tokens: int = Field(ge=1, le=MAX_NODES)
    budget: Literal["auto"] | int = "auto"
    corpus_index: str | None = None

    @classmethod
    def parse(cls, method: str, settings: Mapping[str, Any]) -> LookaheadConfig:
        """Validate what the user wrote.

        Args:
            method: name of a registered proposer.
            settings: the speculative config without ``method`` and ``model``: ``num_speculative_tokens``, ``budget``
                and the proposer's own options.

        Raises:
            ConfigError: names the field, what it was given and what it allows.
        """
        from proposers import registry

        try:
            proposer = registry.get(method)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        settings = dict(settings)
        nodes = _node_limit(method, settings.pop("num_speculative_tokens", None))
        budget = settings.pop("budget", "auto")
        fields = proposer.Options.model_fields
        if nodes is not None and "max_draft_tokens" in fields and "max_draft_tokens" not in settings:
            # "Draft up to n tokens" should not need two options, where a tree is nothing but guesses.
            wider = _validate(method, proposer.Options, {**settings, "max_draft_tokens": nodes})
            if max_nodes(wider) == nodes:
                settings["max_draft_tokens"] = nodes
        options = _validate(method, proposer.Options, settings)
        limit = max_nodes(options)
        nodes = limit if nodes is None else min(nodes, limit)
        plain = {name: value for name, value in options.model_dump(mode="json").items() if name in fields}
        return cls(method=method, options=plain, num_speculative_tokens=nodes, budget=_budget(method, budget, nodes))

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig) -> LookaheadConfig:
        """Read back what ``to_additional_config`` put into vLLM's config.

        Raises:
            ConfigError: the config holds nothing of ours.
        """
        additional = vllm_config.additional_config
        ours = additional.get(KEY) if isinstance(additional, Mapping) else None
        if ours is None:
            raise ConfigError(
                f"vLLM's additional_config has no {KEY!r} entry: select a method with "
                "--speculative-model '[prompt_lookup]' or speculative_config={'method': ...}, not by class path"
            )
        return cls.model_validate(ours)

    @classmethod
    def is_one(cls, value: Any) -> bool:
        """Whether a value is what ``to_additional_config`` leaves in vLLM's config."""
        try:
            cls.model_validate(value)
        except ValidationError:
            return False
        return True

    def to_additional_config(self) -> dict[str, Any]:
        """The entry for vLLM's ``additional_config``: plain JSON, because vLLM hashes and pickles it."""
        return {KEY: self.model_dump(mode="json")}

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of what the method's guesses come from."""
        from proposers import registry

        return registry.get(self.method).sources

    def build_proposer(self) -> Proposer:
        """Make the proposer that this config asks for."""
        from proposers import registry

        kind = registry.get(self.method)
        proposer = kind(_validate(self.method, kind.Options, self.options))
        if self.corpus_index is not None:
            proposer.use_corpus(Path(self.corpus_index))
        return proposer


def max_nodes(options: ProposerOptions) -> int:
    """Most nodes that a proposer with these options puts into one tree.

    A proposer says so with a ``max_nodes`` property on its options; without one, ``max_draft_tokens`` is the answer.
    """
    limits = (getattr(options, name, None) for name in ("max_nodes", "max_draft_tokens"))
    return min(next((int(limit) for limit in limits if limit is not None), MAX_NODES), MAX_NODES)


def method_names() -> set[str]:
    """The names that select one of our methods.

    Entry points are listed, not loaded, and registered proposers count only if somebody imported the registry already:
    this runs in every vLLM process, also where nobody asks for us.
    """
    registry = sys.modules.get("proposers.registry")
    registered = set(registry.names()) if registry is not None else set()
    return registered | {entry_point.name for entry_point in entry_points(group="vllm_lookahead.proposers")}


def requested_method(
    settings: Mapping[str, Any], ours: Iterable[str], stock: Iterable[str]
) -> tuple[str, dict[str, Any]] | None:
    """Find out whether a speculative config asks for one of our methods.

    Args:
        settings: the speculative config, keys with underscores.
        ours: the names of our methods.
        stock: the names of vLLM's methods. They win over ours. Empty if we can't tell: then vLLM judges unknown names.

    Returns:
        The method and the remaining settings, or None if the config is vLLM's business.

    Raises:
        ConfigError: nobody knows the method, or method and model contradict each other.
    """
    stock = set(stock)
    ours = set(ours) - stock
    method, model = settings.get("method"), settings.get("model")
    selected = _bracketed(model)
    if selected is None and isinstance(model, str) and model in ours and not Path(model).exists():
        selected = model  # without the brackets, as vLLM takes "ngram" for "[ngram]"
    named = [name for name in (_name(method), selected) if name is not None]
    mine = [name for name in named if name in ours]
    if not mine:
        unknown = [name for name in named if name not in stock]
        if unknown and stock:
            raise ConfigError(_unknown_method(unknown[0], ours, stock))
        return None
    name = mine[0]
    if any(other != name for other in named):
        raise ConfigError(f"method {method!r} and model {model!r} contradict each other: name one method")
    if model is not None and selected is None:
        raise ConfigError(f"method {method!r} and model {model!r} contradict each other: [{name}] has no draft model")
    return name, {key: value for key, value in settings.items() if key not in ("method", "model")}


def _name(method: Any) -> str | None:
    """The bare name in a ``method``: vLLM's own code reads "[ngram]" and "ngram" alike."""
    return _bracketed(method) or method if isinstance(method, str) else None


def _bracketed(model: Any) -> str | None:
    """The name in a ``model`` like "[prompt_lookup]", or None: anything else is a real model's name."""
    if isinstance(model, str) and model.startswith("[") and model.endswith("]"):
        return model[1:-1].strip()
    return None


def _unknown_method(name: str, ours: set[str], stock: set[str]) -> str:
    guess = _did_you_mean(name, ours | stock)
    return (
        f"unknown speculative method {name!r}{guess}; "
        f"vllm-lookahead has: {', '.join(sorted(ours))}; vLLM has: {', '.join(sorted(stock))}"
    )


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _node_limit(method: str, value: Any) -> int | None:
    if value is None:
        return None
    if type(value) is not int or not 1 <= value <= MAX_NODES:
        allowed = SHARED_OPTIONS["num_speculative_tokens"]
        raise ConfigError(f"[{method}]: num_speculative_tokens = {_show(value)}: must be {allowed}")
    return value


def _budget(method: str, value: Any, nodes: int) -> Literal["auto"] | int:
    if value == "auto" or (type(value) is int and 0 <= value <= nodes):
        return value
    raise ConfigError(f'[{method}]: budget = {_show(value)}: must be "auto" or an integer from 0 to {nodes}')


def _validate(method: str, model: type[ProposerOptions], settings: Mapping[str, Any]) -> ProposerOptions:
    """Validate a proposer's options: as JSON, which they have to be anyway, so that 1.0, "1" or true are no integers.

    Raises:
        ConfigError: one line with everything that is wrong.
    """
    try:
        text = json.dumps(settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"[{method}]: options must be plain JSON values: {error}") from error
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        schema = model.model_json_schema()["properties"]
        problems = error.errors(include_url=False)
        told = [_explain(problem, schema) for problem in problems]
        if any(problem["type"] == "extra_forbidden" for problem in problems):
            told.append(f"the options are: {_all_options(schema)}")
        raise ConfigError(f"[{method}]: {'; '.join(told)}") from None


def _explain(problem: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """One pydantic error in the words of a user who has never heard of pydantic."""
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":
        return f"unknown option {name!r}{_did_you_mean(name, [*schema, *SHARED_OPTIONS])}"
    if name in schema:
        return f"{name} = {_show(problem['input'])}: must be {describe(schema[name])}"
    return str(problem["msg"]).removeprefix("Value error, ")


def _all_options(schema: Mapping[str, Any]) -> str:
    """Every option of a method with what it allows, in one line."""
    allowed = {**{name: describe(field) for name, field in schema.items()}, **SHARED_OPTIONS}
    return ", ".join(f"{name} ({allowed[name]})" for name in sorted(allowed))


def _show(value: Any) -> str:
    return json.dumps(value, default=repr)


_TYPES = {"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "a string"}


def describe(schema: Mapping[str, Any]) -> str:
    """What a field allows, in words, from its JSON schema: "an integer from 1 to 8"."""
    if "anyOf" in schema:
        return " or ".join(describe(choice) for choice in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(_show(value) for value in values)
    words = _TYPES.get(schema.get("type", ""), str(schema.get("type", "a value")))
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f"{words} from {low:.9g} to {high:.9g}"
    if low is not None:
        return f"{words} of at least {low:.9g}"
    if high is not None:
        return f"{words} of at most {high:.9g}"
    if "exclusiveMinimum" in schema:
        return f"{words} above {schema['exclusiveMinimum']:.9g}"
    return words
