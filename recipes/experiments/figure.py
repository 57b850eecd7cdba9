"""Preferences: accuracy against KL to the reference, over the learning rates of every arm."""

from pathlib import Path
from statistics import fmean

import pandas as pd
from matplotlib.figure import Figure
from tables import error

PANELS = (("dpo", 0.3), ("dpo-words", 0.3), ("dpo-words", 0.4))
ARMS = {"adamw": "o", "hard": "s", "random-mask": "v", "soft": "^", "weight": "X", "weight+soft": "d"}


def draw(rows: pd.DataFrame, path: Path) -> None:
    """A panel per data set and share of flips with a line per arm; bars are standard errors. Writes a PNG."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axis, (data, noise) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        part = rows[(rows["data"] == data) & (rows["noise"] == noise)]
        for i, (arm, marker) in enumerate(ARMS.items()):
            points = [
                (fmean(same["test_kl_per_token"]), fmean(same["test_accuracy"]), error(same["test_accuracy"]))
                for _, same in part[part["arm"] == arm].groupby("learning_rate")
            ]
            if points:
                x, y, bars = zip(*points, strict=True)
                axis.errorbar(x, y, bars, label=arm, marker=marker, color=f"C{i}", lw=1)
        axis.set(xscale="log", xlabel="KL to the reference (nats/token)", ylabel="accuracy on clean pairs")
        axis.set_title(f"{data}, {100 * noise:g} % flipped")
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[1].legend(frameon=False, fontsize=8)  # the panel with all arms
    figure.savefig(path, dpi=70, metadata={"Software": None}, pil_kwargs={"optimize": True})
