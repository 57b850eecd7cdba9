"""The trainers: what a window holds, when the gate is decided, what is logged, what a fault leaves."""

import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import trl
from models import QUIET as QUIET
from models import layout, preferences, rows, sequences, tiny_model, trainer_of, trl_trainer_of
from peft import LoraConfig
from torch.utils.data import IterableDataset
from transformers import Trainer

import hf_poprisk
from hf_poprisk import PopRiskMixin, PopRiskTrainer, PopRiskTrainingArguments
from hf_poprisk.per_example.window import ExampleWindow


def plain_trainer(tmp_path: Path, count: int = 8, **options: Any) -> PopRiskTrainer:
    return trainer_of(tmp_path, rows(count), **{**layout(1, 4), "max_steps": 2, **options})


class Record:
    """G and Q of every window, as ``close_window`` reads them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.windows: list[tuple[int, dict[str, tuple[torch.Tensor, torch.Tensor]]]] = []
        original = ExampleWindow.reduce

        def reduce(window: ExampleWindow) -> Any:
            (b, sq_sums), turned = original(window), window.squares.rotated
            self.windows.append(
                (b, {window.names[p]: (turned(p, p.grad).clone(), q.clone()) for p, q in sq_sums.items()})
            )
            return b, sq_sums

        monkeypatch.setattr(ExampleWindow, "reduce", reduce)


def textbook(trainer: Any, windows: list[int], per_token: bool) -> list[list[dict[str, torch.Tensor]]]:
    """Per-example gradients of the first windows, by a loop over the trainer's own batches and loss."""
    trainer.create_optimizer()
    trainer.model.train()
    params = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    batches = iter(trainer.get_train_dataloader())
    gradients = []
    for size in windows:
        batch = [trainer._prepare_inputs(next(batches)) for _ in range(size)]
        tokens = sum(int((b["labels"][..., 1:] != -100).sum()) for b in batch) if per_token else size

        def loss(b: Any, tokens: int = tokens) -> torch.Tensor:
            if per_token:
                return trainer.compute_loss(trainer.model, b, num_items_in_batch=tokens)
            return trainer.compute_loss(trainer.model, b) / tokens

        gradients.append(reference.per_example_gradients(params, loss, batch))
    return gradients


