"""What is known of every training example's label: one row per example, on the device, saved as Parquet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TABLE_NAME = "label_noise.parquet"
INDEX = "example_index"
# In the order of the file; float32 but for the first two.
COLUMNS = ("logodds", "heldout_logodds", "own_effect", "weight", "agreement_mean", "loss_mean")
_GROWTH = 1024


class ExampleTable:
    """Columns over the training examples, found by their ``example_index``.

    Args:
        ids: the examples' indices, [n] unique int64 in any order; None for a stream, whose examples are
            added as they come.
        device: where the columns live.

    Attributes:
        visits: [n] int32, how often the example was trained on.
        columns: name → [n] float32; see ``COLUMNS``.

    Raises:
        ValueError: indices that are not unique.
    """

    def __init__(self, ids: np.ndarray | None, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._streamed: dict[int, int] | None = {} if ids is None else None  # index → row
        self._order: Tensor | None = None  # rows by ascending index, where the index is not the row
        self._ids = torch.as_tensor(np.empty(0, np.int64) if ids is None else ids, dtype=torch.int64)
        if ids is not None and not np.array_equal(ids, np.arange(len(ids))):
            sorted_ids, order = self._ids.sort()
            if (sorted_ids[1:] == sorted_ids[:-1]).any():
                twice = sorted_ids[1:][sorted_ids[1:] == sorted_ids[:-1]][0].item()
                raise ValueError(f"the column {INDEX} must be unique, and {twice} is there more than once.")
            self._order, self._sorted = order.to(self.device), sorted_ids.to(self.device)
        size = 0 if ids is None else len(ids)
        self.visits = torch.zeros(size, dtype=torch.int32, device=self.device)
        self.columns = {name: torch.zeros(size, device=self.device) for name in COLUMNS}
        self.columns["weight"].fill_(1.0)

    def __len__(self) -> int:
        return len(self._ids) if self._streamed is None else len(self._streamed)

    @property
    def streamed(self) -> bool:
        """Whether the examples are not known beforehand."""
        return self._streamed is not None

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of some examples; ids: [N] int64. A stream's new examples get one.

        Raises:
            KeyError: an index that the training set does not have.
        """
        if self._streamed is not None:
            found = [self._streamed.setdefault(i, len(self._streamed)) for i in ids.tolist()]
            self._grow()
            return torch.tensor(found, dtype=torch.int64, device=self.device)
        ids = ids.to(self.device)
        if self._order is None:
            return ids
        place = torch.searchsorted(self._sorted, ids).clamp_(max=len(self._sorted) - 1)
        if not torch.equal(self._sorted[place], ids):
            raise KeyError(f"{INDEX} {ids[self._sorted[place] != ids][0].item()} is not in the training set.")
        return self._order[place]

    def _grow(self) -> None:
        missing = len(self) - len(self.visits)
        if missing > 0:
            more = max(missing, _GROWTH, len(self.visits))
            self.visits = torch.cat([self.visits, self.visits.new_zeros(more)])
            for name, column in self.columns.items():
                fill = 1.0 if name == "weight" else 0.0
                self.columns[name] = torch.cat([column, column.new_full((more,), fill)])

    @property
    def ids(self) -> Tensor:
        """``example_index`` of every row, [n] int64 on the CPU."""
        if self._streamed is None:
            return self._ids
        return torch.tensor(list(self._streamed), dtype=torch.int64)

    def visit(self, rows: Tensor, **values: Tensor) -> None:
        """Record one visit of each example; ``values`` name columns, [N] each.

        ``agreement_mean`` and ``loss_mean`` are averaged over the visits, the others replaced.
        """
        self.visits[rows] += 1
        for name, value in values.items():
            column = self.columns[name]
            if name.endswith("_mean"):
                before = column[rows]
                value = before + (value - before) / self.visits[rows]
            column[rows] = value.to(column.dtype)

    def heldout(self) -> np.ndarray:
        """``heldout_logodds`` of the examples visited so far, [m] float32."""
        n = len(self)
        return self.columns["heldout_logodds"][:n][self.visits[:n] > 0].cpu().numpy()

    def save(self, path: Path) -> None:
        """Write the table; a reader never sees half of it. Needs ``datasets``."""
        from datasets import Dataset

        n = len(self)
        columns: dict[str, Any] = {INDEX: self.ids.numpy(), "visits": self.visits[:n].cpu().numpy()}
        columns |= {name: column[:n].cpu().numpy() for name, column in self.columns.items()}
        columns["suspicion"] = -columns["heldout_logodds"]
        temporary = path.with_name(f"_{path.name}.{os.getpid()}")  # pushes leave out _*
        try:
            Dataset.from_dict(columns).to_parquet(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Take over a saved table, whose examples must be those of this one, in any order.

        Raises:
            ValueError: a table of other examples.
        """
        import pyarrow.parquet as pq

        saved = {name: column.to_numpy() for name, column in _columns(pq.read_table(path)).items()}
        ids = torch.from_numpy(saved[INDEX].copy())
        if self._streamed is None:
            if not torch.equal(ids.sort().values, self._ids.sort().values):
                raise ValueError(
                    f"{path} is of {len(ids)} examples and the training set has {len(self)}, or others: "
                    "resume with the same data."
                )
            here = ids.argsort()[self._ids.argsort().argsort()]  # the saved row of each example
            saved = {name: column[here.numpy()] for name, column in saved.items()}
        else:
            self._streamed.update({i: row for row, i in enumerate(ids.tolist())})
            self._grow()
        n = len(ids)
        self.visits[:n] = torch.from_numpy(saved["visits"].copy()).to(self.device)
        for name, column in self.columns.items():
            column[:n] = torch.from_numpy(saved[name].copy()).to(self.device)


def _columns(table: Any) -> dict[str, Any]:
    return dict(zip(table.column_names, table.columns, strict=True))
