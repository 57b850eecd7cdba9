"""Micro-batches of several examples in the trainers: how they are taken, and that it makes no difference."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from models import preferences, save_tiny_model, sequences
from test_trainer import QUIET, Record
from torch import Tensor, nn
from transformers import LlamaConfig, Trainer

import hf_poprisk
from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments
from hf_poprisk.trainer import take_example
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
        self.conv = nn.Conv1d(6, 6, 1) if conv else None
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


def windows(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, **options: Any
) -> tuple[list[Any], PopRiskTrainer]:
    """b, G and Q of two steps of eight examples, and who took them."""
    with monkeypatch.context() as patch:
        record = Record(patch)
        steps = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 8 // batch}
        args = PopRiskTrainingArguments(str(tmp_path), max_steps=2, **{**QUIET, **steps, **options})
        trainer = PopRiskTrainer(model, args=args, train_dataset=rows(16))
        trainer.train()
    return record.windows, trainer


def assert_same_windows(got: list[Any], expected: list[Any]) -> None:
    assert [b for b, _ in got] == [b for b, _ in expected] == [8, 8]
    for name, pair in expected[0][1].items():
        for ours, theirs in zip(got[0][1][name], pair, strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"conv": True}, "conv.weight (a parameter of Conv1d), conv.bias (a parameter of Conv1d)"),
        (
            {"hidden": True},
            "first.bias cannot be formed: a layer does not see the examples: its input is "
            "[28, 6] and the batch has 4 rows",
        ),
    ],
    ids=["layers", "unknown-layer", "hidden-rows"],
)
def test_the_way_is_chosen_and_makes_no_difference(
    options: dict[str, bool],
    reason: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected, _ = windows(Classifier(**options), tmp_path, monkeypatch, 1)
    with caplog.at_level(logging.WARNING):
        got, trainer = windows(Classifier(**options), tmp_path, monkeypatch, 4)
    assert_same_windows(got, expected)
    said = [record.message for record in caplog.records if ONE_BY_ONE in record.message]
    assert (trainer._layers is None) == (reason is not None)
    assert len(said) == (reason is not None)
    assert reason is None or reason in said[0]


def test_rows_hidden_later_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Classifier()
    model.register_forward_hook(
        lambda *_: setattr(model, "hidden", model.training)
    )  # after the first forward
    with pytest.raises(RuntimeError, match="first.bias cannot be formed: a layer does not see .*set per_dev"):
        windows(model, tmp_path, monkeypatch, 4)


@pytest.mark.parametrize("option", ["torch_compile", "use_liger_kernel"])
def test_rewritten_models_go_one_by_one(
    option: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = PopRiskTrainingArguments(str(tmp_path), **{**QUIET, "per_device_train_batch_size": 4})
    setattr(args, option, True)  # after the checks that want a compiler or a package
    trainer = PopRiskTrainer(Classifier(), args=args, train_dataset=rows(16))
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
    found = []
    for size in (1, 4):
        with monkeypatch.context() as patch:
            record = Record(patch)
            steps = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
            args = getattr(hf_poprisk, f"PopRisk{kind}Config")(
                str(tmp_path), bf16=False, max_steps=1, **{**QUIET, **steps}
            )
            data = sequences(8) if kind == "SFT" else preferences(8)
            trainer = getattr(hf_poprisk, f"PopRisk{kind}Trainer")(
                str(tmp_path / "model"), args=args, train_dataset=data
            )
            stock = trl_utils._ChunkedLogProbFunction
            trainer.train()
            assert trl_utils._ChunkedLogProbFunction is stock
            assert (trainer._layers is not None) == (size > 1)
            found.append(record.windows)
    (b, one), (other_b, several) = found[0][0], found[1][0]
    assert b == other_b == 8
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert one[head][1].count_nonzero() > 100
    for name, pair in one.items():
        for ours, theirs in zip(several[name], pair, strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name


def test_an_example_is_taken_with_all_its_rows() -> None:
    inputs = {"x": torch.arange(8).view(4, 2), "y": torch.arange(2), "z": ["a", "b", "c", "d"], "n": 3}
    inputs["nested"] = {"x": inputs["x"]}
    taken = take_example(inputs, 1, count=2, rows=4)
    assert taken["nested"]["x"].tolist() == [[2, 3], [6, 7]]
    assert taken["x"].tolist() == [[2, 3], [6, 7]] and taken["y"].tolist() == [1]
    assert taken["z"] == ["b", "d"] and taken["n"] == 3
    with pytest.raises(ValueError, match=r"inputs\['y'\] has 3 entries for 2 examples"):
        take_example({"y": torch.arange(3)}, 0, count=2, rows=4)


def test_evaluation_and_stock_optimizers_see_nothing_of_it(tmp_path: Path) -> None:
    args = PopRiskTrainingArguments(
        str(tmp_path),
        max_steps=2,
        **{**QUIET, "per_device_train_batch_size": 8},
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer = PopRiskTrainer(Classifier(), args=args, train_dataset=rows(16), eval_dataset=rows(5))
    stock_args = PopRiskTrainingArguments(
        str(tmp_path), max_steps=2, optim="adamw_torch", **{**QUIET, "per_device_train_batch_size": 8}
    )
    stock = PopRiskTrainer(Classifier(), args=stock_args, train_dataset=rows(16))
    plain = Trainer(Classifier(), args=stock_args, train_dataset=rows(16))
    for t in (trainer, stock, plain):
        t.train()
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert len(losses) == 2 and losses[0] != losses[1] and trainer._layers is not None
    assert stock._layers is None
    for p, w in zip(stock.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, w)


class Kwargs(Classifier):
    """Takes num_items_in_batch, as most models of transformers do; ``sums`` uses it."""

    def __init__(self, sums: bool) -> None:
        super().__init__(conv=True)
        self.sums = sums

    def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        out = super().forward(x, labels)
        if self.sums:
            out["loss"] = nn.functional.cross_entropy(out["logits"], labels, reduction="sum")
            out["loss"] = out["loss"] / kwargs["num_items_in_batch"]
        return out


@pytest.mark.parametrize("sums", [False, True])
def test_one_by_one_the_loss_has_the_scale_of_the_stock_trainer(sums: bool, tmp_path: Path) -> None:
    """Whether or not the model does anything with the number of items."""
    losses = []
    for optim in ("poprisk_adamw", "adamw_torch"):
        options = {**QUIET, "per_device_train_batch_size": 4, "max_grad_norm": 0.0}
        args = PopRiskTrainingArguments(str(tmp_path), max_steps=1, optim=optim, **options)
        trainer = PopRiskTrainer(Kwargs(sums), args=args, train_dataset=rows(16))
        trainer.train()
        losses.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def joined(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """One long row, as a padding-free collator makes it."""
    return {"x": torch.cat([f["x"] for f in features])[None], "labels": torch.tensor([features[0]["labels"]])}


def split_up(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    x = torch.stack([f["x"] for f in features]).repeat(2, 1, 1)
    return {"x": x, "labels": torch.tensor([f["labels"] for f in features]).repeat(2)}


@pytest.mark.parametrize(("collator", "made"), [(joined, 1), (split_up, 8)])
def test_a_collator_that_makes_other_examples_is_refused(collator: Any, made: int, tmp_path: Path) -> None:
    args = PopRiskTrainingArguments(str(tmp_path), max_steps=1, **{**QUIET, "per_device_train_batch_size": 4})
    trainer = PopRiskTrainer(Classifier(), args=args, train_dataset=rows(16), data_collator=collator)
    with pytest.raises(
        ValueError, match=f"collator made {made} examples of 4: .*per_device_train_batch_size=1"
    ):
        trainer.train()


@pytest.mark.parametrize("tokens_first", [False, True])
def test_a_length_that_equals_the_rows_is_looked_into(
    tokens_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """[tokens, rows] passes for [rows, tokens] by its shape, and not by its squares."""
    data = [{**row, "x": row["x"][:4]} for row in rows(16)]
    found = []
    for size in (4, 1):
        with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
            record = Record(patch)
            options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
            args = PopRiskTrainingArguments(str(tmp_path), max_steps=2, **{**QUIET, **options})
            model = Classifier(tokens=4, tokens_first=tokens_first)
            trainer = PopRiskTrainer(model, args=args, train_dataset=data)
            trainer.train()
        found.append(record.windows)
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
    args = PopRiskTrainingArguments(str(tmp_path), max_steps=1, **{**QUIET, "per_device_train_batch_size": 4})
    trainer = PopRiskTrainer(model, args=args, train_dataset=rows(16))
    said = {"norm": "norm normalises over the examples", "experts": "router_aux_loss_coef balances"}[kind]
    with pytest.raises(ValueError, match=f"{said} .*set per_device_train_batch_size=1 .*or poprisk_est"):
        trainer.train()


class Forgetful(Kwargs):
    """With dropout, so that a forward that is thrown away must not cost random numbers."""

    def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        return super().forward(nn.functional.dropout(x, 0.5, self.training), labels, **kwargs)


@pytest.mark.parametrize("hidden", [False, True])
def test_what_is_tried_out_at_the_start_draws_no_random_numbers(hidden: bool, tmp_path: Path) -> None:
    """A resumed run starts once more, and must come to the weights of the uninterrupted one."""
    options = {**QUIET, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    trainers = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = Forgetful(sums=True)
        if hidden:  # covered layers, and rows that they do not see: found out in the first forward
            model.conv, model.hidden = None, True
        args = PopRiskTrainingArguments(str(tmp_path), max_steps=4, **options)
        trainers.append(PopRiskTrainer(model, args=args, train_dataset=rows(16)))
        trainers[-1].train(resume_from_checkpoint=resume)
        assert trainers[-1]._layers is None
    for p, q in zip(trainers[0].model.parameters(), trainers[1].model.parameters(), strict=True):
        assert torch.equal(p, q)
