"""``hf-poprisk output-space RUN_DIR``: one self-contained HTML page about a recorded run."""

from __future__ import annotations

import argparse
import base64
import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_poprisk.output_space.analysis import Analysis
from hf_poprisk.output_space.preconditioner import NONE
from hf_poprisk.output_space.recording import (
    FILE_NAME,
    GRADIENT_DESCENT,
    Recording,
    RecordingError,
    load_recording,
)
from hf_poprisk.user_errors import folder_beside, need

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Section = tuple[list[str], "Figure"]  # sentences and a figure

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>
body {{ max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif }}
img {{ width: 100% }} h2 {{ margin-top: 2.5rem }} p {{ max-width: 48rem }}
</style>
<h1>{title}</h1>
{content}
<p>Definitions: E. Litman and G. Guo, A Theory of Generalization in Deep Learning, arXiv:2605.01172.</p>
</html>
"""


def add_command(commands: Any) -> None:
    """Add ``output-space`` to the subparsers of ``hf-poprisk``."""
    parser = commands.add_parser(
        "output-space",
        help="what a recorded run did in output space",
        description="What a recorded run did in output space, as one HTML page with its figures inside.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help=f"an output folder with {FILE_NAME}")
    parser.add_argument(
        "--to", type=Path, metavar="FILE.html", help="where it goes (default: RUN_DIR/output_space.html)"
    )
    parser.set_defaults(execute=report)


def report(args: argparse.Namespace) -> None:
    """Write the page and print its sentences.

    Raises:
        RecordingError: says in one sentence what is wrong; then nothing was written.
    """
    target = args.to or args.run / "output_space.html"
    if target.suffix.lower() != ".html" or target.is_dir():
        raise RecordingError(f"--to {target} must be a file that ends in .html.")
    if not target.absolute().parent.is_dir() and args.to:
        raise RecordingError(f"--to {target}: the folder {target.parent} does not exist.")
    need("matplotlib", "the report")
    recording = load_recording(args.run)
    if len(recording.steps) < 2:
        raise RecordingError(f"{args.run / FILE_NAME} has one record only: train at least one step.")
    analysis = Analysis(recording)
    printed = about_run(recording, analysis)
    content = [f"<p>{html.escape(line)}</p>" for line in printed]
    for title, section in SECTIONS.items():
        lines, figure = section(analysis)
        printed += ["", title, *lines]
        content += [f"<h2>{html.escape(title)}</h2>", *(f"<p>{html.escape(line)}</p>" for line in lines)]
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110)
        encoded = base64.b64encode(picture.getvalue()).decode()
        content += [f'<img alt="{html.escape(title)}" src="data:image/png;base64,{encoded}">']
    title = html.escape(f"{args.run.resolve().name} in output space")
    with folder_beside(target) as folder:
        text = _PAGE.format(title=title, content="\n".join(content))
        (folder / target.name).write_text(text, encoding="utf-8")
        (folder / target.name).replace(target)
    print(*printed, f"\nreport: {target}", sep="\n")


def about_run(recording: Recording, run: Analysis) -> list[str]:
    """What was recorded and how it is followed, in sentences."""
    (n, k), m = recording.series["outputs"][0].shape, len(recording.series["test_outputs"][0])
    adaptive = recording.preconditioner != NONE
    lines = [
        f"{len(run.steps)} records from step {run.steps[0]} to {run.steps[-1]}; {n} probe and {m} test "
        f"examples with {k} output{'s' if k > 1 else ''} each; optimizer {recording.optimizer}; kernel "
        + (f"K_P = J P Jᵀ, P of {recording.preconditioner}." if adaptive else "K = J Jᵀ."),
        "Every step was full-batch gradient descent on the probe, and is followed as it was."
        if recording.rule == GRADIENT_DESCENT
        else "Steps are followed by their limit of small steps on the probe: mini-batches, the delay of "
        "momentum, clipping, weight decay and what the training set holds beyond the probe are not.",
    ]
    if not run.stable:
        lines.append(
            "Some steps were larger than 2/μ for the fastest mode of the probe, where gradient descent on a "
            "frozen kernel overshoots: no prediction below holds."
        )
    return lines


def _dissipation(run: Analysis) -> Section:
    fall, explained = -run.measured.cumsum(0), -run.predicted.cumsum(0)
    figure, (left, right) = _panels()
    _plot(left, "Loss Φ", run.steps, {"probe": run.losses, "test": run.test_losses})
    _plot(right, "Fall of Φ since the start", run.steps[1:], {"measured": fall, "Σ gᵀWg": explained})
    return [
        f"The probe's loss went from {run.losses[0]:.4g} to {run.losses[-1]:.4g}, the test loss from "
        f"{run.test_losses[0]:.4g} to {run.test_losses[-1]:.4g}.",
        f"The sum of gᵀWg over the intervals is {explained[-1]:.4g}, the measured fall {fall[-1]:.4g}.",
    ], figure


def _channel(run: Analysis) -> Section:
    cut, (figure, (left, right)) = run.splits[-1], _panels()
    lines = [
        f"At the end the signal channel has {cut.channel} of {len(cut.vectors)} directions: the eigenvalues "
        f"of W above {cut.tolerance:.3g}, where the spectrum is cut (Otsu's threshold of the logarithms)."
    ]
    for i in sorted({round(x) for x in torch.linspace(1, len(run.steps) - 1, 5).tolist()}):
        values = run.splits[i].eigenvalues
        values = values[values > 0]
        left.plot(values, ".-", label=f"step {run.steps[i]}")
    left.axhline(cut.tolerance, color="gray", linestyle="--", linewidth=1)
    limits = max(1e-12 * float(values[0]), float(values[-1]) / 3), 4 * float(values[0])
    _plot(left, "Spectrum of W", [], {}, "eigenvalue number", yscale="log", ylim=limits)
    for name, share in run.reservoir.items():
        low = int(share[1:].argmin()) + 1
        lines.append(
            f"Of the {name}, {100 * share[-1]:.1f} % lies in the reservoir at the end (lowest: "
            f"{100 * share[low]:.1f} % at step {run.steps[low]}); this part moves the test outputs "
            f"{run.visible[name][-1]:.2g} times as far as the whole."
        )
    size = torch.tensor([1 - part.channel / len(part.vectors) for part in run.splits])
    shares = {**run.reservoir, "share of all directions": size}
    _plot(right, "Share in the reservoir", run.steps, shares, ylim=(-0.03, 1.03))
    return lines, figure


def _transfer(run: Analysis) -> Section:
    error, (figure, (left, right)) = run.transfer_error, _panels()
    left.axline((0, 0), slope=1, color="gray", linewidth=1)
    left.plot(run.displacement[-1], run.transfer[-1], ".", label="a test output")
    _plot(left, "Displacement at the end", [], {}, "real", ylabel="predicted")
    _plot(right, "Over training", run.steps[1:], {"‖predicted − real‖/‖real‖": error}, yscale="log")
    return [
        "Predicted by −𝒢 g of the first record, the displacement of the test outputs at the end is off by "
        f"{100 * error[-1]:.3g} % of its length; the largest error on the way is {100 * error.max():.3g} %."
    ], figure


def _rotation(run: Analysis) -> Section:
    figure, (left, right) = _panels()
    kept = {f"of {run.leading} eigenvectors, kept": run.alignment}
    _plot(left, "Leading eigenspace against the start", run.steps, kept, ylim=(-0.03, 1.03))
    _plot(right, "Change of the kernel", run.steps, {"‖K − K₀‖ / ‖K₀‖": run.kernel_change})
    return [
        f"The kernel changed by {run.kernel_change[-1]:.3g} times its own norm. Its {run.leading} leading "
        f"eigenvectors keep {100 * run.alignment[-1]:.0f} % of the space that they spanned at the start."
    ], figure


def _modes(run: Analysis) -> Section:
    error, (figure, axis) = run.error_by_mode, _panels(1)
    scaled = (error / error[0].max().clamp(min=1e-300)).clamp(min=1e-10).log10()
    modes = range(1, error.shape[1] + 1)
    image = axis.pcolormesh(run.steps.numpy(), modes, scaled.T.numpy(), cmap="magma", shading="nearest")
    axis.axhline(run.splits[-1].channel + 0.5, color="white", linestyle="--", linewidth=1)
    axis.invert_yaxis()
    axis.set(xlabel="optimizer step", ylabel="mode, by eigenvalue of W")
    axis.set_title("Squared error by mode, log₁₀; the channel is above the dashed line")
    figure.colorbar(image, ax=axis)
    return [
        "Each row is an eigenvector of the last W, the largest eigenvalue on top; the color is the squared "
        "output gradient along it."
    ], figure


SECTIONS = {
    "Where the loss went": _dissipation,
    "Signal channel and reservoir": _channel,
    "What reached the test examples": _transfer,
    "How the kernel turned": _rotation,
    "Error by mode": _modes,
}


def _panels(count: int = 2) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure  # without pyplot, which would keep it

    figure = Figure(figsize=(11.0, 3.8), layout="constrained")
    return figure, figure.subplots(1, count)


def _plot(
    axis: Axes, title: str, x: Any, curves: Mapping[str, Tensor], xlabel: str = "optimizer step", **axes: Any
) -> None:
    for style, (label, y) in zip("- -- : -.".split() * len(curves), curves.items(), strict=False):
        axis.plot(x, y, style, label=label)
    axis.set(title=title, xlabel=xlabel, **axes)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9)
