"""``hf-poprisk output-space RUN_DIR``: one self-contained HTML page about a recorded run."""

from __future__ import annotations

import argparse
import base64
import html
import io
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_poprisk.command import folder_beside, need
from hf_poprisk.output_space.analysis import Analysis, analyse
from hf_poprisk.output_space.plots import FIGURES
from hf_poprisk.output_space.recording import (
    FILE_NAME,
    GRADIENT_DESCENT,
    Recording,
    RecordingError,
    load_recording,
)

_STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif }
img { width: 100% } h2 { margin-top: 2.5rem } p, li { max-width: 48rem }
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
    analysis = analyse(recording)
    text = page(recording, analysis, f"{args.run.resolve().name} in output space")
    with folder_beside(target) as folder:
        (folder / target.name).write_text(text, encoding="utf-8")
        (folder / target.name).replace(target)
    for name, lines in sentences(recording, analysis).items():
        print(*([f"\n{name}"] if name else []), *lines, sep="\n")
    print(f"\nreport: {target}")
    return target


def sentences(recording: Recording, analysis: Analysis) -> dict[str, list[str]]:
    """Title of a figure → what its numbers say; ``""`` is about the run."""
    n, k = recording.series["outputs"][0].shape
    m, records = len(recording.series["test_outputs"][0]), len(analysis.steps)
    begin, end = analysis.steps[0].item(), analysis.steps[-1].item()
    cut, error = analysis.splits[-1], analysis.transfer_error
    loss, test_loss = analysis.losses.tolist(), analysis.test_losses.tolist()
    fall, explained = -analysis.measured.sum().item(), -analysis.predicted.sum().item()
    plain = recording.preconditioner == "none"
    kernel = "K = J Jᵀ" if plain else f"K_P = J P Jᵀ, P of {recording.preconditioner}"
    about = [
        f"{records} records from step {begin} to {end}; {n} probe and {m} test examples with {k} "
        f"output{'s' if k > 1 else ''} each; optimizer {recording.optimizer}; kernel {kernel}.",
        "Every step was full-batch gradient descent on the probe, and is followed as it was."
        if recording.rule == GRADIENT_DESCENT
        else "Steps are followed by their limit of small steps on the probe: mini-batches, the delay of "
        "momentum, clipping, weight decay and what the training set holds beyond the probe are not.",
    ]
    if not analysis.stable:
        about.append(
            "Some steps were larger than 2/μ for the fastest mode of the probe, where gradient descent on a "
            "frozen kernel overshoots: no prediction below holds."
        )
    return {
        "": about,
        "Where the loss went": [
            f"The probe's loss went from {loss[0]:.4g} to {loss[-1]:.4g}, the test loss from "
            f"{test_loss[0]:.4g} to {test_loss[-1]:.4g}.",
            f"The sum of gᵀWg over the intervals is {explained:.4g}, the measured fall {fall:.4g}.",
        ],
        "Signal channel and reservoir": [
            f"At the end the signal channel has {cut.channel} of {len(cut.vectors)} directions: the "
            f"eigenvalues of W above {cut.tolerance:.3g}, where the spectrum is cut (Otsu's threshold of the "
            "logarithms).",
            *(_in_reservoir(name, share, analysis) for name, share in analysis.reservoir.items()),
        ],
        "What reached the test examples": [
            "Predicted by −𝒢 g of the first record, the displacement of the test outputs at the end is off "
            f"by {100 * error[-1].item():.3g} % of its length; the largest error on the way is "
            f"{100 * error.max().item():.3g} %."
        ],
        "How the kernel turned": [
            f"The kernel changed by {analysis.kernel_change[-1].item():.3g} times its own norm. Its "
            f"{analysis.alignment.shape[1]} leading eigenvectors keep "
            f"{100 * analysis.alignment[-1, -1].item():.0f} % of the space that they spanned at the start."
        ],
        "Error by mode": [
            "Each row is an eigenvector of the last W, the largest eigenvalue on top; the color is the "
            "squared output gradient along it."
        ],
    }


def _in_reservoir(name: str, share: Tensor, analysis: Analysis) -> str:
    low = int(share[1:].argmin()) + 1
    return (
        f"Of the {name}, {100 * share[-1].item():.1f} % lies in the reservoir at the end (lowest: "
        f"{100 * share[low].item():.1f} % at step {analysis.steps[low].item()}); this part moves the test "
        f"outputs {analysis.visible[name][-1].item():.2g} times as far as the whole."
    )


def page(recording: Recording, analysis: Analysis, title: str) -> str:
    """The HTML, with its figures inside."""
    parts, title = [], html.escape(title)
    for name, lines in sentences(recording, analysis).items():
        parts += [f"<h2>{html.escape(name)}</h2>"] if name else []
        parts += [f"<p>{html.escape(line)}</p>" for line in lines]
        if name:
            buffer = io.BytesIO()
            FIGURES[name](analysis).savefig(buffer, format="png", dpi=110)
            data = base64.b64encode(buffer.getvalue()).decode()
            parts.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">')
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style>\n<h1>{title}</h1>\n" + "\n".join(parts) + "\n<p>Definitions: E. Litman and "
        "G. Guo, A Theory of Generalization in Deep Learning, arXiv:2605.01172.</p></html>\n"
    )
