"""The figure: how many labels are how likely to be correct."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hf_poprisk.command import folder_beside, need
from hf_poprisk.leave_one_out.run import Run


def plot(run: Run, path: Path, flips: np.ndarray | None = None) -> None:
    """A histogram of ``p_correct`` over the visited examples, as PNG.

    Args:
        path: of the file, which appears whole or not at all.
        flips: the labels known to be mislabeled, [n] bool; their part is outlined.

    Raises:
        UserError: the run has no estimate, or matplotlib is missing.
    """
    fit = run.fit
    need("matplotlib", "--plot")
    from matplotlib.figure import Figure

    p_correct = run.p_correct[run.visited]
    edges = np.linspace(0, 1, 21).tolist()  # no bar is of both sides of .5
    below = p_correct < 0.5
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.hist(
        [p_correct[below], p_correct[~below]],
        edges,
        stacked=True,
        color=["#f2b38a", "#9dbbdc"],
        edgecolor="white",
        label=[f"below .5 ({below.sum()})", f"others ({(~below).sum()})"],
    )
    if flips is not None:
        mislabeled = flips[run.visited]
        label = f"known to be mislabeled ({mislabeled.sum()})"
        axis.hist(p_correct[mislabeled], edges, histtype="step", color="black", label=label)
    axis.set(xlabel="probability that the label is correct", ylabel="labels", xlim=(0, 1))
    axis.set_title(f"Estimated noise rate {fit.rate:.0%} (95% interval {fit.low:.0%} to {fit.high:.0%})")
    axis.legend(frameon=False)
    with folder_beside(path) as folder:
        figure.savefig(folder / "figure.png", dpi=130)
        (folder / "figure.png").replace(path)
