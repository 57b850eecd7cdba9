"""The data that a run was trained on: loaded, checked against the run, and its examples as text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_poprisk.leave_one_out.index import INDEX, first_difference, hashed_rows
from hf_poprisk.leave_one_out.table import Run
from hf_poprisk.record import CONFIG_NAME, load_record
from hf_poprisk.user_errors import UserError, need, one_line, shorten

if TYPE_CHECKING:
    from datasets import Dataset

TRUTH = "is_flipped"  # the column that tells which labels are mislabeled, where somebody knows
_LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}  # of single files
_TEXT_LENGTH = 160  # characters of one column of an example


def load_data(
    name: str,
    split: str | None = None,
    config: str | None = None,
    option: str = "--dataset",
    config_option: str = "--config_name",
    split_option: str = "--split",
) -> Dataset:
    """A split by the data set's Hub name, from a file, or from a folder of files or of ``save_to_disk``.

    Args:
        split: ``train`` if None; slices such as ``train[:512]`` work but for ``save_to_disk``.
        config: configuration of a data set on the Hub or of a folder with several.
        option, config_option, split_option: by which these were given, for messages.

    Raises:
        UserError: it is not there or cannot be read, or has no such split.
    """
    need("datasets", option)
    asked, split = split, split or "train"
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    folder = Path(name).expanduser()
    loader = _loader(name, folder, option)
    if loader is not None and config is not None:
        raise UserError(f"{config_option} has no effect, because {name} is a single file.")
    saved = any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))
    try:
        if saved:
            data = load_from_disk(str(folder))
        elif loader is not None:
            data = load_dataset(loader, data_files=str(folder), split=split)
        else:
            path = str(folder) if folder.is_dir() else name
            data = load_dataset(path, config, split=split)
    except Exception as error:  # the loaders raise whatever their file systems and parsers do
        where = "" if folder.exists() else "is no folder here, and "
        raise UserError(f"{option} {name} {where}cannot be read ({one_line(error)}).") from error
    splits = isinstance(data, DatasetDict)
    for other, value in ((config_option, config), (split_option, None if splits else asked)):
        if saved and value is not None:
            raise UserError(f"{other} has no effect, because {name} was written by save_to_disk without it.")
    if splits and split not in data:
        raise UserError(f"{name} has no split {split}: it has {', '.join(data)}.")
    data = data[split] if splits else data
    if not isinstance(data, Dataset):
        raise UserError(
            f"{option} {name} is no table of examples but a stream, which cannot be looked up: save it first."
        )
    return data.with_format(None)


def _loader(name: str, path: Path, option: str) -> str | None:
    """What reads a single file; None for a folder or a name on the Hub."""
    if path.is_dir():
        return None
    loader = _LOADERS.get(path.suffix.lower())
    if path.is_file() and loader is None:
        raise UserError(f"{option} {name} is not a file of a kind that is read: {', '.join(_LOADERS)}.")
    if loader is not None and not path.is_file():
        raise UserError(f"{option} {name} is not there.")
    if loader is not None and not path.stat().st_size:
        raise UserError(f"{option} {name} is empty.")
    # such a path, which the Hub client would take for a repository, is a folder mistyped
    if loader is None and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{option} {name} is not a folder.")
    return loader


def example_ids(data: Dataset) -> np.ndarray:
    """The column ``example_index``, or the positions where there is none, [len(data)] unique integers."""
    ids = np.asarray(data[INDEX]) if INDEX in data.column_names else np.arange(len(data))
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim != 1 or len(np.unique(ids)) != len(ids):
        raise UserError(f"the column {INDEX} of the data must hold integers, each once.")
    return ids


def find_rows(data: Dataset, run: Run) -> np.ndarray:
    """The row of the data of every example of the run, [n] int64.

    Raises:
        UserError: an example is not in the data, or the data are recognisably others.
    """
    ids = example_ids(data)
    if INDEX not in data.column_names and len(data) != len(run.index):
        raise UserError(
            f"the data have {len(data)} rows and the run {len(run.index)} examples, so positions do not tell "
            f"which is which: give what was trained on, or data with a column {INDEX}."
        )
    row_of = {index: row for row, index in enumerate(ids.tolist())}
    missing = next((index for index in run.index.tolist() if index not in row_of), None)
    if missing is not None:
        raise UserError(f"{INDEX} {missing} is not in the data: give what was trained on.")
    _check_rows(data, row_of, run)
    return np.array([row_of[index] for index in run.index.tolist()])


def _check_rows(data: Dataset, row_of: dict[int, int], run: Run) -> None:
    """Refuse data whose rows are not those that the run was trained on, in that order."""
    known = {index: row_of[int(index)] for index in run.sample if int(index) in row_of}
    different = first_difference(run.sample, hashed_rows(data, known))
    if different is not None:
        raise UserError(
            f"the data are not those of the run: {different[1]!r} of the row with {INDEX} {different[0]} was "
            "another one in training; give the data with the same labels, in the same order."
        )
    if not (run.folder / CONFIG_NAME).is_file() or TRUTH in data.column_names:
        return
    try:
        altered = load_record(run.folder).config["data"]["altered_labels"]
    except ValueError:
        return  # of another version, or damaged: the record is not what is asked for
    if altered:
        raise UserError(
            f"{altered} labels of the run had been altered on purpose, and the data have no column {TRUTH}: "
            "give what was trained on; the recipes leave it in the folder _training_data of their output."
        )


def known_flips(data: Dataset, rows: np.ndarray) -> np.ndarray | None:
    """The column ``is_flipped`` of some rows, [n] bool; None if there is no bool column of that name."""
    if TRUTH not in data.column_names or getattr(data.features[TRUTH], "dtype", "") != "bool":
        return None
    flips = list(data[TRUTH])
    if None in flips:
        raise UserError(f"the column {TRUTH} of the data has missing values.")
    return np.array(flips, dtype=bool)[rows]


def example_text(example: dict[str, Any], features: Any) -> dict[str, str]:
    """The columns of an example that a person would read, on one line each and shortened."""
    shown = whole_text(example, features, _TEXT_LENGTH)
    return {name: shorten(value or "", _TEXT_LENGTH) for name, value in shown.items()}


def whole_text(example: dict[str, Any], features: Any, length: int) -> dict[str, str | None]:
    """The columns of an example that a person would read, whole; None where there is none.

    Args:
        example: one row of the data set.
        features: of the data set; names class labels.
        length: how many characters will be shown; what pairs begin with in common leaves half of it.
    """
    if {"chosen", "rejected"} <= example.keys():
        shown = _pair_text(example, length)
    else:
        texts = [name for name in ("text", "sentence") if name in example]
        # others than the usual names: whatever is text
        texts = texts or [name for name, value in example.items() if isinstance(value, str)]
        shown = {name: _content(example[name]) for name in texts}
        for name in ("label", "labels"):
            if name in example:
                label = example[name]
                named = hasattr(features[name], "int2str") and label is not None and label >= 0
                shown[name] = features[name].int2str(label) if named else str(label)
    return {name: None if not text and example.get(name) is None else text for name, text in shown.items()}


def _pair_text(example: dict[str, Any], length: int) -> dict[str, str]:
    """What both completions begin with is the prompt, and would hide where they differ."""
    prompt, chosen, rejected = example.get("prompt"), example["chosen"], example["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        same = _num_same(chosen, rejected)
        prompt = chosen[:same] if prompt is None and same else prompt
        chosen, rejected = chosen[same:], rejected[same:]
    chosen, rejected = _content(chosen), _content(rejected)
    same = chosen.rfind(" ", 0, _num_same(chosen, rejected) + 1) + 1
    if same > length // 2 and chosen != rejected:
        prompt = chosen[:same] if prompt is None else prompt
        chosen, rejected = f"… {chosen[same:]}", f"… {rejected[same:]}"
    prompts = {} if prompt is None else {"prompt": _content(prompt)}
    return {**prompts, "chosen": chosen, "rejected": rejected}


def _num_same(one: Any, other: Any) -> int:
    """How many items two sequences begin with in common; of each at least one is left."""
    same = 0
    while same < min(len(one), len(other)) - 1 and one[same] == other[same]:
        same += 1
    return same


def _content(value: Any) -> str:
    """Text, or the content of the messages of a conversation, whose parts may be of several media."""
    if isinstance(value, list):
        return " / ".join(_content(message) for message in value)
    if isinstance(value, dict):
        return _content(value.get("content", value.get("text", value.get("type"))))
    return "" if value is None else str(value)
