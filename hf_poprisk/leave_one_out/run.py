"""What a run left in its folder, checked."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hf_poprisk.leave_one_out import INDEX, LABEL_NOISE_MODES, TABLE_NAME, NoiseFit
from hf_poprisk.leave_one_out.common import AuditError, need, one_line
from hf_poprisk.leave_one_out.index import Sample
from hf_poprisk.leave_one_out.noise import MAX_RATE
from hf_poprisk.leave_one_out.weights import FITS_NAME, judged_by, load_fits, train_longer

_SCORES = ("heldout_logodds", "loss_mean", "suspicion")


@dataclass(frozen=True)
class Run:
    """What a run left in its folder, checked.

    Attributes:
        folder: where it was found.
        mode: ``audit``, ``weight`` or ``swap``.
        preferences: an example is a preference pair.
        judging_since: the optimizer step from which on weights were given, or None.
        fits: the estimates of the noise rate, oldest first; there may be none.
        ids: ``example_index``, [n] int64, unique.
        visits: how often each example was trained on, [n]; at least one is positive.
        heldout: ζ, held-out log-odds of the observed label in nats, [n] float64.
        loss_mean: −log σ(z) in nats, averaged over the visits, [n] float64.
        suspicion: [n] float64; the higher, the more suspect.
        sample: some of the rows that it was trained on, hashed.
    """

    folder: Path
    mode: str
    preferences: bool
    judging_since: int | None
    fits: list[NoiseFit]
    ids: np.ndarray
    visits: np.ndarray
    heldout: np.ndarray
    loss_mean: np.ndarray
    suspicion: np.ndarray
    sample: Sample

    @property
    def fit(self) -> NoiseFit | None:
        """The last estimate."""
        return self.fits[-1] if self.fits else None

    @property
    def judged_by(self) -> NoiseFit | None:
        """What labels are judged by, here as in training: the last estimate, or that of the first visits."""
        return judged_by(self.fits, self.preferences) if self.fits else None

    @property
    def visited(self) -> np.ndarray:
        """[n] bool; what is not visited has no scores."""
        return self.visits > 0

    def posterior(self) -> np.ndarray:
        """Probability that each label is right, [n] float64, by ``judged_by``.

        It is 1 − ε where the example was never visited: nothing but the rate is known of it.

        Raises:
            AuditError: the run has no estimate of the noise rate.
        """
        fit = self.judged_by
        if fit is None:
            raise AuditError(
                f"{self.folder} holds no estimate of the noise rate, because its training ended within the "
                f"first epoch: {train_longer(self.preferences)}."
            )
        posterior = fit.probability_right(torch.from_numpy(self.heldout)).numpy()
        return np.where(self.visited, posterior, 1.0 - fit.rate)


def load_run(folder: str | Path) -> Run:
    """Read ``label_noise.json`` and ``label_noise.parquet``.

    Raises:
        AuditError: one of them is not there, damaged, or of something else.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AuditError(f"{folder} is not a folder.")
    for name in (FITS_NAME, TABLE_NAME):
        if not (folder / name).is_file():
            raise AuditError(
                f"{folder} holds no {name}: give the output folder of a run with poprisk_label_noise."
            )
    try:
        content, fits = json.loads((folder / FITS_NAME).read_text()), load_fits(folder)
        mode, preferences, since = (content[k] for k in ("mode", "preferences", "judging_since"))
        valid = mode in LABEL_NOISE_MODES and isinstance(preferences, bool)
        valid &= since is None or type(since) is int
        sample = content.get("sample", {})
        valid = valid and all(map(_is_fit, fits)) and _is_sample(sample)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AuditError(f"{folder / FITS_NAME} cannot be read ({one_line(error)}).") from error
    if not valid:
        raise AuditError(f"{folder / FITS_NAME} cannot be read (a value is out of its range).")
    table = _load_table(folder / TABLE_NAME)
    if content.get("visits", table["visits"].sum()) != table["visits"].sum():
        raise AuditError(
            f"{TABLE_NAME} and {FITS_NAME} of {folder} are not of the same moment, because saving was "
            "interrupted: give a checkpoint of the run."
        )
    return Run(folder, mode, preferences, since, fits, sample=sample, **table)


def _is_fit(fit: NoiseFit) -> bool:
    values = [getattr(fit, name) for name in NoiseFit.__dataclass_fields__ if name != "exact"]
    if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        return False
    if type(fit.exact) is not bool:
        return False
    return 0 <= fit.low <= fit.rate <= fit.high <= MAX_RATE and fit.tau > 0 and fit.num_labels >= 2


def _is_sample(sample: object) -> bool:
    if not isinstance(sample, dict):
        return False
    return all(
        re.fullmatch(r"-?[0-9]+", index) and isinstance(columns, dict) for index, columns in sample.items()
    )


def _load_table(path: Path) -> dict[str, np.ndarray]:
    need("pyarrow", "reading the table")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise AuditError(f"{path} cannot be read ({one_line(error)}).") from error
    columns = {}
    for name in (INDEX, "visits", *_SCORES):
        if table.column_names.count(name) != 1:
            raise AuditError(f"{path} has no column {name}: it is not the table of a run.")
        column, is_whole = table[name], name in (INDEX, "visits")
        if not (pa.types.is_integer if is_whole else pa.types.is_floating)(column.type) or column.null_count:
            kind = "integers" if is_whole else "floating-point numbers"
            raise AuditError(f"the column {name} of {path} must hold {kind} and nothing else.")
        columns[name] = column.to_numpy().astype(np.int64 if is_whole else np.float64)
    ids, visits = columns[INDEX], columns["visits"]
    if len(np.unique(ids)) != len(ids):
        raise AuditError(f"{path} has an {INDEX} more than once.")
    if not (visits > 0).any():
        raise AuditError(f"{path} holds no example that was trained on.")
    if not all(np.isfinite(columns[name][visits > 0]).all() for name in _SCORES):
        raise AuditError(f"{path} holds scores that are not finite.")
    scores = {"heldout": "heldout_logodds", "loss_mean": "loss_mean", "suspicion": "suspicion"}
    return {"ids": ids, "visits": visits, **{name: columns[column] for name, column in scores.items()}}
