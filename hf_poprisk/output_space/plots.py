"""Figures of a recorded run; matplotlib is imported when one is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hf_poprisk.output_space.analysis import Analysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_REAL, _PREDICTED, _GRAY = "#2f5d9b", "#d9773c", "#777777"


def _new(height: float = 3.8) -> Figure:
    from matplotlib.figure import Figure  # without pyplot, which would keep it

    return Figure(figsize=(11.0, height), layout="constrained")


def _over_steps(axis: Axes, analysis: Analysis, lines: dict[str, dict[str, Any]], **settings: Any) -> None:
    """Lines over the last records: label → ``y`` and how it is drawn."""
    for label, style in lines.items():
        y = style.pop("y")
        axis.plot(analysis.steps[-len(y) :], y, label=label, **style)
    axis.set(xlabel="optimizer step", **settings)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9)


def dissipation(analysis: Analysis) -> Figure:
    figure = _new()
    left, right = figure.subplots(1, 2)
    losses = {
        "probe": {"y": analysis.losses, "color": _REAL},
        "test": {"y": analysis.test_losses, "color": _PREDICTED},
    }
    _over_steps(left, analysis, losses, ylabel="loss Φ", title="Loss")
    falls = {
        "measured": {"y": -analysis.measured.cumsum(0), "color": _REAL},
        "Σ gᵀWg": {"y": -analysis.predicted.cumsum(0), "color": _PREDICTED, "linestyle": "--"},
    }
    _over_steps(right, analysis, falls, ylabel="fall of Φ since the start", title="Dissipation")
    return figure


def channel(analysis: Analysis) -> Figure:
    figure = _new()
    left, right = figure.subplots(1, 2)
    _spectrum(left, analysis)
    shares: dict[str, dict[str, Any]] = {name: {"y": share} for name, share in analysis.reservoir.items()}
    size = torch.tensor([1 - cut.channel / len(cut.vectors) for cut in analysis.splits])
    shares["share of all directions"] = {"y": size, "color": _GRAY, "linestyle": ":"}
    settings = {"ylabel": "share in the reservoir", "title": "What lies in the reservoir"}
    _over_steps(right, analysis, shares, ylim=(-0.03, 1.03), **settings)
    return figure


def _spectrum(axis: Axes, analysis: Analysis) -> None:
    """The eigenvalues of W from the start to a few records, and where the last is cut."""
    from matplotlib import colormaps

    picked = sorted({round(x) for x in torch.linspace(1, len(analysis.steps) - 1, 5).tolist()})
    for count, i in enumerate(picked):
        values = analysis.splits[i].eigenvalues
        values = values[values > 0]
        color = colormaps["viridis"](count / max(len(picked) - 1, 1) * 0.9)
        label = f"step {int(analysis.steps[i])}"
        axis.plot(range(1, len(values) + 1), values, ".-", color=color, label=label)
    axis.axhline(analysis.splits[-1].tolerance, color=_GRAY, linestyle="--", linewidth=1, label="last cut")
    axis.set(yscale="log", xlabel="eigenvalue number", ylabel="eigenvalue of W", title="Spectrum of W")
    top = float(values[0])
    axis.set_ylim(bottom=max(1e-12 * top, float(values.min()) / 3), top=4 * top)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9)


def transfer(analysis: Analysis) -> Figure:
    figure = _new()
    left, right = figure.subplots(1, 2)
    real, predicted = analysis.displacement[-1], analysis.transfer[-1]
    ends = [float(min(real.min(), predicted.min())), float(max(real.max(), predicted.max()))]
    left.plot(ends, ends, color=_GRAY, linewidth=1)
    left.plot(real, predicted, ".", color=_REAL)
    left.set(xlabel="real displacement of a test output", ylabel="predicted displacement", title="At the end")
    left.grid(alpha=0.25)
    right.axhline(0.05, color=_GRAY, linestyle=":", label="5 %")
    errors = {"‖predicted − real‖/‖real‖": {"y": analysis.transfer_error, "color": _REAL}}
    _over_steps(right, analysis, errors, yscale="log", ylabel="relative error", title="Over training")
    return figure


def rotation(analysis: Analysis) -> Figure:
    figure = _new(height=4.2)
    left = figure.add_subplot(1, 2, 1, projection="3d")
    ranks = torch.arange(1, analysis.alignment.shape[1] + 1)
    x, y = torch.meshgrid(analysis.steps.double(), ranks.double(), indexing="ij")
    left.plot_surface(x.numpy(), y.numpy(), analysis.alignment.numpy(), cmap="viridis", rcount=60, ccount=20)
    left.set(xlabel="optimizer step", ylabel="leading eigenvectors", zlabel="alignment", zlim=(0, 1))
    left.set_title("Leading eigenspaces against the start")
    right = figure.add_subplot(1, 2, 2)
    change = {"‖K − K₀‖ / ‖K₀‖": {"y": analysis.kernel_change, "color": _REAL}}
    _over_steps(right, analysis, change, title="Change of the kernel")
    return figure


def modes(analysis: Analysis) -> Figure:
    """(vᵢᵀ g)² along the eigenvectors of the last W, relative to the largest at the start."""
    figure = _new()
    axis, error = figure.subplots(), analysis.error_by_mode
    scaled = (error / error[0].max().clamp(min=1e-300)).clamp(min=1e-10).log10()
    places = analysis.steps.numpy(), range(1, error.shape[1] + 1)
    image = axis.pcolormesh(*places, scaled.T.numpy(), cmap="magma", shading="nearest")
    axis.axhline(analysis.splits[-1].channel + 0.5, color="white", linestyle="--", linewidth=1)
    axis.invert_yaxis()
    axis.set(xlabel="optimizer step", ylabel="mode, by eigenvalue of W")
    axis.set_title("Squared error by mode, log₁₀; the channel is above the dashed line")
    figure.colorbar(image, ax=axis)
    return figure


FIGURES = {  # title → what draws it
    "Where the loss went": dissipation,
    "Signal channel and reservoir": channel,
    "What reached the test examples": transfer,
    "How the kernel turned": rotation,
    "Error by mode": modes,
}
