"""Figures of a recorded run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hf_poprisk.output_space.analysis import Analysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_REAL, _PREDICTED, _GRAY = "#2f5d9b", "#d9773c", "#777777"


def figures(analysis: Analysis) -> dict[str, Figure]:
    """Title → figure; matplotlib is imported here, and nothing is shown or kept by it."""
    return {
        "Where the loss went": dissipation(analysis),
        "Signal channel and reservoir": channel(analysis),
        "What reached the test examples": transfer(analysis),
        "How the kernel turned": rotation(analysis),
        "Error by mode": modes(analysis),
    }


def _new(width: float = 11.0, height: float = 3.8) -> Figure:
    from matplotlib.figure import Figure  # without pyplot, which would keep it

    return Figure(figsize=(width, height), layout="constrained")


def dissipation(analysis: Analysis) -> Figure:
    figure = _new()
    left, right = figure.subplots(1, 2)
    left.plot(analysis.steps, analysis.losses, color=_REAL, label="probe")
    left.plot(analysis.steps, analysis.test_losses, color=_PREDICTED, label="test")
    left.set(xlabel="optimizer step", ylabel="loss Φ", title="Loss")
    right.plot(analysis.steps[1:], -analysis.measured.cumsum(0), color=_REAL, label="measured")
    right.plot(
        analysis.steps[1:], -analysis.predicted.cumsum(0), color=_PREDICTED, linestyle="--", label="Σ gᵀWg"
    )
    right.set(xlabel="optimizer step", ylabel="fall of Φ since the start", title="Dissipation")
    _finish(left, right)
    return figure


def channel(analysis: Analysis) -> Figure:
    figure = _new()
    left, right = figure.subplots(1, 2)
    spectrum(left, analysis)
    for name, share in analysis.reservoir.items():
        right.plot(analysis.steps, share, label=name)
    size = torch.tensor([1 - cut.channel / len(cut.vectors) for cut in analysis.splits])
    right.plot(analysis.steps, size, color=_GRAY, linestyle=":", label="share of all directions")
    right.set(xlabel="optimizer step", ylabel="share in the reservoir", ylim=(-0.03, 1.03))
    right.set_title("What lies in the reservoir")
    _finish(left, right)
    return figure


def spectrum(axis: Axes, analysis: Analysis) -> None:
    """The eigenvalues of W from the start to a few records, and where the last is cut."""
    from matplotlib import colormaps

    picked = sorted({round(x) for x in torch.linspace(1, len(analysis.steps) - 1, 5).tolist()})
    for count, i in enumerate(picked):
        cut = analysis.splits[i]
        values = cut.eigenvalues[cut.eigenvalues > 0]
        color = colormaps["viridis"](count / max(len(picked) - 1, 1) * 0.9)
        axis.plot(
            range(1, len(values) + 1), values, ".-", color=color, label=f"step {int(analysis.steps[i])}"
        )
    axis.axhline(cut.tolerance, color=_GRAY, linestyle="--", linewidth=1, label="last cut")
    axis.set(yscale="log", xlabel="eigenvalue number", ylabel="eigenvalue of W", title="Spectrum of W")
    top = float(cut.eigenvalues[0])
    axis.set_ylim(bottom=max(1e-12 * top, float(cut.eigenvalues[cut.eigenvalues > 0].min()) / 3), top=4 * top)


def transfer(analysis: Analysis) -> Figure:
    figure = _new()
    left, right = figure.subplots(1, 2)
    real, predicted = analysis.displacement[-1], analysis.transfer[-1]
    ends = [float(min(real.min(), predicted.min())), float(max(real.max(), predicted.max()))]
    left.plot(ends, ends, color=_GRAY, linewidth=1)
    left.plot(real, predicted, ".", color=_REAL)
    left.set(xlabel="real displacement of a test output", ylabel="predicted displacement", title="At the end")
    right.plot(analysis.steps[1:], analysis.transfer_error, color=_REAL, label="‖predicted − real‖/‖real‖")
    right.axhline(0.05, color=_GRAY, linestyle=":", label="5 %")
    right.set(yscale="log", xlabel="optimizer step", ylabel="relative error", title="Over training")
    _finish(right)
    left.grid(alpha=0.25)
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
    right.plot(analysis.steps, analysis.kernel_change, color=_REAL)
    right.set(xlabel="optimizer step", ylabel="‖K − K₀‖ / ‖K₀‖", title="Change of the kernel")
    right.grid(alpha=0.25)
    return figure


def modes(analysis: Analysis) -> Figure:
    """(vᵢᵀ g)² along the eigenvectors of the last W, relative to the largest at the start."""
    figure = _new()
    axis = figure.subplots()
    error = analysis.error_by_mode
    scaled = (error / error[0].max().clamp(min=1e-300)).clamp(min=1e-10).log10()
    image = axis.pcolormesh(
        analysis.steps.numpy(),
        range(1, error.shape[1] + 1),
        scaled.T.numpy(),
        cmap="magma",
        shading="nearest",
    )
    cut = analysis.splits[-1].channel
    axis.axhline(cut + 0.5, color="white", linestyle="--", linewidth=1)
    axis.invert_yaxis()
    axis.set(xlabel="optimizer step", ylabel="mode, by eigenvalue of W")
    axis.set_title("Squared error by mode, log₁₀; the channel is above the dashed line")
    figure.colorbar(image, ax=axis)
    return figure


def _finish(*axes: Axes) -> None:
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=9)
