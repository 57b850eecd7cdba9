"""One row per example, in memory and as Parquet; what a judged run left, and files that are none."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from hf_poprisk.leave_one_out import TABLE_NAME, ExampleTable, NoiseFit
from hf_poprisk.leave_one_out.table import load_run, read_table
from leave_one_out.judged import FIT, N, command, log_odds, posterior, refused, save_run


@pytest.mark.parametrize("ids", ["range", "shuffled"])
def test_rows_are_found_by_the_index(ids: str, tmp_path: Path) -> None:
    known = np.arange(50) if ids == "range" else np.random.default_rng(0).permutation(10_000)[:50] - 7
    table = ExampleTable(known)
    for start in range(0, 50, 10):
        index = torch.tensor(known[start : start + 10]).flip(0)
        rows = table.rows(index)
        assert len(rows.unique()) == 10 and torch.equal(table.ids[rows], index)
        table.log_odds[rows], table.judged[rows] = index.float(), True
    table.save(tmp_path / TABLE_NAME, np.full(len(table), 0.5), {})
    saved = Dataset.from_parquet(str(tmp_path / TABLE_NAME), keep_in_memory=True)
    by_id = {row["index"]: row for row in saved}
    assert set(by_id) == set(known.tolist()) and by_id[known[7]]["log_odds"] == known[7]
    assert by_id[known[0]]["visits"] == 1 and by_id[known[0]]["weight"] == 1.0

    other = ExampleTable(known[::-1].copy())
    other.load(read_table(tmp_path)[0])
    assert torch.equal(other.log_odds.flip(0), table.log_odds) and other.judged.all()
    with pytest.raises(ValueError, match="resume with the same data"):
        ExampleTable(known + 1).load(read_table(tmp_path)[0])
    with pytest.raises(KeyError, match="10001 is not in the training set"):
        table.rows(torch.tensor([known[3], 10001]))
    with pytest.raises(ValueError, match="must be unique, and 5 is there more than once"):
        ExampleTable(np.array([3, 5, 5]))


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
    (run / TABLE_NAME).unlink()
    assert f"holds no {TABLE_NAME}" in refused(capsys, run)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda t: t.drop_columns(["log_odds"]), "is not the table of a judged run"),
        (lambda t: t.replace_schema_metadata({}), "is not the table of a judged run"),
        (
            lambda t: t.drop_columns("weight").replace_schema_metadata({"hf_poprisk": '{"rule": 3}'}),
            "was judged by an earlier version, whose scores are by another rule: judge the labels again",
        ),
        (lambda t: t.slice(0, 0), "no example that was judged"),
        (lambda t: None, f"{TABLE_NAME} cannot be read"),
    ],
)
def test_tables_of_something_else(run: Path, capsys: Any, damage: Any, says: str) -> None:
    path = run / TABLE_NAME
    damaged = damage(pq.read_table(path))
    if damaged is None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        pq.write_table(damaged, path)
    assert says in refused(capsys, run)
