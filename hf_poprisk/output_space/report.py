"""``hf-poprisk output-space RUN_DIR``: one self-contained HTML page about a recorded run."""

from __future__ import annotations

import argparse
import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_poprisk.output_space.analysis import Analysis
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

_REAL, _PREDICTED, _GRAY = "#2f5d9b", "#d9773c", "#777777"
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


def report(args: argparse.Namespace) -> Path:
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
        content += [f'<img alt="{html.escape(title)}" src="data:image/png;base64,{_png(figure)}">']
    title = html.escape(f"{args.run.resolve().name} in output space")
    with folder_beside(target) as folder:
        text = _PAGE.format(title=title, content="\n".join(content))
        (folder / target.name).write_text(text, encoding="utf-8")
        (folder / target.name).replace(target)
    print(*printed, f"\nreport: {target}", sep="\n")
    return target


def about_run(recording: Recording, analysis: Analysis) -> list[str]:
    """What was recorded and how it is followed, in sentences."""
    n, k = recording.series["outputs"][0].shape
    plain = recording.preconditioner == "none"
    lines = [
        f"{len(recording.steps)} records from step {recording.steps[0]} to {recording.steps[-1]}; {n} probe "
        f"and {len(recording.series['test_outputs'][0])} test examples with {k} output{'s' if k > 1 else ''} "
        f"each; optimizer {recording.optimizer}; kernel "
        + ("K = J Jᵀ." if plain else f"K_P = J P Jᵀ, P of {recording.preconditioner}."),
        "Every step was full-batch gradient descent on the probe, and is followed as it was."
        if recording.rule == GRADIENT_DESCENT
        else "Steps are followed by their limit of small steps on the probe: mini-batches, the delay of "
        "momentum, clipping, weight decay and what the training set holds beyond the probe are not.",
    ]
    if not analysis.stable:
        lines.append(
            "Some steps were larger than 2/μ for the fastest mode of the probe, where gradient descent on a "
            "frozen kernel overshoots: no prediction below holds."
        )
    return lines


def _dissipation(run: Analysis) -> tuple[list[str], Figure]:
    fall, explained = -run.measured.cumsum(0), -run.predicted.cumsum(0)
    lines = [
        f"The probe's loss went from {run.losses[0]:.4g} to {run.losses[-1]:.4g}, the test loss from "
        f"{run.test_losses[0]:.4g} to {run.test_losses[-1]:.4g}.",
        f"The sum of gᵀWg over the intervals is {explained[-1]:.4g}, the measured fall {fall[-1]:.4g}.",
    ]
    figure, (left, right) = _panels()
    left.plot(run.steps, run.losses, color=_REAL, label="probe")
    left.plot(run.steps, run.test_losses, color=_PREDICTED, label="test")
    _finish(left, xlabel="optimizer step", ylabel="loss Φ", title="Loss")
    right.plot(run.steps[1:], fall, color=_REAL, label="measured")
    right.plot(run.steps[1:], explained, "--", color=_PREDICTED, label="Σ gᵀWg")
    _finish(right, xlabel="optimizer step", ylabel="fall of Φ since the start", title="Dissipation")
    return lines, figure


