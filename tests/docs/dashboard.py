"""The Grafana dashboard, and what it asks for."""

from __future__ import annotations

import json
import re
from typing import Any

from docs.blocks import ROOT

DASHBOARD: dict[str, Any] = json.loads((ROOT / "docs" / "grafana-dashboard.json").read_text())
METRIC = re.compile(r"vllm:\w+")


def queries(value: Any) -> list[str]:
    """The PromQL of everything in a dashboard."""
    if isinstance(value, list):
        return [query for part in value for query in queries(part)]
    if not isinstance(value, dict):
        return []
    own = [value[key] for key in ("expr", "query", "definition") if isinstance(value.get(key), str)]
    return own + [query for part in value.values() for query in queries(part)]
