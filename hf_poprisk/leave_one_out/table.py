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
COLUMNS = ("log_odds", "weight", "self_influence", "loss_mean")  # float32
_STATE = b"hf_poprisk"  # in the metadata of the file: one file is of one moment
_GROWTH = 1024


class ExampleTable:
    """Columns over the training examples, found by their ``example_index``.

    Args:
        ids: the examples' indices, [n] unique int64 in any order; None for a stream, whose examples are
            added as they come.
        device: where the columns live.

    Attributes:
        visits: [n] int32, how often the example was trained on.
        columns: name → [n] float32. ``log_odds``: leave-one-out, in nats. ``weight``: the example's last
            p_correct in training. ``self_influence``: what of its log-odds its own steps have taught.
            ``loss_mean``: −log σ(z), averaged over the visits.

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
        self.visits = torch.zeros(0, dtype=torch.int32, device=self.device)
        self.columns = {name: torch.zeros(0, device=self.device) for name in COLUMNS}
        self._grow(len(self._ids))

    def __len__(self) -> int:
        return len(self._ids) if self._streamed is None else len(self._streamed)

    @property
    def streamed(self) -> bool:
        """Whether the examples are not known beforehand."""
        return self._streamed is not None

    @property
    def ids(self) -> Tensor:
        """``example_index`` of every row, [n] int64 on the CPU."""
        return self._ids if self._streamed is None else torch.tensor(list(self._streamed), dtype=torch.int64)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of some examples; ids: [N] int64. A stream's new examples get one.

        Raises:
            KeyError: an index that the training set does not have.
        """
        if self._streamed is not None:
            found = [self._streamed.setdefault(i, len(self._streamed)) for i in ids.tolist()]
            if len(self) > len(self.visits):
                self._grow(max(len(self) - len(self.visits), _GROWTH, len(self.visits)))
            return torch.tensor(found, dtype=torch.int64, device=self.device)
        ids = ids.to(self.device)
        if self._order is None:
            return ids
        place = torch.searchsorted(self._sorted, ids).clamp_(max=len(self._sorted) - 1)
        if not torch.equal(self._sorted[place], ids):
            raise KeyError(f"{INDEX} {ids[self._sorted[place] != ids][0].item()} is not in the training set.")
        return self._order[place]

    def _grow(self, more: int) -> None:
        self.visits = torch.cat([self.visits, self.visits.new_zeros(more)])
        for name, column in self.columns.items():
            fill = 1.0 if name == "weight" else 0.0
            self.columns[name] = torch.cat([column, column.new_full((more,), fill)])

    def visit(self, rows: Tensor, **values: Tensor) -> None:
        """Record one visit of each example; ``values`` name columns, [N] each.

        ``loss_mean`` is averaged over the visits, the others are replaced.
        """
        self.visits[rows] += 1
        for name, value in values.items():
            column = self.columns[name]
            if name == "loss_mean":
                before = column[rows]
                value = before + (value - before) / self.visits[rows]
            column[rows] = value.to(column.dtype)

    def log_odds(self) -> np.ndarray:
        """Leave-one-out log-odds of the examples visited so far, [m] float32."""
        n = len(self)
        return self.columns["log_odds"][:n][self.visits[:n] > 0].cpu().numpy()

    def _ranks(self) -> tuple[np.ndarray, np.ndarray]:
        """0 is the most suspicious, [n] int64; and which were not visited and have none, [n] bool."""
        n = len(self)
        unknown = self.visits[:n].cpu().numpy() == 0
        order = np.lexsort((self.columns["log_odds"][:n].cpu().numpy(), unknown))
        ranks = np.empty(n, np.int64)
        ranks[order] = np.arange(n)
        return ranks, unknown

    def save(self, path: Path, p_correct: np.ndarray, state: dict[str, Any]) -> None:
        """Write the table; a reader never sees half of it. Needs ``pyarrow``.

        Args:
            p_correct: probability that each label is correct, [n]; NaN where there is no estimate.
            state: plain values that are not of single examples.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        n = len(self)
        columns: dict[str, Any] = {"index": self.ids.numpy(), "p_correct": p_correct.astype(np.float32)}
        columns |= {"visits": self.visits[:n].cpu().numpy()}
        columns |= {name: column[:n].cpu().numpy() for name, column in self.columns.items()}
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
        if self._streamed is None and not torch.equal(ids.sort().values, self._ids.sort().values):
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
