"""The command line: ``hf-poprisk output-space RUN_DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_poprisk.command import need
from hf_poprisk.output_space.analysis import analyse
from hf_poprisk.output_space.recording import FILE_NAME, RecordingError, load_recording
from hf_poprisk.output_space.report import page, sentences, write_page


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
    write_page(target, page(recording, analysis, f"{args.run.resolve().name} in output space"))
    for name, lines in sentences(recording, analysis).items():
        print(*([f"\n{name}"] if name else []), *lines, sep="\n")
    print(f"\nreport: {target}")
    return target
