"""Judging a stream."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset

from hf_poprisk import PopRiskTrainingArguments
from hf_poprisk.leave_one_out import INDEX
from leave_one_out.helpers import classify, examples, streamed


def test_a_stream_with_ids(tmp_path: Path) -> None:
    trainer = streamed(tmp_path, max_steps=18)
    trainer.train()
    table = trainer._label_noise.table
    assert table.ids.tolist() == [7 * i for i in range(24)] and table.visits[:24].tolist() == [3] * 24
    # once per pass, when its end is there
    assert [(f.epoch, f.step) for f in trainer._label_noise.fits] == [(1, 6), (2, 12), (3, 18)]


@pytest.mark.parametrize(
    ("accumulation", "max_steps", "steps"), [(1, 8, [6]), (3, 4, [2, 4]), (3, 5, [2, 4])]
)
def test_a_part_of_a_stream_is_no_pass(
    accumulation: int, max_steps: int, steps: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = streamed(tmp_path, gradient_accumulation_steps=accumulation, max_steps=max_steps)
    trainer.train()
    fits = trainer._label_noise.fits
    assert [(fit.epoch, fit.step) for fit in fits] == [(i, step) for i, step in enumerate(steps, 1)]
    cut = streamed(tmp_path, gradient_accumulation_steps=accumulation, max_steps=1)
    cut.train()
    assert not cut._label_noise.fits and "training ended within its first epoch" in caplog.text


def test_a_stream_is_resumed_within_its_first_pass_only(tmp_path: Path) -> None:
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 4}
    whole, resumed = streamed(tmp_path, **options), streamed(tmp_path, **options)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    one, other = whole._label_noise, resumed._label_noise
    assert (
        [(f.epoch, f.step) for f in one.fits] == [(f.epoch, f.step) for f in other.fits] == [(1, 6), (2, 12)]
    )
    assert torch.equal(one.table.visits, other.table.visits) and one.fits[0] == other.fits[0]
    with pytest.raises(ValueError, match="a stream that has been passed once is not resumed where it was"):
        streamed(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_a_stream_on_several_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"x": e["x"].tolist(), "labels": int(e["labels"]), INDEX: i} for i, e in enumerate(examples())]
    monkeypatch.setattr(PopRiskTrainingArguments, "world_size", 2)
    monkeypatch.setattr(PopRiskTrainingArguments, "check_training", lambda self: None)
    with pytest.raises(ValueError, match="cannot tell the examples of a stream on several processes"):
        classify(
            tmp_path, Dataset.from_list(rows).to_iterable_dataset(), poprisk_label_noise="audit", max_steps=2
        )
