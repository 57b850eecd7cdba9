"""What is known of every training example's label: one row per example, on the device, saved as Parquet."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_poprisk.command import UserError, need, one_line
from hf_poprisk.leave_one_out.index import INDEX

TABLE_NAME = "judged.parquet"
_EARLIER_NAME = "label_noise.json"  # of versions that wrote two files
COLUMNS = ("log_odds", "weight")  # float32
_STATE = b"hf_poprisk"  # in the metadata of the file: one file is of one moment


class ExampleTable:
    """Columns over the training examples, found by their ``example_index``.

    Args:
        ids: the examples' indices, [n] unique int64 in any order.
        device: where the columns live.

    Attributes:
        visits: [n] int32, 1 where the example was judged.
        columns: name → [n] float32. ``log_odds``: leave-one-out, in nats. ``weight``: in training.

    Raises:
        ValueError: indices that are not unique.
    """

    def __init__(self, ids: np.ndarray, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._order: Tensor | None = None  # rows by ascending index, where the index is not the row
        self._ids = torch.as_tensor(ids, dtype=torch.int64)
        if not np.array_equal(ids, np.arange(len(ids))):
            sorted_ids, order = self._ids.sort()
            if (sorted_ids[1:] == sorted_ids[:-1]).any():
                twice = sorted_ids[1:][sorted_ids[1:] == sorted_ids[:-1]][0].item()
                raise ValueError(f"the column {INDEX} must be unique, and {twice} is there more than once.")
            self._order, self._sorted = order.to(self.device), sorted_ids.to(self.device)
        n = len(self._ids)
        self.visits = torch.zeros(n, dtype=torch.int32, device=self.device)
        self.columns = {
            name: torch.full((n,), 1.0 if name == "weight" else 0.0, device=self.device) for name in COLUMNS
        }

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ids(self) -> Tensor:
        """``example_index`` of every row, [n] int64 on the CPU."""
        return self._ids

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of some examples; ids: [N] int64.

        Raises:
            KeyError: an index that the training set does not have.
        """
        ids = ids.to(self.device)
        if self._order is None:
            return ids
        place = torch.searchsorted(self._sorted, ids).clamp_(max=len(self._sorted) - 1)
        if not torch.equal(self._sorted[place], ids):
            raise KeyError(f"{INDEX} {ids[self._sorted[place] != ids][0].item()} is not in the training set.")
        return self._order[place]

    def visit(self, rows: Tensor, **values: Tensor) -> None:
        """Record what was found of each example; ``values`` name columns, [N] each."""
        self.visits[rows] += 1
        for name, value in values.items():
            column = self.columns[name]
            column[rows] = value.to(column.dtype)

    def _ranks(self) -> tuple[np.ndarray, np.ndarray]:
        """0 is the most suspicious, [n] int64; and which were not judged and have none, [n] bool."""
        unknown = self.visits.cpu().numpy() == 0
        order = np.lexsort((self.columns["log_odds"].cpu().numpy(), unknown))
        ranks = np.empty(len(self), np.int64)
        ranks[order] = np.arange(len(self))
        return ranks, unknown

    def save(self, path: Path, p_correct: np.ndarray, state: dict[str, Any]) -> None:
        """Write the table; a reader never sees half of it. Needs ``pyarrow``.

        Args:
            p_correct: probability that each label is correct, [n]; NaN where there is no estimate.
            state: plain values that are not of single examples.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, Any] = {"index": self.ids.numpy(), "p_correct": p_correct.astype(np.float32)}
        columns |= {"visits": self.visits.cpu().numpy()}
        columns |= {name: column.cpu().numpy() for name, column in self.columns.items()}
        ranks, unknown = self._ranks()
        columns["rank"] = pa.array(ranks, mask=unknown)
        table = pa.table(columns).replace_schema_metadata({_STATE: json.dumps(state, allow_nan=False)})
        temporary = path.with_name(f"_{path.name}.{os.getpid()}")  # pushes leave out _*
        try:
            pq.write_table(table, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, saved: dict[str, np.ndarray]) -> None:
        """Take over the columns of ``read_table``, whose examples must be those of this one, in any order.

        Raises:
            ValueError: columns of other examples.
        """
        ids = torch.from_numpy(saved["index"].copy())
        if not torch.equal(ids.sort().values, self._ids.sort().values):
            raise ValueError(
                f"the checkpoint judged {len(ids)} examples and the training set has {len(self)}, or others: "
                "resume with the same data."
            )
        rows = self.rows(ids)
        self.visits[rows] = torch.from_numpy(saved["visits"].astype(np.int32)).to(self.device)
        for name, column in self.columns.items():
            column[rows] = torch.from_numpy(saved[name].astype(np.float32)).to(self.device)


def is_judged(folder: str | Path) -> bool:
    """Whether a run of this version, or of an earlier one, left its scores there."""
    return any(Path(folder, name).is_file() for name in (TABLE_NAME, _EARLIER_NAME))


def read_table(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The columns, [n] each, and the state that ``ExampleTable.save`` left in a folder.

    Raises:
        UserError: the file is not there, damaged, of something else, or of an earlier version.
    """
    path = folder / TABLE_NAME
    if not path.is_file() and (folder / _EARLIER_NAME).is_file():
        raise UserError(
            f"{folder} was judged by an earlier version, from which this one cannot go on: set "
            "poprisk_label_noise=off, or start over."
        )
    if not path.is_file():
        raise UserError(f"{folder} holds no {TABLE_NAME}: give the output folder of a judged run.")
    need("pyarrow", "reading the table")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}).") from error
    names = ("index", "p_correct", "visits", *COLUMNS)
    if _STATE not in (table.schema.metadata or {}) or any(table.column_names.count(n) != 1 for n in names):
        raise UserError(f"{path} is not the table of a judged run.")
    columns = {name: table[name].to_numpy() for name in names}
    if len(np.unique(columns["index"])) != len(table):
        raise UserError(f"{path} has an index more than once.")
    return columns, json.loads(table.schema.metadata[_STATE])
