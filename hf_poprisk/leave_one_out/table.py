"""``judged.parquet``: a row per training example with what is known of its label."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_poprisk.leave_one_out.index import INDEX, Sample
from hf_poprisk.leave_one_out.noise import NoiseFit
from hf_poprisk.user_errors import UserError, need, one_line

TABLE_NAME = "judged.parquet"
RULE = 4  # of scores and estimates; raise it with either: a run cannot go on with others
_COLUMNS = ("index", "p_correct", "visits", "log_odds", "weight")
_STATE = b"hf_poprisk"  # in the metadata of the file: one file is of one moment


class ExampleTable:
    """What is known of the training examples, found by their ``example_index``.

    Args:
        ids: the examples' indices, [n] unique int64 in any order.
        device: where the columns live.

    Attributes:
        ids: [n] int64 on the CPU.
        judged: [n] bool.
        log_odds: leave-one-out, in nats, [n] float32; 0 where it was not judged.
        weight: in training, [n] float32.

    Raises:
        ValueError: indices that are not unique.
    """

    def __init__(self, ids: np.ndarray, device: torch.device | str = "cpu") -> None:
        self.ids = torch.as_tensor(ids, dtype=torch.int64)
        self._sorted, self._order = self.ids.to(device).sort()
        twice = self._sorted[1:][self._sorted[1:] == self._sorted[:-1]]
        if len(twice):
            raise ValueError(f"the column {INDEX} must be unique, and {twice[0]} is there more than once.")
        self.clear()

    def clear(self) -> None:
        """Nothing is known, and all weights are 1."""
        self.judged = torch.zeros_like(self._order, dtype=torch.bool)
        self.log_odds = torch.zeros_like(self._order, dtype=torch.float32)
        self.weight = torch.ones_like(self._order, dtype=torch.float32)

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of some examples; ids: [N] int64.

        Raises:
            KeyError: an index that the training set does not have.
        """
        ids = ids.to(self._sorted.device)
        place = torch.searchsorted(self._sorted, ids).clamp_(max=len(self) - 1)
        if not torch.equal(self._sorted[place], ids):
            raise KeyError(f"{INDEX} {ids[self._sorted[place] != ids][0].item()} is not in the training set.")
        return self._order[place]

    def save(self, path: Path, p_correct: np.ndarray, state: dict[str, Any]) -> None:
        """Write the table; a reader never sees half of it. Needs ``pyarrow``.

        Args:
            p_correct: probability that each label is correct, [n]; NaN where there is no estimate.
            state: plain values that are not of single examples.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        judged, log_odds = self.judged.cpu().numpy(), self.log_odds.cpu().numpy()
        ranks = np.empty(len(self), np.int64)  # 0 is the most suspicious
        ranks[np.lexsort((log_odds, ~judged))] = np.arange(len(self))
        columns = {
            "index": self.ids.numpy(),
            "p_correct": p_correct.astype(np.float32),
            "visits": judged.astype(np.int32),
            "log_odds": log_odds,
            "weight": self.weight.cpu().numpy(),
            "rank": pa.array(ranks, mask=~judged),
        }
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
        ids = torch.from_numpy(saved["index"].copy()).to(self._sorted.device)
        if not torch.equal(ids.sort().values, self._sorted):
            raise ValueError(
                f"the checkpoint judged {len(ids)} examples and the training set has {len(self)}, or others: "
                "resume with the same data."
            )
        rows = self.rows(ids)
        for name, column in (("visits", self.judged), ("log_odds", self.log_odds), ("weight", self.weight)):
            column[rows] = torch.from_numpy(saved[name].copy()).to(column)


def read_table(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The columns, [n] each, and the state that ``ExampleTable.save`` left in a folder.

    Raises:
        UserError: the file is not there, damaged, of something else, or of an earlier version.
    """
    path = folder / TABLE_NAME
    if not path.is_file():
        raise UserError(f"{folder} holds no {TABLE_NAME}: give the output folder of a judged run.")
    need("pyarrow", "reading the table")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}).") from error
    if _STATE not in (table.schema.metadata or {}):
        raise UserError(f"{path} is not the table of a judged run.")
    state = json.loads(table.schema.metadata[_STATE])
    if state.get("rule", RULE) != RULE:
        raise UserError(
            f"{folder} was judged by an earlier version, whose scores are by another rule: judge the labels "
            "again, or go on from it with poprisk_label_noise=off."
        )
    if not {*_COLUMNS} <= {*table.column_names}:
        raise UserError(f"{path} is not the table of a judged run.")
    return {name: table[name].to_numpy() for name in _COLUMNS}, state


@dataclass(frozen=True)
class Run:
    """A judged run.

    Attributes:
        folder: where it was found.
        preferences: an example is a preference pair.
        index: ``example_index``, [n] int64, unique.
        p_correct: probability that each label is correct, [n] float32; 1 − the rate where an example was
            not judged.
        log_odds: leave-one-out log-odds of the label in nats, [n] float32.
        judged: [n] bool; of the others nothing but the rate is known. At least one is.
        fit: the noise rate.
        doubt: why the estimate means little, a sentence without its end; None if nothing speaks against it.
        sample: some of the rows that it was trained on, hashed.
    """

    folder: Path
    preferences: bool
    index: np.ndarray
    p_correct: np.ndarray
    log_odds: np.ndarray
    judged: np.ndarray
    fit: NoiseFit
    doubt: str | None
    sample: Sample

    @property
    def suspicious(self) -> np.ndarray:
        """Where the judged examples stand in the columns, the most suspicious first, [m] int64."""
        judged = np.flatnonzero(self.judged)
        return judged[np.argsort(self.log_odds[judged], kind="stable")]


def load_run(folder: str | Path) -> Run:
    """Read ``judged.parquet``.

    Raises:
        UserError: it is not there, damaged, of something else, or of nothing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder.")
    columns, state = read_table(folder)
    judged = columns["visits"] > 0
    if not judged.any() or not state.get("fit"):
        raise UserError(f"{folder / TABLE_NAME} holds no example that was judged.")
    return Run(
        folder=folder,
        preferences=state["preferences"],
        index=columns["index"],
        p_correct=columns["p_correct"],
        log_odds=columns["log_odds"],
        judged=judged,
        fit=NoiseFit(**state["fit"]),
        doubt=state["doubt"],
        sample=state["sample"],
    )
