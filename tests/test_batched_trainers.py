"""Micro-batches of several examples in the trainers: how they are taken, and that it makes no difference."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import layout, save_tiny_model, trainer_of, trl_trainer_of
from test_trainer import Record
from torch import Tensor, nn
from transformers import LlamaConfig, Trainer

from hf_poprisk.trl import trl_utils

ONE_BY_ONE = "are taken one by one, because of"


class Classifier(nn.Module):
    """Mean loss over the rows; ``hidden`` flattens rows and tokens, ``conv`` has a layer we do not know."""

    def __init__(
        self, hidden: bool = False, conv: bool = False, tokens: int = 7, tokens_first: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)
        self.conv = nn.ConvTranspose1d(6, 6, 1) if conv else None
        self.hidden, self.tokens, self.tokens_first = hidden, tokens, tokens_first

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """x: [rows, 7, 6], labels: [rows]."""
        if self.conv is not None:
            x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        if self.tokens_first:
            x = x.transpose(0, 1)
        h = self.first(x.reshape(-1, 6)).view(len(x), self.tokens, 5) if self.hidden else self.first(x)
        logits = self.last(h.tanh()).mean(0 if self.tokens_first else 1)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(7, 6, generator=generator), "labels": i % 3} for i in range(count)]


def windows(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], Any]:
    """b, G and Q of every step, and the trainer that took them."""
    with monkeypatch.context() as patch:
        record = Record(patch)
        trainer = make()
        trainer.train()
    return record.windows, trainer


def assert_same_windows(got: list[Any], expected: list[Any]) -> None:
    assert [b for b, _ in got] == [b for b, _ in expected] and got[0][0] == 8
    for name, pair in expected[0][1].items():
        for ours, theirs in zip(got[0][1][name], pair, strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        (
            {"conv": True},
            "conv.weight (a parameter of ConvTranspose1d), conv.bias (a parameter of ConvTranspose1d)",
        ),
        (
            {"hidden": True},
            "first.bias cannot be formed: a layer does not see the examples: its input is "
            "[28, 6] and the batch has 4 rows",
        ),
    ],
    ids=["layers", "unknown-layer", "hidden-rows"],
)
def test_the_way_is_chosen_and_makes_no_difference(
    options: dict[str, bool], reason: str | None,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    one, several = (
        partial(trainer_of, tmp_path, rows(16), Classifier(**options), **layout(size), max_steps=2)
        for size in (1, 4)
    )
    expected, _ = windows(one, monkeypatch)
    with caplog.at_level(logging.WARNING):
        got, trainer = windows(several, monkeypatch)
    assert_same_windows(got, expected)
    said = [record.message for record in caplog.records if ONE_BY_ONE in record.message]
    assert (trainer._layers is None) == len(said) == (reason is not None)
    assert reason is None or reason in said[0]


def test_rows_hidden_later_are_an_error(tmp_path: Path) -> None:
    model = Classifier()
    # after the first forward
    model.register_forward_hook(lambda *_: setattr(model, "hidden", model.training))
    with pytest.raises(RuntimeError, match="first.bias cannot be formed: a layer does not see .*set per_dev"):
        trainer_of(tmp_path, rows(16), model, **layout(4), max_steps=2).train()


@pytest.mark.parametrize("option", ["torch_compile", "use_liger_kernel"])
def test_rewritten_models_go_one_by_one(
    option: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(tmp_path, rows(16), Classifier(), **layout(4))
    args = trainer.args
    setattr(args, option, True)  # after the checks that want a compiler or a package
    with caplog.at_level(logging.WARNING):
        trainer.create_optimizer()
    assert trainer._layers is None and f"{ONE_BY_ONE}: {option}=True" in caplog.text
    args.ddp_static_graph, trainer.optimizer = True, None  # several backwards per synchronisation
    with pytest.raises(ValueError, match="ddp_static_graph=True fails .* set ddp_static_graph=False"):
        trainer.create_optimizer()


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["DPO", "SFT"])
def test_trl_fused_head(
    kind: str, tied: bool, compact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weight gets every example's gradient, whether it sees all positions or (GPU) labelled ones only."""
    monkeypatch.setattr(trl_utils, "_use_triton", lambda device: compact)
    save_tiny_model(tmp_path / "model", "llama", tied)
    stock, found = trl_utils._ChunkedLogProbFunction, []
    for size in (1, 4):
        model, options = str(tmp_path / "model"), {**layout(size), "max_steps": 1}
        got, trainer = windows(partial(trl_trainer_of, kind, model, tmp_path, **options), monkeypatch)
        assert trl_utils._ChunkedLogProbFunction is stock
        assert (trainer._layers is not None) == (size > 1)
        found.append(got)
    assert_same_windows(*found)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert found[0][0][1][head][1].count_nonzero() > 100


