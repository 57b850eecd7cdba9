"""What is trained is what the stock trainer trains, whatever the loss makes of its examples."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from losses import KINDS, SEQ2SEQ_DATA, TEXTS, VOCABULARY, CallsParts, Kind, Ridge, bert, first_step, gap, mt5
from models import trainer_of
from torch import Tensor

from hf_poprisk import PopRiskTrainingArguments
from hf_poprisk.per_example import Capture, Rows, one_by_one
from hf_poprisk.per_example.one_by_one import OneByOne

TOLERANCE = 5e-5


@pytest.mark.parametrize("layout", [(8, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_and_the_loss_are_the_stock_ones(
    name: str, layout: tuple[int, int], tmp_path: Path
) -> None:
    ours, trainer = first_step(KINDS[name], tmp_path, *layout)
    stock, plain = first_step(KINDS[name], tmp_path, *layout, "adamw_torch")
    assert gap(ours, stock) < TOLERANCE
    mine, theirs = (t.state.log_history[0] for t in (trainer, plain))
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert mine["poprisk/examples"] == 8


@pytest.mark.parametrize("name", ["experts: mixtral", "class weights: vit", "adapter: ia3"])
def test_a_plain_mean_does_not_depend_on_the_layout(name: str, tmp_path: Path) -> None:
    """The sums of losses that know the number of items, or of plain means."""
    kind = KINDS[name]
    if name == "class weights: vit":
        kind = Kind(kind.model, kind.data)
    opens = []
    for size in (1, 2, 8):
        gradient, trainer = first_step(kind, tmp_path, size, 8 // size)
        opens.append((trainer.state.log_history[0]["poprisk/fraction_open"], gradient))
    for opened, gradient in opens[1:]:
        assert opened == pytest.approx(opens[0][0], abs=3e-3)  # the bias of keys: rounding
        assert gap(gradient, opens[0][1]) < TOLERANCE


def test_each_example_keeps_its_own_dropout(tmp_path: Path) -> None:
    """The slope is taken at the very outputs that the example is sent back through."""
    torch.manual_seed(0)
    model = mt5(dropout=0.3).train()
    batch = {name: torch.stack([x[name] for x in SEQ2SEQ_DATA]) for name in ("input_ids", "labels")}
    cache, layout = OneByOne(model), Rows(8, 8)
    model.eval()
    while True:
        with cache.cached(layout, learn=True):
            model(**batch).loss.backward()
        if not cache.refine():
            break
    model.train()
    model.zero_grad()
    torch.manual_seed(1)
    with cache.cached(layout):
        model(**batch).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    for i in range(8):
        cache.backward(i)
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(1)
    logits = torch.cat([model(**{k: v[i : i + 1] for k, v in batch.items()}).logits for i in range(8)])
    torch.nn.functional.cross_entropy(logits.view(-1, VOCABULARY), batch["labels"].view(-1)).backward()
    assert gap(ours, {n: p.grad for n, p in model.named_parameters()}) < TOLERANCE


def test_a_loss_that_takes_the_model_apart_is_refused(tmp_path: Path) -> None:
    """Once the layers cannot tell either: its head is used by hand."""
    kind = Kind(bert, TEXTS, CallsParts)
    with pytest.raises(
        ValueError, match=r"not be the stock trainer's \(.*the loss reaches .* poprisk_exclude could"
    ):
        first_step(kind, tmp_path, 4, 2)
    first_step(kind, tmp_path, 1, 8)  # the way out


def test_a_wrong_gradient_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the examples go one by one, and each slope is a tenth too large."""
    original = one_by_one.part_of
    monkeypatch.setattr(one_by_one, "part_of", lambda *args: 1.1 * original(*args))
    with pytest.raises(ValueError, match=r"the gradient of .* would be 10% off"):
        first_step(KINDS["class weights: vit"], tmp_path, 4, 2)


def test_wrong_squares_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The gradient is right, and the squares of the path in one backward are twice what they should be."""
    original = Capture.finish

    def finish(capture: Capture, param: Tensor, grad: Tensor) -> None:
        original(capture, param, grad)
        capture._squares.so_far()[param].mul_(2)

    monkeypatch.setattr(Capture, "finish", finish)
    with caplog.at_level(logging.WARNING):
        _, trainer = first_step(Kind(bert, TEXTS), tmp_path, 4, 2)
    assert trainer._layers is None and "are not those of the examples alone" in caplog.text


def test_a_term_that_appears_later_is_an_error(tmp_path: Path) -> None:
    """A penalty that the self-check has not met would be taken for nothing's."""

    class Later(Ridge):
        def own_loss(self, model: Any, inputs: Any) -> tuple[Tensor, Any]:
            outputs = model(**inputs)
            return outputs.loss + (self.term(outputs.logits) if self.state.global_step >= 2 else 0.0), outputs

    kind = KINDS["adapter: ia3"]
    kinds, options = (Later, PopRiskTrainingArguments), {"per_device_train_batch_size": 4, "max_steps": 4}
    trainer = trainer_of(tmp_path, kind.data, kind.model(), kinds, **options)
    with pytest.raises(RuntimeError, match="by another way than the model's outputs, which it did not"):
        trainer.train()
    assert trainer.state.global_step == 2
