"""What is saved, and going on from it."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments
from hf_poprisk.checkpoints import damage
from hf_poprisk.leave_one_out import INDEX, TABLE_NAME
from hf_poprisk.leave_one_out.table import read_table
from leave_one_out.helpers import QUIET, Classifier, classify, examples, planted, prefer, same, weights

COLUMNS = ("judged", "log_odds", "weight")


def same_table(one: Any, other: Any) -> bool:
    return all(torch.equal(getattr(one.table, name), getattr(other.table, name)) for name in COLUMNS)


@pytest.mark.parametrize("kind", ["none", "soft", "DPO"])
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, llama_dir: Path, tmp_path: Path) -> None:
    """Bit for bit, and it judges nothing again; nor does a second training of the same model."""

    def trainer() -> Any:
        options: dict[str, Any] = {"poprisk_label_noise": "weight", "save_strategy": "steps"}
        if kind == "DPO":
            options |= {"save_steps": 3, "max_steps": 6}
            return prefer("DPO", llama_dir, tmp_path, planted()[0], **options)
        options |= {"poprisk_gate": kind, "save_steps": 27, "max_steps": 40}
        return classify(tmp_path, examples(wrong=0.2), **options)

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.judge_labels = None  # what was found is kept
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{3 if kind == 'DPO' else 27}"))
    assert same(weights(whole), weights(resumed))
    one, other = whole._label_noise, resumed._label_noise
    assert one.weighted and other.weighted and one.table.weight.min() < 0.6
    assert one.fit == other.fit and same_table(one, other)
    resumed.train()
    assert resumed._label_noise.fit == one.fit


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
    table = pq.read_table(checkpoint / TABLE_NAME)
    state = json.loads(table.schema.metadata[b"hf_poprisk"]) | {"rule": 3}
    older = table.drop_columns("weight").replace_schema_metadata({b"hf_poprisk": json.dumps(state)})
    pq.write_table(older, checkpoint / TABLE_NAME)
    again = classify(tmp_path, examples(), poprisk_label_noise="audit", **options)
    with pytest.raises(ValueError, match="by an earlier version, .* go on from it with poprisk_label_n"):
        again.train(resume_from_checkpoint=str(checkpoint))


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
    classify(tmp_path, examples(), optim="adamw_torch", poprisk_gate="hard", **options).train()
    judged = classify(tmp_path, examples(), poprisk_label_noise="audit", **options)
    with pytest.raises(ValueError, match="holds no judged.parquet: its examples were trained on without"):
        judged.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    options |= {"poprisk_allow_change": True, "num_train_epochs": 4}
    for checkpoint in (15, 30):  # and once more, from a checkpoint of its own
        judged = classify(tmp_path, examples(), poprisk_label_noise="audit", **options)
        judged.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
        assert judged._label_noise.table.judged.all() and judged._label_noise.fit
