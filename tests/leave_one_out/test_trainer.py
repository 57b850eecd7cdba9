"""Labels of classes and of pairs, judged before the first step of a trainer and weighted from there."""

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from models import preferences
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments
from hf_poprisk.leave_one_out import INDEX, LabelNoise, mixin
from hf_poprisk.leave_one_out.index import IndexCollator, first_difference, take_sample, with_index
from hf_poprisk.leave_one_out.table import read_table
from leave_one_out.helpers import (
    QUIET,
    Classifier,
    classify,
    examples,
    first_gradients,
    learnable,
    planted,
    prefer,
    same,
    weights,
)

N = 61
ONE_BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "poprisk_gate": "hard"}


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})


def judged(trainer: Any) -> LabelNoise:
    trainer.judge_labels()
    return trainer._label_noise


# -- weights ------------------------------------------------------------------------------------------------


def test_weights_of_examples_that_batch_norm_joins(tmp_path: Path) -> None:
    """The loss of each is weighted, whatever its outputs are made of."""
    model = Classifier()
    model.net.insert(1, nn.BatchNorm1d(16))
    options = {"max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "max_steps": 1}
    data = examples(240, wrong=0.2)[46:] + examples(240, wrong=0.2)[:46]
    trainer = classify(tmp_path, data, model, poprisk_label_noise="weight", **options)
    got, start = first_gradients(trainer), weights(trainer)
    trainer.train()
    model.load_state_dict(start, strict=False)
    model.zero_grad()
    x, y = (torch.stack([row[name] for row in data[:4]]) for name in ("x", "labels"))
    losses = F.cross_entropy(model.net(x), y, reduction="none")
    (trainer._label_noise.table.weight[:4] * losses).mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *(
            (kind, {"poprisk_gate": gate})
            for kind in ("classes", "DPO", "Reward")
            for gate in ("none", "hard")
        ),
        *((kind, ONE_BY_ONE) for kind in ("classes", "DPO", "Reward")),
        ("DPO", {"loss_type": "hinge"}),  # no function of the log-odds of a label
    ],
)
def test_judged_weights_are_those_of_a_column(
    kind: str, options: dict[str, Any], llama_dir: Path, tmp_path: Path
) -> None:
    """From the first step on; what a column of weights does stands in ``test_sample_weights.py``."""
    settings = {"max_steps": 1, "max_grad_norm": 0.0, "optim": "poprisk_adamw", **options}
    settings["train_sampling_strategy"] = "sequential"
    judge, found, logs, column = None, [], [], {}
    for by in ({"poprisk_label_noise": "weight"}, {"poprisk_weight_column": "w"}):
        if kind == "classes":  # both kinds of labels come first
            rows = [{name: x.tolist() for name, x in row.items()} for row in examples(240, wrong=0.2)]
            data = Dataset.from_list(rows[46:] + rows[:46])
        else:
            data = planted()[0]
        data = data if judge is None else data.add_column("w", judge.table.weight.numpy())
        trainer = classify(tmp_path, data, **by, **settings) if kind == "classes" else None
        trainer = trainer or prefer(kind, llama_dir, tmp_path, data, **by, **settings)
        found.append(first_gradients(trainer))
        trainer.train()
        judge = judge or trainer._label_noise
        logs.append(trainer.state.log_history[0])
        if not column:
            column, _ = read_table(tmp_path)
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-7)
    weight = judge.table.weight
    assert judge.weighted and weight[:4].max() - weight[:4].min() > 0.02
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-5)
    assert logs[0]["poprisk/weight_mean"] == pytest.approx(weight.mean().item(), rel=1e-5)
    assert logs[0]["poprisk/noise_rate"] == judge.fit.rate
    p = column["p_correct"]
    np.testing.assert_allclose(column["weight"], (2 * p - 1).clip(0) if kind == "classes" else p, atol=1e-6)


