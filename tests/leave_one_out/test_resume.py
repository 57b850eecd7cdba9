"""What is saved, and going on from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments
from hf_poprisk.checkpoints import damage
from hf_poprisk.leave_one_out import INDEX, TABLE_NAME
from hf_poprisk.leave_one_out.table import read_table
from leave_one_out.helpers import QUIET, Classifier, classify, examples, same, weights


def test_an_interval_of_the_log_goes_on_and_an_audit_weighs_no_loss(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 2, "max_steps": 4}
    classify(tmp_path / "audit", examples(), poprisk_label_noise="audit", **options).train()
    assert "loss_weighted" not in (tmp_path / "audit/checkpoint-4/trainer_state.json").read_text()
    options |= {"poprisk_label_noise": "weight"}
    whole = classify(tmp_path / "run", examples(), **options)
    whole.train()
    resumed = classify(tmp_path / "run", examples(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    logged = [t.state.log_history[-2]["poprisk/loss_weighted"] for t in (whole, resumed)]
    assert logged[0] == logged[1]  # over a step before the checkpoint and one after it


@pytest.mark.parametrize("gate", ["none", "soft"])
def test_a_resumed_run_is_the_uninterrupted_one(gate: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"poprisk_label_noise": "weight", "poprisk_gate": gate, "max_steps": 40}
    options |= {"save_strategy": "steps", "save_steps": 27, "logging_steps": 2}  # a log goes on over it
    whole, resumed = (classify(tmp_path, examples(wrong=0.2), **options) for _ in range(2))
    whole.train()
    resumed._judge_labels = None  # what was found is kept
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-27"))
    assert same(weights(whole), weights(resumed))
    one, other = whole._label_noise, resumed._label_noise
    assert one.weighted and other.weighted and one.table.columns["weight"].min() < 0.5
    assert one.fit == other.fit
    assert torch.equal(one.table.visits, other.table.visits)
    for name, column in one.table.columns.items():
        assert torch.equal(column, other.table.columns[name]), name
    logs = [[e for e in t.state.log_history if e["step"] > 27 and "loss" in e] for t in (whole, resumed)]
    assert [e.get("poprisk/weight_mean") for e in logs[0]] == [e.get("poprisk/weight_mean") for e in logs[1]]


def test_a_second_training_keeps_what_was_found(tmp_path: Path) -> None:
    trainer = classify(tmp_path, examples(), poprisk_label_noise="audit", num_train_epochs=1)
    trainer.train()
    first, trainer._judge_labels = trainer._label_noise.fit, None
    trainer.train()
    assert trainer._label_noise.fit == first and trainer._label_noise.table.visits.tolist() == [1] * 60


def test_a_model_of_a_new_start_has_seen_nothing(tmp_path: Path) -> None:
    options = {**QUIET, "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2}
    args = PopRiskTrainingArguments(str(tmp_path), poprisk_label_noise="audit", **options)
    trainer = PopRiskTrainer(args=args, train_dataset=examples(), model_init=Classifier)
    found = []
    for _ in range(2):
        trainer.train()
        found.append(trainer._label_noise)
    assert found[0].fit == found[1].fit and found[0] is not found[1]
    for name, column in found[0].table.columns.items():
        assert torch.equal(column, found[1].table.columns[name]), name


def test_the_scores_of_another_model_do_not_stay(tmp_path: Path) -> None:
    classify(tmp_path, examples(), poprisk_label_noise="audit").train()
    assert (tmp_path / TABLE_NAME).exists()
    trainer = classify(tmp_path, examples(), max_steps=1)
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / TABLE_NAME).exists()


def test_what_is_saved(tmp_path: Path) -> None:
    trainer = classify(
        tmp_path, examples(), poprisk_label_noise="audit", save_strategy="epoch", num_train_epochs=2
    )
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-15", tmp_path / "checkpoint-30"):
        table = Dataset.from_parquet(str(folder / TABLE_NAME), keep_in_memory=True)
        assert table.column_names == [*("index", "p_correct", "visits", "log_odds", "weight", "rank")]
        assert table["index"][:] == list(range(60)) and all(0 <= p <= 1 for p in table["p_correct"])
    state = read_table(tmp_path)[1]
    assert state["fit"]["rate"] == trainer._label_noise.fit.rate and state["mode"] == "audit"
    assert json.loads((tmp_path / "poprisk_config.json").read_text())["label_noise"] == "audit"


def test_resuming_under_another_mode_is_refused(tmp_path: Path) -> None:
    options = {"save_strategy": "epoch", "num_train_epochs": 2}
    classify(tmp_path, examples(), poprisk_label_noise="audit", **options).train()
    changed = classify(tmp_path, examples(), poprisk_label_noise="weight", **options)
    with pytest.raises(ValueError, match="would change poprisk_label_noise from 'audit' to 'weight'"):
        changed.train(resume_from_checkpoint=True)
    torn = tmp_path / "checkpoint-30" / TABLE_NAME
    torn.write_bytes(torn.read_bytes()[:-10])
    assert damage(torn.parent) == f"{TABLE_NAME} is cut off"
    for allow, said in ((False, "training examples from 60 to 72"), (True, "resume with the same data")):
        options["poprisk_allow_change"] = allow
        other = classify(tmp_path, examples(72), poprisk_label_noise="audit", **options)
        with pytest.raises(ValueError, match=said):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))


def test_resuming_with_first_differences_is_refused(tmp_path: Path) -> None:
    plain = Dataset.from_list([{"x": e["x"].tolist(), "labels": int(e["labels"])} for e in examples()])
    numbered = plain.add_column(INDEX, list(range(100, 160)))
    for name, data in (("plain", plain), ("numbered", numbered)):
        options = {"save_strategy": "epoch", "num_train_epochs": 2, "poprisk_label_noise": "audit"}
        classify(tmp_path / name, data, **options | {"num_train_epochs": 1}).train()
        classify(tmp_path / name, data, **options).train(resume_from_checkpoint=True)
        shuffled = classify(tmp_path / name, data.shuffle(seed=0), **options)
        checkpoint = str(tmp_path / name / "checkpoint-15")
        if name == "numbered":
            shuffled._label_noise.load(checkpoint)
            table = shuffled._label_noise.table
            saved = Dataset.from_parquet(f"{checkpoint}/{TABLE_NAME}", keep_in_memory=True)
            known = dict(zip(saved["index"], saved["log_odds"], strict=True))
            assert table.columns["log_odds"].tolist() == [known[i] for i in table.ids.tolist()]
            shuffled.train(resume_from_checkpoint=checkpoint)
            assert shuffled._label_noise.table.visits.tolist() == [1] * 60
        else:
            with pytest.raises(ValueError, match="the training data are not those of .* has another x"):
                shuffled.train(resume_from_checkpoint=checkpoint)
            assert not shuffled._label_noise.table.visits.any()  # nothing of the others stays


def test_a_checkpoint_without_scores_is_refused(tmp_path: Path) -> None:
    options = {"save_strategy": "epoch", "num_train_epochs": 2}
    classify(tmp_path, examples(), optim="adamw_torch", poprisk_gate="hard", **options).train()
    judged = classify(tmp_path, examples(), poprisk_label_noise="audit", **options)
    with pytest.raises(ValueError, match="holds no judged.parquet: its examples were trained on without"):
        judged.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    options |= {"poprisk_allow_change": True, "num_train_epochs": 4}
    for checkpoint in (15, 30):  # and once more, from a checkpoint of its own
        judged = classify(tmp_path, examples(), poprisk_label_noise="audit", **options)
        judged.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
        assert judged._label_noise.table.visits.tolist() == [1] * 60 and judged._label_noise.fit


def test_an_interrupted_step_is_not_in_the_logs(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    stop = Stop()
    trainer = classify(tmp_path, examples(), poprisk_label_noise="weight", gradient_accumulation_steps=3)
    trainer.add_callback(stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(stop)
    trainer.model.zero_grad()
    trainer.args.max_steps = 1
    trainer._label_noise.pop_logs = lambda: {"poprisk/visits": trainer._label_noise._sums[0].item()}
    trainer.train()
    assert trainer.state.log_history[0]["poprisk/visits"] == 12
