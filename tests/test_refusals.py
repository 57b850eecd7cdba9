"""What the gate cannot serve is refused by name, before anything is loaded; nothing is silently ungated."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from fault_worker import Fragile, examples, one_sentence
from models import DATA, preferences, reward, rows, tiny_model, trl_trainer_of
from test_arguments import TRAINERS
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig
from trl.experimental.orpo import ORPOConfig

from hf_poprisk import (
    PopRiskDPOConfig,
    PopRiskGRPOConfig,
    PopRiskGRPOTrainer,
    PopRiskKTOConfig,
    PopRiskMixin,
    PopRiskORPOConfig,
    PopRiskRewardConfig,
    PopRiskRLOOConfig,
    PopRiskRLOOTrainer,
    PopRiskSFTConfig,
    PopRiskTrainer,
    PopRiskTrainingArguments,
    refusals,
)

ONLINE: dict[type[Any], type[Any]] = {
    PopRiskGRPOConfig: PopRiskGRPOTrainer,
    PopRiskRLOOConfig: PopRiskRLOOTrainer,
}
ALL = {**TRAINERS, **ONLINE}
STOCK = {"optim": "adamw_torch", "poprisk_estimator": "example"}  # other fields must be the defaults then

Make = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A config that runs anywhere, of the named class; with what is set on it after it was built."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # transformers sets it; put back afterwards

    def build(config_class: type[Any] = PopRiskTrainingArguments, **fields: Any) -> Any:
        names = ("n_gpu", "world_size", "deepspeed", "WORLD_SIZE", "auto_find_batch_size")
        later = {k: fields.pop(k) for k in names if k in fields}
        common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
        steps = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_steps": 2}
        if "num_generations" in config_class.__dataclass_fields__:  # of one prompt
            steps |= {"per_device_train_batch_size": 2, "num_generations": 2}
        args = config_class(**{**common, "save_strategy": "no", "logging_steps": 1, **steps, **fields})
        args.deepspeed = later.get("deepspeed")  # its package is not installed here
        args.auto_find_batch_size = later.get("auto_find_batch_size", False)  # some stock classes refuse it
        for name in later.keys() & {"n_gpu", "world_size"}:
            monkeypatch.setattr(config_class, name, later[name])
        if world := later.get("WORLD_SIZE", later.get("world_size")):
            # now: before, accelerate would take it for a launch and wait for the others
            monkeypatch.setenv("WORLD_SIZE", str(world))
        return args

    return build


def build_trainer(args: Any, tmp_path: Path) -> Any:
    """A trainer that would load a model which is not there."""
    trainer, absent = ALL[type(args)], str(tmp_path / "absent")
    if trainer is PopRiskTrainer:

        def model_init() -> nn.Module:
            raise OSError(absent)

        return trainer(args=args, model_init=model_init, train_dataset=[{}])
    kind = type(args).__name__.removeprefix("PopRisk").removesuffix("Config")
    more = {"reward_funcs": reward} if type(args) in ONLINE else {}
    return trainer(absent, args=args, train_dataset=DATA.get(kind, preferences)(4), **more)


# The table: every rule, by a part of its sentence, with settings that it refuses. One without an entry fails.


BREAKS: dict[str, list[dict[str, Any]]] = {
    "launched as {found} processes": [{"WORLD_SIZE": "2"}],
    "fsdp is not supported": [{"fsdp": "full_shard"}],
    "FSDP1 is not supported": [{"fsdp": "full_shard", "fsdp_config": {"version": 1}}],
    "cpu_offload is not supported": [{"fsdp": "full_shard", "fsdp_config": {"cpu_offload": True}}],
    "poprisk_estimator=ema does not run on": [{"fsdp": "full_shard", "poprisk_estimator": "ema"}],
    "tensor, context and sequence parallelism": [{"parallelism_config": ParallelismConfig(tp_size=2)}],
    "deepspeed is not supported": [{"deepspeed": {"zero_optimization": {"stage": 2}}}],
    "parallelism_config is not supported": [{"parallelism_config": ParallelismConfig()}],
    "auto_find_batch_size is not supported": [{"auto_find_batch_size": True}],
    "nn.DataParallel is not supported": [{"n_gpu": 2}],
    "fp16=True has no effect": [{"fp16": True}],
    "optim_target_modules has no effect": [{"optim_target_modules": "all-linear"}],
    "a step of one {a.poprisk_estimator} leaves nothing": [
        {"gradient_accumulation_steps": 1},
        {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4, "poprisk_estimator": "group"},
    ],
    "ddp_static_graph=True fails": [{"ddp_static_graph": True}],
    "average_tokens_across_devices=False makes": [{"average_tokens_across_devices": False, "world_size": 2}],
    "loss_type={found} compares": [{"loss_type": x} for x in ("aot", "aot_unpaired", ["sigmoid", "aot"])],
    "padding_free=True joins": [{"padding_free": True, "per_device_train_batch_size": 2}],
    "packing_strategy={a.packing_strategy} cuts": [{"packing": True, "packing_strategy": "wrapped"}],
    # of the label noise and the weights
    "which torch_compile=True hides": [{"torch_compile": True}],
    "which use_liger_kernel=True hides": [{"use_liger_kernel": True}],
    "which label_smoothing_factor hides": [{"label_smoothing_factor": 0.1}],
    "which packing=True hides": [{"packing": True}],
    "which padding_free=True hides": [{"padding_free": True}],
    "judges labels, and a sequence has none": [{}],
    "poprisk_judge_after_epochs={found} has no effect": [
        {"poprisk_judge_after_epochs": 1, "poprisk_label_noise": "off"}
    ],
    "num_train_epochs={a.num_train_epochs:g} ends before": [
        {"poprisk_judge_after_epochs": 2, "max_steps": -1, "num_train_epochs": 2},
        {
            **{"poprisk_judge_after_epochs": 2, "max_steps": -1, "num_train_epochs": 1.5},
            "poprisk_label_noise": "audit",
        },
    ],
    "poprisk_leap={a.poprisk_leap} is made before": [{"poprisk_leap": 1.0, "poprisk_judge_after_epochs": 1}],
    "poprisk_leap={a.poprisk_leap} goes to": [
        {"poprisk_leap": 1.0, "poprisk_label_noise": mode} for mode in ("off", "audit")
    ],
    "gives the weights that": [{"poprisk_label_noise": "audit"}],
    "a completion that is good or bad by itself": [{}],
    "a triple with a reference text": [{}],
    # of a gate around a stock optimizer
    "takes its steps during the backward": [{"optim": n} for n in ("lomo", "schedule_free_adamw")],
    "reads the write of poprisk_adamw": [{"poprisk_risk": True}],
    # of sampled completions
    "does not hold whole ones": [{"per_device_train_batch_size": 3}, {"num_generations": 4}],
    "puts the same prompts into a step": [
        {"num_iterations": 2, "steps_per_generation": 1, "gradient_accumulation_steps": 2}
    ],
    "completions are sampled: weight": [{}],
    "a sampled completion has none": [{}],
}


def broken(*rules: refusals.Rule) -> list[tuple[refusals.Rule, dict[str, Any]]]:
    """Every rule with each of the settings that break it."""
    found = []
    for rule in rules:
        [key] = (key for key in BREAKS if key in rule.sentence)
        found += [(rule, fields) for fields in BREAKS[key]]
    return found


def gate_rules(config_class: type[Any]) -> list[refusals.Rule]:
    always = (refusals.LAUNCH, refusals.SHARDED, refusals.OPTIMIZER, refusals.GATE)
    return [rule for rules in (*always, config_class._example_rules) for rule in rules]


GATE_CASES = [
    (config_class, rule, fields) for config_class in ALL for rule, fields in broken(*gate_rules(config_class))
]
LABEL_CASES = [
    (config_class, rule, {"poprisk_label_noise": "weight", **fields})
    for config_class in ALL
    for rule, fields in broken(*refusals.JUDGING, *config_class._label_rules)
]
WEIGHT_CASES = [
    (config_class, rule, {"poprisk_weight_column": "w", **way, **fields})
    for config_class in ALL
    for rule, fields in broken(
        *config_class._weight_rules,
        *(() if config_class in ONLINE else refusals.WHOLE_PARAMETERS),  # where weights never are
    )
    for way in ({}, STOCK)
    if way == {} or "poprisk_label_noise" not in fields  # which has no effect there
]


AROUND_CASES = [
    (config_class, rule, {"optim": "sgd", "poprisk_gate": "hard", **fields})
    for config_class in ALL
    for rule, fields in broken(
        *refusals.AROUND, *refusals.WHOLE_PARAMETERS, *refusals.OPTIMIZER, *config_class._example_rules
    )
]


@pytest.mark.parametrize(
    ("config_class", "rule", "fields"), [*GATE_CASES, *LABEL_CASES, *WEIGHT_CASES, *AROUND_CASES]
)
def test_every_rule_refuses_before_a_model_is_loaded(
    config_class: type[Any], rule: refusals.Rule, fields: dict[str, Any], make: Make, tmp_path: Path
) -> None:
    args = make(config_class, **fields)
    words = {"of": args.gated_by, "without": args.plain_options}
    if args.poprisk_weight_column is not None:
        words = {"of": "poprisk_weight_column", "without": "no poprisk_weight_column"}
    sentence = rule.sentence.format(a=args, found=rule.found(args), **words)
    assert sentence == one_sentence(ValueError(sentence)) and "{" not in sentence and ": " in sentence
    for refused in (args.check_training, lambda: build_trainer(args, tmp_path)):
        with pytest.raises(ValueError) as caught:
            refused()
        assert str(caught.value) == sentence


@pytest.mark.parametrize("run", ["none", "stock", "ema", "risk"])
@pytest.mark.parametrize(("config_class", "rule", "fields"), GATE_CASES)
def test_other_runs_are_refused_only_what_they_cannot_do(
    config_class: type[Any], rule: refusals.Rule, fields: dict[str, Any], run: str, make: Make
) -> None:
    """Without the gate, by the streaming form, or with a stock optimizer and the gains."""
    changes, refused = {
        "none": ({"poprisk_gate": "none"}, rule in refusals.OPTIMIZER),
        "stock": (STOCK, False),
        "ema": ({"poprisk_estimator": "ema"}, rule not in config_class._example_rules),
        "risk": ({**STOCK, "poprisk_risk": True}, rule in (*refusals.WHOLE_PARAMETERS, *refusals.SHARDED)),
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


# Configs


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (PopRiskTrainingArguments, TrainingArguments),
        (PopRiskDPOConfig, DPOConfig),
        (PopRiskSFTConfig, SFTConfig),
        (PopRiskRewardConfig, RewardConfig),
        (PopRiskKTOConfig, KTOConfig),
        (PopRiskORPOConfig, ORPOConfig),
        (PopRiskGRPOConfig, GRPOConfig),
        # gated, and for another trainer
        (PopRiskDPOConfig, PopRiskTrainingArguments),
        (PopRiskSFTConfig, PopRiskDPOConfig),
    ],
)
def test_a_config_of_another_class_is_refused(
    right: type[Any], wrong: type[Any], make: Make, tmp_path: Path
) -> None:
    trainer, args = ALL[right], make(wrong)
    # By position: DPO and KTO have the reference model where the others have `args`, GRPO its rewards.
    before = (None,) if right in (PopRiskDPOConfig, PopRiskKTOConfig, PopRiskGRPOConfig) else ()
    named_before = {"reward_funcs": None} if right is PopRiskGRPOConfig else {}
    for positional, named in (((), {"args": args, **named_before}), ((*before, args), {})):
        message = rf"^{trainer.__name__} does not take {wrong.__name__}: use {right.__name__}\.$"
        with pytest.raises(TypeError, match=message):
            trainer(str(tmp_path / "absent"), *positional, **named)


class OwnTrainer(PopRiskMixin, Seq2SeqTrainer):
    """As a user writes it."""


def test_a_trainer_of_ones_own_names_the_mixin(make: Make) -> None:
    sentence = (
        "^OwnTrainer does not take {0}: put PopRiskArgumentsMixin before {0} in a dataclass of your own"
    )
    with pytest.raises(TypeError, match=sentence.format("Seq2SeqTrainingArguments")):
        OwnTrainer(tiny_model(), make(Seq2SeqTrainingArguments), train_dataset=rows(8))


# Data


class OwnLossTrainer(PopRiskTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class WeightedModel(nn.Module):
    def forward(self, x: Tensor, label_weight: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


@pytest.mark.parametrize("noise", ["off", "weight"])
def test_label_weights_that_nothing_reads_are_refused(noise: str, make: Make, llama_dir: Path) -> None:
    data = preferences(8).add_column("label_weight", [1.0] * 8)
    sentence = (
        "Trainer does not read the column label_weight: train with poprisk_weight_column=label_weight, "
        r"remove it, or read it in a compute_loss of your own\.$"
    )
    for config in (PopRiskTrainingArguments, PopRiskDPOConfig, PopRiskRewardConfig):
        with pytest.raises(ValueError, match=f"^PopRisk(DPO|Reward)?{sentence}"):
            args = make(config, poprisk_label_noise=noise)
            TRAINERS[config](nn.Linear(1, 1), args=args, train_dataset=data)
    if noise == "off":  # a loss or a model of one's own may
        OwnLossTrainer(tiny_model(), make(), train_dataset=data)
        PopRiskTrainer(WeightedModel(), make(), train_dataset=data)


@pytest.mark.parametrize("kind", ["SFT", "DPO", "Reward"])
def test_data_of_which_nothing_is_left_is_named(kind: str, tmp_path: Path, llama_dir: Path) -> None:
    data = preferences(8)
    if kind == "SFT":
        data = data.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
    short = {"max_length": 2, "gradient_accumulation_steps": 2}
    sentence = r"^no training example is left of 8: max_length=2 drops them all, so raise max_length\.$"
    with pytest.raises(ValueError, match=sentence):
        trl_trainer_of(kind, str(llama_dir), tmp_path, data, **short)
    with pytest.raises(ValueError, match="^train_dataset is empty: give it at least one example"):
        trl_trainer_of(kind, str(llama_dir), tmp_path, data.select([]), **short)


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/below", "/proc"])
def test_an_output_folder_that_cannot_be_written_to(place: str, make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    make(output_dir=str(tmp_path / "new/below")).check_training()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]  # asking makes none
    trainer = PopRiskTrainer(Fragile(), make(), train_dataset=examples(16))
    trainer.args.output_dir = str(tmp_path / place)
    sentence = rf"^output_dir={tmp_path / place} cannot be written to \(.*\): choose another one\.$"
    for refused in (trainer.train, lambda: PopRiskTrainer(Fragile(), trainer.args, train_dataset=rows(8))):
        with pytest.raises(ValueError, match=sentence):
            refused()
    assert all(map(torch.equal, trainer.model.parameters(), Fragile().parameters()))
    assert (tmp_path / "file").read_text() == "not a folder"
