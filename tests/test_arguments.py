"""The flags as users give them: command line, YAML, keyword arguments, a saved training_args.bin."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml
from models import DATA, preferences, rows, tiny_model
from transformers import HfArgumentParser
from transformers.training_args import OptimizerNames
from trl import TrlParser

from hf_poprisk import (
    PopRiskAdamW,
    PopRiskCPOConfig,
    PopRiskCPOTrainer,
    PopRiskDPOConfig,
    PopRiskDPOTrainer,
    PopRiskKTOConfig,
    PopRiskKTOTrainer,
    PopRiskORPOConfig,
    PopRiskORPOTrainer,
    PopRiskRewardConfig,
    PopRiskRewardTrainer,
    PopRiskSFTConfig,
    PopRiskSFTTrainer,
    PopRiskTPOConfig,
    PopRiskTPOTrainer,
    PopRiskTrainer,
    PopRiskTrainingArguments,
)
from hf_poprisk.gate import GATES
from hf_poprisk.options import ALLOWED, BASES, ESTIMATORS, LABEL_NOISE

TRAINERS: dict[type[Any], type[Any]] = {
    PopRiskTrainingArguments: PopRiskTrainer,
    PopRiskDPOConfig: PopRiskDPOTrainer,
    PopRiskSFTConfig: PopRiskSFTTrainer,
    PopRiskRewardConfig: PopRiskRewardTrainer,
    PopRiskKTOConfig: PopRiskKTOTrainer,
    PopRiskORPOConfig: PopRiskORPOTrainer,
    PopRiskCPOConfig: PopRiskCPOTrainer,
    PopRiskTPOConfig: PopRiskTPOTrainer,
}
CHOICES = {"gate": GATES, "estimator": ESTIMATORS, "label_noise": LABEL_NOISE, "basis": BASES}

# Every value differs from its default.
FIELDS: dict[str, Any] = {
    "poprisk_gate": "soft",
    "poprisk_estimator": "ema",
    "poprisk_exclude": ["embed", r"layers\.0\."],
    "poprisk_ema_alpha": 0.5,
}
FIELDS_ON_THE_COMMAND_LINE = (
    "--poprisk_gate soft --poprisk_estimator ema --poprisk_exclude embed layers\\.0\\. "
    "--poprisk_ema_alpha 0.5"
).split()


@pytest.fixture(params=TRAINERS, ids=lambda config: config.__name__)
def config_class(request: pytest.FixtureRequest) -> type[Any]:
    return request.param


@pytest.fixture
def common(tmp_path: Path) -> dict[str, Any]:
    return {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}


@pytest.fixture
def make(config_class: type[Any], common: dict[str, Any]) -> Callable[..., Any]:
    """A config of the class under test that runs anywhere."""
    return lambda **options: config_class(**{**common, **options})


@pytest.fixture
def parse(config_class: type[Any], common: dict[str, Any], tmp_path: Path) -> Callable[..., Any]:
    """The same, from a command line and perhaps a YAML file."""

    def build(*flags: str, config: dict[str, Any] | None = None, parser: type[Any] = TrlParser) -> Any:
        if config is not None:
            path = tmp_path / "recipe.yaml"
            path.write_text(yaml.safe_dump({**common, **config}))
            return parser(config_class).parse_args_and_config(["--config", str(path), *flags])[0]
        line = [word for name, value in common.items() for word in (f"--{name}", str(value))]
        return parser(config_class).parse_args_into_dataclasses([*line, *flags])[0]

    return build


def changed_fields(args: Any) -> dict[str, Any]:
    defaults = {spec.name: spec.default for spec in dataclasses.fields(args) if "poprisk_" in spec.name}
    return {n: getattr(args, n) for n, default in defaults.items() if getattr(args, n) != default}


# What the fields mean


def test_the_gate_is_on_by_default_and_sees_eight_examples(config_class: type[Any], make: Any) -> None:
    args = make()
    assert args.optim == "poprisk_adamw"
    assert type(args.optim) is str  # not an Enum member that only lives in this process
    assert changed_fields(args) == {}
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (8, 1)  # the stock ones
    assert args.units_per_step == 8
    # The mixin's fields come after the stock ones: output_dir stays the first positional argument.
    assert dataclasses.fields(config_class)[0].name == "output_dir"
    PopRiskAdamW([torch.nn.Parameter(torch.zeros(2))], **make(**FIELDS).gate_options())


def test_help_lists_every_field_with_its_meaning_and_the_choices_that_are_checked(
    config_class: type[Any],
) -> None:
    doc = " ".join(config_class.__doc__.split())
    for spec in dataclasses.fields(config_class):
        if spec.name.startswith("poprisk_"):
            assert f"{spec.name} (default {spec.default!r}): {spec.metadata['help']}" in doc
    own = {"PopRiskTrainingArguments": "transformers.TrainingArguments", "PopRiskSFTConfig": "trl.SFTConfig"}
    assert own.get(config_class.__name__, "with the gate's fields") in doc
    types = get_type_hints(config_class)
    choices = {name: get_args(types[f"poprisk_{name}"]) for name in CHOICES}
    gate = get_args(choices["gate"][0])  # or None
    assert {**choices, "gate": gate} == CHOICES


# Command line, YAML, keyword arguments


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_flags_are_read_from_the_command_line(parse: Any, parser: type[Any]) -> None:
    args = parse("--optim", "poprisk_adamw", *FIELDS_ON_THE_COMMAND_LINE, parser=parser)
    assert args.optim == "poprisk_adamw" and changed_fields(args) == FIELDS


def test_flags_are_read_from_yaml_and_the_command_line_wins(parse: Any) -> None:
    args = parse(config={"optim": "poprisk_adamw", **FIELDS})
    assert args.optim == "poprisk_adamw" and changed_fields(args) == FIELDS
    # `hard` is what the default means: saying it must still beat the recipe.
    flags = "--optim poprisk_adamw --poprisk_gate hard --poprisk_exclude norm".split()
    recipe = {"poprisk_gate": "soft", "poprisk_exclude": ["embed"], "poprisk_leap": 0.5}
    args = parse(*flags, config={"optim": "adamw_torch", **recipe})
    assert args.optim == "poprisk_adamw"
    said = {"poprisk_gate": "hard", "poprisk_exclude": ["norm"], "poprisk_leap": 0.5}
    assert changed_fields(args) == said
    args = parse("--optim", "adamw_torch", config={"optim": "poprisk_adamw", "poprisk_label_noise": False})
    assert args.optim is OptimizerNames.ADAMW_TORCH  # and YAML reads off as false
    assert parse(config={"poprisk_exclude": "embed"}).poprisk_exclude == ["embed"]


# Copies


@pytest.mark.parametrize("fields", [FIELDS, {"poprisk_gate": "none"}, {"optim": "adamw_torch"}])
def test_to_dict_makes_an_equal_config(config_class: type[Any], make: Any, fields: dict[str, Any]) -> None:
    args = make(**fields)
    dump = args.to_dict()
    assert dump.items() >= {"optim": "poprisk_adamw", **fields}.items()
    assert json.loads(args.to_json_string()).items() >= {"optim": "poprisk_adamw", **fields}.items()
    tokens = {name for name in dump if name.endswith("_token")}  # masked by transformers
    again = config_class(**{name: value for name, value in dump.items() if name not in tokens})
    assert type(again.optim) is type(args.optim)
    assert {**again.to_dict(), **{name: dump[name] for name in tokens}} == dump


def test_a_copy_changes_what_it_is_told_to(make: Any) -> None:
    copy = dataclasses.replace(make(**FIELDS), learning_rate=0.25)
    assert (copy.optim, copy.learning_rate) == ("poprisk_adamw", 0.25)
    assert changed_fields(copy) == FIELDS
    assert dataclasses.replace(make(), optim="adamw_torch").optim is OptimizerNames.ADAMW_TORCH


def test_training_args_bin_loads_in_a_process_that_never_heard_of_us(
    common: dict[str, Any], tmp_path: Path
) -> None:
    for config in TRAINERS:
        torch.save(config(**common, **FIELDS), tmp_path / f"{config.__name__}.bin")  # as Trainer._save does
    code = """
