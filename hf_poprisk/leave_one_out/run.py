"""What a judged run left in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_poprisk.command import UserError
from hf_poprisk.leave_one_out.index import Sample
from hf_poprisk.leave_one_out.noise import NoiseFit
from hf_poprisk.leave_one_out.table import TABLE_NAME, read_table
from hf_poprisk.leave_one_out.weights import TRAIN_LONGER, caveat


@dataclass(frozen=True)
class Run:
    """A judged run.

    Attributes:
        folder: where it was found.
        preferences: an example is a preference pair.
        index: ``example_index``, [n] int64, unique.
        p_correct: probability that each label is correct, [n] float32; 1 − the rate where an example was
            never trained on, NaN without an estimate.
        log_odds: leave-one-out log-odds of the label in nats, [n] float32.
        visits: how often each example was trained on, [n]; at least one is positive.
        fit: the estimate that labels are judged by, or None.
        doubt: why the estimate means little, a sentence without its end; None if nothing speaks against it.
        caveat: what is to be known beside that, or None.
        sample: some of the rows that it was trained on, hashed.
    """

    folder: Path
    preferences: bool
    index: np.ndarray
    p_correct: np.ndarray
    log_odds: np.ndarray
    visits: np.ndarray
    fit: NoiseFit | None
    doubt: str | None
    caveat: str | None
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

    def need_fit(self) -> NoiseFit:
        """The estimate.

        Raises:
            UserError: there is none.
        """
        if self.fit is None:
            raise UserError(
                f"{self.folder} holds no estimate of the noise rate, because its training ended within the "
                f"first epoch: {TRAIN_LONGER}."
            )
        return self.fit


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
    if not visited.any():
        raise UserError(f"{folder / TABLE_NAME} holds no example that was trained on.")
    if not np.isfinite(kept["log_odds"][visited]).all():
        raise UserError(f"{folder / TABLE_NAME} holds log-odds that are not finite.")
    fits, preferences = [NoiseFit(**fit) for fit in state["fits"]], state["preferences"]
    return Run(
        folder,
        preferences,
        **kept,
        fit=fits[-1] if fits else None,
        doubt=state["doubt"],
        caveat=caveat(fits) if fits and not preferences else None,
        sample=state["sample"],
    )
