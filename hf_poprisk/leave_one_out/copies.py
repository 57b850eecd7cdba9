"""Corrected copies of the training data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_poprisk.leave_one_out import INDEX
from hf_poprisk.leave_one_out.common import TRUTH, AuditError, beside
from hf_poprisk.leave_one_out.run import Run
from hf_poprisk.leave_one_out.weights import doubt

if TYPE_CHECKING:
    from datasets import Dataset

WRITES = ("filtered", "weighted", "reflipped")


def row_weights(run: Run, data: Dataset, rows: np.ndarray) -> np.ndarray:
    """Posterior that the label is right of every row of the data, [len(data)] float64.

    It is 1 − ε where the row was not trained on, as in ``Run.posterior``.

    Args:
        rows: as ``find_rows`` gives them, [n].

    Raises:
        AuditError: the run has no estimate of the noise rate.
    """
    posterior, fit = run.posterior(), run.judged_by
    assert fit is not None
    weights = np.full(len(data), 1.0 - fit.rate)
    weights[rows] = posterior
    return weights


def check_write(run: Run, data: Dataset, rows: np.ndarray, kind: str) -> None:
    """Refuse what ``write_data`` cannot do.

    Raises:
        AuditError: no estimate of the noise rate or one that means nothing, data without a column of the run,
            no pairs to flip, nothing left, or a column that is there already.
    """
    why = doubt(run.fits, run.preferences, run.judging_since) if run.fits else None
    if why is not None:
        raise AuditError(f"--write {kind} would follow an estimate that means little: {why}.")
    sampled = {column for columns in run.sample.values() for column in columns}
    if sampled and not sampled & set(data.column_names):
        raise AuditError(
            f"--write {kind} needs data with a column of those that the run was trained on "
            f"({', '.join(sorted(sampled))}): nothing tells whether the labels of these are the same."
        )
    if (row_weights(run, data, rows) < 0.5).all() and kind == "filtered":
        raise AuditError("--write filtered would drop every row: use weighted.")  # cannot be loaded
    if kind == "reflipped" and not run.preferences:
        raise AuditError("--write reflipped is for preference pairs: use filtered or weighted.")
    if kind == "reflipped" and not {"chosen", "rejected"} <= set(data.column_names):
        raise AuditError("--write reflipped needs the columns chosen and rejected, which the data lack.")
    if kind == "reflipped" and "margin" in data.column_names:
        raise AuditError("--write reflipped cannot turn the column margin round: remove it from the data.")
    added = {"weighted": "label_weight", "reflipped": "reflipped"}.get(kind)
    if added in data.column_names:
        raise AuditError(f"--write {kind} adds a column {added}, which the data have already.")


def write_data(run: Run, data: Dataset, rows: np.ndarray, kind: str, folder: str | Path) -> int:
    """Write a corrected copy with ``save_to_disk``; the folder appears whole or not at all.

    ``filtered`` is without the rows whose posterior of being right is below 1/2, and keeps positions in the
    column ``example_index``, by which a second run can be compared with the first; ``weighted`` has it in a
    float32 column ``label_weight``, ``reflipped`` has those pairs swapped, scores included, and says so in a
    bool column ``reflipped``; a bool column ``is_flipped`` goes on telling which pairs are the wrong way
    round, so it changes with them.

    Args:
        rows: as ``find_rows`` gives them, [n].
        kind: one of ``WRITES``.
        folder: empty, or not there yet.

    Returns:
        How many rows were dropped or swapped; for ``weighted``, how many weigh less than 1/2.

    Raises:
        AuditError: as ``check_write``, or a folder with something in it.
    """
    check_write(run, data, rows, kind)
    check_target(Path(folder))
    target = Path(os.path.abspath(folder))
    weights = row_weights(run, data, rows)
    wrong = weights < 0.5
    target.parent.mkdir(parents=True, exist_ok=True)
    with beside(target) as temporary:
        if kind == "filtered":
            if INDEX not in data.column_names:
                data = data.add_column(INDEX, np.arange(len(data)))
            data = data.select(np.flatnonzero(~wrong))
        elif kind == "weighted":
            data = data.add_column("label_weight", weights.astype(np.float32))
        else:
            data = _reflipped(data, wrong, temporary / "swapped.arrow")
        data.save_to_disk(str(temporary / "data"))
        (temporary / "data").replace(target)
    return int(wrong.sum())


def _reflipped(data: Dataset, wrong: np.ndarray, cache: Path) -> Dataset:
    from datasets import Features, Value

    names = set(data.column_names)  # chosen, score_chosen, chosen_rating, …
    pairs = [
        (name, other) for name in names if (other := name.replace("chosen", "rejected")) in names - {name}
    ]
    known = TRUTH in data.column_names and getattr(data.features[TRUTH], "dtype", "") == "bool"

    def swap(row: dict[str, Any], index: int) -> dict[str, Any]:
        swapped = {"reflipped": bool(wrong[index])}
        if wrong[index]:
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
        desc="Swapping pairs",
    )


def check_target(folder: Path) -> None:
    """Refuse to write where something is.

    Raises:
        AuditError: a file, or a folder that is not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise AuditError(f"--to {folder} is a file: give a folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise AuditError(f"--to {folder} is not empty: give another folder.")
