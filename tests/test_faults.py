"""What a trainer refuses once it is built, and what faulty numbers and data leave behind."""

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fault_worker import assert_complete, build, examples, state_of
from models import layout, trainer_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from hf_poprisk import PopRiskAdamW, PopRiskTrainer, PopRiskTrainingArguments, load_record


class Regression(nn.Module):
    """Squared error of two linear layers, or of one used twice; optionally checkpointed, with a table."""

    def __init__(
        self, shared: bool = False, reentrant: bool | None = None, sparse: bool | None = None
    ) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first if shared else nn.Linear(4, 4)
        self.table = None if sparse is None else nn.Embedding(3, 4, sparse=sparse)
        self.reentrant = reentrant

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """x, labels: [batch, 4]."""
        x = x.requires_grad_()  # reentrant checkpointing needs an input with a gradient
        for layer in (self.first, self.second):
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        if self.table is not None:
            x = x + self.table(torch.zeros(len(x), dtype=torch.long))
        return {"loss": (x - labels).square().mean(), "logits": x}


def points(count: int) -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(4), "labels": torch.randn(4)} for _ in range(count)]


def small(folder: Path, model: nn.Module | None = None, count: int = 16, **options: Any) -> PopRiskTrainer:
    """A trainer of ``Regression`` that takes eight examples per step."""
    return trainer_of(
        folder, points(count), model or Regression(), **{**layout(1), "max_steps": 2, **options}
    )


def train_or_refuse(trainer: Any, error: type[Exception], sentence: str | None) -> None:
    """The sentence, or a gated run where there is none."""
    if sentence is None:
        trainer.train()
        assert any("poprisk/fraction_open" in entry for entry in trainer.state.log_history)
    else:
        with pytest.raises(error, match=sentence):
            trainer.train()


# Parameters and optimizers


@pytest.mark.parametrize("options", [{}, {"poprisk_gate": "none"}, {"poprisk_exclude": ["lora_A"]}], ids=str)
def test_an_adapter_that_was_loaded_frozen_is_refused_as_such(
    options: dict[str, Any], tmp_path: Path
) -> None:
    get_peft_model(Regression(), LoraConfig(target_modules=["first"])).save_pretrained(tmp_path / "adapter")
    for trainable in (False, True):
        model = PeftModel.from_pretrained(Regression(), tmp_path / "adapter", is_trainable=trainable)
        trainer = small(tmp_path, model, remove_unused_columns=False, **options)
        if trainable:
            trainer.train()
        else:
            with pytest.raises(ValueError, match="^nothing to train: .* an adapter with is_trainable=True"):
                trainer.train()


FSDP1, FSDP2 = (SimpleNamespace(fsdp_version=version, cpu_offload=None) for version in (1, 2))


@pytest.mark.parametrize(
    ("switched_on", "options", "sentence"),
    [
        ({"is_fsdp_enabled": FSDP1}, {}, "FSDP1 is not supported by optim=poprisk_adamw: set fsdp_version=2"),
        ({"is_deepspeed_enabled": FSDP1}, {}, "deepspeed is not .* optim=poprisk_adamw: shard with FSDP2"),
        (
            {"is_fsdp_enabled": FSDP2},
            {"poprisk_estimator": "ema"},
            "poprisk_estimator=ema does not run on sh",
        ),
        *(
            ({name: FSDP1}, {"optim": "adamw_torch", "poprisk_risk": True}, f"{kind} is not supported by pop")
            for name, kind in (("is_fsdp_enabled", "fsdp"), ("is_deepspeed_enabled", "deepspeed"))
        ),
        ({"is_fsdp_enabled": FSDP1}, {"poprisk_gate": "none"}, None),
        ({}, {}, "tensor, context and sequence .* by optim=poprisk_adamw: shard with"),
        # as accelerate does on a CPU, where it trains with DDP and says nothing
        ({"fsdp": True}, {}, "fsdp was asked for, and accelerate set up NO instead, .* on GPUs"),
    ],
)
def test_sharding_switched_on_by_the_launcher_is_refused(
    switched_on: dict[str, Any],
    options: dict[str, Any],
    sentence: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Trainer, "train", lambda *_: "trained")
    trainer = small(tmp_path, **options)
    for name, plugin in switched_on.items():
        setattr(trainer.args if name == "fsdp" else trainer, name, True)
        monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
    if not switched_on:
        split = SimpleNamespace(tp_enabled=False, cp_enabled=True, sp_enabled=False)
        monkeypatch.setattr(type(trainer.accelerator), "parallelism_config", split)
    with nullcontext() if sentence is None else pytest.raises(ValueError, match=f"^{sentence}"):
        assert trainer.train() == "trained"