@pytest.mark.parametrize("kind", ["DPO", "Reward"])
def test_log_odds_of_a_pair_are_those_of_its_rows_alone(kind: str, llama_dir: Path, tmp_path: Path) -> None:
    """Without padding."""
    trainer = prefer(kind, llama_dir, tmp_path)
    model, batch = trainer.model.eval(), next(iter(trainer.get_train_dataloader()))
    got, values = trainer.label_log_odds(model, batch), []
    for row, mask in enumerate(batch["attention_mask"].bool()):
        ids = batch["input_ids"][row, mask]
        logits = model(input_ids=ids[None]).logits[0]
        if kind == "Reward":
            values.append(logits[0])
        else:
            log_p = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
            values.append(log_p[batch["completion_mask"][row, mask][1:].bool()].sum())
    chosen, rejected = torch.stack(values).chunk(2)
    torch.testing.assert_close(got, chosen - rejected, rtol=1e-4, atol=1e-4)


def test_wrong_classes_are_found(tmp_path: Path) -> None:
    judge = judged(classify(tmp_path, examples(240, wrong=0.25, seed=3), poprisk_label_noise="weight"))
    assert judge.weighted and judge.fit.low < 0.25 < judge.fit.high
    ranks = (-judge.table.log_odds).argsort().argsort().float()
    assert (ranks[:60].sum() - 60 * 59 / 2) / (60 * 180) > 0.97
    weight, p = judge.table.weight, torch.from_numpy(judge.p_correct()).float()
    torch.testing.assert_close(weight, (2 * p - 1).clamp(min=0))
    assert weight[:60].mean() < 0.1 and weight[60:].mean() > 0.9