import json, sys, torch
loaded = [torch.load(path, weights_only=False) for path in sys.argv[1:]]
print(json.dumps([[type(a).__name__, a.to_dict()] for a in loaded]))
"""
    command = [sys.executable, "-c", code, *sorted(map(str, tmp_path.glob("*.bin")))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = dict(json.loads(done.stdout.splitlines()[-1]))
    assert loaded.keys() == {config.__name__ for config in TRAINERS}
    for dump in loaded.values():
        assert dump.items() >= {"optim": "poprisk_adamw", **FIELDS}.items()


# Which optimizer


@pytest.mark.parametrize("name", ["adamw_torch", "sgd", OptimizerNames.ADAMW_TORCH_FUSED])
def test_other_optimizers_stay_enum_members(make: Any, name: str) -> None:
    assert make(optim=name).optim is OptimizerNames(name)
    assert make().set_optimizer(name, weight_decay=0.1).optim is OptimizerNames(name)


def test_set_optimizer_takes_our_name_by_default(make: Any) -> None:
    args = make(optim="adamw_torch")
    assert args.set_optimizer(learning_rate=0.25, beta1=0.5) is args
    assert (args.optim, args.learning_rate, args.adam_beta1) == ("poprisk_adamw", 0.25, 0.5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("poprisk_adam", {}, "poprisk_adam is not a valid OptimizerNames"),
        ("poprisk_adamw", {"args": "gate=soft"}, "optim_args has no effect with optim=poprisk_adamw: set"),
        ("adamw_torch", {}, "poprisk_leap=0.5 has no effect with optim=adamw_torch"),
    ],
)
def test_set_optimizer_refuses_what_the_constructor_refuses(
    make: Any, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(poprisk_gate="soft", poprisk_leap=0.5).set_optimizer(name, **options)


def test_a_gate_that_is_given_goes_around_any_optimizer(make: Any) -> None:
    gates = {None: "none", "none": "none", "soft": "soft"}
    for given, meant in gates.items():
        args = make(optim="sgd", poprisk_gate=given)
        assert (args.gate_options()["gate"], args.gated) == (meant, meant != "none")
    assert dataclasses.replace(make(), optim="sgd").gated is False and make().gated
    make(optim="sgd", poprisk_gate="hard", poprisk_exclude=["a"], poprisk_estimator="group")
    for name, value in {
        "estimator": "ema",
        "leap": 0.5,
        "basis": "eigen",
        "label_noise": "audit",
    }.items():
        with pytest.raises(ValueError, match=f"^poprisk_{name}=.* has no effect with optim=sgd: remove it"):
            make(optim="sgd", poprisk_gate="hard", **{f"poprisk_{name}": value})


@pytest.mark.parametrize(
    "value",
    [
        *(
            "learning_rate=inf",
            "learning_rate=-0.1",
            "learning_rate=nan",
            "weight_decay=inf",
            "adam_beta2=1.0",
        ),
        *("adam_epsilon=0.0", "max_grad_norm=-1.0", "per_device_train_batch_size=0"),
        *("gradient_accumulation_steps=0", "num_train_epochs=inf"),
    ],
)
def test_numbers_that_no_run_can_have(value: str, make: Any) -> None:
    name, _, text = value.partition("=")
    number = float(text) if "." in text or not text.isdecimal() else int(text)
    with pytest.raises(ValueError, match=rf"^{name}(={text} is not a finite number: give one\.| must be )"):
        make(**{name: number})
    args = make()
    setattr(args, name, number)  # later
    with pytest.raises(ValueError, match=f"^{name}"):
        args.check_training()


@pytest.mark.parametrize("optim", ["poprisk_adamw", "adamw_torch"])
def test_the_optim_flag_decides_what_the_trainer_runs(
    config_class: type[Any], parse: Any, llama_dir: Path, optim: str
) -> None:
    flags = f"--optim {optim} --max_steps 2 --logging_steps 1 --save_strategy no --weight_decay 0.1"
    args = parse(*flags.split(), "--gradient_accumulation_steps", "2", parser=HfArgumentParser)
    model: Any = str(llama_dir)
    kind = config_class.__name__.removeprefix("PopRisk").removesuffix("Config")
    data: Any = DATA.get(kind, preferences)(16)
    if config_class is PopRiskTrainingArguments:
        model, data = tiny_model(), rows(16)
    trainer = TRAINERS[config_class](model, args=args, train_dataset=data)
    parameters = list(trainer.model.parameters())
    hooks: list[int] = []  # per backward
    # Fires in the backward, and is not itself one of the hooks that are counted.
    parameters[0].register_post_accumulate_grad_hook(
        lambda _: hooks.append(sum(bool(p._backward_hooks) for p in parameters))
    )
    trainer.train()
    gated = optim == "poprisk_adamw"
    assert type(trainer.optimizer.optimizer) is (PopRiskAdamW if gated else torch.optim.AdamW)
    assert hooks[-3:] == [len(parameters) if gated else 0] * 3  # after what the self-check tried out
    logged = {name for entry in trainer.state.log_history for name in entry if name.startswith("poprisk/")}
    names = ("fraction_open", "fraction_open_null", "examples", "margin")
    logged.discard("poprisk/noise_scale")  # where a signal was seen
    assert logged == ({f"poprisk/{name}" for name in names} if gated else set())
    assert not any(p._backward_hooks for p in parameters)


# Bad values: one sentence that names the field


BAD: dict[str, list[Any]] = {
    "gate": ["open"],
    "estimator": ["token"],
    "leap": [-1.0, 1e-6, float("inf"), float("nan"), True, "far"],
    "ema_alpha": [0.0, -0.5, float("nan"), True, "0.5"],
    "basis": ["Eigen", None],
    "kahan": [1, "true", None],
    "exclude": [["embed", 3], ["first("]],
    "label_noise": ["open"],
    "judge_after_epochs": [-1, 0.5, True, "1"],
    "weight_column": ["", 3, True],
    "hub_access": ["yes"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in ALLOWED for value in BAD[name]])
def test_values_that_are_not_allowed(name: str, value: Any, common: dict[str, Any]) -> None:
    """By the fields, and by the optimizer's own options of the same names."""
    options = {"estimator": "ema", name: value} if name == "ema_alpha" else {name: value}
    sentence = re.escape(f"{name} must be {ALLOWED[name][1]}; got {value!r}.")
    with pytest.raises(ValueError, match=f"^poprisk_{sentence}$"):
        PopRiskTrainingArguments(**common, **{f"poprisk_{n}": v for n, v in options.items()})
    if name in PopRiskTrainingArguments(**common).gate_options():
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            PopRiskAdamW([torch.nn.Parameter(torch.zeros(2))], **options)


NO_EFFECT = {**FIELDS, "poprisk_allow_change": True}
NO_EFFECT = {n: v for n, v in NO_EFFECT.items() if n not in ("poprisk_gate", "poprisk_ema_alpha")}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": "poprisk_adam"}, r"^poprisk_adam is not .* one of \['poprisk_adamw', 'adamw_torch"),
        ({"poprisk_ema_alpha": 0.5}, "poprisk_ema_alpha has no effect with poprisk_estimator='example'"),
        ({"optim_args": "gate=soft"}, "optim_args has no effect with optim=poprisk_adamw: set the fields"),
        *(
            ({"optim": "sgd", name: value}, f"{name}=.* no effect with optim=sgd: .*poprisk_adamw")
            for name, value in NO_EFFECT.items()
        ),
    ],
    ids=str,
)
def test_options_without_effect(common: dict[str, Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PopRiskTrainingArguments(**common, **values)
