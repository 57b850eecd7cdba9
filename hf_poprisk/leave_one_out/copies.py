"""Copies of the training data: filtered, weighted, or with the mislabeled pairs reversed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_poprisk.command import UserError, folder_beside
from hf_poprisk.leave_one_out.data import TRUTH
from hf_poprisk.leave_one_out.index import INDEX
from hf_poprisk.leave_one_out.run import Run
from hf_poprisk.leave_one_out.weights import ALL_CLEAN, sample_weights

if TYPE_CHECKING:
    from datasets import Dataset

WRITES = ("filtered", "weighted", "reflipped")


def row_weights(run: Run, data: Dataset, rows: np.ndarray) -> np.ndarray:
    """Probability that the label is correct of every row of the data, [len(data)] float32.

    It is 1 − the noise rate where the row was not judged.

    Args:
        rows: as ``find_rows`` gives them, [n].
    """
    weights = np.full(len(data), 1.0 - run.fit.rate, np.float32)
    weights[rows] = run.p_correct
    return weights


def check_write(run: Run, data: Dataset, rows: np.ndarray, kind: str, force: bool = False) -> None:
    """Refuse what ``write_data`` cannot do, or should not.

    Args:
        force: follow an estimate that means little, or by which all labels may be clean.

    Raises:
        UserError: an estimate that should not be followed, data without a column of
            the run, no pairs to flip, nothing left, or a column that is there already.
    """
    fit, forced = run.fit, "--force writes it all the same"
    weights, columns = row_weights(run, data, rows), set(data.column_names)
    sampled = {column for row in run.sample.values() for column in row}
    added = {"weighted": "label_weight", "reflipped": "reflipped"}.get(kind)
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
            sampled and not sampled & columns,
            f"needs data with a column of those that the run was trained on ({', '.join(sorted(sampled))}): "
            "nothing tells whether the labels of these are the same",
        ),
        # an empty data set cannot be loaded
        (kind == "filtered" and (weights < 0.5).all(), "would drop every row: use weighted"),
        (kind == "reflipped" and not pairs, "is for preference pairs, with columns chosen and rejected"),
        (
            kind == "reflipped" and "margin" in columns,
            "cannot turn the column margin round: remove it from the data",
        ),
        (added in columns, f"adds a column {added}, which the data have already"),
    ):
        if wrong:
            raise UserError(f"--write {kind} {sentence}.")


def write_data(run: Run, data: Dataset, rows: np.ndarray, kind: str, folder: Path) -> int:
    """Write a copy with ``save_to_disk``, after ``check_write``; the folder appears whole or not at all.

    ``filtered`` is without the rows whose label is more likely mislabeled than clean; ``weighted`` has what
    ``poprisk_label_noise=weight`` weights a row by, in a float32 column ``label_weight``; ``reflipped`` has
    those pairs reversed, scores included, and says so in a bool column ``reflipped`` (a bool ``is_flipped``
    goes on telling which pairs are the wrong way round, so it changes with them). All keep the rows'
    ``example_index``.

    Args:
        rows: as ``find_rows`` gives them, [n].
        kind: one of ``WRITES``.
        folder: empty, or not there yet.

    Returns:
        How many rows were dropped or reversed; for ``weighted``, how many are below .5.
    """
    target = Path(os.path.abspath(folder))
    weights = row_weights(run, data, rows)
    mislabeled = weights < 0.5
    if INDEX not in data.column_names:
        data = data.add_column(INDEX, np.arange(len(data)))
    with folder_beside(target) as temporary:
        if kind == "filtered":
            data = data.select(np.flatnonzero(~mislabeled))
        elif kind == "weighted":
            data = data.add_column("label_weight", sample_weights(weights, run.preferences))
        else:
            data = _reflipped(data, mislabeled, temporary / "swapped.arrow")
        data.save_to_disk(str(temporary / "data"))
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


def check_target(folder: Path, option: str = "--to") -> None:
    """Refuse to write where something is.

    Args:
        option: that names the folder.

    Raises:
        UserError: a file, or a folder that is not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{option} {folder} is a file: give a folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{option} {folder} is not empty: give another folder.")
