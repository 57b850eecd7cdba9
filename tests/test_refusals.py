"""What the gate cannot serve is refused by name, before anything is loaded; nothing is silently ungated."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from models import preferences, sequences
from peft import LoraConfig, PeftModel, get_peft_model
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
    PopRiskRewardTrainer,
    PopRiskSFTConfig,
    PopRiskSFTTrainer,
    PopRiskTrainer,
    PopRiskTrainingArguments,
    refusals,
)

CONFIGS = {
    PopRiskTrainer: PopRiskTrainingArguments,
    PopRiskDPOTrainer: PopRiskDPOConfig,
    PopRiskSFTTrainer: PopRiskSFTConfig,
    PopRiskRewardTrainer: PopRiskRewardConfig,
}
TRL_TRAINERS = (PopRiskDPOTrainer, PopRiskSFTTrainer, PopRiskRewardTrainer)
DATA = {
    PopRiskDPOTrainer: preferences(4),
    PopRiskSFTTrainer: sequences(4),
    PopRiskRewardTrainer: preferences(4),
}

# `poprisk_` fields other than the defaults are refused with another optimizer
STOCK = {"optim": "adamw_torch", "poprisk_estimator": "example"}

Make = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A config that runs anywhere, of the named class."""

    def build(config_class: type[Any] = PopRiskTrainingArguments, **kwargs: Any) -> Any:
        common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
        steps = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_steps": 2}
        return config_class(**{**common, "save_strategy": "no", "logging_steps": 1, **steps, **kwargs})

    return build


def pretend(monkeypatch: pytest.MonkeyPatch, config_class: type[Any], **properties: Any) -> None:
    """Replace properties of a config class that only other hardware would set.

    After the config is built: accelerate would take WORLD_SIZE for a launch and wait for the others.
    """
    for name, value in properties.items():
        monkeypatch.setattr(config_class, name, property(lambda _, value=value: value))
    if "world_size" in properties:
        monkeypatch.setenv("WORLD_SIZE", str(properties["world_size"]))


# Settings. One row each; every row is read by check_training and by the constructors of the trainers.


class Setting(NamedTuple):
    """A configuration that the gate refuses."""

    message: str  # regular expression
    fields: dict[str, Any] = {}
    attributes: dict[str, Any] = {}  # set afterwards: their library is not installed here
    properties: dict[str, Any] = {}
    sharding: bool = False  # refused for the streaming estimator as well
    only: type[Any] | None = None  # trainer class


def no_support(name: str, way_out: str) -> str:
    return rf"^{name} is not supported by optim=poprisk_adamw: {way_out}, or set poprisk_gate=none\.$"


ALONE = "leaves nothing to hold out: raise gradient_accumulation_steps"


SETTINGS = {
    "one_example": Setting(
        f"^a step of one example {ALONE}",
        {"gradient_accumulation_steps": 1},
    ),
    "one_group": Setting(
        f"^a step of one group {ALONE}",
        {
            "gradient_accumulation_steps": 1,
            "per_device_train_batch_size": 4,
            "poprisk_estimator": "group",
        },
    ),
    "auto_find_batch_size": Setting(
        no_support("auto_find_batch_size", "set the batch size yourself"),
        {"auto_find_batch_size": True},
        sharding=True,
    ),
    "fsdp": Setting(no_support("fsdp", "train with DDP"), {"fsdp": "full_shard"}, sharding=True),
    "deepspeed": Setting(
        no_support("deepspeed", "train with DDP"),
        attributes={"deepspeed": {"zero_optimization": {"stage": 2}}},
        sharding=True,
    ),
    "parallelism_config": Setting(
        no_support("parallelism_config", "train with DDP"),
        {"parallelism_config": ParallelismConfig()},
        sharding=True,
    ),
    "data_parallel": Setting(
        no_support(r"nn\.DataParallel", ".*accelerate launch, or set CUDA_VISIBLE_DEVICES"),
        properties={"n_gpu": 2},
        sharding=True,
    ),
    "static_graph": Setting(
        "^ddp_static_graph=True fails in PyTorch .* set ddp_static_graph=False", {"ddp_static_graph": True}
    ),
    "tokens_per_rank": Setting(
        "^average_tokens_across_devices=False makes .* set average_tokens_across_devices=True",
        {"average_tokens_across_devices": False},
        properties={"world_size": 2},
    ),
    **{
        f"dpo_{loss}": Setting(
            rf"^loss_type={loss} compares the pairs .* such as sigmoid, or poprisk_estimator=group",
            {"loss_type": loss},
            only=PopRiskDPOTrainer,
        )
        for loss in ("aot", "aot_unpaired")
    },
    "dpo_mixed_losses": Setting(
        "^loss_type=aot compares", {"loss_type": ["sigmoid", "aot"]}, only=PopRiskDPOTrainer
    ),
    "sft_packing": Setting(
        "^packing_strategy=wrapped cuts sequences, .* set packing_strategy=bfd, or poprisk_estimator=group",
        {"packing": True, "packing_strategy": "wrapped"},
        only=PopRiskSFTTrainer,
    ),
}
CASES = [
    pytest.param(setting, trainer, id=f"{trainer.__name__}-{name}")
    for name, setting in SETTINGS.items()
    for trainer in CONFIGS
    if setting.only in (None, trainer)
]