@pytest.mark.parametrize(
    ("kind", "options"),
    [("DPO", {}), ("Reward", {}), ("DPO", {"model_init_kwargs": {"dtype": "bfloat16"}})],
)
def test_swapped_pairs_are_found(
    kind: str, options: dict[str, Any], llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, flips = planted(120)
    options = {"poprisk_label_noise": "weight", "max_steps": 2, **options}
    trainer = prefer(kind, llama_dir, tmp_path, data, **options)
    assert trainer.model.dtype == (torch.bfloat16 if "model_init_kwargs" in options else torch.float32)
    trainer.train()
    judge = trainer._label_noise
    weight = judge.table.weight.numpy()
    assert weight[flips].max() < 0.3 < 0.9 < weight[~flips].min()
    assert judge.fit.low < flips.mean() < judge.fit.high
    assert judge.doubt.endswith("judge the data without them")  # the prompts repeat
    assert f"; {flips.sum()} of 120 labels are right with a probability below .5." in caplog.text
    assert f"weights since step 0; `hf-poprisk audit {tmp_path}`" in caplog.text
    trainer.create_model_card()
    assert f"{judge.found()}.\n" in ModelCard.load(tmp_path / "README.md").text


@pytest.mark.parametrize("together", [False, True])
def test_pairs_of_one_prompt_that_share_a_completion(together: bool, llama_dir: Path, tmp_path: Path) -> None:
    """A quarter is flipped: single pairs are found, all those of a prompt confirm each other."""
    rng, rows = np.random.default_rng(0), learnable(400, wrong=0)
    flips = np.repeat(rng.permutation(20) < 5, 20) if together else rng.permutation(400) < 100
    pairs = []
    for i, row in enumerate(rows):
        bad, good = row["rejected"], rows[i - i % 20]["chosen"]
        pairs.append({"prompt": f"prompt {i // 20}", "chosen": good, "rejected": bad})
        if flips[i]:
            pairs[i] |= {"chosen": bad, "rejected": good}
    trainer = prefer("DPO", llama_dir, tmp_path, Dataset.from_list(pairs), poprisk_label_noise="audit")
    found = trainer.judge_labels()
    if together:
        assert found.fit.high < 0.05 and (found.p_correct < 0.5).sum() == 0
    else:
        assert found.fit.rate == pytest.approx(0.25, abs=0.03)
        assert ((found.p_correct < 0.5) == flips).mean() > 0.95


def test_labels_that_are_not_predicted_are_not_followed(tmp_path: Path) -> None:
    """Of guessed labels every second one would look mislabeled."""
    data = examples(120)
    order = np.random.default_rng(0).permutation(120)
    data = [{"x": row["x"], "labels": data[i]["labels"]} for row, i in zip(data, order, strict=True)]
    judge = judged(classify(tmp_path, data, poprisk_label_noise="weight"))
    assert not judge.weighted and (judge.table.weight == 1).all()
    assert "the ambiguous look wrong" in judge.doubt


@pytest.mark.parametrize("gate", ["none", "hard"])
def test_an_ignored_label_leaves_the_others_alone(gate: str, tmp_path: Path) -> None:
    data = examples(wrong=0.2)
    data[5]["labels"] = torch.tensor(-100)
    trainer = classify(tmp_path, data, poprisk_label_noise="weight", poprisk_gate=gate)
    trainer.train()
    judge = trainer._label_noise
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert not any(e.get("poprisk/steps_skipped") for e in trainer.state.log_history)
    assert judge.table.judged.tolist() == [True] * 5 + [False] + [True] * 54
    assert judge.table.weight[5] == 1 and judge.p_correct()[5] == pytest.approx(1 - judge.fit.rate)


# -- audit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("classes", {"poprisk_gate": "none"}),
        ("classes", {"poprisk_gate": "hard"}),
        ("DPO", {"poprisk_gate": "hard"}),
        ("DPO", {"loss_type": ["ipo"]}),
        ("DPO", {"loss_type": ["sigmoid", "sft"]}),
        ("DPO", {"use_weighting": True}),
        ("DPO", {"sync_ref_model": True, "ref_model_sync_steps": 2}),
        ("DPO", {"f_divergence_type": "js_divergence"}),
        ("DPO", {"peft_config": lora(lora_dropout=0.3), "disable_dropout": False}),
        ("Reward", {"center_rewards_coefficient": 0.1}),
    ],
    ids=["classes", "gated classes", "gate", "ipo", "sft", "weighting", "sync", "js", "dropout", "centred"],
)
def test_an_audit_changes_nothing(
    kind: str, options: dict[str, Any], llama_dir: Path, tmp_path: Path
) -> None:
    """Bit for bit, in a random order, whatever the loss is."""
    seen = []
    for mode in ("off", "audit"):
        settings = {"poprisk_label_noise": mode, "max_steps": 4, "optim": "poprisk_adamw", **options}
        if kind == "classes":
            trainer = classify(tmp_path, examples(240, wrong=0.2), **settings)
        else:
            trainer = prefer(kind, llama_dir, tmp_path, preferences(N), **settings)
        trainer.train()
        seen.append((weights(trainer), trainer.state.log_history))
    assert same(seen[0][0], seen[1][0]) and trainer._label_noise.table.judged.all()
    plain, audit = ([e["loss"] for e in log if "loss" in e] for _, log in seen)
    assert plain == audit and "poprisk/noise_rate" in seen[1][1][0]
    assert "poprisk/weight_mean" not in seen[1][1][0]
    assert kind != "classes" or trainer._label_noise.table.weight.min() < 0.1  # that it would have given


@pytest.mark.parametrize("kind", ["classes", "pairs"])
def test_judging_leaves_the_model_and_chance_as_they_were(kind: str, llama_dir: Path, tmp_path: Path) -> None:
    options = {"poprisk_label_noise": "audit"}
    if kind == "classes":
        model = Classifier()
        model.net.insert(2, nn.Dropout(0.5))
        trainer = classify(tmp_path, examples(), model, **options)
    else:
        options |= {"disable_dropout": False, "peft_config": lora(lora_dropout=0.5)}
        trainer = prefer("DPO", llama_dir, tmp_path, preferences(N), **options)

    def state() -> list[Any]:
        modules = [module.training for module in trainer.model.modules()]
        params = [(p.requires_grad, p.grad is None) for p in trainer.model.parameters()]
        chance = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
        return [modules, params, *chance]

    found = []
    for training in (True, False):
        trainer.model.train(training)
        before, tensors = state(), weights(trainer)
        found.append(trainer.judge_labels().log_odds)
        assert state() == before and same(tensors, weights(trainer))
    np.testing.assert_array_equal(*found)  # without dropout
    assert not any(module._forward_hooks for module in trainer.model.modules())


