"""Plots of a benchmark run: time against size, one file a benchmark, the floor drawn in."""

from __future__ import annotations

import re
from pathlib import Path

from bench.common import Row


def write_plots(rows: list[Row], folder: Path, title: str) -> list[Path]:
    """One PNG for every benchmark with a curve of two sizes or more; a panel for each of its curves."""
    from matplotlib.figure import Figure  # of the `plot` extra

    written = []
    for name in dict.fromkeys(row.benchmark for row in rows):
        mine = [row for row in rows if row.benchmark == name and row.curve]
        curves = [
            c for c in dict.fromkeys(row.curve for row in mine) if len({r.amount for r in mine if r.curve == c}) > 1
        ]
        if not curves:
            continue
        figure = Figure(figsize=(5.5 * len(curves), 4.2), layout="constrained")
        for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves):
            shown = [row for row in mine if row.curve == curve]
            for contender in dict.fromkeys(row.contender for row in shown):
                points = sorted((row for row in shown if row.contender == contender), key=lambda row: row.amount)
                amounts, is_floor = [row.amount for row in points], contender.startswith("floor")
                style = {"color": "black", "linestyle": "--"} if is_floor else {"marker": "o"}
                (line,) = axes.plot(
                    amounts,
                    [row.p50_ms for row in points],
                    label=contender,
                    linewidth=2.5 if contender == "fasttrain" else 1.2,
                    **style,
                )
                axes.fill_between(
                    amounts,
                    [row.p20_ms for row in points],
                    [row.p80_ms for row in points],
                    color=line.get_color(),
                    alpha=0.15,
                    linewidth=0,
                )
            axes.set(xscale="log", yscale="log", xlabel=shown[0].axis, ylabel="milliseconds", title=curve)
            axes.grid(True, which="both", alpha=0.2)
            axes.legend(fontsize=7)
        figure.suptitle(f"{name} ({title}): median, band p20 to p80")
        path = folder / f"{title}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.png"
        figure.savefig(path, dpi=110)
        written.append(path)
    return written
