"""What a run found out about its labels: the noise rate, the most suspicious rows, corrected data.

RUN is the output folder, or a checkpoint, of a training with poprisk_label_noise. The data must be those that
it was trained on, with the same labels and in that order, or have the column example_index. If they have a
bool column is_flipped that tells which labels are mislabeled, the scores are compared with it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_poprisk.command import UserError
from hf_poprisk.leave_one_out.copies import WRITES, check_target, check_write, write_data
from hf_poprisk.leave_one_out.data import find_rows, known_flips, load_data
from hf_poprisk.leave_one_out.figure import plot
from hf_poprisk.leave_one_out.page import write_page
from hf_poprisk.leave_one_out.report import report
from hf_poprisk.leave_one_out.run import load_run


def add_command(commands: Any) -> None:
    """Add ``audit`` to the subparsers of ``hf-poprisk``."""
    parser = commands.add_parser(
        "audit", help="the labels that a run judged", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--dataset", metavar="NAME_OR_PATH", help="the training data, for the texts")
    parser.add_argument("--split", help="of the data set (default: train)")
    parser.add_argument("--config_name", metavar="C", help="configuration of the data set")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a histogram")
    parser.add_argument(
        "--page", type=Path, metavar="FILE.html", help="write a page to look through the suspicious rows"
    )
    parser.add_argument(
        "--write",
        choices=WRITES,
        help="write a copy of the data: without the rows whose label is correct with a probability below .5; "
        "with that probability as label_weight, for poprisk_weight_column; or with those pairs reversed",
    )
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="where --write writes, with save_to_disk")
    parser.add_argument(
        "--force",
        action="store_true",
        help="let --write follow an estimate that means little, or whose interval includes zero",
    )
    parser.set_defaults(execute=audit)


def audit(args: argparse.Namespace) -> None:
    """Carry out a command line; files are written before anything is printed.

    Raises:
        UserError: says in one sentence what is wrong; then nothing was written or printed.
    """
    _check_options(args)
    run, data, rows, flips, done = load_run(args.run), None, None, None, []
    if args.dataset is not None:
        data = load_data(args.dataset, args.split, args.config_name)
        rows = find_rows(data, run)
        flips = known_flips(data, rows)
        if len(data) > len(rows):
            done += [f"{len(data) - len(rows)} rows of the data are not in the run."]
    if args.write:
        check_write(run, data, rows, args.write, args.force)
    lines = report(run, data, rows, flips)
    if args.plot:
        plot(run, args.plot, flips)
        done += [f"figure: {args.plot}"]
    if args.page:
        write_page(args.page, run, data, rows)
        done += [f"page: {args.page}"]
    if args.write:
        count = write_data(run, data, rows, args.write, args.to)
        verb = {"filtered": "dropped", "weighted": "below .5", "reflipped": "reversed"}[args.write]
        done += [f"{args.write} data: {args.to} ({count} of {len(data)} rows {verb})"]
    print(*lines, *done, sep="\n")


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other or have no effect, before anything is read."""
    for wrong, sentence in (
        (args.to and not args.write, "--to has no effect without --write."),
        (args.write and not (args.to and args.dataset), "--write needs --dataset and --to FOLDER."),
        (args.force and not args.write, "--force has no effect without --write."),
        (args.split is not None and not args.dataset, "--split has no effect without --dataset."),
        (args.config_name is not None and not args.dataset, "--config_name has no effect without --dataset."),
        (args.plot and args.plot.suffix.lower() != ".png", f"--plot {args.plot} must end in .png."),
        (args.page and not args.dataset, "--page needs --dataset."),
        (args.page and args.page.suffix.lower() != ".html", f"--page {args.page} must end in .html."),
    ):
        if wrong:
            raise UserError(sentence)
    if args.to:
        if Path(args.dataset).resolve() in args.to.resolve().parents:
            raise UserError(f"--to {args.to} lies inside the data, {args.dataset}: give another folder.")
        check_target(args.to)
