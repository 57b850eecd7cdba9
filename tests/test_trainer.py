"""The trainers: what a window holds, when the gate is decided, what is logged, what a fault leaves."""

import itertools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import trl
from datasets import Dataset
from models import preferences, sequences, tiny_model, tiny_tokenizer, token_examples
from peft import LoraConfig
from torch.utils.data import IterableDataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

import hf_poprisk
from hf_poprisk import PopRiskMixin, PopRiskTrainer, PopRiskTrainingArguments
from hf_poprisk.per_example.window import ExampleWindow

QUIET: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "learning_rate": 1e-3,
    "train_sampling_strategy": "sequential",
    "per_device_train_batch_size": 1,
    "lr_scheduler_type": "constant",
}


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    return [{k: v[0] for k, v in example.items()} for example in token_examples(count)]


def plain_trainer(tmp_path: Path, count: int = 8, **options: Any) -> PopRiskTrainer:
    options = {"gradient_accumulation_steps": 4, "max_steps": 2, **QUIET, **options}
    args = PopRiskTrainingArguments(str(tmp_path), **options)
    return PopRiskTrainer(tiny_model(), args=args, train_dataset=rows(count), eval_dataset=rows(2))


def trl_trainer(kind: str, model: str, tmp_path: Path, count: int = 8, **options: Any) -> Any:
    config = getattr(hf_poprisk, f"PopRisk{kind}Config")
    trainer = getattr(hf_poprisk, f"PopRisk{kind}Trainer")
    peft_config = options.pop("peft_config", None)
    options = {"gradient_accumulation_steps": 4, "max_steps": 2, **QUIET, **options}
    args = config(str(tmp_path), bf16=False, **options)
    data = sequences(count) if kind == "SFT" else preferences(count)
    return trainer(model, args=args, train_dataset=data, peft_config=peft_config)


class Record:
    """G and Q of every window, as ``close_window`` reads them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.windows: list[tuple[int, dict[str, tuple[torch.Tensor, torch.Tensor]]]] = []
        original = ExampleWindow.reduce

        def reduce(window: ExampleWindow) -> Any:
            b, sq_sums = original(window)
            self.windows.append(
                (b, {window.names[p]: (p.grad.clone(), q.clone()) for p, q in sq_sums.items()})
            )
            return b, sq_sums

        monkeypatch.setattr(ExampleWindow, "reduce", reduce)


def textbook(
    trainer: Any, windows: list[int], scale: Callable[[int], float]
) -> list[list[dict[str, torch.Tensor]]]:
    """Per-example gradients of the first windows, by a loop over the trainer's own batches and loss."""
    trainer.create_optimizer()
    trainer.model.train()
    params = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    batches = iter(trainer.get_train_dataloader())
    gradients = []
    for size in windows:
        batch = [trainer._prepare_inputs(next(batches)) for _ in range(size)]
        tokens = (
            sum(int((b["labels"][..., 1:] != -100).sum()) for b in batch) if "labels" in batch[0] else None
        )
        gradients.append(
            reference.per_example_gradients(
                params,
                lambda b, tokens=tokens, size=size: (
                    scale(size)
                    * trainer.compute_loss(
                        trainer.model, b, **({} if tokens is None else {"num_items_in_batch": tokens})
                    )
                ),
                batch,
            )
        )
    return gradients


