"""The leap: the step against the textbook, and what it does to a run."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import tiny_model
from peft import LoraConfig
from scipy.special import expit

from hf_poprisk import load_record
from hf_poprisk.checkpoints import ResumeError
from hf_poprisk.leave_one_out import leap as leap_file
from hf_poprisk.leave_one_out.features import label_features
from hf_poprisk.leave_one_out.judgement import judge_pairs
from hf_poprisk.leave_one_out.leap import leap, trained_layers

from .helpers import classify, examples, planted, prefer, same, weights

SETTINGS: dict[str, Any] = {"poprisk_label_noise": "weight", "num_train_epochs": 0}


def log_odds(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Of "pairs" of rows, the first N chosen; float64 would not show float32's bases."""
    chosen, rejected = (
        model(batch).logits.log_softmax(-1)[:, :-1].gather(-1, batch[:, 1:, None]).sum((1, 2)).chunk(2)
    )
    return chosen - rejected


def test_the_step_is_the_textbooks() -> None:
    model = tiny_model("llama").eval()
    ids = torch.randint(5, 60, (24, 7))
    rows = [torch.cat([ids[:12][part], ids[12:][part]]) for part in (slice(0, 8), slice(8, 12))]
    features = label_features(model, lambda count: rows, log_odds, 2)
    alpha, w = torch.rand(12, 2), torch.rand(12)
    before, margin = weights_of(model), 0.01
    z = torch.cat([log_odds(model, batch) for batch in rows])
    layers = {name: part for part, bases in enumerate(features.bases) for name in bases}
    modules = dict(model.named_modules())
    grads = [torch.autograd.grad(x, [modules[n].weight for n in layers], retain_graph=True) for x in z]
    directions, slope = {}, 0.0
    for k, (name, part) in enumerate(layers.items()):
        basis, h = features.bases[part][name], torch.stack([g[k] for g in grads])
        pulled = basis.left.T @ torch.einsum("n,noi->oi", alpha[:, part], h) @ basis.right
        directions[name] = basis.left @ (pulled * basis.preconditioner()) @ basis.right.T
        slope += float((directions[name] * torch.einsum("n,noi->oi", w / w.sum(), h)).sum())
    found = leap(model, lambda: rows, log_odds, 2, features.bases, alpha, w, margin)
    assert found.predicted == margin
    assert found.reached == pytest.approx(margin, rel=0.05)
    with torch.no_grad():
        moved = torch.cat([log_odds(model, batch) for batch in rows])
    assert float(w @ (moved - z.detach()) / w.sum()) == pytest.approx(found.reached, rel=1e-3)
    assert len(layers) > 10
    for name, direction in directions.items():
        torch.testing.assert_close(
            modules[name].weight - before[name], margin / slope * direction, rtol=1e-3, atol=1e-6, msg=name
        )


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n.removesuffix(".weight"): p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("useless", [None, 0, 1])
def test_the_judges_solution_is_the_minimum(useless: int | None) -> None:
    """Of the regression weighted by p_correct: its gradient is zero there."""
    rng = np.random.default_rng(0)
    truth, parts = rng.normal(size=(2, 9)), [rng.normal(size=(200, 9)) + 0.1 for _ in range(2)]
    if useless is not None:
        truth[useless] = 0
    z = sum(x @ a for x, a in zip(parts, truth, strict=True))
    parts = [x * np.where(z > 0, 1, -1)[:, None] for x in parts]
    if useless is not None:
        parts[useless] = rng.normal(size=(200, 9))
    found = judge_pairs(parts)
    used = [0, 1] if found.part is None else [found.part]
    assert (found.dual.any(0) == [p in used for p in (0, 1)]).all()
    units = [parts[p] / np.linalg.norm(parts[p], axis=1, keepdims=True) for p in used]
    solution = [found.dual[:, p] @ parts[p] for p in used]
    fitted = sum(x @ a for x, a in zip(units, solution, strict=True)) / len(used)
    lengths = np.linalg.norm(parts[used[0]], axis=1)
    np.testing.assert_allclose(
        found.dual[:, used[0]] * lengths, found.p_correct * expit(-fitted) / found.ridge, rtol=1e-3
    )


@pytest.mark.parametrize("kind", ["DPO", "Reward"])
def test_a_leap_alone_ranks_pairs_that_were_swapped(kind: str, llama_dir: Path, tmp_path: Path) -> None:
    data, flips = planted(121)
    trainer = prefer(kind, llama_dir, tmp_path, data, poprisk_leap=0.5, **SETTINGS)

    def margins() -> np.ndarray:
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(121)])
        batch.pop("example_index", None)
        with torch.no_grad():
            return trainer.label_log_odds(trainer.model.eval(), trainer._prepare_inputs(batch)).numpy()

    before, z = weights(trainer), margins()
    trainer.train()
    found, [logs, _] = trainer._label_noise.leap, trainer.state.log_history  # and the end of training
    assert found.predicted == 0.5 and found.reached == pytest.approx(0.5, rel=0.2)
    assert logs["poprisk/leap_predicted"] == 0.5 and logs["poprisk/leap_reached"] == found.reached
    assert not same(weights(trainer), before)
    right = (margins() > z) != flips  # as the labels were before some were swapped
    assert right.mean() > 0.95 > 0.8 > 1 - flips.mean()