def test_examples_one_by_one_are_refused_on_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = small(tmp_path)
    monkeypatch.setattr(type(trainer), "_sharded", True)
    with pytest.raises(ValueError, match="one by one, because of: a reason, which FSDP2 does not allow: set"):
        trainer._say_one_by_one("a reason")


TWO = {"per_device_train_batch_size": 2}


@pytest.mark.parametrize(
    ("count", "fields", "allowed"),
    [
        *((count, {}, False) for count in (3, 5, 15)),
        (4, {}, True),
        (17, {}, True),  # the copy that fills the second step's gap has its original in the first
        (3, {"dataloader_drop_last": True}, True),
        (3, {"poprisk_gate": "none"}, True),
        (3, {"optim": "adamw_torch"}, True),
        *((count, {"poprisk_estimator": "group", **TWO}, count == 8) for count in (6, 8)),
        *((count, TWO, count == 8) for count in (6, 8)),
        # without copies a process may be left without a last batch, or with a shorter one
        *((n, {"accelerator_config": {"even_batches": False}, **TWO}, n > 10) for n in (9, 10, 11, 12)),
    ],
)
def test_examples_that_do_not_divide_over_the_processes(
    count: int, fields: dict[str, Any], allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "train", lambda *_: "trained")
    trainer = small(tmp_path, count=count, **fields)
    assert trainer.train() == "trained"  # a single process takes any number
    monkeypatch.setattr(PopRiskTrainingArguments, "world_size", 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    if allowed:
        assert trainer.train() == "trained"
        return
    sentence = rf"^{count} training examples do not divide over 2 processes × \d.*, .*drop_last=True"
    with pytest.raises(ValueError, match=sentence):
        trainer.train()


def test_another_optimizer_handed_to_the_trainer_is_refused(tmp_path: Path) -> None:
    model = Regression()
    adamw = torch.optim.AdamW(model.parameters())
    handed, made = small(tmp_path, model), small(tmp_path, model)
    handed.optimizer = adamw
    made.optimizer_cls_and_kwargs = (torch.optim.AdamW, {"lr": 1e-3})
    for trainer in (handed, made):
        sentence = "the optimizer handed to the trainer is AdamW: .*set optim=adamw_torch for a run without"
        with pytest.raises(ValueError, match=sentence):
            trainer.train()
    assert not adamw.state  # no step was taken


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({}, {}, None),
        ({"optim": "adamw_torch"}, {}, "handed to the trainer, but optim=adamw_torch"),
        ({"poprisk_gate": "soft"}, {}, "has gate='hard', but poprisk_gate='soft'"),
        ({"poprisk_estimator": "ema"}, {}, "has estimator='example', but poprisk_estimator='ema'"),
        ({}, {"estimator": "group"}, "has estimator='group', but poprisk_estimator='example'"),
        ({"poprisk_exclude": ["first"]}, {}, "gates other parameters than poprisk_exclude"),
    ],
)
def test_an_optimizer_that_is_not_what_the_arguments_say_is_refused(
    config: dict[str, Any], options: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    model = Regression()
    trainer = small(tmp_path, model, **config)
    trainer.optimizer = PopRiskAdamW(model.parameters(), **options)
    train_or_refuse(trainer, ValueError, message)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["first", "lm_head"], "^the pattern 'lm_head' matches no trainable parameter"),
        (["frozen"], "^the pattern 'frozen' matches no trainable parameter"),
        ([""], "^every parameter is ungated: use gate='none'"),
        (["first", "second"], "^every parameter is ungated: use gate='none'"),
    ],
)
def test_exclusions_that_cannot_be_meant_are_refused(
    patterns: list[str], message: str, tmp_path: Path
) -> None:
    model = Regression()
    model.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    with pytest.raises(ValueError, match=message):
        small(tmp_path, model, poprisk_exclude=patterns).train()


# Gradients that the hooks cannot read