@pytest.mark.parametrize("kind", ["Trainer", "DPO", "SFT", "Reward", "DPO-LoRA"])
def test_the_window_holds_the_textbook_sums(
    kind: str, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the real training loop; a learning rate of 0 keeps the second, short window comparable."""
    record = Record(monkeypatch)
    options: dict[str, Any] = {"learning_rate": 0.0, "max_steps": 2, "count": 6}
    if kind == "Trainer":
        trainer: Any = plain_trainer(tmp_path, **options)
    else:
        if kind == "DPO-LoRA":
            options["peft_config"] = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        trainer = trl_trainer(kind.split("-")[0], str(llama_dir), tmp_path, **options)
    trainer.train()
    # mean over tokens of the window for language modelling, mean over pairs for preferences
    per_token = kind in ("Trainer", "SFT")
    gradients = textbook(trainer, [4, 2], lambda size: 1.0 if per_token else 1.0 / size)
    assert [b for b, _ in record.windows] == [4, 2]
    for (_, sums), per_example in zip(record.windows, gradients, strict=True):
        for name, (grad, sq_sum) in sums.items():
            for got, expected in zip(
                (grad, sq_sum), reference.grad_and_square_sums(per_example, name), strict=True
            ):
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


def spoil(trainer: PopRiskTrainer, micro_step: int, factor: float) -> None:
    """Multiply the loss of one micro-step."""
    original, calls = trainer.compute_loss, itertools.count()

    def compute_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(*args, **kwargs)
        return loss * factor if next(calls) == micro_step else loss

    trainer.compute_loss = compute_loss


class Scaler(TrainerCallback):
    """Gives the trainer a loss scaler on the CPU, where accelerate makes none."""

    def __init__(self, trainer: PopRiskTrainer) -> None:
        self.accelerator = trainer.accelerator
        # before `prepare`, which hands it to the optimizer's wrapper
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # after `prepare`, which would wrap the model in half-precision autocast
        self.accelerator.native_amp, self.accelerator.state._mixed_precision = True, "fp16"


def test_a_loss_scaler_changes_nothing_and_its_overflow_is_a_clean_skip(tmp_path: Path) -> None:
    plain = plain_trainer(tmp_path, max_steps=1)
    plain.train()
    scaled = plain_trainer(tmp_path, max_steps=3, count=12)
    Scaler(scaled)
    spoil(scaled, micro_step=5, factor=1e37)
    try:
        scaled.train()
    finally:
        scaled.accelerator.state._mixed_precision = "no"  # the state is shared by all accelerators
    logs = [entry for entry in scaled.state.log_history if "loss" in entry]
    assert logs[0]["poprisk/fraction_open"] == plain.state.log_history[0]["poprisk/fraction_open"]
    assert "poprisk/fraction_open" not in logs[1]  # nothing was decided in the overflowing step
    assert logs[2]["poprisk/examples"] == 4  # and nothing of it leaked into the next
    assert {int(s["step"]) for s in scaled._poprisk_optimizer().state.values()} == {2}
    assert all(p.isfinite().all() for p in scaled.model.parameters())


def test_a_nan_loss_leaves_the_step_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = plain_trainer(tmp_path, max_steps=3, count=12)
    spoil(trainer, micro_step=5, factor=float("nan"))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert caplog.text.count("this optimizer step was left out") == 1
    assert trainer.state.log_history[1]["poprisk/steps_skipped"] == 1
    optimizer = trainer._poprisk_optimizer()
    assert all(state["step"] == 2 and state["exp_avg"].isfinite().all() for state in optimizer.state.values())
    assert all(p.isfinite().all() for p in trainer.model.parameters())


class Stream(IterableDataset):
    """Five examples an epoch and no length: the last window of an epoch is never stepped."""

    def __iter__(self) -> Any:
        return iter(rows(5))


def test_a_window_that_runs_over_the_end_of_a_stream_counts_all_its_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(monkeypatch)
    args = PopRiskTrainingArguments(str(tmp_path), gradient_accumulation_steps=4, max_steps=2, **QUIET)
    trainer = PopRiskTrainer(tiny_model(), args=args, train_dataset=Stream())
    trainer.train()
    # the stock loop neither steps nor clears the fifth example's gradient: G and Q both keep it
    assert [b for b, _ in record.windows] == [4, 5]


def test_a_last_window_of_one_example_is_ungated_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = plain_trainer(tmp_path, count=5, max_steps=4)
        trainer.train()
    assert caplog.text.count("single example") == 1
    gated = ["poprisk/examples" in entry for entry in trainer.state.log_history if "loss" in entry]
    assert gated == [True, False, True, False]


def test_logs_are_averages_over_the_interval_and_not_in_evaluations(tmp_path: Path) -> None:
    runs = {}
    for interval in (1, 4):
        trainer = plain_trainer(
            tmp_path, count=16, max_steps=4, logging_steps=interval, eval_strategy="steps", eval_steps=1
        )
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
    }
    evaluations = [entry for entry in runs[4] if "eval_loss" in entry]
    assert len(evaluations) == 4 and not any("poprisk" in key for entry in evaluations for key in entry)


def test_report_to_receives_the_numbers(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer = plain_trainer(tmp_path)
    trainer.add_callback(Reporter())
    trainer.train()
    assert "poprisk/fraction_open" in seen[0] and math.isfinite(seen[0]["poprisk/margin"])


@pytest.mark.parametrize(
    ("lora", "kinds"),
    [
        ({}, "lora_A 14, lora_B 14"),
        ({"use_dora": True}, "lora_A 14, lora_B 14, lora_magnitude_vector 14"),
        ({"modules_to_save": ["embed_tokens"]}, "lora_A 14, lora_B 14, modules_to_save 1"),
    ],
)
def test_adapters_are_gated_and_counted(
    lora: dict[str, Any], kinds: str, llama_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", **lora)
    with caplog.at_level(logging.WARNING):
        trainer = trl_trainer("DPO", str(llama_dir), tmp_path, peft_config=config)
        trainer.train()
    assert "population-risk gate: hard" in caplog.text and "4 examples per step" in caplog.text
    assert f"({kinds}), 0 trainable tensors ungated" in caplog.text
    trained = {p for p in trainer.model.parameters() if p.requires_grad}
    assert set(trainer._poprisk_optimizer().gated_parameters) == trained
    first, second = (e["poprisk/fraction_open"] for e in trainer.state.log_history[:2])
    assert 0 < first < 1 and 0 < second < 1


def test_excluded_parameters_stay_ungated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = plain_trainer(tmp_path, poprisk_exclude=["embed_tokens", "norm"])
        trainer.train()
    assert "6 trainable tensors ungated" in caplog.text
    gated = set(trainer._poprisk_optimizer().gated_parameters)
    left_out = {n for n, p in trainer.model.named_parameters() if p not in gated}
    assert left_out == {n for n, _ in trainer.model.named_parameters() if "embed_tokens" in n or "norm" in n}


def test_weight_decay_groups_are_the_stock_ones(tmp_path: Path) -> None:
    trainers = [
        plain_trainer(tmp_path, weight_decay=0.1, **({"optim": "adamw_torch"} if stock else {}))
        for stock in (True, False)
    ]
    stock, ours = (
        [[p.numel() for p in g["params"]] for g in t.create_optimizer().param_groups] for t in trainers
    )
    assert stock == ours
    assert [g["weight_decay"] for g in trainers[1].optimizer.param_groups] == [0.1, 0.0]


def test_gate_none_trains_as_adamw_does(tmp_path: Path) -> None:
    weights = []
    for options in ({"optim": "adamw_torch"}, {"poprisk_gate": "none"}):
        trainer = plain_trainer(tmp_path, weight_decay=0.1, **options)
        trainer.train()
        assert not any("poprisk" in key for entry in trainer.state.log_history for key in entry)
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(torch.equal(p, w) for p, w in zip(*weights, strict=True))


@pytest.mark.parametrize("estimator", ["ema", "group"])
def test_the_other_estimators_take_larger_micro_batches(estimator: str, tmp_path: Path) -> None:
    options = {**QUIET, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    args = PopRiskTrainingArguments(str(tmp_path), max_steps=2, poprisk_estimator=estimator, **options)
    trainer = PopRiskTrainer(tiny_model(), args=args, train_dataset=rows(8))
    trainer.train()
    entry = trainer.state.log_history[0]
    assert 0 < entry["poprisk/fraction_open"] <= 1 and "poprisk/examples" not in entry
    assert ("poprisk/groups" in entry) == (estimator == "group")


def test_classification(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=2)
    tokenizer = tiny_tokenizer()
    data = Dataset.from_list(
        [{**tokenizer(f"{'the' if i % 2 else 'gate'} {i}"), "labels": i % 2} for i in range(16)]
    )
    args = PopRiskTrainingArguments(str(tmp_path), max_steps=4, gradient_accumulation_steps=8, **QUIET)
    trainer = PopRiskTrainer(classifier, args=args, train_dataset=data, processing_class=tokenizer)
    before = classifier.score.weight.detach().clone()
    trainer.train()
    assert trainer.state.log_history[0]["poprisk/examples"] == 8
    assert (classifier.score.weight != before).any()


def test_checkpointing_and_bf16_autocast_run_gated(llama_dir: Path, tmp_path: Path) -> None:
    args = hf_poprisk.PopRiskDPOConfig(
        str(tmp_path),
        bf16=True,
        gradient_checkpointing=True,
        gradient_accumulation_steps=4,
        max_steps=2,
        **QUIET,
    )
    trainer = hf_poprisk.PopRiskDPOTrainer(str(llama_dir), args=args, train_dataset=preferences(8))
    trainer.train()
    assert 0.05 < trainer.state.log_history[0]["poprisk/fraction_open"] < 0.95


def test_a_default_config_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock trainers make a config of their own when none is given; it would have no gate."""
    monkeypatch.chdir(tmp_path)
    trainer = PopRiskTrainer(tiny_model(), train_dataset=rows(8))
    assert isinstance(trainer.args, PopRiskTrainingArguments) and trainer.args.optim == "poprisk_adamw"


def test_no_hook_is_left_after_training(tmp_path: Path) -> None:
    trainer = plain_trainer(tmp_path)
    trainer.train()
    assert all(not p._backward_hooks for p in trainer.model.parameters())
    assert trainer._poprisk_optimizer().needs_examples


def test_resuming_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    options = {"count": 16, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = plain_trainer(tmp_path / "whole", **options)
    whole.train()
    half = plain_trainer(tmp_path / "half", **options)
    half.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for p, w in zip(half.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, w)


def test_the_mixin_hides_nothing_of_the_stock_trainers() -> None:
    """Its own names are free in every class it stands before; TRL prints `_name` in model cards, say."""
    overridden = {"create_optimizer", "train", "training_step", "compute_loss", "log", "push_to_hub"}
    overridden |= {"get_optimizer_cls_and_kwargs", "create_model_card", "init_hf_repo"}
    overridden |= {
        "_save",
        "_save_checkpoint",
        "_save_rng_state",
        "_load_optimizer_and_scheduler",
        "_run_epoch",
        "_load_best_model",
    }
    overridden |= {"_push_from_checkpoint", "_finish_current_push"}
    overridden |= {"_clip_grad_norm", "get_train_dataloader", "get_batch_samples", "_prepare_inputs"}
    own = {name for base in (PopRiskMixin, *PopRiskMixin.__bases__) for name in vars(base)} - overridden
    for stock in (Trainer, trl.DPOTrainer, trl.SFTTrainer, trl.RewardTrainer):
        assert not [name for name in own if not name.startswith("__") and hasattr(stock, name)]
