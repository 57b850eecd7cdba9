"""What the gate cannot serve is refused by name, before anything is loaded; nothing is silently ungated."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from models import preferences, sequences
from peft import LoraConfig, PeftModel, get_peft_model
from test_arguments import TRAINERS
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, RewardConfig, SFTConfig

from hf_poprisk import (
    PopRiskAdamW,
    PopRiskDPOConfig,
    PopRiskDPOTrainer,
    PopRiskRewardConfig,
    PopRiskSFTConfig,
    PopRiskSFTTrainer,
    PopRiskTrainer,
    PopRiskTrainingArguments,
    refusals,
)

STOCK = {"optim": "adamw_torch", "poprisk_estimator": "example"}  # other fields must be the defaults then

Make = Callable[..., Any]


def pretend(monkeypatch: pytest.MonkeyPatch, config_class: type[Any], **properties: Any) -> None:
    """Replace properties of a config class that only other hardware would set.

    After the config is built: accelerate would take WORLD_SIZE for a launch and wait for the others.
    """
    for name, value in properties.items():
        monkeypatch.setattr(config_class, name, property(lambda _, value=value: value))
    if "world_size" in properties:
        monkeypatch.setenv("WORLD_SIZE", str(properties["world_size"]))


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A config that runs anywhere, of the named class; with what is set on it after it was built."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # transformers sets it; put back afterwards

    def build(config_class: type[Any] = PopRiskTrainingArguments, **fields: Any) -> Any:
        hardware = {name: fields.pop(name) for name in ("n_gpu", "world_size") if name in fields}
        launched, deepspeed = fields.pop("WORLD_SIZE", None), fields.pop("deepspeed", None)
        common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
        steps = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_steps": 2}
        args = config_class(**{**common, "save_strategy": "no", "logging_steps": 1, **steps, **fields})
        args.deepspeed = deepspeed  # its package is not installed here
        pretend(monkeypatch, config_class, **hardware)
        if launched:
            monkeypatch.setenv("WORLD_SIZE", launched)
        return args

    return build


def build_trainer(args: Any, tmp_path: Path) -> Any:
    """A trainer that would load a model which is not there."""
    trainer, absent = TRAINERS[type(args)], str(tmp_path / "absent")
    if trainer is PopRiskTrainer:

        def model_init() -> nn.Module:
            raise OSError(absent)

        return trainer(args=args, model_init=model_init, train_dataset=[{}])
    data = sequences(4) if trainer is PopRiskSFTTrainer else preferences(4)
    return trainer(absent, args=args, train_dataset=data)


# The table: every row, with settings that this row refuses. A row without an entry fails.


BREAKS: dict[str, list[dict[str, Any]]] = {
    "launched as {found} processes": [{"WORLD_SIZE": "2"}],
    "fsdp": [{"fsdp": "full_shard"}],
    "deepspeed": [{"deepspeed": {"zero_optimization": {"stage": 2}}}],
    "parallelism_config": [{"parallelism_config": ParallelismConfig()}],
    "auto_find_batch_size": [{"auto_find_batch_size": True}],
    "nn.DataParallel": [{"n_gpu": 2}],
    "fp16=True": [{"fp16": True}],
    "optim_target_modules": [{"optim_target_modules": "all-linear"}],
    "a step of one {a.poprisk_estimator}": [
        {"gradient_accumulation_steps": 1},
        {
            "gradient_accumulation_steps": 1,
            "per_device_train_batch_size": 4,
            "poprisk_estimator": "group",
        },
    ],
    "ddp_static_graph=True": [{"ddp_static_graph": True}],
    "average_tokens_across_devices=False": [{"average_tokens_across_devices": False, "world_size": 2}],
    "loss_type={found}": [{"loss_type": loss} for loss in ("aot", "aot_unpaired", ["sigmoid", "aot"])],
    "padding_free=True": [{"padding_free": True, "per_device_train_batch_size": 2}],
    "packing_strategy={a.packing_strategy}": [{"packing": True, "packing_strategy": "wrapped"}],
    # of the label noise, by their ways out
    "set poprisk_estimator=example": [{"poprisk_estimator": "group"}],
    "set torch_compile=False": [{"torch_compile": True}],
    "set use_liger_kernel=False": [{"use_liger_kernel": True}],
    "set label_smoothing_factor=0": [{"label_smoothing_factor": 0.1}],
    "use another loss_type, such as sigmoid, or set poprisk_label_noise=audit": [
        {"loss_type": loss} for loss in ("aot", "aot_unpaired", ["sigmoid", "aot"])
    ],
    "set poprisk_label_noise=off, or train with DPO, a reward model or a classifier": [{}],
    # of the weights
    "set poprisk_label_noise=off, or remove poprisk_weight_column": [{"poprisk_label_noise": "audit"}],
    "set packing=False": [{"packing": True}],
    "set padding_free=False": [{"padding_free": True}],
}


def gate_rows(config_class: type[Any]) -> list[refusals.Rule]:
    always = (refusals.LAUNCH, refusals.WHOLE_PARAMETERS, refusals.OPTIMIZER, refusals.GATE)
    return [rule for rules in (*always, config_class._example_rules) for rule in rules]


GATE_CASES = [
    (rule, config_class, fields)
    for config_class in TRAINERS
    for rule in gate_rows(config_class)
    for fields in BREAKS[rule.setting]
]
LABEL_CASES = [
    (rule, config_class, {"poprisk_label_noise": "weight", **fields})
    for config_class in TRAINERS
    for rule in config_class._label_rules
    for fields in BREAKS[rule.way_out if rule.setting == refusals.LABEL_MODE else rule.setting]
]

WEIGHT_CASES = [
    (rule, config_class, {"poprisk_weight_column": "w", **way, **fields})
    for config_class in TRAINERS
    for rule in (*config_class._weight_rules, *refusals.WHOLE_PARAMETERS)
    for fields in BREAKS[rule.way_out if rule.setting == refusals.WEIGHT_COLUMN else rule.setting]
    for way in ({}, STOCK)
    if way == {} or "poprisk_label_noise" not in fields  # which has no effect there
]


@pytest.mark.parametrize(("rule", "config_class", "fields"), [*GATE_CASES, *LABEL_CASES, *WEIGHT_CASES])
def test_every_row_refuses_before_a_model_is_loaded(
    rule: refusals.Rule, config_class: type[Any], fields: dict[str, Any], make: Make, tmp_path: Path
) -> None:
    args = make(config_class, **fields)
    with pytest.raises(ValueError) as caught:
        args.check_training()
    said = str(caught.value)
    of_weights = {"of": "poprisk_weight_column", "without": "no poprisk_weight_column"}
    weighted = args.poprisk_weight_column is not None
    assert said == str(rule.error(args, **(of_weights if weighted else args._our_words)))
    assert said.endswith(".") and "\n" not in said and "{" not in said and ": " in said
    with pytest.raises(ValueError) as caught:
        build_trainer(args, tmp_path)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"gradient_accumulation_steps": 1},
            "^a step of one example leaves nothing to hold out: raise gradient_accumulation_steps",
        ),
        (
            {"fsdp": "full_shard"},
            r"^fsdp is not supported by optim=poprisk_adamw: train with DDP, or set poprisk_gate=none\.$",
        ),
        (
            {"WORLD_SIZE": "2"},
            "^launched as 2 processes that do not see each other: add --use_cpu true",
        ),
    ],
)
def test_the_sentences(fields: dict[str, Any], sentence: str, make: Make) -> None:
    with pytest.raises(ValueError, match=sentence):
        make(**fields).check_training()


@pytest.mark.parametrize("run", ["none", "stock", "ema", "risk"])
@pytest.mark.parametrize(("rule", "config_class", "fields"), GATE_CASES)
def test_other_runs_are_refused_only_what_they_cannot_do(
    rule: refusals.Rule, config_class: type[Any], fields: dict[str, Any], run: str, make: Make
) -> None:
    """Without the gate, by the streaming form, or with a stock optimizer and the gains."""
    changes, refused = {
        "none": ({"poprisk_gate": "none"}, rule in refusals.OPTIMIZER),
        "stock": (STOCK, False),
        "ema": ({"poprisk_estimator": "ema"}, rule not in config_class._example_rules),
        "risk": ({**STOCK, "poprisk_risk": True}, rule in refusals.WHOLE_PARAMETERS),
    }[run]
    args = make(config_class, **{**fields, **changes})
    if refused or rule in refusals.LAUNCH:
        gains = refused and run == "risk"
        sentence = "is not supported by poprisk_risk=true: .*or set poprisk_risk=false" if gains else None
        with pytest.raises(ValueError, match=sentence):
            args.check_training()
    else:
        args.check_training()


@pytest.mark.parametrize("config_class", TRAINERS)
def test_settings_near_the_refused_ones_pass(config_class: type[Any], make: Make, tmp_path: Path) -> None:
    make(config_class, gradient_accumulation_steps=2).check_training()
    make(config_class, average_tokens_across_devices=False).check_training()  # one process
    group = {"per_device_train_batch_size": 4, "poprisk_estimator": "group"}
    make(config_class, **group, gradient_accumulation_steps=2).check_training()
    make(config_class, per_device_train_batch_size=2, gradient_accumulation_steps=1).check_training()
    with pytest.raises(OSError, match="absent"):  # the refusals come first, not instead
        build_trainer(make(config_class), tmp_path)
    # Two processes make two examples, and without accumulation a static graph works.
    args = make(config_class, gradient_accumulation_steps=1, ddp_static_graph=True, world_size=2)
    args.check_training()
    assert args.units_per_step == 2


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (PopRiskTrainingArguments, TrainingArguments),
        (PopRiskDPOConfig, DPOConfig),
        (PopRiskSFTConfig, SFTConfig),
        (PopRiskRewardConfig, RewardConfig),
        # gated, and for another trainer
        (PopRiskDPOConfig, PopRiskTrainingArguments),
        (PopRiskSFTConfig, PopRiskDPOConfig),
    ],
)
def test_a_config_of_another_class_is_refused(
    right: type[Any], wrong: type[Any], make: Make, tmp_path: Path
) -> None:
    trainer, args = TRAINERS[right], make(wrong)
    # By position: DPO has the reference model where the others have `args`.
    before = (None,) if trainer is PopRiskDPOTrainer else ()
    for positional, named in (((), {"args": args}), ((*before, args), {})):
        message = rf"^{trainer.__name__} does not take {wrong.__name__}: use {right.__name__}\.$"
        with pytest.raises(TypeError, match=message):
            trainer(str(tmp_path / "absent"), *positional, **named)


# A model and data small enough to train in a test


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


def rows(count: int) -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(4), "labels": torch.randn(4)} for _ in range(count)]


def logged(trainer: Any) -> set[str]:
    return {name for entry in trainer.state.log_history for name in entry if name.startswith("poprisk/")}


@pytest.mark.parametrize("options", [{}, {"poprisk_gate": "none"}, {"poprisk_exclude": ["lora_A"]}], ids=str)
def test_an_adapter_that_was_loaded_frozen_is_refused_as_such(
    options: dict[str, Any], make: Make, tmp_path: Path
) -> None:
    get_peft_model(Regression(), LoraConfig(target_modules=["first"])).save_pretrained(tmp_path / "adapter")
    args = make(max_steps=1, remove_unused_columns=False, **options)
    model = PeftModel.from_pretrained(Regression(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="^nothing to train: .* an adapter with is_trainable=True"):
        PopRiskTrainer(model, args=args, train_dataset=rows(8)).train()
    model = PeftModel.from_pretrained(Regression(), tmp_path / "adapter", is_trainable=True)
    PopRiskTrainer(model, args=args, train_dataset=rows(8)).train()


def test_a_trainer_that_only_evaluates_is_not_refused(make: Make) -> None:
    args = make(gradient_accumulation_steps=1)
    assert PopRiskTrainer(Regression(), args, eval_dataset=rows(4)).evaluate()["eval_loss"] > 0


def test_train_checks_again_what_changed_after_construction(make: Make) -> None:
    trainer = PopRiskTrainer(Regression(), make(), train_dataset=rows(16))
    trainer.args.gradient_accumulation_steps = 1
    with pytest.raises(ValueError, match="leaves nothing to hold out"):
        trainer.train()
    assert trainer.optimizer is None  # nothing was set up


# What only the built trainer knows


@pytest.mark.parametrize(
    ("attribute", "name"), [("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")]
)
def test_sharding_switched_on_by_the_launcher_is_refused(
    attribute: str, name: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "train", lambda *_: "trained")
    gated, gains = (
        PopRiskTrainer(Regression(), make(**fields), train_dataset=rows(16))
        for fields in ({}, {**STOCK, "poprisk_risk": True})
    )
    for trainer, of in ((gated, "optim=poprisk_adamw"), (gains, "poprisk_risk=true")):
        setattr(trainer, attribute, True)
        with pytest.raises(ValueError, match=f"^{name} is not supported by {of}: launch with DDP"):
            trainer.train()
    gated.args.poprisk_gate = "none"
    assert gated.train() == "trained"


GROUPS_OF_TWO = {"poprisk_estimator": "group", "per_device_train_batch_size": 2}


@pytest.mark.parametrize(
    ("count", "fields", "allowed"),
    [
        *((count, {}, False) for count in (3, 5, 15)),
        *((count, {}, True) for count in (4, 16)),
        (17, {}, True),  # the copy that fills the second step's gap has its original in the first
        (3, {"dataloader_drop_last": True}, True),
        (3, {"poprisk_gate": "none"}, True),
        (3, STOCK, True),
        (6, GROUPS_OF_TWO, False),
        (8, GROUPS_OF_TWO, True),
        (6, {"per_device_train_batch_size": 2}, False),
        (8, {"per_device_train_batch_size": 2}, True),
    ],
)
def test_examples_that_do_not_divide_over_the_processes(
    count: int, fields: dict[str, Any], allowed: bool, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "train", lambda *_: "trained")
    trainer = PopRiskTrainer(Regression(), make(**fields), train_dataset=rows(count))
    assert trainer.train() == "trained"  # a single process takes any number
    pretend(monkeypatch, PopRiskTrainingArguments, world_size=2)
    if allowed:
        assert trainer.train() == "trained"
    else:
        sentence = (
            rf"^{count} training examples do not divide over 2 processes × \d examples, .*drop_last=True"
        )
        with pytest.raises(ValueError, match=sentence):
            trainer.train()


# Optimizers


def test_another_optimizer_handed_to_the_trainer_is_refused(make: Make) -> None:
    model = Regression()
    adamw = torch.optim.AdamW(model.parameters())
    for options in (
        {"optimizers": (adamw, None)},
        {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 1e-3})},
    ):
        trainer = PopRiskTrainer(model, make(), train_dataset=rows(16), **options)
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
        ({"poprisk_warmup_steps": 3}, {}, "has warmup_steps=0, but poprisk_warmup_steps=3"),
        ({"poprisk_exclude": ["first"]}, {}, "gates other parameters than poprisk_exclude"),
        ({"poprisk_exclude": ["nothing"]}, {}, "matches no trainable parameter"),
    ],
)
def test_an_optimizer_that_is_not_what_the_arguments_say_is_refused(
    config: dict[str, Any], options: dict[str, Any], message: str | None, make: Make
) -> None:
    model = Regression()
    optimizer = PopRiskAdamW(model.parameters(), **options)
    trainer = PopRiskTrainer(model, make(**config), train_dataset=rows(16), optimizers=(optimizer, None))
    if message is None:
        trainer.train()
        assert "poprisk/fraction_open" in logged(trainer)
    else:
        with pytest.raises(ValueError, match=message):
            trainer.train()


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["first", "lm_head"], "^the pattern 'lm_head' matches no trainable parameter"),
        (["frozen"], "^the pattern 'frozen' matches no trainable parameter"),
        ([""], "^every parameter is ungated: use gate='none'"),
        (["first", "second"], "^every parameter is ungated: use gate='none'"),
    ],
)
def test_exclusions_that_cannot_be_meant_are_refused(patterns: list[str], message: str, make: Make) -> None:
    model = Regression()
    model.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    with pytest.raises(ValueError, match=message):
        PopRiskTrainer(model, make(poprisk_exclude=patterns), train_dataset=rows(16)).train()


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
    model: dict[str, bool], sentence: str | None, make: Make
) -> None:
    trainer = PopRiskTrainer(Regression(**model), make(), train_dataset=rows(16))
    if sentence is None:
        trainer.train()
        assert "poprisk/fraction_open" in logged(trainer)
    else:
        with pytest.raises(RuntimeError, match=sentence):
            trainer.train()


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_parameters_are_refused(process_group: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    sharded = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    plain = nn.Parameter(torch.ones(4))
    for estimator in ("example", "group", "ema"):
        with pytest.raises(NotImplementedError, match=r"sharded parameters \(FSDP2, .* set gate='none'"):
            PopRiskAdamW([plain, sharded], estimator=estimator)
    with pytest.raises(NotImplementedError, match="sharded parameters"):
        PopRiskAdamW([plain]).add_param_group({"params": [sharded]})
    ungated = PopRiskAdamW([sharded], gate="none", lr=0.5, weight_decay=0.0)
    sharded.sum().backward()
    ungated.step()
    assert torch.allclose(sharded.full_tensor(), torch.full((4,), 0.5))
