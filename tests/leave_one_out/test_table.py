"""One row per example, in memory and as Parquet."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_poprisk.leave_one_out import TABLE_NAME, ExampleTable, fit_noise
from hf_poprisk.leave_one_out.table import read_table
from leave_one_out.helpers import drawn


@pytest.mark.parametrize("ids", ["range", "shuffled"])
def test_rows_are_found_by_the_index(ids: str, tmp_path: Path) -> None:
    known = np.arange(50) if ids == "range" else np.random.default_rng(0).permutation(10_000)[:50] - 7
    table = ExampleTable(known)
    for start in range(0, 50, 10):
        index = torch.tensor(known[start : start + 10]).flip(0)
        rows = table.rows(index)
        assert len(rows.unique()) == 10 and torch.equal(table.ids[rows], index)
        table.visit(rows, log_odds=index.float())
    table.save(tmp_path / TABLE_NAME, np.full(len(table), 0.5), {})
    saved = Dataset.from_parquet(str(tmp_path / TABLE_NAME), keep_in_memory=True)
    by_id = {row["index"]: row for row in saved}
    assert set(by_id) == set(known.tolist()) and by_id[known[7]]["log_odds"] == known[7]
    assert by_id[known[0]]["visits"] == 1 and by_id[known[0]]["weight"] == 1.0

    other = ExampleTable(known)
    other.load(read_table(tmp_path)[0])
    assert torch.equal(other.ids, table.ids)
    assert torch.equal(other.rows(table.ids), torch.arange(50))
    for name, column in table.columns.items():
        assert torch.equal(column[:50], other.columns[name][:50])


def test_a_wrong_index_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be unique, and 5 is there more than once"):
        ExampleTable(np.array([3, 5, 5]))
    table = ExampleTable(np.array([3, 9, 5]))
    with pytest.raises(KeyError, match="4 is not in the training set"):
        table.rows(torch.tensor([3, 4]))
    table.save(tmp_path / TABLE_NAME, np.full(len(table), 0.5), {})
    with pytest.raises(ValueError, match="resume with the same data"):
        ExampleTable(np.array([3, 9, 6])).load(read_table(tmp_path)[0])


def test_a_million_examples(tmp_path: Path) -> None:
    n = 1_000_000
    table = ExampleTable(np.random.default_rng(0).permutation(n) + 10**12)
    index = table.ids[torch.randint(n, (64,))].unique()
    table.visit(table.rows(index), log_odds=torch.arange(len(index)).float())
    assert sorted(table.columns["log_odds"][table.visits > 0].tolist()) == list(range(len(index)))
    assert sum(x.numel() * x.element_size() for x in (table.visits, *table.columns.values())) <= 20 * n
    table.save(tmp_path / TABLE_NAME, np.full(len(table), 0.5), {})
    other = ExampleTable(table.ids.numpy())
    other.load(read_table(tmp_path)[0])
    assert torch.equal(other.visits, table.visits)
    zeta, wrong = drawn(n, 0.2, 2)
    assert fit_noise(zeta).rate == pytest.approx(wrong.mean(), abs=0.005)
