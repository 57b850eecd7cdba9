"""What the self-check sees, what it leaves as it was, and what it decides on several ranks."""

import copy
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from losses import TEXTS, Kind, OwnLoss, bert, first_step
from models import layout, trainer_of, trl_trainer_of
from peft import LoraConfig
from test_batched_trainers import Classifier, rows
from torch import Tensor, nn
from torch.nn import functional as F

from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments
from hf_poprisk.microbatch import MicrobatchMixin
from hf_poprisk.per_example import Capture, one_by_one
from hf_poprisk.per_example.self_check import Verdict


def train(model: nn.Module, folder: Path, trainer: Any = PopRiskTrainer, **options: Any) -> Any:
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, **options}
    run = trainer_of(folder, rows(16), model, (trainer, PopRiskTrainingArguments), **settings)
    run.train()
    return run


class Shifted(Classifier):
    """Sees another input, which may depend on the others and on the mode."""

    def __init__(self, shift: Callable[[Tensor, bool], Tensor], conv: bool = False) -> None:
        super().__init__(conv=conv)
        self.shift = shift

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return super().forward(x + self.shift(x, self.training), labels)


class Centred(Classifier):
    """Normalises between two layers, where every example's rows are seen."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self.first(x)
        logits = self.last((h - h.mean(0)).tanh()).mean(1)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Counting(Classifier):
    """Keeps state in its forward: a buffer, and an attribute."""

    def __init__(self, conv: bool) -> None:
        super().__init__(conv=conv)
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.seen += 1
            self.calls += 1
        return super().forward(x, labels)


class Scaled(Classifier):
    """The loss, computed by the model itself, takes a parameter past its parts."""

    def __init__(self) -> None:
        super().__init__(conv=True)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        logits = self.last(self.first(x).tanh()).mean(1) * self.scale.exp()
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Recording(Classifier):
    """Installs a hook at its first forward, as transformers does for hidden states, and reads what it saw."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if not hasattr(self, "installed"):
            self.first.register_forward_hook(lambda module, args, output: self.states.append(output))
            self.installed = True
        self.states: list[Tensor] = []
        found = super().forward(x, labels)
        return {**found, "loss": found["loss"] * len(self.states)}


class Frozen(Classifier):
    """A norm that stays in eval mode is no norm of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6, affine=False)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return super().forward(self.norm(x.transpose(1, 2)).transpose(1, 2), labels)


class ReadsLast(OwnLoss):
    """A feature without a gradient, which is of the last example where they go one by one."""

    def own_loss(self, model: Any, inputs: Any) -> tuple[Tensor, Any]:
        net, seen = self.accelerator.unwrap_model(model), []
        hook = net.first.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
        outputs = model(**inputs)
        hook.remove()
        loss = F.cross_entropy(outputs["logits"], inputs["labels"])
        return loss + seen[-1].square().mean(), outputs


def views(repeated: Callable[[Tensor], Tensor]) -> type[OwnLoss]:
    """Two views of each example, of which rows i and i + N are taken for one."""

    class Views(OwnLoss):
        def own_loss(self, model: Any, inputs: Any) -> tuple[Tensor, Any]:
            outputs = model(repeated(inputs["x"]), repeated(inputs["labels"]))
            return outputs["loss"], outputs

    return Views


COUPLED = "trainer's .*the loss would be .*set per_device_train_batch"


@pytest.mark.parametrize(
    ("make", "trainer", "sentence"),
    [
        (lambda: Shifted(lambda x, training: -x.mean(0) * training, conv=True), PopRiskTrainer, COUPLED),
        (Centred, PopRiskTrainer, COUPLED),
        (lambda: Counting(conv=True), PopRiskTrainer, "keeps state in its forward"),
        (Scaled, PopRiskTrainer, "the loss reaches scale by another way .*poprisk_exclude could"),
        (lambda: Classifier(conv=True), ReadsLast, "the loss would be"),
        (
            lambda: Classifier(conv=True),
            views(lambda x: x.repeat_interleave(2, 0)),
            "the rows that the model is called on are not example after example",
        ),
    ],
    ids=["norm", "centred", "state", "parameter", "last example", "interleaved"],
)
def test_examples_that_do_not_stand_alone_are_refused(
    make: Any, trainer: Any, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        train(make(), tmp_path, trainer)


@pytest.mark.parametrize(
    ("make", "trainer", "together"),
    [
        # drawn inside the model in every mode, as a VAE does
        (lambda: Shifted(lambda x, training: 0.1 * torch.randn_like(x)), PopRiskTrainer, True),
        (Frozen, PopRiskTrainer, True),
        (lambda: Classifier(conv=True), views(lambda x: torch.cat([x, x])), False),
    ],
    ids=["random numbers", "frozen norm", "tiled"],
)
def test_examples_that_stand_alone_are_taken(make: Any, trainer: Any, together: bool, tmp_path: Path) -> None:
    run = train(make(), tmp_path, trainer)
    assert run._paths_checked and (run._layers is not None) == together


def test_a_hook_installed_by_the_first_forward_is_installed_once(tmp_path: Path) -> None:
    run = train(Recording(conv=False), tmp_path)
    assert run._paths_checked and len(run.model.first._forward_hooks) == 1


def test_what_is_tried_out_leaves_no_trace(tmp_path: Path) -> None:
    class Warm(PopRiskTrainer):
        losses = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.losses += 1
            return super().compute_loss(*args, **kwargs)

    run = train(Counting(conv=False), tmp_path, Warm)
    assert run._layers is not None
    assert (run.model.seen, run.model.calls, run.losses) == (2, 2, 2)


def test_a_micro_batch_that_is_not_finite_decides_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The next one does."""

    class Late(OwnLoss):
        def own_loss(self, model: Any, inputs: Any) -> tuple[Tensor, Any]:
            outputs = model(**inputs)
            if self.state.global_step == 0 and not inputs["labels"][0]:
                # in one class of the gradients alone: the others are finite
                return outputs["loss"] + model.last.bias.sum() * torch.nan, outputs
            return outputs["loss"], outputs

    with caplog.at_level(logging.WARNING):
        run = train(Classifier(conv=True), tmp_path, Late, max_steps=3)
    assert run._paths_checked and run.state.global_step == 3
    assert "this optimizer step was left out" in caplog.text