@pytest.mark.parametrize("kind", ["Trainer", "DPO", "SFT", "Reward", "DPO-LoRA"])
def test_the_window_holds_the_textbook_sums(
    kind: str, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the real training loop; a learning rate of 0 keeps the second, short window comparable."""
    record = Record(monkeypatch)
    options: dict[str, Any] = {**layout(1, 4), "learning_rate": 0.0, "max_steps": 2}
    if kind == "Trainer":
        trainer = trainer_of(tmp_path, rows(6), **options)
    else:
        if kind == "DPO-LoRA":
            options["peft_config"] = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        data = sequences(6) if kind == "SFT" else preferences(6)
        trainer = trl_trainer_of(kind.split("-")[0], str(llama_dir), tmp_path, data, **options)
    trainer.train()
    # mean over tokens of the window for language modelling, mean over pairs for preferences
    gradients = textbook(trainer, [4, 2], per_token=kind in ("Trainer", "SFT"))
    assert [b for b, _ in record.windows] == [4, 2]
    for (_, sums), per_example in zip(record.windows, gradients, strict=True):
        for name, pair in sums.items():
            for got, expected in zip(pair, reference.grad_and_square_sums(per_example, name), strict=True):
                assert (got - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-30, name
        assert sum(int(q.count_nonzero()) for _, q in sums.values()) > 100


def test_clipping_leaves_the_gate_alone(tmp_path: Path) -> None:
    moved = []
    for max_grad_norm in (0.0, 1e-4):
        trainer = plain_trainer(tmp_path, max_steps=1, max_grad_norm=max_grad_norm, adam_epsilon=1e-12)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.train()
        moved.append([p.detach() != w for p, w in zip(trainer.model.parameters(), before, strict=True)])
        assert 0.1 < trainer.state.log_history[0]["poprisk/fraction_open"] < 0.9
    for free, clipped in zip(*moved, strict=True):
        assert torch.equal(free, clipped)


class Stream(IterableDataset):
    """Five examples an epoch and no length: the last window of an epoch is never stepped."""

    def __iter__(self) -> Any:
        return iter(rows(5))


def test_a_window_that_runs_over_the_end_of_a_stream_counts_all_its_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(monkeypatch)
    trainer_of(tmp_path, Stream(), **layout(1, 4), max_steps=2).train()
    # the stock loop neither steps nor clears the fifth example's gradient: G and Q both keep it
    assert [b for b, _ in record.windows] == [4, 5]


def test_logs_are_averages_over_the_interval_and_not_in_evaluations(tmp_path: Path) -> None:
    runs = {}
    for interval in (1, 4):
        evaluation = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": rows(2)}
        trainer = plain_trainer(tmp_path, count=16, max_steps=4, logging_steps=interval, **evaluation)
        trainer.train()  # evaluates inside the interval, where nothing may be taken away
        runs[interval] = trainer.state.log_history
    fine = [entry["poprisk/fraction_open"] for entry in runs[1] if "loss" in entry]
    coarse = [entry for entry in runs[4] if "loss" in entry]
    assert len(fine) == 4 and len(coarse) == 1
    assert coarse[0]["poprisk/fraction_open"] == pytest.approx(sum(fine) / 4, rel=0.02)
    assert coarse[0]["poprisk/fraction_open_null"] == pytest.approx(0.3910, abs=1e-4)
    assert {k for k in coarse[0] if k.startswith("poprisk/")} == {
        "poprisk/fraction_open",
        "poprisk/fraction_open_null",
        "poprisk/examples",
        "poprisk/margin",
        "poprisk/noise_scale",
    }
    evaluations = [entry for entry in runs[4] if "eval_loss" in entry]
    assert len(evaluations) == 4 and not any("poprisk" in key for entry in evaluations for key in entry)


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"modules_to_save": ["embed_tokens"]}], ids=str)
def test_adapters_are_gated_and_counted(
    lora: dict[str, Any], llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", **lora)
    with caplog.at_level(logging.WARNING):
        trainer = trl_trainer_of(
            "DPO", str(llama_dir), tmp_path, **layout(1, 4), max_steps=2, peft_config=config
        )
        trainer.train()
    trained = {p for p in trainer.model.parameters() if p.requires_grad}
    assert set(trainer._poprisk_optimizer().gated_parameters) == trained
    assert "population-risk gate: hard" in caplog.text and "4 examples per step" in caplog.text
    assert f" in {len(trained)} tensors, 0 trainable tensors ungated" in caplog.text
    first, second = (e["poprisk/fraction_open"] for e in trainer.state.log_history[:2])
    assert 0 < first < 1 and 0 < second < 1


@pytest.mark.parametrize(
    ("size", "examples", "estimator", "hint"),
    [
        (1, 3, "example", " With 3 per step the test has little power, and noise often passes: raise "),
        (4, 8, "group", " With 2 per step the test has little power, and noise often passes: raise "),
        (4, 4, "example", None),
        (2, 2, "ema", None),
    ],
)
def test_the_summary_hints_at_too_few_examples(
    size: int,
    examples: int,
    estimator: str,
    hint: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {**layout(size, examples), "max_steps": 1, "poprisk_estimator": estimator}
    plain_trainer(tmp_path, **options).create_optimizer()
    [line] = [r.message for r in caplog.records if r.message.startswith("population-risk gate:")]
    assert line.endswith(f"{hint}gradient_accumulation_steps." if hint else " trainable tensors ungated.")


def test_a_run_without_the_gate_says_so_on_the_main_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, other = (plain_trainer(tmp_path, max_steps=1, optim="sgd") for _ in range(2))
    monkeypatch.setattr(other, "is_world_process_zero", lambda: False)
    for run in (trainer, other, plain_trainer(tmp_path, max_steps=1)):
        run.train()
    sentence = (
        "optim=sgd: plain sgd, no population-risk gate; set optim=poprisk_adamw for it, or "
        "poprisk_gate=hard for one around sgd."
    )
    assert [r.message for r in caplog.records if "no population-risk gate" in r.message] == [sentence]


def test_excluded_parameters_stay_ungated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = plain_trainer(tmp_path, poprisk_exclude=["embed_tokens", "norm"])
        trainer.train()
    assert "6 trainable tensors ungated" in caplog.text
    gated = set(trainer._poprisk_optimizer().gated_parameters)
    left_out = {n for n, p in trainer.model.named_parameters() if p not in gated}
    assert left_out == {n for n, _ in trainer.model.named_parameters() if "embed_tokens" in n or "norm" in n}


def test_gate_none_trains_as_adamw_does(tmp_path: Path) -> None:
    weights = []
    for options in ({"optim": "adamw_torch"}, {"poprisk_gate": "none"}):
        trainer = plain_trainer(tmp_path, weight_decay=0.1, **options)
        trainer.train()
        assert not any("poprisk" in key for entry in trainer.state.log_history for key in entry)
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(torch.equal(p, w) for p, w in zip(*weights, strict=True))


def test_a_default_config_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock trainers make a config of their own when none is given; it would have no gate."""
    monkeypatch.chdir(tmp_path)
    trainer = PopRiskTrainer(tiny_model(), train_dataset=rows(8))
    assert isinstance(trainer.args, PopRiskTrainingArguments) and trainer.args.optim == "poprisk_adamw"


def test_the_mixin_hides_nothing_of_the_stock_trainers() -> None:
    """Its own names are free in every class it stands before; TRL prints `_name` in model cards, say."""
    overridden = set(
        "create_optimizer train training_step compute_loss log push_to_hub get_optimizer_cls_and_kwargs "
        "set_initial_training_values "
        "create_model_card init_hf_repo save_model _save _save_checkpoint _save_rng_state _run_epoch "
        "_load_optimizer_and_scheduler _load_best_model _push_from_checkpoint _finish_current_push end "
        "_clip_grad_norm get_train_dataloader get_batch_samples _prepare_inputs _prepare_for_training".split()
    )
    own = {name for base in (PopRiskMixin, *PopRiskMixin.__bases__) for name in vars(base)} - overridden
    for stock in (Trainer, trl.DPOTrainer, trl.SFTTrainer, trl.RewardTrainer):
        assert not [name for name in own if not name.startswith("__") and hasattr(stock, name)]


@pytest.mark.parametrize("name", ["", "DPO", "SFT", "Reward"])
def test_the_signature_is_the_stock_trainers(name: str) -> None:
    ours = getattr(hf_poprisk, f"PopRisk{name}Trainer")
    stock = getattr(trl, f"{name}Trainer") if name else Trainer
    assert inspect.signature(ours) == inspect.signature(stock)
    assert "train_dataset" in inspect.signature(ours.__init__).parameters

    class Own(ours):
        def __init__(self, extra: int) -> None: ...

    assert list(inspect.signature(Own).parameters) == ["extra"]  # what is not inherited is not hidden
