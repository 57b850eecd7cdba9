"""When labels are judged, what is saved of it, and going on from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from test_checkpoints import assert_same
from transformers import TrainerCallback

from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments
from hf_poprisk.checkpoints import damage
from hf_poprisk.leave_one_out import INDEX, TABLE_NAME
from hf_poprisk.leave_one_out.table import read_table
from leave_one_out.helpers import QUIET, Classifier, classify, examples, planted, prefer, same, weights

COLUMNS = ("judged", "log_odds", "weight")


def same_table(one: Any, other: Any) -> bool:
    return all(torch.equal(getattr(one.table, name), getattr(other.table, name)) for name in COLUMNS)


LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian", lora_dropout=0.2)
# Two epochs of 15 or 16 micro-batches, 8 steps each
KINDS: dict[str, dict[str, Any]] = {
    "classes": {},
    "classes, gated": {"poprisk_gate": "soft"},
    "DPO": {"poprisk_gate": "hard"},
    "DPO, LoRA": {"peft_config": LORA, "disable_dropout": False},
    "Reward": {},
}


class AtEpochEnds(TrainerCallback):
    """The weights at the end of each epoch, and when labels were judged."""

    def __init__(self, trainer: Any) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.judged_at: list[int] = []
        self._trainer, judge = trainer, trainer.judge_labels
        trainer.judge_labels = lambda: (self.judged_at.append(trainer.state.global_step), judge())[1]
        trainer.add_callback(self)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append(weights(self._trainer))


def build(kind: str, llama_dir: Path, folder: Path, mode: str = "weight", **options: Any) -> Any:
    options = {
        **{"gradient_accumulation_steps": 2, "num_train_epochs": 2, "lr_scheduler_type": "linear"},
        **KINDS[kind],
        **{"poprisk_label_noise": mode, "poprisk_judge_after_epochs": int(mode != "off"), **options},
    }
    if kind.startswith("classes"):
        return classify(folder, examples(60, wrong=0.2), optim="poprisk_adamw", **options)
    return prefer(kind.split(",")[0], llama_dir, folder, planted()[0], **options)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_judged_at_the_weights_after_an_epoch(kind: str, llama_dir: Path, tmp_path: Path) -> None:
    """Which are those of plain training, bit for bit; an audit leaves all of it as it is."""
    trainers, seen = {}, {}
    for mode in ("off", "audit", "weight"):
        trainers[mode] = build(kind, llama_dir, tmp_path, mode)
        seen[mode] = AtEpochEnds(trainers[mode])
        trainers[mode].train()
    assert [seen[mode].judged_at for mode in seen] == [[], [8], [8]]
    for one, other in zip(seen["off"].weights, seen["audit"].weights, strict=True):
        assert same(one, other)
    (plain, last), (first, weighted) = seen["off"].weights, seen["weight"].weights
    for name, weight in plain.items():
        torch.testing.assert_close(first[name], weight, rtol=1e-5, atol=1e-5)  # weights of 1 may round
    assert not same(last, weighted) and not same(plain, last)

    fresh = build(kind, llama_dir, tmp_path / "fresh")
    fresh.model.load_state_dict(first, strict=False)
    fresh.judge_labels()
    found, expected = (trainer._label_noise for trainer in (trainers["weight"], fresh))
    assert found.fit == expected.fit and same_table(found, expected) and found.weighted
    assert found.table.weight.min() < 0.9 and "weights since step 8" in found.found()
    start = build(kind, llama_dir, tmp_path / "fresh")
    start.judge_labels()
    assert not torch.equal(start._label_noise.table.log_odds, found.table.log_odds)


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("kind", ["classes, gated", "DPO, LoRA", "DPO"])
def test_a_run_is_resumed_before_and_after_the_judgement(
    kind: str, after: int, llama_dir: Path, tmp_path: Path
) -> None:
    """Bit for bit, and it judges once; checkpoint-8 is of the last step of the epoch."""
    options = {"poprisk_judge_after_epochs": after}
    whole = build(kind, llama_dir, tmp_path, save_strategy="steps", save_steps=1, **options)
    whole.train()
    assert whole._label_noise.weighted and whole._label_noise.table.weight.min() < 0.9
    for step, judged_at in ((5, [8] * after), (8, []), (9, [])):
        resumed = build(kind, llama_dir, tmp_path / "other", **options)
        seen = AtEpochEnds(resumed)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert seen.judged_at == judged_at
        assert_same(whole, resumed)
        assert resumed._label_noise.found() == whole._label_noise.found()
        assert same_table(whole._label_noise, resumed._label_noise)
        assert resumed._label_noise.fit == whole._label_noise.fit
    resumed.train()  # nor does a second training of the same model
    assert resumed._label_noise.fit == whole._label_noise.fit
    changed = build(kind, llama_dir, tmp_path / "other", num_train_epochs=3, poprisk_judge_after_epochs=2)
    with pytest.raises(ValueError, match=f"would change poprisk_judge_after_epochs from {after} to 2"):
        changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


@pytest.mark.parametrize("way", ["epochs", "steps", "resumed"])
def test_an_audit_may_be_at_the_end(way: str, llama_dir: Path, tmp_path: Path) -> None:
    length = {"max_steps": 8} if way == "steps" else {"num_train_epochs": 1}
    trainer = build("classes", llama_dir, tmp_path, "audit", save_strategy="steps", save_steps=8, **length)
    trainer.train()
    assert trainer._label_noise.step == 8
    columns, state = read_table(tmp_path / "checkpoint-8")  # which was written in that step
    assert columns["visits"].all() and state["fit"]["rate"] == trainer._label_noise.fit.rate
    if way == "resumed":
        again = build("classes", llama_dir, tmp_path / "other", "audit", **length)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
        assert again.state.global_step == 8 and again._label_noise.fit == trainer._label_noise.fit


def test_an_earlier_model_is_not_said_to_be_weighted(llama_dir: Path, tmp_path: Path) -> None:
    """The best one of the run, which was loaded at the end, is of before the weights."""
    options: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    options |= {"eval_dataset": examples(seed=3), "load_best_model_at_end": True, "greater_is_better": True}
    trainer = build("classes", llama_dir, tmp_path, **options)
    trainer.train()
    assert trainer.state.best_global_step == 8 and trainer._label_noise.weighted
    card = trainer._card_section(trainer._record())
    assert ", weights since step 8, but this model is of step 8.\n" in card


@pytest.mark.parametrize(("mode", "steps"), [("weight", 8), ("audit", 7)])
def test_steps_that_end_before_are_refused(mode: str, steps: int, llama_dir: Path, tmp_path: Path) -> None:
    trainer = build("classes", llama_dir, tmp_path, mode, max_steps=steps)
    before = weights(trainer)
    with pytest.raises(ValueError, match=f"^max_steps={steps} ends before poprisk_judge_after_epochs=1 has "):
        trainer.train()
    assert same(before, weights(trainer))
    build("classes", llama_dir, tmp_path, mode, max_steps=steps + 1).train()


def test_a_run_that_another_callback_ends_says_that_nothing_was_judged(
    llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    trainer = build("classes", llama_dir, tmp_path)
    trainer.add_callback(Stop())
    trainer.train()
    assert trainer._label_noise.fit is None
    assert "no label was judged: training ended before poprisk_judge_after_epochs" in caplog.text


def test_a_model_of_a_new_start_has_seen_nothing(tmp_path: Path) -> None:
    options = {**QUIET, "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2}
    args = PopRiskTrainingArguments(str(tmp_path), poprisk_label_noise="audit", **options)
    trainer = PopRiskTrainer(args=args, train_dataset=examples(), model_init=Classifier)
    judge, found = trainer.judge_labels, []
    trainer.judge_labels = lambda: found.append(judge()) or found[-1]
    for _ in range(2):
        trainer.train()
    assert len(found) == 2 and found[0].fit == found[1].fit


def test_what_is_saved(tmp_path: Path) -> None:
    options = {"save_strategy": "epoch", "num_train_epochs": 2}
    trainer = classify(tmp_path, examples(), poprisk_label_noise="audit", **options)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-15", tmp_path / "checkpoint-30"):
        table = Dataset.from_parquet(str(folder / TABLE_NAME), keep_in_memory=True)
        assert table.column_names == [*("index", "p_correct", "visits", "log_odds", "weight", "rank")]
        assert table["index"][:] == list(range(60)) and all(0 <= p <= 1 for p in table["p_correct"])
    state = read_table(tmp_path)[1]
    assert state["fit"]["rate"] == trainer._label_noise.fit.rate and state["mode"] == "audit"
    assert json.loads((tmp_path / "poprisk_config.json").read_text())["label_noise"] == "audit"
    other = classify(tmp_path, examples(), max_steps=1)
    other.train()
    other.save_model()
    assert not (tmp_path / TABLE_NAME).exists()  # the scores of another model do not stay


def test_resuming_under_another_mode_or_other_data_is_refused(tmp_path: Path) -> None:
    options = {"save_strategy": "epoch", "num_train_epochs": 2}
    classify(tmp_path, examples(), poprisk_label_noise="audit", **options).train()
    changed = classify(tmp_path, examples(), poprisk_label_noise="weight", **options)
    with pytest.raises(ValueError, match="would change poprisk_label_noise from 'audit' to 'weight'"):
        changed.train(resume_from_checkpoint=True)
    torn = tmp_path / "checkpoint-30" / TABLE_NAME
    torn.write_bytes(torn.read_bytes()[:-10])
    assert damage(torn.parent) == f"{TABLE_NAME} is cut off"
    checkpoint = tmp_path / "checkpoint-15"
    for allow, said in ((False, "training examples from 60 to 72"), (True, "resume with the same data")):
        options["poprisk_allow_change"] = allow
        other = classify(tmp_path, examples(72), poprisk_label_noise="audit", **options)
        with pytest.raises(ValueError, match=said):
            other.train(resume_from_checkpoint=str(checkpoint))


def test_resuming_with_rows_in_another_order_is_refused(tmp_path: Path) -> None:
    plain = Dataset.from_list([{"x": e["x"].tolist(), "labels": int(e["labels"])} for e in examples()])
    numbered = plain.add_column(INDEX, list(range(100, 160)))
    for name, data in (("plain", plain), ("numbered", numbered)):
        options = {"save_strategy": "epoch", "num_train_epochs": 2, "poprisk_label_noise": "audit"}
        classify(tmp_path / name, data, **options | {"num_train_epochs": 1}).train()
        classify(tmp_path / name, data, **options).train(resume_from_checkpoint=True)
        shuffled = classify(tmp_path / name, data.shuffle(seed=0), **options)
        checkpoint, table = str(tmp_path / name / "checkpoint-15"), shuffled._label_noise.table
        if name == "numbered":
            shuffled.train(resume_from_checkpoint=checkpoint)
            saved = Dataset.from_parquet(f"{checkpoint}/{TABLE_NAME}", keep_in_memory=True)
            known = dict(zip(saved["index"], saved["log_odds"], strict=True))
            assert table.log_odds.tolist() == [known[i] for i in table.ids.tolist()]
        else:
            with pytest.raises(ValueError, match="the training data are not those of .* has another x"):
                shuffled.train(resume_from_checkpoint=checkpoint)
            assert not table.judged.any()  # nothing of the others stays


def test_a_checkpoint_without_scores_is_refused(tmp_path: Path) -> None:
    options = {"save_strategy": "epoch", "num_train_epochs": 2}
    classify(tmp_path, examples(), optim="adamw_torch", **options).train()
    judged = classify(tmp_path, examples(), poprisk_label_noise="audit", **options)
    with pytest.raises(ValueError, match="holds no judged.parquet: its examples were trained on without"):
        judged.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    options |= {"poprisk_allow_change": True, "num_train_epochs": 4}
    for checkpoint in (15, 30):  # and once more, from a checkpoint of its own
        judged = classify(tmp_path, examples(), poprisk_label_noise="audit", **options)
        judged.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
        assert judged._label_noise.table.judged.all() and judged._label_noise.fit
