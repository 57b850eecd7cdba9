"""What the self-check sees, what it leaves as it was, and what it decides on several ranks."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from losses import TEXTS, Kind, OwnLoss, bert, first_step
from test_batched_trainers import Classifier, rows
from test_trainer import QUIET
from torch import Tensor, nn
from torch.nn import functional as F

from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments
from hf_poprisk.microbatch import MicrobatchMixin


def train(
    model: nn.Module, folder: Path, size: int = 4, trainer: Any = PopRiskTrainer, **options: Any
) -> Any:
    settings = {**QUIET, "max_steps": 2, "per_device_train_batch_size": size, **options}
    args = PopRiskTrainingArguments(str(folder), **settings)
    run = trainer(model, args=args, train_dataset=rows(16))
    run.train()
    return run


class OwnNorm(Classifier):
    """Normalises over the micro-batch, in train mode alone."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return super().forward(x - x.mean(0) if self.training else x, labels)


class Centred(Classifier):
    """Normalises between two layers, where every example's rows are seen."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h = self.first(x)
        logits = self.last((h - h.mean(0)).tanh()).mean(1)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("model", [OwnNorm, Centred])
def test_examples_that_depend_on_one_another_are_refused(model: type[nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trainer's .*the loss would be .*set per_device_train_batch"):
        train(model(conv=True) if model is OwnNorm else model(), tmp_path)


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


class Recording(Classifier):
    """Installs a hook at its first forward, as transformers does for hidden states, and reads what it saw."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if not hasattr(self, "installed"):
            self.first.register_forward_hook(lambda module, args, output: self.states.append(output))
            self.installed = True
        self.states: list[Tensor] = []
        found = super().forward(x, labels)
        return {**found, "loss": found["loss"] * len(self.states)}


def test_a_hook_installed_by_the_first_forward_is_installed_once(tmp_path: Path) -> None:
    run = train(Recording(conv=False), tmp_path)
    assert run._paths_checked and len(run.model.first._forward_hooks) == 1


def test_what_is_tried_out_leaves_no_trace(tmp_path: Path) -> None:
    class Warm(PopRiskTrainer):
        losses = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.losses += 1
            return super().compute_loss(*args, **kwargs)

    run = train(Counting(conv=False), tmp_path, trainer=Warm)
    assert run._layers is not None
    assert (run.model.seen, run.model.calls, run.losses) == (2, 2, 2)


def test_state_that_an_example_alone_would_change_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keeps state in its forward"):
        train(Counting(conv=True), tmp_path)


class Sampled(Classifier):
    """Draws random numbers inside the model in every mode, as a VAE does."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return super().forward(x + 0.1 * torch.randn_like(x), labels)


def test_random_numbers_are_the_same_for_every_path(tmp_path: Path) -> None:
    assert train(Sampled(), tmp_path)._layers is not None


def test_a_loss_value_that_differs_is_seen(tmp_path: Path) -> None:
    """It reads a feature without a gradient, which is of the last example where they go one by one."""

    class Hooked(OwnLoss):
        def own_loss(self, model: Any, inputs: Any) -> tuple[Tensor, Any]:
            net, seen = self.accelerator.unwrap_model(model), []
            hook = net.first.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
            outputs = model(**inputs)
            hook.remove()
            loss = F.cross_entropy(outputs["logits"], inputs["labels"])
            return loss + seen[-1].square().mean(), outputs

    with pytest.raises(ValueError, match="the loss would be"):
        train(Classifier(conv=True), tmp_path, trainer=Hooked)


def test_rows_that_are_laid_out_in_another_way_are_refused(tmp_path: Path) -> None:
    """Each example's two views side by side; rows i and i + N are taken for one example."""

    class Interleaved(OwnLoss):
        def own_loss(self, model: Any, inputs: Any) -> tuple[Tensor, Any]:
            x, labels = (inputs[name].repeat_interleave(2, 0) for name in ("x", "labels"))
            outputs = model(x, labels)
            return outputs["loss"], outputs

    class Tiled(OwnLoss):
        def own_loss(self, model: Any, inputs: Any) -> tuple[Tensor, Any]:
            outputs = model(inputs["x"].repeat(2, 1, 1), inputs["labels"].repeat(2))
            return outputs["loss"], outputs

    with pytest.raises(
        ValueError, match="the rows that the model is called on are not example after example"
    ):
        train(Classifier(conv=True), tmp_path, trainer=Interleaved)
    assert train(Classifier(conv=True), tmp_path, trainer=Tiled)._layers is None


def test_a_micro_batch_that_is_not_finite_decides_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The next one does."""

    class Late(OwnLoss):
        def own_loss(self, model: Any, inputs: Any) -> tuple[Tensor, Any]:
            outputs = model(**inputs)
            bad = self.state.global_step == 0 and not inputs["labels"][0]
            if bad:  # in one class of the gradients alone: the others are finite
                return outputs["loss"] + model.last.bias.sum() * torch.nan, outputs
            return outputs["loss"], outputs

    with caplog.at_level(logging.WARNING):
        run = train(Classifier(conv=True), tmp_path, trainer=Late, max_steps=3)
    assert run._paths_checked and run.state.global_step == 3
    assert "this optimizer step was left out" in caplog.text


def test_a_padded_row_is_not_packed(tmp_path: Path) -> None:
    """Positions that start over where there is padding on the left."""
    from hf_poprisk.per_example import Rows
    from hf_poprisk.per_example.examples import find_layout

    positions = torch.tensor([[0, 0, 0, 1, 2, 3]])
    batch = {"input_ids": positions, "position_ids": positions, "attention_mask": (positions > 0).long()}
    assert find_layout(batch) == Rows(1, 1)


def test_norms_that_stay_in_eval_mode_are_no_norms_of_the_batch(tmp_path: Path) -> None:
    class Frozen(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6, affine=False)

        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return super().forward(self.norm(x.transpose(1, 2)).transpose(1, 2), labels)

    assert train(Frozen(), tmp_path)._layers is not None


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


class Scaled(Classifier):
    """The loss, computed by the model itself, takes a parameter past its parts."""

    def __init__(self) -> None:
        super().__init__(conv=True)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        logits = self.last(self.first(x).tanh()).mean(1) * self.scale.exp()
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_a_parameter_that_no_example_reaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be ungated on one process; on several DDP would not reduce its gradient."""
    with pytest.raises(ValueError, match="the loss reaches scale by another way .*poprisk_exclude could"):
        train(Scaled(), tmp_path)
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
