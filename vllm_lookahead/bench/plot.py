"""The picture: ratio to stock by batch size, and where the time of a step goes. Needs matplotlib (extra "bench")."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from vllm_lookahead.bench.results import Results
from vllm_lookahead.bench.tables import PART_NAMES, describe
from vllm_lookahead.bench.watch import PARTS, REST

MISSING = "no plot: matplotlib is not installed (pip install 'vllm-lookahead[bench]')"


def available() -> bool:
    """Whether plots can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(results: Results, path: Path, subtitle: str = "") -> None:
    """Draw a comparison.

    Args:
        results: at least one measurement.
        path: the PNG file.
        subtitle: a line about the machine.
    """
    import matplotlib  # type: ignore[import-not-found]

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 2 if results.profiles else 1
    figure, axes = pyplot.subplots(1, columns, figsize=(7.5 * columns, 5.2), squeeze=False)
    _ratios(axes[0][0], results)
    if results.profiles:
        _time_split(axes[0][1], results)
    figure.suptitle(describe(results))
    figure.text(0.5, 0.005, subtitle, ha="center", fontsize=8, color="dimgray")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _ratios(axes: Any, results: Results) -> None:
    lines = list(results.summary())
    for method in results.methods:
        own = [line for line in lines if line.method == method and line.ratio is not None]
        if method == results.baseline or not own:
            continue
        spreads = [line.ratio for line in own if line.ratio is not None]
        middle = [spread.median for spread in spreads]
        below = [spread.median - spread.min for spread in spreads]
        above = [spread.max - spread.median for spread in spreads]
        axes.errorbar(
            [line.batch for line in own],
            middle,
            yerr=[below, above],
            marker="o",
            capsize=3,
            label=method,
            linewidth=1.5,
        )
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(results.batches, [str(batch) for batch in results.batches])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("requests at a time")
    axes.set_ylabel(f"tokens/s, ratio to {results.baseline}")
    axes.set_title(f"median and range of {results.load.rounds} rounds", fontsize=10)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()


def _time_split(axes: Any, results: Results) -> None:
    shown = [
        batch for batch in (results.batches[0], results.batches[-1]) if any(p.batch == batch for p in results.profiles)
    ]
    bars = [(batch, method) for batch in dict.fromkeys(shown) for method in results.methods]
    bars = [(batch, method) for batch, method in bars if results.profile(method, batch)]
    labels = [f"{method}, batch {batch}" for batch, method in bars]
    # one step of a larger batch does more: per request, the bars can be compared
    bottom = [0.0] * len(bars)
    for part in (*PARTS, REST):
        widths = [results.profile(method, batch)[part] / batch for batch, method in bars]
        axes.barh(labels, widths, left=bottom, label=PART_NAMES[part])
        bottom = [a + b for a, b in zip(bottom, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms per step and request")
    axes.set_title("where the time of a decoding step goes", fontsize=10)
    axes.legend(fontsize=8)