def test_a_resumed_run_does_not_leap_again(llama_dir: Path, tmp_path: Path) -> None:
    options = {
        "poprisk_label_noise": "weight",
        "poprisk_leap": 0.5,
        "num_train_epochs": 2,
        "save_strategy": "epoch",
    }
    run = partial(prefer, "DPO", llama_dir, data=planted()[0], **options)
    whole = run(tmp_path=tmp_path / "whole")
    whole.train()
    resumed = run(tmp_path=tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(sorted((tmp_path / "whole").glob("checkpoint-*"))[0]))
    assert whole.state.global_step == resumed.state.global_step > 0
    assert resumed._label_noise.leap == whole._label_noise.leap != (0, 0)
    assert same(weights(whole), weights(resumed))
    assert resumed.state.log_history[-2]["poprisk/leap_reached"] == whole._label_noise.leap.reached
    checkpoint = str(sorted((tmp_path / "whole").glob("checkpoint-*"))[0])
    with pytest.raises(ResumeError, match="poprisk_leap from 0.5 to 0.1"):
        run(tmp_path=tmp_path / "other", poprisk_leap=0.1).train(resume_from_checkpoint=checkpoint)


def test_a_leap_that_was_interrupted_is_made_by_the_next_call(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is in the record of what is saved, in place of another model's."""
    prefer("DPO", llama_dir, tmp_path, planted()[0], poprisk_gate="hard").save_model()
    trainer = prefer("DPO", llama_dir, tmp_path, planted()[0], poprisk_leap=0.5, **SETTINGS)
    before = weights(trainer)
    with monkeypatch.context() as patch:  # once the weights are moved
        patch.setattr(leap_file, "_AGREE", None)
        with pytest.raises(TypeError):
            trainer.train()
    assert same(weights(trainer), before)
    trainer.train()
    assert trainer._label_noise.leapt and not same(weights(trainer), before)
    trainer.save_model()
    config = load_record(tmp_path).config
    assert (config["gate"], config["leap"], config["steps"]) == ("none", 0.5, 0)


@pytest.mark.parametrize(
    ("dtype", "says"), [("float32", ": train it, or try"), ("bfloat16", ": load it in float32")]
)
def test_a_model_that_does_not_follow_stays_as_it_was(
    dtype: str, says: str, llama_dir: Path, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(leap_file, "_AGREE", -1.0)
    load = {"model_init_kwargs": {"dtype": dtype}}
    trainer = prefer("DPO", llama_dir, tmp_path, planted()[0], poprisk_leap=0.5, **load, **SETTINGS)
    before = weights(trainer)
    trainer.train()
    assert same(weights(trainer), before)
    assert f"does not follow its linearisation, and its weights are as they were{says}" in caplog.text


def test_labels_that_are_not_predicted_are_not_followed(
    llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng, rows = np.random.default_rng(1), planted()[0].to_list()
    for row in rows:
        if rng.random() < 0.5:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    data = Dataset.from_list(rows)
    trainer = prefer("DPO", llama_dir, tmp_path, data, poprisk_leap=0.5, **SETTINGS)
    before = weights(trainer)
    trainer.train()
    assert "no leap" in caplog.text and same(weights(trainer), before)


def test_what_cannot_leap_is_refused(llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="poprisk_leap is for preference pairs"):
        classify(tmp_path, examples(), poprisk_label_noise="weight", poprisk_leap=1.0)
    for kind, kept in (("DPO", None), ("DPO", ["lm_head"]), ("Reward", None)):
        lora = LoraConfig(task_type="SEQ_CLS" if kind == "Reward" else "CAUSAL_LM", modules_to_save=kept)
        with pytest.raises(ValueError, match="which an adapter keeps: train without one"):
            prefer(kind, llama_dir, tmp_path, peft_config=lora, poprisk_leap=1.0, **SETTINGS)
    with pytest.raises(ValueError, match="none of them is trained"):
        trained_layers(tiny_model().requires_grad_(False))


def test_the_reference_is_not_the_model_that_leapt(llama_dir: Path, tmp_path: Path) -> None:
    """TRL asks only whether a step was made."""
    trainer = prefer(
        "DPO", llama_dir, tmp_path, planted()[0], poprisk_leap=0.5, precompute_ref_log_probs=True, **SETTINGS
    )
    other = planted(20)[0]
    trainer.train()
    with pytest.raises(ValueError, match="poprisk_leap has moved the model"):
        trainer.evaluate(other)