def _channel(run: Analysis) -> tuple[list[str], Figure]:
    from matplotlib import colormaps

    cut = run.splits[-1]
    lines = [
        f"At the end the signal channel has {cut.channel} of {len(cut.vectors)} directions: the eigenvalues "
        f"of W above {cut.tolerance:.3g}, where the spectrum is cut (Otsu's threshold of the logarithms)."
    ]
    figure, (left, right) = _panels()
    picked = sorted({round(x) for x in torch.linspace(1, len(run.steps) - 1, 5).tolist()})
    for i in picked:
        values = run.splits[i].eigenvalues
        values = values[values > 0]
        color = colormaps["viridis"](0.9 * i / picked[-1])
        left.plot(range(1, len(values) + 1), values, ".-", color=color, label=f"step {run.steps[i]}")
    left.axhline(cut.tolerance, color=_GRAY, linestyle="--", linewidth=1, label="last cut")
    top = float(values[0])
    limits = max(1e-12 * top, float(values.min()) / 3), 4 * top
    axes = {"yscale": "log", "xlabel": "eigenvalue number", "ylabel": "eigenvalue of W", "ylim": limits}
    _finish(left, **axes, title="Spectrum of W")
    for name, share in run.reservoir.items():
        low = int(share[1:].argmin()) + 1
        lines.append(
            f"Of the {name}, {100 * share[-1]:.1f} % lies in the reservoir at the end (lowest: "
            f"{100 * share[low]:.1f} % at step {run.steps[low]}); this part moves the test outputs "
            f"{run.visible[name][-1]:.2g} times as far as the whole."
        )
        right.plot(run.steps, share, label=name)
    size = [1 - part.channel / len(part.vectors) for part in run.splits]
    right.plot(run.steps, size, ":", color=_GRAY, label="share of all directions")
    axes = {"xlabel": "optimizer step", "ylabel": "share in the reservoir", "ylim": (-0.03, 1.03)}
    _finish(right, **axes, title="What lies in the reservoir")
    return lines, figure


def _transfer(run: Analysis) -> tuple[list[str], Figure]:
    error, real, predicted = run.transfer_error, run.displacement[-1], run.transfer[-1]
    lines = [
        "Predicted by −𝒢 g of the first record, the displacement of the test outputs at the end is off by "
        f"{100 * error[-1]:.3g} % of its length; the largest error on the way is {100 * error.max():.3g} %."
    ]
    figure, (left, right) = _panels()
    left.axline((0, 0), slope=1, color=_GRAY, linewidth=1)
    left.plot(real, predicted, ".", color=_REAL, label="a test output")
    _finish(left, xlabel="real displacement", ylabel="predicted displacement", title="At the end")
    right.axhline(0.05, color=_GRAY, linestyle=":", label="5 %")
    right.plot(run.steps[1:], error, color=_REAL, label="‖predicted − real‖/‖real‖")
    _finish(right, xlabel="optimizer step", ylabel="relative error", yscale="log", title="Over training")
    return lines, figure


def _rotation(run: Analysis) -> tuple[list[str], Figure]:
    lines = [
        f"The kernel changed by {run.kernel_change[-1]:.3g} times its own norm. Its {run.leading} leading "
        f"eigenvectors keep {100 * run.alignment[-1]:.0f} % of the space that they spanned at the start."
    ]
    figure, (left, right) = _panels()
    left.plot(run.steps, run.alignment, color=_REAL, label=f"of {run.leading} eigenvectors, kept")
    _finish(left, xlabel="optimizer step", ylim=(-0.03, 1.03), title="Leading eigenspace against the start")
    right.plot(run.steps, run.kernel_change, color=_REAL, label="‖K − K₀‖ / ‖K₀‖")
    _finish(right, xlabel="optimizer step", title="Change of the kernel")
    return lines, figure


def _modes(run: Analysis) -> tuple[list[str], Figure]:
    lines = [
        "Each row is an eigenvector of the last W, the largest eigenvalue on top; the color is the squared "
        "output gradient along it."
    ]
    error = run.error_by_mode
    scaled = (error / error[0].max().clamp(min=1e-300)).clamp(min=1e-10).log10()
    figure, axis = _panels(1)
    image = axis.pcolormesh(
        run.steps.numpy(), range(1, error.shape[1] + 1), scaled.T.numpy(), cmap="magma", shading="nearest"
    )
    axis.axhline(run.splits[-1].channel + 0.5, color="white", linestyle="--", linewidth=1)
    axis.invert_yaxis()
    axis.set(xlabel="optimizer step", ylabel="mode, by eigenvalue of W")
    axis.set_title("Squared error by mode, log₁₀; the channel is above the dashed line")
    figure.colorbar(image, ax=axis)
    return lines, figure


SECTIONS = {  # title → sentences and figure
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


def _finish(axis: Axes, **settings: Any) -> None:
    axis.set(**settings)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9)


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()
