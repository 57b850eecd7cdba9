"""What a judged run left, and files that are none."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_poprisk.leave_one_out import TABLE_NAME, NoiseFit
from hf_poprisk.leave_one_out.run import load_run
from leave_one_out.judged import FIT, N, command, log_odds, posterior, refused, save_run


@pytest.mark.parametrize(
    ("preferences", "fit"), [(True, FIT), (False, NoiseFit(0.2, 0.1, 0.3, 1.2, 5, -1.0, N))]
)
def test_labels_are_judged_as_the_formula_says(tmp_path: Path, preferences: bool, fit: NoiseFit) -> None:
    """And where an example was not judged, nothing but the rate is known of it."""
    run = load_run(save_run(tmp_path / "run", fit=fit, preferences=preferences, never=(3, 7)))
    expected = [1 - fit.rate if i in (3, 7) else posterior(float(z), fit) for i, z in enumerate(log_odds())]
    np.testing.assert_allclose(run.p_correct, expected, rtol=1e-6)


def test_folders_that_are_not_of_a_run(run: Path, tmp_path: Path, capsys: Any) -> None:
    nowhere = tmp_path / "nowhere"
    assert refused(capsys, nowhere) == f"{nowhere} is not a folder."
    assert "is not a folder" in refused(capsys, run / TABLE_NAME)
    assert command(capsys, run)
    (run / TABLE_NAME).rename(run / "label_noise.json")
    assert "was judged by an earlier version" in refused(capsys, run)
    (run / "label_noise.json").unlink()
    assert f"holds no {TABLE_NAME}" in refused(capsys, run)


def change(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, [values])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t: t.drop_columns(["log_odds"]), "is not the table of a judged run"),
        (lambda t: t.replace_schema_metadata({}), "is not the table of a judged run"),
        (lambda t: change(t, "index", pa.array([0] * N)), "has an index more than once"),
        (lambda t: change(t, "visits", pa.array([0] * N)), "no example that was judged"),
        (lambda t: change(t, "log_odds", pa.array([math.nan] * N)), "log-odds that are not finite"),
        (lambda t: t.slice(0, 0), "no example that was judged"),
    ],
)
def test_tables_of_something_else(run: Path, capsys: Any, damage: Any, says: str) -> None:
    pq.write_table(damage(pq.read_table(run / TABLE_NAME)), run / TABLE_NAME)
    assert re.search(says, refused(capsys, run))


@pytest.mark.parametrize("content", [b"", b"no table at all", None])
def test_damaged_table(run: Path, capsys: Any, content: bytes | None) -> None:
    whole = (run / TABLE_NAME).read_bytes()
    (run / TABLE_NAME).write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert f"{TABLE_NAME} cannot be read" in refused(capsys, run)
