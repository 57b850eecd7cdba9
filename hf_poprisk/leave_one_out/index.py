"""Which training example is which: an index in every batch, and a few hashed rows to know the data by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

INDEX = "example_index"
_SAMPLE_SIZE = 64
Sample = dict[str, dict[str, str]]  # index → column → hash of the value


class IndexCollator:
    """A data collator that lets the examples' index through as a tensor, [N] int64.

    Args:
        collator: of the examples without it.
        option: that asks for the index, for messages.

    Raises:
        ValueError: features without it.
    """

    def __init__(self, collator: Any, option: str = "poprisk_label_noise") -> None:
        self.collator, self.option = collator, option

    def __call__(self, features: list[Any]) -> Any:
        if not all(isinstance(feature, Mapping) and INDEX in feature for feature in features):
            raise ValueError(
                f"{self.option} finds no {INDEX} in the training examples: a transform must keep it."
            )
        batch = self.collator([{k: v for k, v in f.items() if k != INDEX} for f in features])
        if not isinstance(batch, MutableMapping):
            raise ValueError(
                f"{self.option} finds no place for {INDEX} in a batch that is a {type(batch).__name__}: let "
                "the collator give a dict of tensors."
            )
        batch[INDEX] = torch.tensor([int(feature[INDEX]) for feature in features])
        return batch


class _Indexed(torch.utils.data.Dataset):
    """A map-style data set whose examples carry their position."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, position: int) -> Any:
        item = self._data[position]
        if not isinstance(item, Mapping):
            raise ValueError(
                f"poprisk_label_noise finds no place for {INDEX} in an example that is a "
                f"{type(item).__name__}: give examples that are dicts."
            )
        return {**item, INDEX: position}


def with_index(dataset: Any) -> tuple[Any, np.ndarray]:
    """The training set with a column ``example_index``, and its values.

    A column of that name stays as it is, so that the index survives ``shuffle``, ``select`` and ``map``
    before the trainer is built; otherwise the index is the position in the data set that the trainer is
    given.

    Raises:
        ValueError: a stream, or a column that does not hold integers.
    """
    columns = getattr(dataset, "column_names", None)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            "poprisk_label_noise judges labels by all others before training, and a stream has none: train "
            "on a data set that is no stream, or set poprisk_label_noise=off."
        )
    if columns is None:  # of torch
        return _Indexed(dataset), np.arange(len(dataset))
    if INDEX not in columns:
        return dataset.add_column(INDEX, np.arange(len(dataset))), np.arange(len(dataset))
    ids = np.asarray(dataset.with_format(None)[INDEX])
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim != 1:
        raise ValueError(f"the column {INDEX} must hold integers; it holds {ids.dtype}.")
    return dataset, ids.astype(np.int64)


class IndexMixin:
    """Carries the index through a trainer's training batches, and no others; part of ``PopRiskMixin``."""

    _index_for: str | None = None  # the option that asks for it

    def get_train_dataloader(self) -> Any:
        if self._index_for is None:
            return super().get_train_dataloader()  # type: ignore[misc]
        # the index is of the training batches only: an evaluation has nothing to do with it
        collator, self.data_collator = self.data_collator, IndexCollator(self.data_collator, self._index_for)
        try:
            with self._index_is_used():
                return super().get_train_dataloader()  # type: ignore[misc]
        finally:
            self.data_collator = collator

    @contextmanager
    def _index_is_used(self) -> Iterator[None]:
        """Inside, the index is not among the columns that the model has no use for."""
        self._set_signature_columns_if_needed()
        columns = self._signature_columns
        self._signature_columns = [*columns, INDEX]
        try:
            yield
        finally:
            self._signature_columns = columns

    def _used_columns(self, data: Any, collator: Any) -> tuple[Any, Any]:
        """The training set and a collator of it without what the model has no use for, as it is trained."""
        with self._index_is_used():
            if hasattr(data, "remove_columns"):
                return self._remove_unused_columns(data), collator
            return data, self._get_collator_with_removed_columns(collator)

    def _take_index(self, inputs: Any) -> tuple[Any, Tensor | None]:
        """Take the index out of a training batch: the batch, and the index, [N], if one is asked for."""
        if self._index_for is None:
            return inputs, None
        index = inputs.pop(INDEX, None) if isinstance(inputs, MutableMapping) else None
        if index is None:
            raise ValueError(
                f"{self._index_for} finds no {INDEX} in the batch: leave get_train_dataloader as it is, "
                "or let its collator be an IndexCollator."
            )
        return inputs, index

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = super()._prepare_inputs(inputs)  # type: ignore[misc]
        if self._index_for is not None and isinstance(prepared, MutableMapping):
            prepared.pop(INDEX, None)  # an evaluation on the training set
        return prepared


def take_sample(dataset: Any, ids: np.ndarray) -> Sample:
    """Rows spread evenly over a data set of the datasets package, the same ones in any order; of others none.

    Args:
        ids: ``example_index`` of the rows, [n].
    """
    if not hasattr(dataset, "with_format") or not len(dataset):
        return {}
    places = np.unique(np.linspace(0, len(dataset) - 1, _SAMPLE_SIZE).round().astype(int))
    rows = np.argsort(ids)[places].tolist()
    return hashed_rows(dataset, {str(int(ids[row])): row for row in rows})


def hashed_rows(dataset: Any, rows: dict[str, int]) -> Sample:
    """Some rows of a data set, hashed; rows: index → row."""
    plain, sample = dataset.with_format(None), {}
    for index, row in rows.items():
        values = {name: _hash(value) for name, value in plain[row].items() if name != INDEX}
        sample[index] = {name: value for name, value in values.items() if value is not None}
    return sample


def _hash(value: Any) -> str | None:
    """Of plain values; None of others, such as images, which are not the same object twice."""
    try:
        text = json.dumps(value, sort_keys=True)
    except (TypeError, ValueError):
        return None
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def first_difference(sample: Sample, other: Sample) -> tuple[str, str] | None:
    """The first index and column with another value; None if all that both samples have agree."""
    for index, columns in sample.items():
        for name, value in other.get(index, {}).items():
            if columns.get(name, value) != value:
                return index, name
    return None
