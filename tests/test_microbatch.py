"""Trainers of a user's own, what a run says first, and numbers, data and folders that are faulty."""

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_worker import Fragile, assert_complete, build, examples, one_sentence, state_of
from losses import KINDS, SEQ2SEQ_DATA
from models import preferences, tiny_model
from test_trainer import Scaler, plain_trainer
from torch import nn
from torch.utils.data import Dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments

import hf_poprisk
from hf_poprisk import (
    PopRiskArgumentsMixin,
    PopRiskMixin,
    PopRiskTrainer,
    PopRiskTrainingArguments,
    load_record,
)
from hf_poprisk.checkpoints import CheckpointError

QUIET: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}

# A trainer and a config of one's own


@dataclass
class Seq2SeqArguments(PopRiskArgumentsMixin, Seq2SeqTrainingArguments):
    """As a user writes it."""

    beams: int = field(default=1, metadata={"help": "A field of the user's own."})


class GatedSeq2SeqTrainer(PopRiskMixin, Seq2SeqTrainer):
    """As a user writes it."""


def seq2seq(args: Any) -> GatedSeq2SeqTrainer:
    model = KINDS["token mean: bart"].model()
    return GatedSeq2SeqTrainer(model, args, train_dataset=SEQ2SEQ_DATA, eval_dataset=SEQ2SEQ_DATA[:2])


def test_a_sequence_to_sequence_trainer_of_ones_own_is_gated(tmp_path: Path) -> None:
    options = {"max_steps": 1, "logging_steps": 1, "predict_with_generate": True, **QUIET}
    trainer = seq2seq(Seq2SeqArguments(str(tmp_path), **options))
    trainer.train()
    assert 0 < trainer.state.log_history[0]["poprisk/fraction_open"] < 1
    assert "eval_loss" in trainer.evaluate()  # with generation, by the stock trainer


