"""A judged run in a folder, and its data."""

from pathlib import Path

import datasets
import pytest

from leave_one_out.judged import pairs, save_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return save_run(tmp_path / "run")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    pairs().save_to_disk(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
