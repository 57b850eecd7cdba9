"""What the self-check sees, what it leaves as it was, and what it decides on several ranks."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from losses import TEXTS, Kind, OwnLoss, bert, first_step
from models import trainer_of
from test_batched_trainers import Classifier, rows
from torch import Tensor, nn
from torch.nn import functional as F

from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments
from hf_poprisk.microbatch import MicrobatchMixin


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

    def watched(self: Any, verdict: Any, optimizer: Any) -> bool:
        verdicts.append([optimizer.describe(p) for p in verdict.unreached])
        return take(self, verdict, optimizer)

    monkeypatch.setattr(MicrobatchMixin, "_take", watched)
    run = train(Scaled(), tmp_path, poprisk_exclude=["scale"])
    assert verdicts == [["scale"]] and run.state.global_step == 2
    monkeypatch.setattr(type(run.accelerator), "num_processes", 2)
    with pytest.raises(ValueError, match="no example reaches scale, whose gradient DDP would not reduce"):
        train(Scaled(), tmp_path, poprisk_exclude=["scale"])