@pytest.fixture
def refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Build the config of a setting; changed fields come on top."""

    def build(setting: Setting, trainer: type[Any], **changes: Any) -> Any:
        # transformers sets it when it reads `fsdp`; here only so that it is put back
        monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
        args = make(CONFIGS[trainer], **{**setting.fields, **changes})
        for name, value in setting.attributes.items():
            setattr(args, name, value)
        pretend(monkeypatch, CONFIGS[trainer], **setting.properties)
        return args

    return build


@pytest.mark.parametrize(("setting", "trainer"), CASES)
def test_check_training_refuses(refused: Any, setting: Setting, trainer: type[Any]) -> None:
    with pytest.raises(ValueError, match=setting.message):
        refused(setting, trainer).check_training()


@pytest.mark.parametrize(("setting", "trainer"), CASES)
def test_trainers_refuse_before_they_load_a_model(
    refused: Any, setting: Setting, trainer: type[Any], tmp_path: Path
) -> None:
    args = refused(setting, trainer)
    with pytest.raises(ValueError, match=setting.message):
        if trainer is PopRiskTrainer:
            trainer(args=args, model_init=_must_not_be_called, train_dataset=[{}])
        else:
            trainer(str(tmp_path / "absent"), args=args, train_dataset=DATA[trainer])


@pytest.mark.parametrize("changes", [{"poprisk_gate": "none"}, STOCK], ids=["none", "stock"])
@pytest.mark.parametrize(("setting", "trainer"), CASES)
def test_without_the_gate_nothing_is_refused(
    refused: Any, setting: Setting, trainer: type[Any], changes: dict[str, Any]
) -> None:
    assert refused(setting, trainer, **changes).check_training() is None


@pytest.mark.parametrize(("setting", "trainer"), CASES)
def test_the_streaming_estimator_needs_no_examples_but_whole_parameters(
    refused: Any, setting: Setting, trainer: type[Any]
) -> None:
    args = refused(setting, trainer, poprisk_estimator="ema")
    if setting.sharding:
        with pytest.raises(ValueError, match=setting.message):
            args.check_training()
    else:
        args.check_training()


@pytest.mark.parametrize("changes", [{"poprisk_gate": "none"}, STOCK], ids=["none", "stock"])
@pytest.mark.parametrize(("setting", "trainer"), [c for c in CASES if c.values[0].sharding])
def test_gains_need_whole_parameters_whatever_the_optimizer(
    refused: Any, setting: Setting, trainer: type[Any], changes: dict[str, Any]
) -> None:
    args = refused(setting, trainer, **changes, poprisk_risk=True)
    with pytest.raises(
        ValueError, match="is not supported by poprisk_risk=true: .*or set poprisk_risk=false"
    ):
        args.check_training()


# The table itself: every row, with settings that this row refuses. A row without an entry fails.


BREAKS: dict[str, dict[str, Any]] = {
    "launched as {found} processes": {},
    "fsdp": SETTINGS["fsdp"].fields,
    "deepspeed": {},
    "parallelism_config": SETTINGS["parallelism_config"].fields,
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "nn.DataParallel": {},
    "fp16=True": {"fp16": True},
    "optim_target_modules": {"optim_target_modules": "all-linear"},
    "a step of one {a.poprisk_estimator}": {"gradient_accumulation_steps": 1},
    "ddp_static_graph=True": {"ddp_static_graph": True},
    "average_tokens_across_devices=False": {"average_tokens_across_devices": False},
    "loss_type={found}": {"loss_type": "aot"},
    "padding_free=True": {"padding_free": True, "per_device_train_batch_size": 2},
    "packing_strategy={a.packing_strategy}": SETTINGS["sft_packing"].fields,
    # of the label noise, by their ways out
    "set poprisk_label_noise=weight": {"poprisk_label_noise": "swap"},
    "set poprisk_estimator=example": {"poprisk_estimator": "group"},
    "set torch_compile=False": {"torch_compile": True},
    "set use_liger_kernel=False": {"use_liger_kernel": True},
    "set label_smoothing_factor=0": {"label_smoothing_factor": 0.1},
    "use sigmoid or sigmoid_norm": {"loss_type": "ipo"},
    "use sigmoid or sigmoid_norm, or set poprisk_label_noise=audit": {"loss_type": ["sigmoid", "sft"]},
    "set use_weighting=False, or set poprisk_label_noise=audit": {"use_weighting": True},
    "set sync_ref_model=False": {"sync_ref_model": True},
    "use reverse_kl": {"f_divergence_type": "js_divergence"},
    "set poprisk_label_noise=off, or train with DPO, a reward model or a classifier": {},
    "remove center_rewards_coefficient, or set poprisk_label_noise=audit": {
        "center_rewards_coefficient": 0.1
    },
}


def rows_of(config_class: type[Any]) -> list[Any]:
    always = (*refusals.LAUNCH, *refusals.WHOLE_PARAMETERS, *refusals.OPTIMIZER, *refusals.GATE)
    return [
        *((rule, False, config_class) for rule in (*always, *config_class._example_rules)),
        *((rule, True, config_class) for rule in config_class._label_rules),
    ]


@pytest.mark.parametrize(
    ("rule", "judged", "config_class"), [row for config in CONFIGS.values() for row in rows_of(config)]
)
def test_every_row_of_the_table(
    rule: refusals.Rule, judged: bool, config_class: type[Any], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # transformers sets it; put back afterwards
    name = rule.way_out if rule.setting == refusals.LABEL_MODE else rule.setting
    noise = {"poprisk_label_noise": "weight"} if judged else {}
    args = make(config_class, **{**noise, **BREAKS[name]})
    if name == "launched as {found} processes":
        monkeypatch.setenv("WORLD_SIZE", "2")
    elif name == "deepspeed":
        args.deepspeed = {"zero_optimization": {"stage": 2}}
    elif name == "nn.DataParallel":
        pretend(monkeypatch, config_class, n_gpu=2)
    elif name == "average_tokens_across_devices=False":
        pretend(monkeypatch, config_class, world_size=2)
    with pytest.raises(ValueError) as caught:
        args.check_training()
    said = str(caught.value)
    assert said == str(rule.error(args, **args._our_words))
    assert said.endswith(".") and "\n" not in said and "{" not in said and ": " in said


@pytest.mark.parametrize("trainer", TRL_TRAINERS)
def test_a_good_config_gets_as_far_as_loading_the_model(
    make: Make, trainer: type[Any], tmp_path: Path
) -> None:
    # The counterpart of the refusals above: they come first, not instead.
    with pytest.raises(OSError, match="absent"):
        trainer(str(tmp_path / "absent"), args=make(CONFIGS[trainer]), train_dataset=DATA[trainer])


def _must_not_be_called() -> nn.Module:
    raise AssertionError("the model was built before the settings were checked")


@pytest.mark.parametrize("config_class", CONFIGS.values())
def test_settings_near_the_refused_ones_pass(
    make: Make, config_class: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(config_class, gradient_accumulation_steps=2).check_training()
    make(config_class, average_tokens_across_devices=False).check_training()  # one process
    group = {"per_device_train_batch_size": 4, "poprisk_estimator": "group"}
    make(config_class, **group, gradient_accumulation_steps=2).check_training()
    make(config_class, per_device_train_batch_size=2, gradient_accumulation_steps=1).check_training()
    # Two processes make two examples, and without accumulation a static graph works.
    args = make(config_class, gradient_accumulation_steps=1, ddp_static_graph=True)
    pretend(monkeypatch, config_class, world_size=2)
    args.check_training()
    assert args.units_per_step == 2


@pytest.mark.parametrize(
    "changes", [{}, {"poprisk_gate": "none"}, {"optim": "adamw_torch"}], ids=["gate", "none", "stock"]
)
@pytest.mark.parametrize("trainer", CONFIGS)
def test_processes_that_do_not_see_each_other_are_refused(
    make: Make, trainer: type[Any], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    args = make(CONFIGS[trainer], **changes)
    monkeypatch.setenv("WORLD_SIZE", "2")
    sentence = "^launched as 2 processes that do not see each other: add --use_cpu true"
    with pytest.raises(ValueError, match=sentence):
        args.check_training()
    with pytest.raises(ValueError, match=sentence):
        if trainer is PopRiskTrainer:
            trainer(args=args, model_init=_must_not_be_called, train_dataset=[{}])
        else:
            trainer(str(tmp_path / "absent"), args=args, train_dataset=DATA[trainer])


@pytest.mark.parametrize(
    ("trainer", "wrong"),
    [
        (PopRiskTrainer, TrainingArguments),
        (PopRiskDPOTrainer, DPOConfig),
        (PopRiskSFTTrainer, SFTConfig),
        (PopRiskRewardTrainer, RewardConfig),
        # gated, and for another trainer
        (PopRiskDPOTrainer, PopRiskTrainingArguments),
        (PopRiskSFTTrainer, PopRiskDPOConfig),
    ],
)
def test_a_config_of_another_class_is_refused(
    make: Make, trainer: type[Any], wrong: type[Any], tmp_path: Path
) -> None:
    args, name = make(wrong), CONFIGS[trainer].__name__
    message = rf"^{trainer.__name__} does not take {wrong.__name__}: use {name}\.$"
    with pytest.raises(TypeError, match=message):
        trainer(str(tmp_path / "absent"), args=args, train_dataset=DATA.get(trainer))
    # By position: DPO has the reference model where the others have `args`.
    before = (None,) if trainer is PopRiskDPOTrainer else ()
    with pytest.raises(TypeError, match=message):
        trainer(str(tmp_path / "absent"), *before, args, train_dataset=DATA.get(trainer))


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
    generator = torch.Generator().manual_seed(0)
    return [{name: torch.randn(4, generator=generator) for name in ("x", "labels")} for _ in range(count)]


def logged(trainer: Any) -> set[str]:
    return {name for entry in trainer.state.log_history for name in entry if name.startswith("poprisk/")}


def trained(trainer: Any, before: dict[str, Tensor]) -> bool:
    return any(not torch.equal(p, before[name]) for name, p in trainer.model.state_dict().items())


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.clone() for name, p in model.state_dict().items()}


@pytest.mark.parametrize("options", [{}, {"poprisk_gate": "none"}, {"poprisk_exclude": ["lora_A"]}], ids=str)
def test_an_adapter_that_was_loaded_frozen_is_refused_as_such(
    options: dict[str, Any], make: Make, tmp_path: Path
) -> None:
    get_peft_model(Regression(), LoraConfig(target_modules=["first"])).save_pretrained(tmp_path / "adapter")
    for trainable in (False, True):
        model = PeftModel.from_pretrained(Regression(), tmp_path / "adapter", is_trainable=trainable)
        args = make(max_steps=1, remove_unused_columns=False, **options)
        trainer = PopRiskTrainer(model, args=args, train_dataset=rows(8))
        if trainable:
            trainer.train()
            assert trainer.state.global_step == 1
        else:
            with pytest.raises(ValueError, match="^nothing to train: .* an adapter with is_trainable=True"):
                trainer.train()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"poprisk_estimator": "group"}, {"fraction_open", "fraction_open_null", "groups", "margin"}),
        ({"poprisk_estimator": "ema"}, {"fraction_open", "fraction_open_null"}),
        ({"poprisk_gate": "none"}, set()),
    ],
    ids=["group", "ema", "none"],
)
def test_batches_of_four_train_where_no_single_example_is_claimed(
    make: Make, changes: dict[str, Any], expected: set[str]
) -> None:
    args = make(per_device_train_batch_size=4, gradient_accumulation_steps=3, **changes)
    trainer = PopRiskTrainer(Regression(), args, train_dataset=rows(24))
    before = snapshot(trainer.model)
    trainer.train()
    assert trained(trainer, before)
    assert logged(trainer) == {f"poprisk/{name}" for name in expected}
    groups = [entry["poprisk/groups"] for entry in trainer.state.log_history if "poprisk/groups" in entry]
    assert groups == ([3.0, 3.0] if "groups" in expected else [])


def test_a_trainer_that_only_evaluates_is_not_refused(make: Make) -> None:
    trainer = PopRiskTrainer(Regression(), make(per_device_train_batch_size=4), eval_dataset=rows(4))
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_trainer_without_a_config_gets_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # the default output_dir is relative
    trainer = PopRiskTrainer(Regression(), train_dataset=rows(4))
    assert type(trainer.args) is PopRiskTrainingArguments
    assert type(trainer.create_optimizer()) is PopRiskAdamW


def test_train_checks_again_what_changed_after_construction(make: Make) -> None:
    trainer = PopRiskTrainer(Regression(), make(), train_dataset=rows(16))
    trainer.args.gradient_accumulation_steps = 1
    with pytest.raises(ValueError, match=ALONE):
        trainer.train()
    assert trainer.optimizer is None  # nothing was set up


# What only the built trainer knows


@pytest.mark.parametrize(
    ("attribute", "name"), [("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")]
)
def test_sharding_switched_on_by_the_launcher_is_refused(
    make: Make, attribute: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "train", lambda *_: "trained")
    trainer = PopRiskTrainer(Regression(), make(), train_dataset=rows(16))
    setattr(trainer, attribute, True)
    with pytest.raises(ValueError, match=f"^{name} is not supported by optim=poprisk_adamw: launch with DDP"):
        trainer.train()
    gains = PopRiskTrainer(Regression(), make(**STOCK, poprisk_risk=True), train_dataset=rows(16))
    setattr(gains, attribute, True)
    with pytest.raises(ValueError, match=f"^{name} is not supported by poprisk_risk=true: launch with DDP"):
        gains.train()
    trainer.args.poprisk_gate = "none"
    assert trainer.train() == "trained"


@pytest.mark.parametrize(
    ("count", "fields", "allowed"),
    [
        (3, {}, False),
        (5, {}, False),
        (15, {}, False),
        (4, {}, True),
        (16, {}, True),
        (17, {}, True),  # the copy that fills the second step's gap has its original in the first
        (3, {"dataloader_drop_last": True}, True),
        (3, {"poprisk_gate": "none"}, True),
        (3, {"optim": "adamw_torch"}, True),
        (6, {"poprisk_estimator": "group", "per_device_train_batch_size": 2}, False),
        (8, {"poprisk_estimator": "group", "per_device_train_batch_size": 2}, True),
        (6, {"per_device_train_batch_size": 2}, False),
        (8, {"per_device_train_batch_size": 2}, True),
    ],
)
def test_examples_that_do_not_divide_over_the_processes(
    make: Make, count: int, fields: dict[str, Any], allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "train", lambda *_: "trained")
    trainer = PopRiskTrainer(Regression(), make(**fields), train_dataset=rows(count))
    pretend(monkeypatch, PopRiskTrainingArguments, world_size=2)
    if allowed:
        assert trainer.train() == "trained"
    else:
        sentence = (
            rf"^{count} training examples do not divide over 2 processes × \d examples, .*drop_last=True"
        )
        with pytest.raises(ValueError, match=sentence):
            trainer.train()


@pytest.mark.parametrize(
    ("fields", "unit"),
    [({}, "examples"), ({"poprisk_estimator": "group", "per_device_train_batch_size": 2}, "groups")],
    ids=["example", "group"],
)
def test_a_single_process_takes_any_number_of_examples(make: Make, fields: dict[str, Any], unit: str) -> None:
    trainer = PopRiskTrainer(Regression(), make(**fields), train_dataset=rows(3))
    trainer.train()
    assert f"poprisk/{unit}" in logged(trainer)


# Optimizers


def test_another_optimizer_handed_to_the_trainer_is_refused(make: Make) -> None:
    model = Regression()
    before = snapshot(model)
    sentence = "the optimizer handed to the trainer is AdamW: .*set optim=adamw_torch for a run without"
    adamw = torch.optim.AdamW(model.parameters())
    by_instance = PopRiskTrainer(model, make(), train_dataset=rows(16), optimizers=(adamw, None))
    by_class = PopRiskTrainer(
        model, make(), train_dataset=rows(16), optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 1e-3})
    )
    for trainer in (by_instance, by_class):
        with pytest.raises(ValueError, match=sentence):
            trainer.train()
        assert not trained(trainer, before)


def test_a_poprisk_optimizer_handed_to_the_trainer_is_gated(make: Make) -> None:
    model = Regression()
    optimizer = PopRiskAdamW(model.parameters())
    trainer = PopRiskTrainer(model, make(), train_dataset=rows(16), optimizers=(optimizer, None))
    trainer.train()
    assert "poprisk/fraction_open" in logged(trainer)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["first", "lm_head"], "^the pattern 'lm_head' matches no trainable parameter"),
        (["frozen"], "^the pattern 'frozen' matches no trainable parameter"),
        ([""], "^every parameter is ungated: use gate='none'"),
        (["first", "second"], "^every parameter is ungated: use gate='none'"),
    ],
)
def test_exclusions_that_cannot_be_meant_are_refused(make: Make, patterns: list[str], message: str) -> None:
    model = Regression()
    model.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    trainer = PopRiskTrainer(model, make(poprisk_exclude=patterns), train_dataset=rows(16))
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_an_exclusion_that_matches_leaves_exactly_those_parameters_ungated(make: Make) -> None:
    model = Regression()
    trainer = PopRiskTrainer(model, make(poprisk_exclude=["first", r"\.bias$"]), train_dataset=rows(16))
    gated = trainer.create_optimizer().gated_parameters
    assert [id(p) for p in gated] == [id(model.second.weight)]


# Gradients that the hooks cannot read


@pytest.mark.parametrize(
    ("shared", "reentrant", "allowed"),
    [(True, True, False), (True, False, True), (False, True, True), (True, None, True)],
)
def test_a_gradient_that_comes_in_parts_is_refused(
    make: Make, shared: bool, reentrant: bool | None, allowed: bool
) -> None:
    # Reentrant checkpointing runs one backward per segment, so a shared layer's hook fires in each.
    trainer = PopRiskTrainer(Regression(shared, reentrant), make(), train_dataset=rows(16))
    if allowed:
        trainer.train()
        assert "poprisk/fraction_open" in logged(trainer)
    else:
        sentence = r"^the gradient of first\.\w+ arrived in several parts .*'use_reentrant': False"
        with pytest.raises(RuntimeError, match=sentence):
            trainer.train()


def test_sparse_gradients_are_refused(make: Make) -> None:
    trainer = PopRiskTrainer(Regression(sparse=True), make(), train_dataset=rows(16))
    with pytest.raises(RuntimeError, match=r"^table\.weight has sparse gradients, .* sparse=False"):
        trainer.train()
    trainer = PopRiskTrainer(Regression(sparse=False), make(), train_dataset=rows(16))
    trainer.train()
    assert "poprisk/fraction_open" in logged(trainer)


@pytest.fixture
def process_group() -> Iterator[None]:
    assert not dist.is_initialized()
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
    optimizer = PopRiskAdamW([plain])
    with pytest.raises(NotImplementedError, match="sharded parameters"):
        optimizer.add_param_group({"params": [sharded]})

    ungated = PopRiskAdamW([sharded], gate="none", lr=0.5, weight_decay=0.0)
    sharded.sum().backward()
    ungated.step()
    assert torch.allclose(sharded.full_tensor(), torch.full((4,), 0.5))


def test_an_exclusion_that_is_no_regular_expression_is_refused_at_once(make: Make) -> None:
    with pytest.raises(ValueError, match=r"^'first\(' is not a regular expression: .* subpattern"):
        make(poprisk_exclude=["first("])


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
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
    make: Make, config: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    model = Regression()
    optimizer = PopRiskAdamW(model.parameters(), **options)
    trainer = PopRiskTrainer(model, make(**config), train_dataset=rows(16), optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=message):
        trainer.train()
