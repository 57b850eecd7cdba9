"""What a judged run left in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_poprisk.command import UserError
from hf_poprisk.leave_one_out.index import Sample
from hf_poprisk.leave_one_out.noise import NoiseFit
from hf_poprisk.leave_one_out.table import TABLE_NAME, read_table


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
        visits: 1 for each example that was judged, [n]; at least one is positive.
        fit: the noise rate.
        doubt: why the estimate means little, a sentence without its end; None if nothing speaks against it.
        sample: some of the rows that it was trained on, hashed.
    """

    folder: Path
    preferences: bool
    index: np.ndarray
    p_correct: np.ndarray
    log_odds: np.ndarray
    visits: np.ndarray
    fit: NoiseFit
    doubt: str | None
    sample: Sample

    @property
    def visited(self) -> np.ndarray:
        """[n] bool; of the others nothing but the rate is known."""
        return self.visits > 0

    @property
    def suspicious(self) -> np.ndarray:
        """Where the visited examples stand in the columns, the most suspicious first, [m] int64."""
        visited = np.flatnonzero(self.visited)
        return visited[np.argsort(self.log_odds[visited], kind="stable")]


def load_run(folder: str | Path) -> Run:
    """Read ``judged.parquet``.

    Raises:
        UserError: it is not there, damaged, of something else, or of nothing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder.")
    columns, state = read_table(folder)
    kept = {name: columns[name] for name in ("index", "p_correct", "log_odds", "visits")}
    visited = kept["visits"] > 0
    if not visited.any() or not state.get("fit"):
        raise UserError(f"{folder / TABLE_NAME} holds no example that was judged.")
    if not np.isfinite(kept["log_odds"][visited]).all():
        raise UserError(f"{folder / TABLE_NAME} holds log-odds that are not finite.")
    return Run(
        folder,
        state["preferences"],
        **kept,
        fit=NoiseFit(**state["fit"]),
        doubt=state["doubt"],
        sample=state["sample"],
    )
