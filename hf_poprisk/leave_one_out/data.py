"""The training data: found, and its examples as text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_poprisk.leave_one_out import INDEX
from hf_poprisk.leave_one_out.common import TEXT_LENGTH, TRUTH, AuditError, need, one_line, shorten
from hf_poprisk.leave_one_out.index import first_difference
from hf_poprisk.leave_one_out.run import Run
from hf_poprisk.record import CONFIG_NAME, load_record

if TYPE_CHECKING:
    from datasets import Dataset


def load_data(name: str, split: str | None = None, config: str | None = None) -> Dataset:
    """A split by the data set's Hub name, or from a folder: of data files, or written by ``save_to_disk``.

    Args:
        name: of the data set, or its folder.
        split: ``train`` if None; slices such as ``train[:512]`` work but for ``save_to_disk``.
        config: configuration of a data set on the Hub or of a folder with several.

    Returns:
        All of its columns, whatever format they were saved with.

    Raises:
        AuditError: it is not there or cannot be read, or has no such split.
    """
    need("datasets", "--dataset")
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    folder = Path(name).expanduser()
    # such a path, which the Hub client would take for a repository, is a folder mistyped
    looks_local = folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not folder.is_dir():
        raise AuditError(f"--dataset {name} is not a folder.")
    saved = any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))
    if saved and config is not None:
        raise AuditError(f"--config_name has no effect, because {name} was written by save_to_disk.")
    try:
        if not saved:
            path = str(folder) if folder.is_dir() else name
            data = load_dataset(path, config, split=split or "train")
        else:
            data = load_from_disk(str(folder))
    except Exception as error:  # the loaders raise whatever their file systems and parsers do
        where = "" if folder.exists() else "is no folder here, and "
        raise AuditError(f"--dataset {name} {where}cannot be read ({one_line(error)}).") from error
    if isinstance(data, DatasetDict):
        if (split or "train") not in data:
            raise AuditError(f"{name} has no split {split or 'train'}: it has {', '.join(data)}.")
        return data[split or "train"].with_format(None)
    if saved and split is not None:
        raise AuditError(f"--split has no effect, because {name} is a single data set without splits.")
    if not isinstance(data, Dataset):
        raise AuditError(f"--dataset {name} is not a table of examples.")
    return data.with_format(None)


def find_rows(data: Dataset, run: Run) -> np.ndarray:
    """The position in the data of every example of the run, [n] int64.

    Raises:
        AuditError: an example is not in the data, or the data are recognisably others.
    """
    if not len(data):
        raise AuditError("the data are empty: give what was trained on.")
    if INDEX not in data.column_names:
        # without the column the table has a row for each position
        if run.ids.min() < 0 or run.ids.max() >= len(data):
            outside = run.ids[(run.ids < 0) | (run.ids >= len(data))][0]
            raise AuditError(
                f"{INDEX} {outside} is not in the data ({len(data)} rows): give what was trained on."
            )
        if len(data) != len(run.ids):
            raise AuditError(
                f"the data have {len(data)} rows and the run {len(run.ids)} examples, so positions do not "
                f"tell which is which: give what was trained on, or data with a column {INDEX}."
            )
        return run.ids
    ids = np.asarray(data[INDEX])
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim != 1:
        raise AuditError(f"the column {INDEX} of the data must hold integers.")
    if len(np.unique(ids)) != len(ids):
        raise AuditError(f"the column {INDEX} of the data must be unique.")
    order = np.argsort(ids)
    rows = order[np.searchsorted(ids, run.ids, sorter=order).clip(max=len(ids) - 1)]
    missing = run.ids[ids[rows] != run.ids]
    if len(missing):
        raise AuditError(f"{INDEX} {missing[0]} is not in the data: give what was trained on.")
    return rows


def check_rows(data: Dataset, rows: np.ndarray, run: Run) -> None:
    """Refuse data whose rows are not those that the run was trained on, in that order.

    Args:
        rows: as ``find_rows`` gives them, [n].

    Raises:
        AuditError: names the first row and the column that differ.
    """
    row_of = dict(zip(run.ids.tolist(), rows.tolist(), strict=True))
    known = {index: columns for index, columns in run.sample.items() if int(index) in row_of}
    different = first_difference(known, data, row_of)
    if different is not None:
        index, column = different
        raise AuditError(
            f"the data are not those of the run: {column!r} of the row with {INDEX} {index} was another "
            "one in training; give the data with the same labels, in the same order."
        )


def check_labels(data: Dataset, run: Run) -> None:
    """Refuse data with the labels from before they were altered.

    Raises:
        AuditError: the run's record tells of altered labels, and the data of none.
    """
    if not (run.folder / CONFIG_NAME).is_file() or TRUTH in data.column_names:
        return
    try:
        altered = load_record(run.folder).config["data"]["altered_labels"]
    except ValueError:
        return  # of another version, or damaged: the record is not what is asked for
    if altered:
        raise AuditError(
            f"{altered} labels of the run had been altered on purpose, and the data have no column {TRUTH}: "
            "give what was trained on; the recipes leave it in the folder _training_data of their output."
        )


def known_flips(data: Dataset, rows: np.ndarray) -> np.ndarray | None:
    """The column ``is_flipped`` of some rows, [n] bool; None if there is no bool column of that name.

    Raises:
        AuditError: values are missing.
    """
    if TRUTH not in data.column_names or getattr(data.features[TRUTH], "dtype", "") != "bool":
        return None
    flips = list(data[TRUTH])
    if None in flips:
        raise AuditError(f"the column {TRUTH} of the data has missing values.")
    return np.array(flips, dtype=bool)[rows]


def example_text(example: dict[str, Any], features: Any) -> dict[str, str]:
    """The columns of an example that a person would read, on one line each and shortened.

    Args:
        example: one row of the data set.
        features: of the data set; names class labels.
    """
    if {"chosen", "rejected"} <= example.keys():
        shown = _pair_text(example)
    else:
        texts = [name for name in ("text", "sentence") if name in example]
        # others than the usual names: whatever is text
        texts = texts or [name for name, value in example.items() if isinstance(value, str)]
        labels = [name for name in ("label", "labels") if name in example]
        shown = {name: _content(example[name]) for name in texts}
        for name in labels:
            named = hasattr(features[name], "int2str") and example[name] is not None and example[name] >= 0
            shown[name] = features[name].int2str(example[name]) if named else str(example[name])
    return {name: shorten(value) for name, value in shown.items()}


def _pair_text(example: dict[str, Any]) -> dict[str, str]:
    """What both completions begin with is the prompt, and would hide where they differ."""
    prompt, chosen, rejected = example.get("prompt"), example["chosen"], example["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        same = 0
        while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
            same += 1
        prompt = chosen[:same] if prompt is None and same else prompt
        chosen, rejected = chosen[same:], rejected[same:]
    chosen, rejected = _content(chosen), _content(rejected)
    start = os.path.commonprefix([chosen, rejected])
    start = start[: start.rfind(" ") + 1]
    if len(start) > TEXT_LENGTH // 2 and chosen != rejected:
        prompt = start if prompt is None else prompt
        chosen, rejected = (f"… {text[len(start) :]}" for text in (chosen, rejected))
    prompts = {} if prompt is None else {"prompt": _content(prompt)}
    return {**prompts, "chosen": chosen, "rejected": rejected}


def _content(value: Any) -> str:
    """Text, or the content of the messages of a conversation, whose parts may be of several media."""
    if isinstance(value, list):
        return " / ".join(_content(message) for message in value)
    if isinstance(value, dict):
        parts = value.get("content", value.get("text", value.get("type")))
        return _content(parts)
    return "" if value is None else str(value)
