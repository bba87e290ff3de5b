"""The picture: ratio to stock by batch size. Needs matplotlib (extra "bench")."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from vllm_lookahead.bench.comparison import Load, Measurement, ratios
from vllm_lookahead.bench.methods import BASELINE


def draw(found: Sequence[Measurement], load: Load, path: Path, caption: str) -> None:
    """Draw a comparison: one picture for each temperature, side by side.

    Args:
        found: what was measured.
        load: with what.
        path: the PNG file.
        caption: a line about the machine.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib  # type: ignore[import-not-found]

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = len(load.temperatures)
    figure, axes = pyplot.subplots(1, columns, figsize=(7.5 * columns, 5.2), squeeze=False, sharey=True)
    for axis, temperature in zip(axes[0], load.temperatures, strict=True):
        for method in dict.fromkeys(m.method for m in found if m.method != BASELINE):
            points = []
            for batch in sorted(load.batches):
                here = [m for m in found if (m.temperature, m.batch) == (temperature, batch)]
                if spread := ratios(here, method, BASELINE):
                    points.append((batch, min(spread), median(spread), max(spread)))
            if points:
                at, low, middle, high = zip(*points, strict=True)
                errors = [
                    [m - x for m, x in zip(middle, low, strict=True)],
                    [x - m for m, x in zip(middle, high, strict=True)],
                ]
                axis.errorbar(at, middle, yerr=errors, marker="o", capsize=3, label=method)
        axis.axhline(1.0, color="black", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(load.batches, [str(batch) for batch in load.batches])
        axis.set(
            xlabel="requests at a time", ylabel=f"tokens/s, ratio to {BASELINE}", title=f"temperature {temperature:g}"
        )
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.text(0.5, 0.005, caption, ha="center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
