"""What a run found out about its labels: the noise rate, the most suspicious rows, corrected data.

RUN is the output folder of ``hf-poprisk judge``, or that or a checkpoint of a training with
poprisk_label_noise. The data must be those that were judged, with the same labels and in that order, or have
the column example_index. If they have a bool column is_flipped that tells which labels are mislabeled, the
scores are compared with it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_poprisk.leave_one_out.data import TRUTH, find_rows, known_flips, load_data
from hf_poprisk.leave_one_out.index import INDEX
from hf_poprisk.leave_one_out.page import write_page
from hf_poprisk.leave_one_out.report import report
from hf_poprisk.leave_one_out.table import Run, load_run
from hf_poprisk.leave_one_out.weights import ALL_CLEAN, sample_weights
from hf_poprisk.user_errors import UserError, folder_beside

if TYPE_CHECKING:
    from datasets import Dataset

WRITES = ("filtered", "weighted", "reflipped")
_ADDED = {"weighted": "label_weight", "reflipped": "reflipped"}  # columns of the copies
_NOTHING = "nothing tells whether the rows and labels of these are the same"


def add_command(commands: Any) -> None:
    """Add ``audit`` to the subparsers of ``hf-poprisk``."""
    parser = commands.add_parser(
        "audit", help="the labels that a run judged", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--dataset", metavar="NAME_OR_PATH", help="the training data, for the texts")
    parser.add_argument("--split", help="of the data set (default: train)")
    parser.add_argument("--config_name", metavar="C", help="configuration of the data set")
    parser.add_argument(
        "--page", type=Path, metavar="FILE.html", help="write a page to look through the suspicious rows"
    )
    parser.add_argument(
        "--write",
        choices=WRITES,
        help="write a copy of the data: without the rows whose label is right with a probability below .5; "
        "with what a row counts by it as label_weight, for poprisk_weight_column; or with those pairs "
        "reversed",
    )
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help="where --write writes, a data set in Parquet"
    )
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
        if others := _unknown(run, data):
            done += [f"The data have no column of those that the run was trained on ({others}): {_NOTHING}."]
        if len(data) > len(rows):
            done += [f"{len(data) - len(rows)} rows of the data are not in the run."]
    if args.write:
        p_correct = np.full(len(data), 1.0 - run.fit.rate, np.float32)  # nothing else is known of other rows
        p_correct[rows] = run.p_correct
        _check_write(run, data, p_correct, args.write, args.force)
    lines = report(run, data, rows, flips)
    if args.page:
        write_page(args.page, run, data, rows)
        done += [f"page: {args.page}"]
    if args.write:
        count = _write(run, data, p_correct, args.write, args.to)
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
        (args.page and not args.dataset, "--page needs --dataset."),
        (args.page and args.page.suffix.lower() != ".html", f"--page {args.page} must end in .html."),
    ):
        if wrong:
            raise UserError(sentence)
    if args.to:
        check_target(args.to, "--to", args.dataset)


def check_target(folder: Path, option: str, data: str, but: str | None = None) -> None:
    """Refuse to write where something is, or into the data.

    Args:
        option: that names the folder.
        but: how the names of what may be there begin.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option} {folder} is a file: give a folder.")
    if folder.is_dir() and any(but is None or not path.name.startswith(but) for path in folder.iterdir()):
        raise UserError(f"{option} {folder} is not empty: give another folder.")
    if Path(data).resolve() in folder.resolve().parents:
        raise UserError(f"{option} {folder} lies inside the data, {data}: give another folder.")


def _check_write(run: Run, data: Dataset, p_correct: np.ndarray, kind: str, force: bool) -> None:
    """Refuse what ``_write`` cannot do, or should not."""
    fit, forced, columns = run.fit, "--force writes it all the same", set(data.column_names)
    pairs = run.preferences and {"chosen", "rejected"} <= columns
    for wrong, sentence in (
        (
            run.doubt is not None and not force,
            f"would follow an estimate that means little: {run.doubt}; {forced}",
        ),
        (
            fit.low < ALL_CLEAN and not force,
            f"would follow an interval that includes zero ({fit.low:.1%} to {fit.high:.1%}): there may be no "
            f"mislabeled label at all; {forced}",
        ),
        (
            others := _unknown(run, data),
            f"needs data with a column of those that the run was trained on ({others}): {_NOTHING}",
        ),
        # an empty data set cannot be loaded
        (kind == "filtered" and (p_correct < 0.5).all(), "would drop every row: use weighted"),
        (kind == "reflipped" and not pairs, "is for preference pairs, with columns chosen and rejected"),
        (
            kind == "reflipped" and "margin" in columns,
            "cannot turn the column margin round: remove it from the data",
        ),
        (_ADDED.get(kind) in columns, f"adds a column {_ADDED.get(kind)}, which the data have already"),
    ):
        if wrong:
            raise UserError(f"--write {kind} {sentence}.")


def _unknown(run: Run, data: Dataset) -> str:
    """The columns that the run was trained on, if the data have none of them to know the rows by."""
    sampled = {column for row in run.sample.values() for column in row}
    return "" if sampled & set(data.column_names) else ", ".join(sorted(sampled))


def _write(run: Run, data: Dataset, p_correct: np.ndarray, kind: str, folder: Path) -> int:
    """Write a copy that ``load_dataset(folder)`` reads; the folder appears whole or not at all.

    ``filtered`` is without the rows whose label is more likely mislabeled than clean; ``weighted`` has what
    ``poprisk_label_noise=weight`` weights a row by, in a float32 column ``label_weight``; ``reflipped`` has
    those pairs reversed, scores included, and says so in a bool column ``reflipped`` (a bool ``is_flipped``
    goes on telling which pairs are the wrong way round, so it changes with them). All keep the rows'
    ``example_index``.

    Returns:
        How many rows are below .5.
    """
    target, mislabeled = Path(os.path.abspath(folder)), p_correct < 0.5
    if INDEX not in data.column_names:
        data = data.add_column(INDEX, np.arange(len(data)))
    with folder_beside(target) as temporary:
        if kind == "filtered":
            data = data.select(np.flatnonzero(~mislabeled))
        elif kind == "weighted":
            data = data.add_column(_ADDED[kind], sample_weights(p_correct, run.preferences))
        else:
            data = _reflipped(data, mislabeled, temporary / "swapped.arrow")
        (temporary / "data").mkdir()
        data.to_parquet(temporary / "data" / "train.parquet")
        (temporary / "data").replace(target)
    return int(mislabeled.sum())


def _reflipped(data: Dataset, mislabeled: np.ndarray, cache: Path) -> Dataset:
    from datasets import Features, Value

    names = set(data.column_names)  # chosen, score_chosen, chosen_rating, …
    pairs = [
        (name, other) for name in names if (other := name.replace("chosen", "rejected")) in names - {name}
    ]
    known = TRUTH in data.column_names and getattr(data.features[TRUTH], "dtype", "") == "bool"

    def swap(row: dict[str, Any], index: int) -> dict[str, Any]:
        swapped: dict[str, Any] = {"reflipped": bool(mislabeled[index])}
        if mislabeled[index]:
            for one, other in pairs:
                swapped |= {one: row[other], other: row[one]}
            if known and row[TRUTH] is not None:
                swapped[TRUTH] = not row[TRUTH]
        return swapped

    return data.map(
        swap,
        with_indices=True,
        features=Features({**data.features, "reflipped": Value("bool")}),
        # the cache would lie beside the data, in somebody's folder
        cache_file_name=str(cache),
        load_from_cache_file=False,
        desc="Reversing pairs",
    )
