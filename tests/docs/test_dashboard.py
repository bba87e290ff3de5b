"""Every metric that the dashboard and the documents name is one that vLLM or this plugin has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from vllm.v1.metrics import loggers
from vllm.v1.spec_decode import metrics as spec_decode

from docs.blocks import DOCUMENTS, Piece, pieces
from docs.dashboard import DASHBOARD, METRIC, queries
from vllm_lookahead.metrics import COUNTERS


@pytest.fixture(scope="module")
def exposed() -> set[str]:
    """The names under which the metrics in vLLM's sources and in ours appear on ``/metrics``."""
    found = {f"{name}_total" for name, _ in COUNTERS}
    for module in (loggers, spec_decode):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            match node:
                case ast.Call(func=ast.Attribute(attr=maker), keywords=keywords) if maker.endswith("_cls"):
                    for keyword in keywords:
                        if keyword.arg == "name" and isinstance(keyword.value, ast.Constant):
                            found |= series(maker, keyword.value.value)
                case ast.Tuple(elts=[ast.Constant(value=str(name)), _]) if name.startswith("vllm:"):
                    found |= series("_counter_cls", name)  # vLLM's table of counters of speculative decoding
    return found


def series(maker: str, name: str) -> set[str]:
    """What a metric of one of vLLM's classes looks like on ``/metrics``."""
    match maker:
        case "_counter_cls":
            return {f"{name.removesuffix('_total')}_total"}
        case "_histogram_cls":
            return {f"{name}_{part}" for part in ("bucket", "count", "sum")}
        case _:
            return {name}


def test_metrics_of_the_dashboard_exist(exposed: set[str]) -> None:
    named = set(METRIC.findall("\n".join(queries(DASHBOARD))))
    assert len(named) > 10
    assert not named - exposed


@pytest.mark.parametrize("piece", pieces("promql"), ids=lambda piece: piece.where)
def test_metrics_of_formulas_exist(exposed: set[str], piece: Piece) -> None:
    named = set(METRIC.findall(piece.text))
    assert named
    assert not named - exposed


def test_metrics_in_the_text_exist(exposed: set[str]) -> None:
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in exposed}
    for document in DOCUMENTS:
        assert not set(METRIC.findall(document.read_text())) - exposed - families


def test_the_dashboard_is_one() -> None:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            # every selector is restricted to the chosen models, and every bracket closes
            assert len(METRIC.findall(target["expr"])) == target["expr"].count('model_name=~"$model_name"')
            assert target["expr"].count("(") == target["expr"].count(")")
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= {*variables, "__rate_interval"}


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
