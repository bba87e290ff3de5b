"""What a contract consists of. Each part can be checked against the vLLM that is installed, or against its sources."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_lookahead.contract import running
from vllm_lookahead.contract.reading import Missing, Reading


@dataclass(frozen=True)
class Function:
    """A function or method that we call, wrap or override.

    Attributes:
        path: "module:Class.method".
        parameters: names that it must take (without ``self``).
        exactly: whether it may take no others: set where an override names every parameter.
    """

    path: str
    parameters: tuple[str, ...] = ()
    exactly: bool = False

    def problem(self, vllm: Reading = running) -> str | None:
        """What is wrong with it, or None."""
        try:
            signature = vllm.signature(self.path)
        except Missing as missing:
            return str(missing)
        if signature is None:
            return None
        found = signature.names
        lacking = not signature.takes_any and not set(self.parameters) <= set(found)
        if lacking or (self.exactly and len(found) != len(self.parameters)):
            return f"{_dotted(self.path)} takes ({', '.join(found)}), expected ({', '.join(self.parameters)})"
        return None


@dataclass(frozen=True)
class Attributes:
    """Attributes of a class, of its instances or of a module that we read or set.

    Attributes:
        path: "module:Class" or "module".
        names: found as class attributes, annotations, dataclass fields, or assigned to ``self`` in the class's source.
    """

    path: str
    names: tuple[str, ...] = ()

    def problem(self, vllm: Reading = running) -> str | None:
        """What is wrong with it, or None."""
        try:
            lacking = vllm.lacking(self.path, self.names)
        except Missing as missing:
            return str(missing)
        return f"{_dotted(self.path)} has no {', '.join(lacking)}" if lacking else None


Part = Function | Attributes


def _dotted(path: str) -> str:
    return path.replace(":", ".")
