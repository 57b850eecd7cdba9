"""A few hashed training rows, by which an audit knows the data that a run was trained on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from hf_poprisk.leave_one_out.table import INDEX

SIZE = 64
Sample = dict[str, dict[str, str]]  # example_index → column → hash of the value


def hashed(value: Any) -> str | None:
    """Of plain values; None of others, such as images, which are not the same object twice."""
    try:
        text = json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        return None
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def take_sample(dataset: Any, ids: np.ndarray | None) -> Sample:
    """Rows spread evenly over a data set of the datasets package, the same ones in any order; of others none.

    Args:
        ids: ``example_index`` of the rows, [n].
    """
    if ids is None or not hasattr(dataset, "with_format") or not len(dataset):
        return {}
    rows = np.argsort(ids)[np.unique(np.linspace(0, len(dataset) - 1, SIZE).round().astype(int))].tolist()
    plain = dataset.with_format(None)
    sample = {}
    for row in rows:
        values = {name: hashed(value) for name, value in plain[row].items() if name != INDEX}
        sample[str(int(ids[row]))] = {name: value for name, value in values.items() if value is not None}
    return sample


def first_difference(sample: Sample, dataset: Any, row_of: dict[int, int]) -> tuple[int, str] | None:
    """The first example_index and column whose value is another one; None if all of them agree.

    Columns that only one side has are passed over.

    Args:
        dataset: of the datasets package.
        row_of: example_index → row of the data set.
    """
    plain = dataset.with_format(None)
    for index, columns in sample.items():
        values = plain[row_of[int(index)]]
        for name, value in columns.items():
            if name in values and hashed(values[name]) != value:
                return int(index), name
    return None


def other_row(sample: Sample, other: Sample) -> tuple[int, str] | None:
    """The first example_index and column that two samples have with another value; None if all agree."""
    for index, columns in sample.items():
        for name, value in other.get(index, {}).items():
            if columns.get(name, value) != value:
                return int(index), name
    return None