IN_PARTS = r"^the gradient of first\.\w+ arrived in several parts .*'use_reentrant': False"


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        # Reentrant checkpointing runs one backward per segment, so a shared layer's hook fires in each.
        ({"shared": True, "reentrant": True}, IN_PARTS),
        ({"shared": True, "reentrant": False}, None),
        ({"shared": False, "reentrant": True}, None),
        ({"shared": True}, None),
        ({"sparse": True}, r"^table\.weight has sparse gradients, .* sparse=False"),
        ({"sparse": False}, None),
    ],
    ids=str,
)
def test_gradients_that_no_hook_can_read_are_refused(
    model: dict[str, bool], sentence: str | None, tmp_path: Path
) -> None:
    train_or_refuse(small(tmp_path, Regression(**model)), RuntimeError, sentence)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_parameters_are_refused(process_group: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    sharded = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    plain = nn.Parameter(torch.ones(4))
    with pytest.raises(NotImplementedError, match=r"sharded parameters \(FSDP2, .* or gate='none'"):
        PopRiskAdamW([plain, sharded], estimator="ema")
    with pytest.raises(NotImplementedError, match="sharded parameters .* set basis='coordinate'"):
        PopRiskAdamW([plain, sharded], gate="none", basis="eigen")
    for estimator in ("example", "group"):
        gated = PopRiskAdamW([plain, sharded], estimator=estimator)
        with pytest.raises(NotImplementedError, match=r"call optimizer.follow\(model\)"):
            gated.example()
        with pytest.raises(NotImplementedError, match="is not sharded by FSDP2 in this model"):
            gated.follow(nn.Linear(2, 2))
    ungated = PopRiskAdamW([sharded], gate="none", lr=0.5, weight_decay=0.0)
    sharded.sum().backward()
    ungated.step()
    assert torch.allclose(sharded.full_tensor(), torch.full((4,), 0.5))


# Numbers


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

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.accelerator.state._mixed_precision = "no"  # the state is shared by all accelerators


LAYOUTS: dict[str, dict[str, Any]] = {
    "one by one": {},
    "batched": layout(4, 4),
    "groups": {**layout(2, 4), "poprisk_estimator": "group"},
    "ema": {"poprisk_estimator": "ema"},
}
NUMBERS = {
    "NaN loss": {"loss_factor": float("nan")},
    "infinite gradient": {"grad_factor": float("inf")},
    "overflow under a loss scaler": {"grad_factor": 1e38},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_that_are_not_finite_leave_the_step_out(
    number: str, layout: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = examples(12, faulty=5, **NUMBERS[number])
    trainer = build(tmp_path, data, **layout)
    scaler = Scaler(trainer).accelerator.scaler if "scaler" in number else None
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert_complete(tmp_path, [1, 2, 3])
    checkpoints = [tmp_path / f"checkpoint-{step}" for step in (1, 2, 3)]
    first, second, third = map(state_of, checkpoints)
    assert all(map(torch.equal, first, second)) and not all(map(torch.equal, second, third))
    logs = trainer.state.log_history[:3]
    assert ["poprisk/fraction_open" in entry for entry in logs] == [True, False, True]
    if scaler is not None:
        assert scaler.get_scale() == 512.0
        unscaled = build(tmp_path / "unscaled", data, max_steps=1, **layout)
        unscaled.train()
        name = "poprisk/fraction_open"
        assert logs[0][name] == unscaled.state.log_history[0][name]
        return
    said = [r.message for r in caplog.records if "left out" in r.message]
    assert said == ["a gradient is not finite: this optimizer step was left out."]
    assert [entry.get("poprisk/steps_skipped") for entry in logs] == [None, 1.0, None]
    assert load_record(checkpoints[2]).statistics["steps_skipped"] == 1
    # what was saved after the step that was left out is as good as any
    build(tmp_path, data, **layout).train(resume_from_checkpoint=str(checkpoints[1]))
    assert all(map(torch.equal, third, state_of(checkpoints[2])))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_weights_that_are_nan_stop_the_run_by_name(layout: dict[str, Any], tmp_path: Path) -> None:
    trainer = build(tmp_path, examples(12), **layout)
    with torch.no_grad():
        trainer.model.first.weight[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match=r"because first\.weight is not: load"):
        trainer.train()
    assert trainer.state.global_step == 0


# Data


class Broken(Dataset):
    """One row cannot be read until somebody repairs it."""

    def __init__(self, rows: list[dict[str, torch.Tensor]], broken: int | None) -> None:
        self.rows, self.broken = rows, broken

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == self.broken:
            raise LookupError(f"row {index} cannot be read")
        return self.rows[index]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_an_example_that_cannot_be_read(layout: dict[str, Any], tmp_path: Path) -> None:
    build(tmp_path / "undisturbed", examples(16), max_steps=4, **layout).train()
    data = Broken(examples(16), broken=10)  # in the middle of the third step
    trainer = build(tmp_path / "run", data, max_steps=4, **layout)
    with pytest.raises(LookupError, match="^row 10 cannot be read$"):
        trainer.train()
    # accelerate reads one batch ahead, which is a whole step where nothing is accumulated
    assert_complete(tmp_path / "run", [1] if layout.get("gradient_accumulation_steps") == 1 else [1, 2])
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    data.broken = None
    trainer.train(resume_from_checkpoint=True)  # with half a window behind it
    assert_complete(tmp_path / "run", [1, 2, 3, 4])
    end, expected = (state_of(tmp_path / name / "checkpoint-4") for name in ("run", "undisturbed"))
    assert all(map(torch.equal, end, expected))
