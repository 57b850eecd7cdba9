"""The figure: the held-out log-odds with the posterior, and the noise rate over training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_poprisk.leave_one_out import NoiseFit
from hf_poprisk.leave_one_out.common import beside, percent
from hf_poprisk.leave_one_out.noise import MAX_RATE
from hf_poprisk.leave_one_out.run import Run

_RIGHT_COLOR, _WRONG_COLOR = "#9dbbdc", "#f2b38a"  # light, because lines cross them
_DARK_COLOR, _LINE_COLOR = "#2f5d9b", "#333333"
_TRUTH_STYLE = {"color": "black", "linewidth": 1.5, "linestyle": ":"}


def plot(run: Run, path: str | Path, flips: np.ndarray | None = None) -> None:
    """A PNG: the held-out log-odds with the posterior, and the noise rate over training.

    Args:
        path: of the file, which appears whole or not at all.
        flips: the labels known to be wrong, [n] bool; their part of the histogram is outlined.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(12, 4.8), layout="constrained", width_ratios=(3, 2)
    )
    try:
        _plot_log_odds(left, run, flips)
        _plot_rate(right, run, flips)
        figure.get_layout_engine().set(w_pad=0.12)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with beside(target) as folder:
            figure.savefig(folder / "figure.png", dpi=130)
            (folder / "figure.png").replace(target)
    finally:
        pyplot.close(figure)


def _plot_log_odds(axis: Any, run: Run, flips: np.ndarray | None) -> None:
    heldout = run.heldout[run.visited]
    edges = _edges(heldout, run.judged_by)
    inside = heldout.clip(edges[0], edges[-1])  # the few beyond are counted in the outermost bars
    axis.set(xlabel="held-out log-odds ζ of the observed label [nats]", ylabel="examples per bar")
    axis.set_title("Held-out log-odds of the labels")
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    bars = {"stacked": True, "edgecolor": "white", "linewidth": 0.5}
    if run.judged_by is None:
        axis.hist(inside, edges, color=_RIGHT_COLOR, label=f"all examples ({len(heldout)})", **bars)
    else:
        right = run.posterior()[run.visited] >= 0.5
        parts = [inside[~right], inside[right]]
        labels = [
            f"posterior {side} 0.5: {percent(len(part), len(heldout))} ({len(part)})"
            for part, side in zip(parts, ("below", "above"), strict=True)
        ]
        axis.hist(parts, edges, color=[_WRONG_COLOR, _RIGHT_COLOR], label=labels, **bars)
    if flips is not None:
        wrong = inside[flips[run.visited]]
        axis.hist(wrong, edges, histtype="step", label=f"known to be wrong ({len(wrong)})", **_TRUTH_STYLE)
    handles, labels = axis.get_legend_handles_labels()
    if run.judged_by is not None:
        second = axis.twinx()
        z = np.linspace(edges[0], edges[-1], 400)
        curve = run.judged_by.probability_right(torch.from_numpy(z)).numpy()
        line = second.plot(z, curve, color=_LINE_COLOR, linewidth=2, label="posterior of being right")
        second.axhline(0.5, color=_LINE_COLOR, linewidth=0.8, linestyle="--")
        second.set(ylabel="probability that the label is right", ylim=(0, 1.05))
        second.set_yticks([0.0, 0.25, 0.5, 0.75, 1.0])
        handles, labels = [*handles, *line], [*labels, line[0].get_label()]
    axis.set_xlim(edges[0], edges[-1])
    # below, because bars and curve may be anywhere
    axis.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)


def _edges(heldout: np.ndarray, fit: NoiseFit | None) -> np.ndarray:
    """Of the bars; one of them is where the posterior is 1/2, so that no bar is of both sides."""
    low, high = np.quantile(heldout, [0.005, 0.995])
    if high - low < 1e-6:  # one example, or all alike
        low, high = low - 0.5, high + 0.5
    width = (high - low) / np.clip(2 * len(heldout) ** 0.5, 10, 60)
    start = low
    if fit is not None and fit.rate > 0:
        even = math.log(fit.rate / (1 - fit.rate)) / fit.tau - math.log(fit.num_labels - 1)
        start = even if low < even < high else low
    return start + width * np.arange(math.floor((low - start) / width), math.ceil((high - start) / width) + 1)


def _plot_rate(axis: Any, run: Run, flips: np.ndarray | None) -> None:
    axis.set(xlabel="epoch", ylabel="share of wrong labels", ylim=(0, MAX_RATE + 0.05))
    axis.set_title("Estimated noise rate over training")
    axis.grid(alpha=0.25)
    if run.fits:
        epochs, rates = [fit.epoch for fit in run.fits], [fit.rate for fit in run.fits]
        lows, highs = [fit.low for fit in run.fits], [fit.high for fit in run.fits]
        label = f"estimate, at last {rates[-1]:.3f}"
        axis.plot(epochs, rates, color=_DARK_COLOR, marker="o", markersize=4, label=label)
        axis.fill_between(
            epochs, lows, highs, color=_RIGHT_COLOR, alpha=0.4, linewidth=0, label="95 % interval"
        )
        if len(epochs) == 1:  # a band without width cannot be seen
            axis.vlines(epochs, lows, highs, color=_DARK_COLOR)
        by = run.judged_by
        if by is not run.fit:
            axis.axhline(by.rate, color=_DARK_COLOR, linewidth=1, label=f"of the first visits: {by.rate:.3f}")
        since = next((fit.epoch for fit in run.fits if fit.step == run.judging_since), None)
        if since is not None:
            what = "weights would begin" if run.mode == "audit" else "weights begin"
            axis.axvline(since, color=_LINE_COLOR, linewidth=1, linestyle="--", label=what)
    else:
        axis.text(0.5, 0.5, "no estimate", ha="center", va="center", transform=axis.transAxes)
    if flips is not None:
        true = float(flips[run.visited].mean())
        axis.axhline(true, label=f"known to be wrong: {true:.3f}", **_TRUTH_STYLE)
    limit = f"limit of the fit: {MAX_RATE}"
    axis.axhline(MAX_RATE, color="gray", linewidth=1, linestyle="-.", label=limit)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