def test_evaluation_and_stock_optimizers_see_nothing_of_it(tmp_path: Path) -> None:
    options = {**layout(8), "max_steps": 2}
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": rows(5)}
    trainer = trainer_of(tmp_path, rows(16), Classifier(), **options, **evaluation)
    stock = trainer_of(tmp_path, rows(16), Classifier(), **options, optim="adamw_torch")
    plain = Trainer(Classifier(), stock.args, train_dataset=rows(16))
    for t in (trainer, stock, plain):
        t.train()
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert len(losses) == 2 and losses[0] != losses[1] and trainer._layers is not None
    assert stock._layers is None
    for p, w in zip(stock.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, w)


def joined(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """One long row, as a padding-free collator makes it."""
    return {"x": torch.cat([f["x"] for f in features])[None], "labels": torch.tensor([features[0]["labels"]])}


def split_up(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    x = torch.stack([f["x"] for f in features]).repeat(2, 1, 1)
    return {"x": x, "labels": torch.tensor([f["labels"] for f in features]).repeat(2)}


@pytest.mark.parametrize(("collator", "made"), [(joined, 1), (split_up, 8)])
def test_a_collator_that_makes_other_examples_is_refused(collator: Any, made: int, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, rows(16), Classifier(), **layout(4), data_collator=collator)
    with pytest.raises(ValueError, match=f"collator made {made} examples of 4: .*train_batch_size=1"):
        trainer.train()


@pytest.mark.parametrize("tokens_first", [False, True])
def test_a_length_that_equals_the_rows_is_looked_into(
    tokens_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """[tokens, rows] passes for [rows, tokens] by its shape, and not by its squares."""
    data = [{**row, "x": row["x"][:4]} for row in rows(16)]
    found = []
    for size in (4, 1):
        model = Classifier(tokens=4, tokens_first=tokens_first)
        with caplog.at_level(logging.WARNING):
            make = partial(trainer_of, tmp_path, data, model, **layout(size), max_steps=2)
            got, trainer = windows(make, monkeypatch)
        found.append(got)
        assert size == 1 or (trainer._layers is None) == tokens_first
    assert_same_windows(*found)
    assert tokens_first == ("are not those of the examples alone" in caplog.text)


@pytest.mark.parametrize("kind", ["norm", "experts"])
def test_what_couples_the_examples_is_refused(kind: str, tmp_path: Path) -> None:
    model = Classifier()
    if kind == "norm":
        model.norm = nn.BatchNorm1d(3, affine=False)
    else:
        model.config = LlamaConfig(output_router_logits=True, router_aux_loss_coef=0.1)
    said = {"norm": "norm normalises over the examples", "experts": "router_aux_loss_coef balances"}[kind]
    with pytest.raises(ValueError, match=f"{said} .*set per_device_train_batch_size=1 .*or poprisk_est"):
        trainer_of(tmp_path, rows(16), model, **layout(4)).train()


class Forgetful(Classifier):
    """With dropout, so that a forward that is thrown away must not cost random numbers."""

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return super().forward(nn.functional.dropout(x, 0.5, self.training), labels)


@pytest.mark.parametrize("hidden", [False, True])
def test_what_is_tried_out_at_the_start_draws_no_random_numbers(hidden: bool, tmp_path: Path) -> None:
    """A resumed run starts once more, and must come to the weights of the uninterrupted one."""
    options = {**layout(4, 4), "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    trainers = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = Forgetful(hidden, conv=not hidden)  # found out before the first forward, or in it
        trainers.append(trainer_of(tmp_path, rows(16), model, **options))
        trainers[-1].train(resume_from_checkpoint=resume)
        assert trainers[-1]._layers is None
    for p, q in zip(trainers[0].model.parameters(), trainers[1].model.parameters(), strict=True):
        assert torch.equal(p, q)