# -- whatever the model, the data and the layout are --------------------------------------------------------


@pytest.fixture(scope="module")
def plainly_judged(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """Log-odds of the pairs, judged four at a time."""
    folder = tmp_path_factory.mktemp("plain")
    return judged(prefer("DPO", llama_dir, folder, planted()[0], poprisk_label_noise="audit")).table.log_odds


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"poprisk_gate": "hard", "per_device_train_batch_size": 16},
        {"gradient_checkpointing": True, "poprisk_label_noise": "weight"},
        {"peft_config": lora()},
        {"precompute_ref_log_probs": True},
    ],
    ids=["one by one", "gate", "checkpointing", "lora", "precomputed"],
)
def test_pairs_are_judged_alike(
    options: dict[str, Any], plainly_judged: Tensor, llama_dir: Path, tmp_path: Path
) -> None:
    """However they are trained: adapters at their start leave the base layers' gradients as they are."""
    options = {"poprisk_label_noise": "audit", "max_steps": 1, **options}
    trainer = prefer("DPO", llama_dir, tmp_path, planted()[0], **options)
    trainer.train()
    scale = float(plainly_judged.std())
    assert scale > 0.01
    torch.testing.assert_close(
        trainer._label_noise.table.log_odds, plainly_judged, rtol=1e-3, atol=1e-3 * scale
    )


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_columns_that_the_model_does_not_take_are_left_out_of_judging_too(kind: Any, tmp_path: Path) -> None:
    """As they are in training: a text beside its tokens."""
    found = []
    for more in ({}, {"score": 1.0}):
        rows = [{**row, **more} for row in examples()]
        data = kind(rows) if kind is list else kind(rows).with_format("torch")
        found.append(classify(tmp_path, data, poprisk_label_noise="audit").judge_labels().log_odds)
    assert np.array_equal(*found)


def test_the_features_do_not_know_the_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are gradients of one combination of the logits, the same one for all examples."""
    given: list[Any] = []
    judge = mixin.judge_classes
    monkeypatch.setattr(mixin, "judge_classes", lambda *args: (given.append(args), judge(*args))[1])
    for shift in (0, 1):
        data = [{"x": e["x"], "labels": (e["labels"] + shift) % 3} for e in examples()]
        classify(tmp_path, data, poprisk_label_noise="audit").judge_labels()
    (parts, labels), (shifted, others) = given
    assert labels.tolist() == [int(e["labels"]) for e in examples()] == [(i - 1) % 3 for i in others]
    for one, other in zip(parts, shifted, strict=True):
        np.testing.assert_array_equal(one, other)
    # the head's are apart: its inputs, in its basis
    assert [part.shape[1] for part in parts] == [16 * 3, 6 * 16]


class OwnLoss(PopRiskTrainer):
    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        return F.cross_entropy(model(inputs["x"])["logits"], inputs["labels"])


class Convolved(Classifier):
    """With a layer whose examples go one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return super().forward(x + self.conv(x[:, None])[:, 0], labels)


