"""A server's ``/metrics``, and how far they moved."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

Labels = frozenset[tuple[str, str]]


class Counters:
    """The samples of a server's metrics.

    Args:
        values: by name and labels.
    """

    def __init__(self, values: Mapping[tuple[str, Labels], float]) -> None:
        self._values = dict(values)

    @staticmethod
    def read(url: str) -> Counters:
        """What a server says now."""
        with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples]
        return Counters({(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples})

    def since(self, before: Counters) -> Counters:
        """How far they moved."""
        return Counters({key: value - before._values.get(key, 0.0) for key, value in self._values.items()})

    def sums(self) -> dict[str, float]:
        """By name, over all labels."""
        found: dict[str, float] = {}
        for (name, _), value in self._values.items():
            found[name] = found.get(name, 0.0) + value
        return found

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples of a name that have these labels, among others.

        Raises:
            KeyError: there is none.
        """
        wanted = set(labels.items())
        found = [value for (key, given), value in self._values.items() if key == name and wanted <= given]
        if not found:
            raise KeyError(f"{name} {labels}")
        return sum(found)

    def by(self, name: str, label: str) -> dict[str, float]:
        """The sums of a name's samples, by the value of a label."""
        found: dict[str, float] = {}
        for (key, labels), value in self._values.items():
            if key == name and label in dict(labels):
                found[dict(labels)[label]] = found.get(dict(labels)[label], 0.0) + value
        return found
