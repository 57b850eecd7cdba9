"""What ``hf-poprisk judge`` reads, and the data that it refuses before a model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_poprisk.command import UserError
from hf_poprisk.leave_one_out.data import example_ids
from hf_poprisk.leave_one_out.index import INDEX
from hf_poprisk.leave_one_out.judgement import FEWEST

if TYPE_CHECKING:
    from datasets import Dataset

_PAIR = ("prompt", "chosen", "rejected")
TEXT, LABEL = "text", "label"
# What the trainers read; other columns, such as margin, have a meaning in training alone.
PAIR_COLUMNS = (*_PAIR, "tools", "chat_template_kwargs", INDEX)
CLASS_COLUMNS = (TEXT, LABEL, INDEX)


def holds_pairs(data: Dataset, name: str) -> bool:
    """Whether the data are preference pairs; if not, they are labelled texts.

    Raises:
        UserError: they are neither.
    """
    columns = set(data.column_names)
    has = f"(it has {', '.join(sorted(columns))})"
    if {"chosen", "rejected"} <= columns:
        return True
    if LABEL not in columns:
        raise UserError(
            f"{name} has no columns chosen and rejected {has}, for pairs, and no columns {TEXT} and {LABEL}, "
            "for classes."
        )
    if TEXT not in columns:
        raise UserError(f"{name} has a column {LABEL} and no column {TEXT} {has}: rename the one of texts.")
    return False


def check_pairs(data: Dataset, name: str) -> None:
    """Refuse pairs that are not whole, or say nothing.

    Raises:
        UserError: says in one sentence what is wrong.
    """
    columns = set(data.column_names)
    _check_rows(data, name, "pairs")
    pairs = {column: list(data[column]) for column in _PAIR if column in columns}
    for column, values in pairs.items():
        missing = next((row for row, value in enumerate(values) if value is None or value == []), None)
        if missing is not None:
            raise UserError(f"{name} has no {column} in row {missing}.")
    kinds = {type(value) for values in pairs.values() for value in values}
    if kinds not in ({str}, {list}):
        raise UserError(f"{name} must hold either texts or conversations in all of {', '.join(pairs)}.")
    if pairs["chosen"] == pairs["rejected"]:
        raise UserError(f"chosen and rejected are the same in all pairs of {name}.")
    if all(value == values[0] for values in pairs.values() for value in values):
        raise UserError(f"all pairs of {name} are the same, so none says anything about another's label.")


def check_classes(data: Dataset, name: str) -> int:
    """Refuse labelled texts that are not whole, or say nothing.

    Returns:
        K: labels are in [0, K); as many as their feature names, or up to the highest one.

    Raises:
        UserError: says in one sentence what is wrong.
    """
    _check_rows(data, name, "examples")
    if tokens := sorted({"input_ids", "attention_mask", "token_type_ids"} & set(data.column_names)):
        raise UserError(f"{name} holds tokens, and judge makes its own: remove the column {tokens[0]}.")
    feature, texts, labels = data.features[LABEL], list(data[TEXT]), list(data[LABEL])
    if not str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        raise UserError(f"the column {LABEL} of {name} must hold integers, one for each text.")
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if label is None or label < 0:
            what = "no label" if label is None else f"the label {label}"
            raise UserError(f"{name} has {what} in row {row}: give the rows with labels of 0 or more alone.")
        if text is not None and not isinstance(text, str):
            raise UserError(f"the column {TEXT} of {name} must hold texts.")
        if not (text or "").strip():
            raise UserError(f"{name} has no {TEXT} in row {row}.")
    if len(set(labels)) == 1:
        raise UserError(f"all labels of {name} are {labels[0]}, so none says anything about another.")
    if len(set(texts)) == 1:
        raise UserError(f"all texts of {name} are the same, so none says anything about another's label.")
    return max(getattr(feature, "num_classes", 0), max(labels) + 1)


def _check_rows(data: Dataset, name: str, what: str) -> None:
    """For either kind."""
    if {"image", "images"} & set(data.column_names):
        raise UserError(f"{name} holds images, and judge reads texts alone.")
    if len(data) < FEWEST:
        raise UserError(
            f"{name} has {len(data)} {what}, too few to judge labels by: it takes {FEWEST} or more."
        )
    example_ids(data)