def run(
    tmp_path: Path, mode: str, kind: Any = PopRiskTrainer, model: Any = Classifier, size: int = 4
) -> list[Tensor]:
    """The scores, and the weights at the end of three epochs."""
    options = {**QUIET, "per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
    options |= {"num_train_epochs": 3, "learning_rate": 1e-2, "poprisk_label_noise": mode}
    args = PopRiskTrainingArguments(str(tmp_path), **options)
    trainer = kind(model(), args=args, train_dataset=examples(60, wrong=0.25))
    trainer.train()
    table = trainer._label_noise.table
    assert table.judged.all() and table.log_odds.isfinite().all()
    return [table.log_odds, table.weight, *weights(trainer).values()]


@pytest.mark.parametrize("mode", ["audit", "weight"])
@pytest.mark.parametrize("model", [Classifier, Convolved])
def test_whoever_computes_the_loss(model: type[nn.Module], mode: str, tmp_path: Path) -> None:
    """One by one, too, where the labels are read off the loss of the whole micro-batch."""
    expected = run(tmp_path, mode, model=model, size=1)
    for trainer in (PopRiskTrainer, OwnLoss):
        for got, wanted in zip(run(tmp_path, mode, trainer, model), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


# -- which example is which ---------------------------------------------------------------------------------


def test_an_index_of_the_users_is_kept() -> None:
    data = Dataset.from_dict({"a": list(range(8)), INDEX: list(range(100, 108))}).shuffle(0).select(range(5))
    same_data, ids = with_index(data)
    assert same_data is data and ids.tolist() == data[INDEX]
    hidden = Dataset.from_dict({"a": [1, 2], INDEX: [4, 9]}).with_format("torch", columns=["a"])
    assert with_index(hidden)[1].tolist() == [4, 9]
    added, ids = with_index(Dataset.from_dict({"a": [1, 2, 3]}))
    assert added[INDEX] == ids.tolist() == [0, 1, 2]
    listed, ids = with_index([{"a": 1}, {"a": 2}])
    assert listed[1] == {"a": 2, INDEX: 1} and len(listed) == 2
    with pytest.raises(ValueError, match="must hold integers"):
        with_index(Dataset.from_dict({INDEX: ["a", "b"]}))
    for examples_of, message in (
        (lambda: IndexCollator(list)([{"a": 1}]), "finds no example_index in the training examples"),
        (lambda: IndexCollator(list)([{"a": 1, INDEX: 0}]), "in a batch that is a list: let the collator"),
        (lambda: with_index([(1, 2)])[0][0], "in an example that is a tuple: give examples that are dicts"),
    ):
        with pytest.raises(ValueError, match=message):
            examples_of()


def test_a_sample_knows_rows_in_another_order() -> None:
    data = Dataset.from_dict({INDEX: list(range(5, 5005)), "labels": [i % 2 for i in range(5000)]})
    shuffled = data.shuffle(seed=0)
    one, other = (take_sample(d, np.array(d[INDEX])) for d in (data, shuffled))
    assert one.keys() == other.keys() and len(one) == 64 and first_difference(one, other) is None
    spoiled = shuffled.map(lambda row: {"labels": 1 - row["labels"]})
    assert first_difference(one, take_sample(spoiled, np.array(spoiled[INDEX])))[1] == "labels"


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_evaluation_sees_no_index(remove_unused_columns: bool, tmp_path: Path) -> None:
    data = Dataset.from_list([{"x": e["x"].tolist(), "labels": int(e["labels"])} for e in examples()])
    options = {"poprisk_label_noise": "audit", "num_train_epochs": 1}
    data = data.add_column(INDEX, list(range(60))).shuffle(1)
    trainer = classify(tmp_path, data, remove_unused_columns=remove_unused_columns, **options)
    trainer.train()
    assert math.isfinite(trainer.evaluate(data)["eval_loss"])
    assert math.isfinite(trainer.evaluate(trainer.train_dataset)["eval_loss"])


def test_an_index_of_the_models_own_is_left_to_it_without_label_noise(tmp_path: Path) -> None:
    class Indexed(Classifier):
        def forward(self, x: Tensor, labels: Tensor, example_index: Tensor) -> dict[str, Tensor]:
            assert example_index.shape == labels.shape
            return super().forward(x, labels)

    data = [{**e, INDEX: torch.tensor(i)} for i, e in enumerate(examples())]
    trainer = classify(tmp_path, data, Indexed(), max_steps=2, optim="poprisk_adamw", poprisk_gate="hard")
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_loss_may_take_its_labels_out_of_the_batch(tmp_path: Path) -> None:
    class Own(PopRiskTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            labels = inputs.pop("labels")
            return F.cross_entropy(model(**inputs)["logits"], labels)

    usual, own = (classify(tmp_path, examples(), poprisk_label_noise="weight") for _ in range(2))
    own.__class__ = Own
    for trainer in (usual, own):
        trainer.train()
    assert own._label_noise.fit == usual._label_noise.fit and same(weights(usual), weights(own))


# -- refusals -----------------------------------------------------------------------------------------------


def refused_loss(*args: Any, **options: Any) -> Any:
    return lambda logits, labels: F.cross_entropy(logits, labels, *args, **options)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda z, y: (z[:, 0] - y).square().mean(), "it computes none"),
        (lambda z, y: F.cross_entropy(z, y) + F.cross_entropy(z, y), "more than one log-probability"),
        (lambda z, y: F.cross_entropy(z.repeat(3, 1), y.repeat(3)), "it has 12 terms for 4 examples"),
        (lambda z, y: F.cross_entropy(z[None].mT, y[None]), r"are \[1, 3, 4\] and not \[examples, labels\]"),
        (refused_loss(weight=torch.ones(3)), "class weights or label smoothing"),
        (refused_loss(torch.ones(3)), "class weights or label smoothing"),
        (refused_loss(label_smoothing=0.1), "class weights or label smoothing"),
        (refused_loss(ignore_index=0), "ignores a label that is not negative"),
    ],
)
def test_a_loss_of_something_else_is_refused_before_a_step(loss: Any, says: str, tmp_path: Path) -> None:
    class Other(Classifier):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": loss(logits, labels), "logits": logits}

    trainer = classify(tmp_path, examples(), Other(), poprisk_label_noise="audit")
    before = weights(trainer)
    with pytest.raises(ValueError, match=rf"mean cross-entropy of class labels.*{says}.*_noise=off\.$"):
        trainer.train()
    assert same(before, weights(trainer)) and not hasattr(Trainer, "_label_noise")


