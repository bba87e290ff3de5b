"""What a job shall do to its rows, and what of it must stay the same when it is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_lookahead.config import ConfigError

FREE = frozenset(
    {
        "cpu_offload_gb",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_num_batched_tokens",
        "max_num_seqs",
    }
)
"""Engine arguments that may differ when a job is resumed: how much memory is used, not what is computed."""

SAMPLE = 1 << 20
"""Of a larger file, so many bytes at both ends are read: reading all weights takes minutes."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a row's result is.

    Attributes:
        model: folder or name of the model.
        speculative_config: as for ``LLM``; None for stock vLLM.
        sampling: fields of ``vllm.SamplingParams``.
        engine: further arguments for the engine (``vllm.AsyncEngineArgs``).
    """

    model: str
    speculative_config: dict[str, Any] | None
    sampling: dict[str, Any]
    engine: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        model: str,
        speculative_config: dict[str, Any] | None,
        sampling: dict[str, Any],
        engine: dict[str, Any],
    ) -> Settings:
        """The settings as a user wrote them: a folder may be relative, and JSON has no integers as keys.

        Raises:
            ConfigError: what is no token id.
        """
        if Path(model).is_dir():
            model = str(Path(model).resolve())
        sampling = {name: value for name, value in sampling.items() if value is not None}
        if isinstance(bias := sampling.get("logit_bias"), dict):
            try:
                sampling["logit_bias"] = {int(token): value for token, value in bias.items()}
            except ValueError:
                raise ConfigError(f"logit_bias = {json.dumps(bias)}: its keys must be token ids") from None
        return cls(model, speculative_config, sampling, engine)

    @property
    def engine_kwargs(self) -> dict[str, Any]:
        """The arguments of ``vllm.AsyncEngineArgs``, but for the model."""
        return {**self.engine, "speculative_config": self.speculative_config}

    def fingerprint(self) -> dict[str, Any]:
        """What two jobs must have in common to share results: plain JSON, one level deep.

        A model in a folder is known by its files, wherever the folder is; any other by its name.
        """
        folder = Path(self.model)
        model = {"model files": digest(folder)} if folder.is_dir() else {"model": self.model}
        engine = {name: value for name, value in self.engine.items() if name not in FREE}
        parts = {"speculative config": self.speculative_config or {}, "sampling": self.sampling, "engine": engine}
        flat = {f"{part} {name}": value for part, values in parts.items() for name, value in values.items()}
        found: dict[str, Any] = json.loads(json.dumps({**model, **flat}))
        return found


def digest(folder: Path) -> str:
    """A hash of a folder's files: their names, sizes and contents (the ends of large ones)."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        found.update(f"{path.relative_to(folder)} {size}\n".encode())
        with path.open("rb") as file:
            found.update(file.read(SAMPLE))
            if size > SAMPLE:
                file.seek(max(size - SAMPLE, SAMPLE))
                found.update(file.read(SAMPLE))
    return found.hexdigest()


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> Iterator[str]:
    """What differs between two fingerprints, in words."""
    for name in sorted(theirs.keys() | ours.keys()):
        one, other = (json.dumps(side[name]) if name in side else "not set" for side in (theirs, ours))
        if one != other:
            yield f"{name} was {one}, is {other}"