class FromReference(OwnLoss):
    """At first the distance from outputs that its own are but for rounding; later a loss."""

    def own_loss(self, model: Any, inputs: Any) -> tuple[Tensor, Any]:
        outputs = model(**inputs)
        if self.state.global_step:
            return outputs["loss"], outputs
        with torch.no_grad():
            exact = copy.deepcopy(self.accelerator.unwrap_model(model)).double()
            expected = exact(inputs["x"].double(), inputs["labels"])["logits"]
        return (outputs["logits"] - expected).square().mean(), outputs


def without_labels(folder: Path, **options: Any) -> Any:
    data = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in models.rows(4)]
    return trainer_of(folder, [*data, *models.rows(4)], **layout(4, 4), **options)


def same_texts(folder: Path, lora: bool = False, **options: Any) -> Any:
    pairs = models.preferences(8)
    rejected = [pairs["chosen" if i < 4 else "rejected"][i] for i in range(8)]
    data = pairs.remove_columns("rejected").add_column("rejected", rejected)
    options |= {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if lora else {}
    return trl_trainer_of("DPO", str(folder), folder, data, **layout(4, 4), **options)


def same_rewards(folder: Path, kind: str = "GRPO", **options: Any) -> Any:
    calls: list[int] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        calls.append(len(completions))
        return [0.1] * 8 if len(calls) == 1 else models.reward(completions)

    options |= {"num_generations": 2, "max_completion_length": 6, "reward_funcs": reward}
    return trl_trainer_of(kind, str(folder), folder, **layout(8, 8), **options)


WITHOUT_GRADIENT: dict[str, Callable[..., Any]] = {
    "labels": without_labels,
    "labels, bf16": partial(without_labels, bf16=True),
    "pairs": same_texts,
    "pairs, bf16": partial(same_texts, bf16=True),
    "pairs, LoRA": partial(same_texts, lora=True),
    "pairs, LoRA, bf16": partial(same_texts, lora=True, bf16=True),
    "rewards, GRPO": same_rewards,
    "rewards, RLOO, bf16": partial(same_rewards, kind="RLOO", bf16=True),
    "reference": lambda folder, **options: trainer_of(
        folder, rows(8), Classifier(), (FromReference, PopRiskTrainingArguments), **layout(4, 4), **options
    ),
}


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_a_micro_batch_without_a_gradient_decides_nothing(
    name: str, wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly, or but for rounding; the next one decides, and sees what is wrong."""
    models.save_tiny_model(tmp_path, "llama")
    verdicts: list[Verdict | None] = []
    take = MicrobatchMixin._take

    def watched(self: Any, verdict: Verdict, named: Any) -> None:
        verdicts.append(Verdict.of([verdict]))
        take(self, verdict, named)

    monkeypatch.setattr(MicrobatchMixin, "_take", watched)
    if wrong:
        original = Capture.elementwise
        monkeypatch.setattr(Capture, "elementwise", lambda *args: 1.5 * original(*args))
        dense = Capture.dense
        monkeypatch.setattr(Capture, "dense", lambda *args: 1.5 * dense(*args))
        part = one_by_one.part_of
        monkeypatch.setattr(one_by_one, "part_of", lambda *args: 1.5 * part(*args))
    run = WITHOUT_GRADIENT[name](tmp_path, max_steps=2)
    if wrong:
        with pytest.raises(ValueError, match="would not be the stock trainer's"):
            run.train()
        assert run.state.global_step == 1
    else:
        run.train()
        assert run._paths_checked and run._layers is not None
        logs = [entry["poprisk/examples"] for entry in run.state.log_history if "loss" in entry]
        assert logs == [run.args.units_per_step] * 2
    assert verdicts[0] is None and verdicts[1] is not None and len(verdicts) == 2


class Labelled(Classifier):
    """Rows of class 2 have no loss."""

    gradient_checkpointing = True

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = super().forward(x, labels)
        losses = F.cross_entropy(found["logits"], labels, reduction="none", ignore_index=2)
        return {**found, "loss": losses.mean()}


def test_of_many_examples_two_with_a_gradient_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With checkpointing they are not compared all; the first ones may have none."""
    data = [{**row, "labels": 0 if i % 4 == 3 else 2} for i, row in enumerate(rows(8))]
    options = {**layout(4, 4), "max_steps": 1}
    trainer_of(tmp_path, data, Labelled(conv=True), **options).train()
    part = one_by_one.part_of
    monkeypatch.setattr(one_by_one, "part_of", lambda *args: 1.5 * part(*args))
    with pytest.raises(ValueError, match="would be 50% off"):
        trainer_of(tmp_path, data, Labelled(conv=True), **options).train()


def test_what_dropout_alone_gives_a_gradient_is_refused(tmp_path: Path) -> None:
    """In eval mode, where the paths are compared, there is none."""

    class Twice(OwnLoss):
        def own_loss(self, model: Any, inputs: Any) -> tuple[Tensor, Any]:
            one, other = (model(**inputs)["logits"] for _ in range(2))
            return (one - other).square().mean(), None

    model = Shifted(lambda x, training: F.dropout(x, 0.5, training))
    with pytest.raises(ValueError, match="dropout aside there is no gradient to compare with"):
        train(model, tmp_path, Twice)


def test_a_gradient_that_cancels_out_is_no_fault(tmp_path: Path) -> None:
    """A bias that the loss does not depend on, but for rounding."""

    class Differences(OwnLoss):
        def own_loss(self, model: Any, inputs: Any) -> tuple[Tensor, Any]:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            scores = outputs.logits - outputs.logits.mean(1, keepdim=True)
            return F.cross_entropy(scores, labels), outputs

    _, run = first_step(Kind(bert, TEXTS, Differences), tmp_path, 4, 2)
    assert run._paths_checked and run.state.global_step == 1


def test_a_parameter_that_no_example_reaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be ungated on one process; on several DDP would not reduce its gradient."""
    verdicts, take = [], MicrobatchMixin._take

    def watched(self: Any, verdict: Any, named: Any) -> bool:
        verdicts.append(list(verdict.unreached))
        return take(self, verdict, named)

    monkeypatch.setattr(MicrobatchMixin, "_take", watched)
    run = train(Scaled(), tmp_path, poprisk_exclude=["scale"])
    assert verdicts == [["scale"]] and run.state.global_step == 2
    monkeypatch.setattr(type(run.accelerator), "num_processes", 2)
    with pytest.raises(ValueError, match="no example reaches scale, whose gradient DDP would not reduce"):
        train(Scaled(), tmp_path, poprisk_exclude=["scale"])