def test_settings_are_refused_with_a_way_out(tmp_path: Path) -> None:
    model = Classifier()
    model.compile()
    with pytest.raises(ValueError, match=r"model.compile\(\) hides: .* or set poprisk_label_noise=off"):
        classify(tmp_path, examples(), model, poprisk_label_noise="weight").train()
    trainer = classify(tmp_path, None, poprisk_label_noise="weight")
    trainer.train_dataset = examples()  # which comes too late
    with pytest.raises(ValueError, match="was set without a training set"):
        trainer.train()
    quiet = {**QUIET, "poprisk_label_noise": "weight", "auto_find_batch_size": True}
    with pytest.raises(ValueError, match="or set poprisk_gate=none, poprisk_label_noise=off"):
        PopRiskTrainingArguments(str(tmp_path), **quiet).check_training()
    trainer = classify(tmp_path, examples(), poprisk_label_noise="weight")
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="deepspeed is not supported .* poprisk_label_noise=off"):
        trainer.train()


def test_a_model_that_gives_nan_is_refused(llama_dir: Path, tmp_path: Path) -> None:
    trainer = prefer("DPO", llama_dir, tmp_path, poprisk_label_noise="audit")
    with torch.no_grad():
        next(trainer.model.parameters())[0] = torch.nan
        trainer.model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="not finite: the model gives NaN or inf\\.$"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_stream_is_refused(llama_dir: Path, tmp_path: Path) -> None:
    stream = preferences(N).add_column(INDEX, list(range(N))).to_iterable_dataset()
    with pytest.raises(ValueError, match="and a stream has none: train on a data set that is no stream"):
        prefer("DPO", llama_dir, tmp_path, stream, poprisk_label_noise="audit", max_steps=3)
    assert prefer("DPO", llama_dir, tmp_path, stream, max_steps=3)._label_noise is None
