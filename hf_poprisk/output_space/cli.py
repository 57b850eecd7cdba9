"""The command line: ``python -m hf_poprisk.output_space RUN_DIR``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_poprisk.leave_one_out.common import AuditError, need, one_line
from hf_poprisk.output_space.analysis import analyse
from hf_poprisk.output_space.recording import FILE_NAME, RecordingError, load_recording
from hf_poprisk.output_space.report import page, sentences, write_page


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hf_poprisk.output_space",
        description="What a recorded run did in output space, as one HTML page with its figures inside.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help=f"an output folder with {FILE_NAME}")
    parser.add_argument(
        "--to", type=Path, metavar="FILE.html", help="where it goes (default: RUN_DIR/output_space.html)"
    )
    return parser


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


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        report(args)
    except (RecordingError, AuditError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except OSError as error:
        parser.exit(2, f"{parser.prog}: error: {one_line(error)}.\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted: nothing was left half-written.\n")