@pytest.mark.parametrize(
    ("config_class", "message"),
    [
        (
            Seq2SeqTrainingArguments,
            "Seq2SeqTrainingArguments: put PopRiskArgumentsMixin before Seq2SeqTrainingArguments in a "
            "dataclass",
        ),
        (
            PopRiskTrainingArguments,
            r"PopRiskTrainingArguments \(generation_config is missing\): put PopRiskArgumentsMixin before "
            "the config class of the stock trainer in a dataclass",
        ),
        (TrainingArguments, "TrainingArguments: use PopRiskTrainingArguments"),
    ],
)
def test_a_config_without_the_fields_is_refused_with_what_to_write(
    config_class: type[Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=rf"^GatedSeq2SeqTrainer does not take {message}( of your own)?\.$"):
        seq2seq(config_class(str(tmp_path), **QUIET))


def test_an_error_of_the_users_own_keeps_its_own_words(tmp_path: Path) -> None:
    def model_init() -> Any:
        return object().weights  # type: ignore[attr-defined]

    args = PopRiskTrainingArguments(str(tmp_path), **QUIET)
    with pytest.raises(AttributeError, match="'object' object has no attribute 'weights'"):
        PopRiskTrainer(args=args, model_init=model_init, train_dataset=[{}] * 8)


class OwnLossTrainer(PopRiskTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs.pop("label_weight")
        return super().compute_loss(model, inputs, *args, **kwargs)


class WeightedModel(nn.Module):
    def forward(self, x: torch.Tensor, label_weight: torch.Tensor) -> dict[str, torch.Tensor]:
        raise NotImplementedError


@pytest.mark.parametrize("noise", ["off", "weight"])
def test_label_weights_that_nothing_reads_are_refused(noise: str, tmp_path: Path, llama_dir: Path) -> None:
    data = preferences(8).add_column("label_weight", [1.0] * 8)
    sentence = (
        "Trainer does not read the column label_weight: train with poprisk_weight_column=label_weight, "
        r"remove it, or read it in a compute_loss of your own\.$"
    )
    for kind in ("DPO", "Reward"):
        args = getattr(hf_poprisk, f"PopRisk{kind}Config")(
            str(tmp_path), bf16=False, poprisk_label_noise=noise, **QUIET
        )
        with pytest.raises(ValueError, match=f"^PopRisk{kind}{sentence}"):
            getattr(hf_poprisk, f"PopRisk{kind}Trainer")(str(llama_dir), args=args, train_dataset=data)
    args = PopRiskTrainingArguments(str(tmp_path), poprisk_label_noise=noise, **QUIET)
    with pytest.raises(ValueError, match=f"^PopRisk{sentence}"):
        PopRiskTrainer(tiny_model(), args, train_dataset=data)
    if noise == "off":  # a loss or a model of one's own may
        OwnLossTrainer(tiny_model(), args, train_dataset=data)
        PopRiskTrainer(WeightedModel(), args, train_dataset=data)


# What a run says at the start


def test_a_run_without_the_gate_says_so_once_and_on_the_main_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, other = (plain_trainer(tmp_path, max_steps=1, optim="sgd") for _ in range(2))
    monkeypatch.setattr(other, "is_world_process_zero", lambda: False)
    for run in (trainer, trainer, other, plain_trainer(tmp_path, max_steps=1)):
        run.train()
    sentence = "optim=sgd: plain sgd, no population-risk gate; set optim=poprisk_adamw for it."
    assert [r.message for r in caplog.records if "no population-risk gate" in r.message] == [sentence]


@pytest.mark.parametrize(
    ("size", "steps", "options", "few"),
    [
        (2, 1, {}, True),
        (1, 3, {}, True),
        (4, 1, {}, False),
        (2, 1, {"poprisk_estimator": "ema"}, False),
        (4, 2, {"poprisk_estimator": "group"}, True),
        (2, 1, {"poprisk_gate": "none"}, False),
    ],
)
def test_the_summary_hints_at_too_few_examples(
    size: int,
    steps: int,
    options: dict[str, Any],
    few: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    layout = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    plain_trainer(tmp_path, max_steps=1, **layout, **options).train()
    [line] = [r.message for r in caplog.records if r.message.startswith("population-risk gate:")]
    units = 2 if options else size * steps
    hint = f" With {units} per step the test has little power, and noise often passes: raise "
    assert line.endswith(f"{hint}gradient_accumulation_steps.") if few else "little power" not in line


# Numbers


LAYOUTS: dict[str, dict[str, Any]] = {
    "one by one": {},
    "batched": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
    "groups": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "poprisk_estimator": "group",
    },
    "ema": {"poprisk_estimator": "ema"},
}
NUMBERS = {
    "NaN loss": {"loss_factor": float("nan")},
    "infinite gradient": {"grad_factor": float("inf")},
    "overflow under a loss scaler": {"grad_factor": 1e38},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_that_are_not_finite_leave_the_step_out(
    number: str, layout: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = examples(12, faulty=5, **NUMBERS[number])
    trainer = build(tmp_path, data, **layout)
    scaler = Scaler(trainer).accelerator.scaler if "scaler" in number else None
    try:
        with caplog.at_level(logging.WARNING):
            trainer.train()
    finally:
        trainer.accelerator.state._mixed_precision = "no"  # the state is shared by all accelerators
    assert_complete(tmp_path, [1, 2, 3])
    checkpoints = [tmp_path / f"checkpoint-{step}" for step in (1, 2, 3)]
    first, second, third = map(state_of, checkpoints)
    assert all(map(torch.equal, first, second)) and not all(map(torch.equal, second, third))
    logs = trainer.state.log_history[:3]
    assert ["poprisk/fraction_open" in entry for entry in logs] == [True, False, True]
    if scaler is not None:
        assert scaler.get_scale() == 512.0
        return
    said = [r.message for r in caplog.records if "left out" in r.message]
    assert said == ["a gradient is not finite: this optimizer step was left out."]
    assert [entry.get("poprisk/steps_skipped") for entry in logs] == [None, 1.0, None]
    assert load_record(checkpoints[2]).statistics["steps_skipped"] == 1
    # what was saved after the step that was left out is as good as any
    build(tmp_path, data, **layout).train(resume_from_checkpoint=str(checkpoints[1]))
    assert all(map(torch.equal, third, state_of(checkpoints[2])))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_weights_that_are_nan_stop_the_run_by_name(layout: dict[str, Any], tmp_path: Path) -> None:
    trainer = build(tmp_path, examples(12), **layout)
    with torch.no_grad():
        trainer.model.first.weight[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match=r"because first\.weight is not: load"):
        trainer.train()
    assert trainer.state.global_step == 0


# Data and folders


class Broken(Dataset):
    """One row cannot be read until somebody repairs it."""

    def __init__(self, rows: list[dict[str, torch.Tensor]], broken: int | None) -> None:
        self.rows, self.broken = rows, broken

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == self.broken:
            raise LookupError(f"row {index} cannot be read")
        return self.rows[index]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_an_example_that_cannot_be_read(layout: dict[str, Any], tmp_path: Path) -> None:
    build(tmp_path / "undisturbed", examples(16), max_steps=4, **layout).train()
    data = Broken(examples(16), broken=10)  # in the middle of the third step
    trainer = build(tmp_path / "run", data, max_steps=4, **layout)
    with pytest.raises(LookupError, match="^row 10 cannot be read$"):
        trainer.train()
    # accelerate reads one batch ahead, which is a whole step where nothing is accumulated
    assert_complete(tmp_path / "run", [1] if layout.get("gradient_accumulation_steps") == 1 else [1, 2])
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    data.broken = None
    trainer.train(resume_from_checkpoint=True)  # with half a window behind it
    assert_complete(tmp_path / "run", [1, 2, 3, 4])
    end, expected = (state_of(tmp_path / name / "checkpoint-4") for name in ("run", "undisturbed"))
    assert all(map(torch.equal, end, expected))


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/below", "/proc"])
def test_an_output_folder_that_cannot_be_written_to(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    sentence = r"^output_dir=.* cannot be written to \(.*\): choose another"
    with pytest.raises(ValueError, match=sentence) as error:
        build(tmp_path / place, examples(12))
    assert str(tmp_path / place) in one_sentence(error.value)
    trainer = build(tmp_path, examples(12))
    trainer.args.output_dir = str(tmp_path / place)
    with pytest.raises(ValueError, match="cannot be written to"):
        trainer.train()
    assert all(map(torch.equal, trainer.model.parameters(), Fragile().parameters()))
    assert (tmp_path / "file").read_text() == "not a folder"


def test_an_output_folder_that_turns_into_a_file(tmp_path: Path) -> None:
    trainer = build(tmp_path / "run", examples(12))
    check_training = trainer.args.check_training

    def turned() -> None:
        check_training()
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").write_text("somebody's file")

    trainer.args.check_training = turned
    sentence = "checkpoint-1 could not be written .*; there is no complete"
    with pytest.raises(CheckpointError, match=sentence) as error:
        trainer.train()
    one_sentence(error.value)
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert (tmp_path / "run").read_text() == "somebody's file"
