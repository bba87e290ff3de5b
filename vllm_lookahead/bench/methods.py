"""What is compared: names for speculative configs."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm_lookahead.config import method_names, requested_method

BASELINE = "stock"

STOCK: dict[str, dict[str, Any] | None] = {
    BASELINE: None,
    "ngram": {"method": "ngram", "num_speculative_tokens": 5},
    "ngram-tuned": {"method": "ngram", "num_speculative_tokens": 12, "prompt_lookup_max": 4, "prompt_lookup_min": 2},
    "suffix": {"method": "suffix", "suffix_decoding_max_cached_requests": 0},
}
"""vLLM's own methods. "ngram" has vLLM's default lookup (exactly 5 tokens have to match) and its documentation's 5
draft tokens; "ngram-tuned" was chosen by replaying the bundled model's greedy output on code; "suffix" must not keep
past answers: here each prompt comes several times, and it would know them by heart."""

STANDARD = (*STOCK, "prompt_lookup", "lookahead")


class MethodError(ValueError):
    """A method can't be understood. The message is one sentence for the user."""


@dataclass(frozen=True)
class Method:
    """One engine of a comparison.

    Attributes:
        name: in tables.
        speculative_config: as for ``LLM``; None for no speculation.
        plugin: whether the engine loads our plugin. Stock methods run in an engine that doesn't.
        imports: modules that the engine's process imports first.
    """

    name: str
    speculative_config: dict[str, Any] | None
    plugin: bool
    imports: tuple[str, ...] = ()

    @property
    def missing(self) -> str | None:
        """Why this method can't run here, or None."""
        config = self.speculative_config or {}
        if config.get("method") == "suffix" and importlib.util.find_spec("arctic_inference") is None:
            return "vLLM's suffix method needs the package arctic-inference, which is not installed"
        return None


def parse(values: Iterable[str]) -> list[Method]:
    """Methods as they are typed: bare names, several separated by commas, or ``NAME=JSON``.

    Raises:
        MethodError: unknown, not JSON, or a name twice.
    """
    methods: list[Method] = []
    for value in values:
        name, equals, text = value.partition("=")
        if not equals:
            methods += [_named(bare) for bare in value.split(",") if bare.strip()]
            continue
        try:
            config = json.loads(text)
        except json.JSONDecodeError as error:
            raise MethodError(f"method {name!r}: not JSON: {error}") from error
        if not isinstance(config, dict | None) or not name:
            raise MethodError(f"method {value!r}: must be NAME={{...}} with a speculative config, or NAME=null")
        ours = config is not None and requested_method(config, method_names(), ()) is not None
        methods.append(Method(name, config, plugin=ours))
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise MethodError(f"method {name!r} is named twice: give one of them another name, as NAME=JSON")
    return methods


def _named(name: str) -> Method:
    """The method that goes by a bare name: one of vLLM's in ``STOCK`` or one of ours."""
    bare = name.strip().removeprefix("[").removesuffix("]")
    if bare in STOCK:
        return Method(bare, STOCK[bare], plugin=False)
    if bare in method_names():
        return Method(bare, {"method": bare}, plugin=True)
    known = ", ".join([*STOCK, *sorted(method_names())])
    raise MethodError(f"unknown method {name!r}: known are {known}, and NAME=JSON with a speculative config")
