"""The figure of an experiment: every arm at its best settings, over training or over a facet."""

from pathlib import Path
from typing import Any

import numpy as np
from comparison import best, by
from experiment import Experiment
from matplotlib.figure import Figure
from sweep import Row


def draw(experiment: Experiment, rows: list[Row], path: Path) -> None:
    """Mean and standard error over the seeds of every arm at its best settings, to a PNG file."""
    figure, curve = Figure(figsize=(6.4, 4), layout="constrained"), experiment.curve
    axis = figure.subplots()
    for arm in experiment.arms:
        mine = [row for row in rows if row["arm"] == arm]
        if not mine:
            continue
        x, values = series(experiment, mine, curve["y"])
        mean, n = values.mean(0), len(values)
        color = axis.plot(x, mean, "-", label=arm)[0].get_color()
        if n > 1:
            half = values.std(0, ddof=1) / n**0.5
            axis.fill_between(x, mean - half, mean + half, color=color, alpha=0.15, lw=0)
        if "dashed" in curve:
            x, values = series(experiment, mine, curve["dashed"])
            axis.plot(x, values.mean(0), ":", color=color)
    axis.set(xlabel=curve.get("x_label", curve["x"]), ylabel=curve.get("y_label", curve["y"]))
    for which in curve.get("log", ""):
        getattr(axis, f"set_{which}scale")("log")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def series(experiment: Experiment, rows: list[Row], name: str) -> tuple[list[Any], np.ndarray]:
    """A result of one arm at its best settings.

    Returns:
        The places on the x axis, and the values [seeds, places]. A run that ended before the longest one
        stays where it was.
    """
    along, report = experiment.curve["x"], experiment.reports[0]
    if along in experiment.facets:
        parts = sorted(by(rows, [along]).items())
        chosen = [best(part, experiment.grid, report) for _, part in parts]
        count = min(map(len, chosen))
        values = np.array([[row[name] for row in part[:count]] for part in chosen]).T
        return [facet[0] for facet, _ in parts], values
    chosen = best(rows, experiment.grid, report)
    x = max((row[along] for row in chosen), key=len)
    return x, np.array([row[name] + row[name][-1:] * (len(x) - len(row[name])) for row in chosen])
