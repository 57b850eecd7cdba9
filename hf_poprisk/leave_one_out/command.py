"""What a run found out about its labels: the noise rate, the most contradicted examples, corrected data.

    python -m hf_poprisk.audit OUTPUT_DIR --dataset NAME_OR_FOLDER --top 50 --plot labels.png
    python -m hf_poprisk.audit OUTPUT_DIR --dataset NAME_OR_FOLDER --write filtered --to FOLDER

OUTPUT_DIR is the output folder, or a checkpoint, of a training run with ``poprisk_label_noise``. The data
must be those that it was trained on, with the same labels and in that order, or have the column
``example_index``. If they have a bool column ``is_flipped`` that tells which labels are wrong, the scores are
compared with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_poprisk.leave_one_out import TABLE_NAME
from hf_poprisk.leave_one_out.common import AuditError, need, one_line
from hf_poprisk.leave_one_out.copies import WRITES, check_target, check_write, write_data
from hf_poprisk.leave_one_out.data import check_labels, check_rows, find_rows, known_flips, load_data
from hf_poprisk.leave_one_out.figure import plot
from hf_poprisk.leave_one_out.report import report
from hf_poprisk.leave_one_out.run import load_run
from hf_poprisk.leave_one_out.weights import FITS_NAME

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 110


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hf_poprisk.audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="OUTPUT_DIR", help=f"holds {TABLE_NAME} and {FITS_NAME}")
    parser.add_argument(
        "--dataset",
        metavar="NAME_OR_FOLDER",
        help="the training data: a name on the Hub, a folder of data files, or one from save_to_disk",
    )
    parser.add_argument("--split", help="of the data set (default: train)")
    parser.add_argument("--config_name", metavar="C", help="configuration of the data set")
    parser.add_argument(
        "--top", type=int, default=20, metavar="N", help="show the N most contradicted examples (default: 20)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw held-out log-odds and the noise rate"
    )
    parser.add_argument(
        "--write",
        choices=WRITES,
        help="write a copy of the data: without the rows whose posterior of being right is below 0.5; with "
        "the posterior as label_weight; or with those pairs swapped",
    )
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where --write writes, with save_to_disk")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other or have no effect, before anything is read.

    Raises:
        AuditError: says which.
    """
    for wrong, sentence in (
        (args.top < 0, "--top must be 0 or more."),
        (args.to and not args.write, "--to has no effect without --write."),
        (args.write and not args.to, "--write needs --to FOLDER."),
        (args.write and not args.dataset, "--write needs --dataset, which it makes a copy of."),
        (args.split is not None and not args.dataset, "--split has no effect without --dataset."),
        (args.config_name is not None and not args.dataset, "--config_name has no effect without --dataset."),
        (args.dataset == "", "--dataset is empty: give a name on the Hub or a folder."),
        (args.plot and args.plot.suffix.lower() != ".png", f"--plot {args.plot} must end in .png."),
        (args.plot and args.plot.is_dir(), f"--plot {args.plot} is a folder."),
    ):
        if wrong:
            raise AuditError(sentence)
    for option, target in (("--plot", args.plot), ("--to", args.to)):
        for parent in target.absolute().parents if target else ():
            if parent.is_file():
                raise AuditError(f"{option} {target} goes through a file, {parent}.")
    if args.to and Path(args.dataset).resolve() in args.to.resolve().parents:
        raise AuditError(f"--to {args.to} lies inside the data, {args.dataset}: give another folder.")
    if args.to:
        check_target(args.to)
    need("rich", "the report")
    if args.plot:
        need("matplotlib", "--plot")


def audit(args: argparse.Namespace, console: Console | None = None) -> None:
    """Carry out a command line; files are written before anything is printed.

    Raises:
        AuditError: says in one sentence what is wrong; then nothing was written or printed.
    """
    check_options(args)
    from rich.console import Console
    from rich.text import Text

    run, data, rows, flips, done = load_run(args.run), None, None, None, []
    if args.dataset is not None:
        data = load_data(args.dataset, args.split, args.config_name)
        rows = find_rows(data, run)
        check_labels(data, run)
        check_rows(data, rows, run)
        flips = known_flips(data, rows)
        if len(data) > len(rows):
            done += [f"{len(data) - len(rows)} rows of the data are not in the run."]
    if args.write:
        check_write(run, data, rows, args.write)
    contents = report(run, data, rows, args.top)
    if args.plot:
        plot(run, args.plot, flips)
        done += [f"figure: {args.plot}"]
    if args.write:
        count = write_data(run, data, rows, args.write, args.to)
        verb = {"filtered": "dropped", "weighted": "below 0.5", "reflipped": "swapped"}[args.write]
        done += [f"{args.write} data: {args.to} ({count} of {len(data)} rows {verb})"]
    console = console or Console(width=_WIDTH, highlight=False)
    for content in contents:
        console.print(content, soft_wrap=isinstance(content, Text))
    for line in done:
        console.print(line, markup=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        audit(args)
    except AuditError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except OSError as error:
        parser.exit(2, f"{parser.prog}: error: {one_line(error)}.\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted: nothing was left half-written.\n")
