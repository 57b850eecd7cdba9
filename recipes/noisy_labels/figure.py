"""Preferences: accuracy against KL to the reference, over the learning rates of every arm."""

from pathlib import Path
from statistics import fmean

import common
from comparison import by, error
from matplotlib.figure import Figure
from sweep import Row

from noisy_labels.arms import ARMS


def frontier(rows: list[Row], path: Path) -> None:
    """A panel per task, epochs and noise, with a line per arm; bars are standard errors. Writes a PNG file.

    Raises:
        RecipeError: there are no two arms to compare.
    """
    pairs = [row for row in rows if row["test_kl_per_token"] is not None]
    groups = {at: by(part, ["arm"]) for at, part in sorted(by(pairs, ("task", "epochs", "noise")).items())}
    groups = {at: arms for at, arms in groups.items() if len(arms) > 1}
    if not groups:
        raise common.RecipeError(
            "no two arms with preferences are among the results: run the task dpo first."
        )
    columns = min(4, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(5 * columns, 4.5 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(groups) :]:
        axis.remove()
    for axis, ((task, epochs, noise), arms) in zip(axes, groups.items(), strict=False):
        for (arm,), part in arms.items():
            points = [
                (
                    fmean(row["test_kl_per_token"] for row in same),
                    fmean(row["test_accuracy"] for row in same),
                    error([row["test_accuracy"] for row in same]),
                )
                for _, same in sorted(by(part, ["learning_rate"]).items())
            ]
            number, (x, y, bars) = list(ARMS).index(arm), zip(*points, strict=True)
            style = {"color": f"C{number % 10}", "marker": "os^Dv<>PX*hdp8H"[number % 15], "lw": 1}
            axis.errorbar(x, y, bars, label=arm, elinewidth=0.5, **style)
        axis.set(
            xscale="log", xlabel="KL to the reference (nats per token)", ylabel="accuracy on clean test pairs"
        )
        axis.set_title(f"{task}, {100 * noise:g} % wrong labels, {epochs} epochs")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
