"""The flags as users give them: command line, YAML, keyword arguments, a saved training_args.bin."""

import dataclasses
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml
from models import preferences, sequences, token_examples
from transformers import AutoModelForCausalLM, HfArgumentParser
from transformers.training_args import OptimizerNames
from trl import TrlParser

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
)
from hf_poprisk.gate import GATES
from hf_poprisk.leave_one_out import LABEL_NOISE_MODES
from hf_poprisk.options import ESTIMATORS

CONFIGS = (PopRiskTrainingArguments, PopRiskDPOConfig, PopRiskSFTConfig, PopRiskRewardConfig)
TRAINERS = (PopRiskTrainer, PopRiskDPOTrainer, PopRiskSFTTrainer, PopRiskRewardTrainer)

# Every value differs from its default.
FIELDS: dict[str, Any] = {
    "poprisk_gate": "soft",
    "poprisk_estimator": "ema",
    "poprisk_exclude": ["embed", r"layers\.0\."],
    "poprisk_warmup_steps": 3,
    "poprisk_ema_alpha": 0.5,
}
FIELDS_ON_THE_COMMAND_LINE = (
    "--poprisk_gate soft --poprisk_estimator ema --poprisk_exclude embed layers\\.0\\. "
    "--poprisk_warmup_steps 3 --poprisk_ema_alpha 0.5"
).split()


@pytest.fixture(params=CONFIGS, ids=lambda config: config.__name__)
def config_class(request: pytest.FixtureRequest) -> type[Any]:
    return request.param


@pytest.fixture
def make(config_class: type[Any], tmp_path: Path) -> Callable[..., Any]:
    """A config of the class under test that runs anywhere."""

    def build(**kwargs: Any) -> Any:
        return config_class(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **kwargs)

    return build


@pytest.fixture
def parse(config_class: type[Any], tmp_path: Path) -> Callable[..., Any]:
    """The same, from a command line and perhaps a YAML file."""

    def build(*flags: str, config: dict[str, Any] | None = None, parser: type[Any] = TrlParser) -> Any:
        common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"}
        if config is not None:
            path = tmp_path / "recipe.yaml"
            path.write_text(yaml.safe_dump({**common, **config}))
            return parser(config_class).parse_args_and_config(["--config", str(path), *flags])[0]
        line = [word for name, value in common.items() for word in (f"--{name}", str(value))]
        return parser(config_class).parse_args_into_dataclasses([*line, *flags])[0]

    return build


def poprisk_fields(args: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name.startswith("poprisk_")}


def changed_fields(args: Any) -> dict[str, Any]:
    defaults = type(args).__dataclass_fields__
    return {name: value for name, value in poprisk_fields(args).items() if value != defaults[name].default}


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


def test_fields_become_the_optimizers_keyword_arguments(make: Any) -> None:
    options = make(**FIELDS).gate_options()
    expected = {name.removeprefix("poprisk_"): value for name, value in FIELDS.items()}
    del expected["exclude"]  # becomes `ungated`, which needs the model
    assert options == expected
    PopRiskAdamW([torch.nn.Parameter(torch.zeros(2))], **options)


def test_a_single_exclusion_may_be_written_as_a_string(make: Any) -> None:
    assert make(poprisk_exclude="embed").poprisk_exclude == ["embed"]


# Command line and YAML


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_flags_are_read_from_the_command_line(parse: Any, parser: type[Any]) -> None:
    args = parse("--optim", "poprisk_adamw", *FIELDS_ON_THE_COMMAND_LINE, parser=parser)
    assert args.optim == "poprisk_adamw"
    assert changed_fields(args) == FIELDS


def test_flags_are_read_from_yaml(parse: Any) -> None:
    args = parse(config={"optim": "poprisk_adamw", **FIELDS})
    assert args.optim == "poprisk_adamw"
    assert changed_fields(args) == FIELDS


def test_the_command_line_wins_over_yaml(parse: Any) -> None:
    # `hard` is also the default: saying it must still beat the recipe.
    flags = "--optim poprisk_adamw --poprisk_gate hard --poprisk_exclude norm".split()
    recipe = {"poprisk_gate": "soft", "poprisk_exclude": ["embed"], "poprisk_warmup_steps": 5}
    args = parse(*flags, config={"optim": "adamw_torch", **recipe})
    assert args.optim == "poprisk_adamw"
    assert changed_fields(args) == {"poprisk_exclude": ["norm"], "poprisk_warmup_steps": 5}


def test_the_command_line_can_switch_a_recipes_optimizer_off(parse: Any) -> None:
    args = parse("--optim", "adamw_torch", config={"optim": "poprisk_adamw", "learning_rate": 1e-3})
    assert args.optim is OptimizerNames.ADAMW_TORCH


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gate=soft", {"poprisk_gate": "soft"}),
        (" gate = soft , warmup_steps = 3 ", {"poprisk_gate": "soft", "poprisk_warmup_steps": 3}),
        ("estimator=ema,ema_alpha=0.5", {"poprisk_estimator": "ema", "poprisk_ema_alpha": 0.5}),
        ("exclude=embed|norm", {"poprisk_exclude": ["embed|norm"]}),
    ],
)
def test_optim_args_set_the_fields(parse: Any, text: str, expected: dict[str, Any]) -> None:
    command_line = parse("--optim_args", text, parser=HfArgumentParser)
    recipe = parse(config={"optim_args": text})
    for args in (command_line, recipe):
        assert changed_fields(args) == expected
        assert {name: type(value) for name, value in changed_fields(args).items()} == {
            name: type(value) for name, value in expected.items()
        }


def test_optim_args_may_repeat_what_a_field_says(make: Any) -> None:
    said = {"poprisk_gate": "soft", "poprisk_exclude": ["embed"]}
    args = make(**said, optim_args="gate=soft,exclude=embed,warmup_steps=3")
    assert changed_fields(args) == {**said, "poprisk_warmup_steps": 3}


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_a_misspelt_flag_on_the_command_line_is_refused(parse: Any, parser: type[Any]) -> None:
    with pytest.raises(ValueError, match="not used by the HfArgumentParser.*--poprisk_gaet"):
        parse("--poprisk_gaet", "soft", parser=parser)


def test_a_misspelt_key_in_yaml_is_refused(parse: Any) -> None:
    with pytest.raises(ValueError, match="Unknown arguments from config file.*--poprisk_gaet"):
        parse(config={"poprisk_gaet": "soft"})


def test_a_misspelt_keyword_is_refused(make: Any) -> None:
    with pytest.raises(TypeError, match="poprisk_gaet"):
        make(poprisk_gaet="soft")


def test_a_fractional_warmup_on_the_command_line_is_refused(
    parse: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse("--poprisk_warmup_steps", "1.5")
    assert "invalid int value: '1.5'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gate", "estimator", "label_noise"])
@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_a_bad_choice_on_the_command_line_ends_in_one_sentence(
    parse: Any, parser: type[Any], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(f"--poprisk_{name}", "open", parser=parser)
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"argument --poprisk_{name}" in last and "invalid choice: 'open' (choose from " in last


@pytest.mark.parametrize("name", ["gate", "estimator", "label_noise"])
def test_a_bad_choice_in_yaml_is_refused_by_name(parse: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"^poprisk_{name} must be one of .*; got 'open'\\.$"):
        parse(config={f"poprisk_{name}": "open"})


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("gate", GATES),
        ("estimator", ESTIMATORS),
        ("label_noise", LABEL_NOISE_MODES),
    ],
)
def test_the_types_hold_the_choices_that_are_checked(
    config_class: type[Any], name: str, choices: tuple[str, ...]
) -> None:
    assert get_args(get_type_hints(config_class)[f"poprisk_{name}"]) == choices


def test_help_lists_every_field_with_its_meaning(config_class: type[Any]) -> None:
    doc = " ".join((config_class.__doc__ or "").split())
    for spec in dataclasses.fields(config_class):
        if spec.name.startswith("poprisk_"):
            assert f"{spec.name} (default {spec.default!r}): {spec.metadata['help']}" in doc
    own = {"PopRiskTrainingArguments": "transformers.TrainingArguments", "PopRiskSFTConfig": "trl.SFTConfig"}
    assert own.get(config_class.__name__, "with the gate's fields") in doc


# Copies


@pytest.mark.parametrize("fields", [FIELDS, {"poprisk_gate": "none"}, {"optim": "adamw_torch"}])
def test_to_dict_makes_an_equal_config(config_class: type[Any], make: Any, fields: dict[str, Any]) -> None:
    args = make(**fields)
    dump = args.to_dict()
    assert dump["optim"] == fields.get("optim", "poprisk_adamw")
    assert {name: dump[name] for name in fields} == fields
    tokens = {name for name in dump if name.endswith("_token")}  # masked by transformers
    again = config_class(**{name: value for name, value in dump.items() if name not in tokens})
    assert type(again.optim) is type(args.optim)
    assert {**again.to_dict(), **{name: dump[name] for name in tokens}} == dump


def test_json_says_poprisk_adamw(make: Any) -> None:
    dump = json.loads(make(**FIELDS).to_json_string())
    assert dump["optim"] == "poprisk_adamw"
    assert {name: dump[name] for name in FIELDS} == FIELDS


def test_replace_keeps_the_optimizer_and_the_fields(make: Any) -> None:
    copy = dataclasses.replace(make(**FIELDS), learning_rate=0.25)
    assert (copy.optim, copy.learning_rate) == ("poprisk_adamw", 0.25)
    assert changed_fields(copy) == FIELDS


def test_replace_keeps_what_optim_args_said(make: Any) -> None:
    copy = dataclasses.replace(make(optim_args="gate=soft"), learning_rate=0.25)
    assert changed_fields(copy) == {"poprisk_gate": "soft"}


def test_replace_can_turn_the_gate_off(make: Any) -> None:
    copy = dataclasses.replace(make(), optim="adamw_torch")
    assert copy.optim is OptimizerNames.ADAMW_TORCH


def _python(code: str, *argv: str, cwd: Path) -> Any:
    """Run code in a fresh interpreter and read the JSON it prints last."""
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_training_args_bin_loads_in_a_process_that_never_heard_of_us(tmp_path: Path) -> None:
    files = []
    for config in CONFIGS:
        files.append(str(tmp_path / f"{config.__name__}.bin"))
        args = config(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **FIELDS)
        torch.save(args, files[-1])  # as Trainer._save does
    code = """
import json, sys, torch
loaded = [torch.load(path, weights_only=False) for path in sys.argv[1:]]
print(json.dumps([[type(a).__name__, a.optim, a.to_dict()] for a in loaded]))
"""
    loaded = _python(code, *files, cwd=tmp_path)
    assert [name for name, _, _ in loaded] == [config.__name__ for config in CONFIGS]
    for _, optim, dump in loaded:
        assert optim == "poprisk_adamw"
        assert {name: dump[name] for name in FIELDS} == FIELDS


def test_importing_the_package_does_not_import_trl(tmp_path: Path) -> None:
    code = """
import json, sys
import hf_poprisk
hf_poprisk.PopRiskTrainer, hf_poprisk.PopRiskTrainingArguments, hf_poprisk.PopRiskAdamW
before = "trl" in sys.modules
hf_poprisk.PopRiskDPOConfig
print(json.dumps([before, "trl" in sys.modules]))
"""
    assert _python(code, cwd=tmp_path) == [False, True]


# Other optimizers


@pytest.mark.parametrize("name", ["poprisk_adam", "poprisk", "adamw"])
def test_a_typo_in_optim_gets_the_stock_sentence_with_our_name_in_it(make: Any, name: str) -> None:
    expected = (
        rf"^{name} is not a valid OptimizerNames, please select one of \['poprisk_adamw', 'adamw_torch'"
    )
    with pytest.raises(ValueError, match=expected):
        make(optim=name)


def test_a_typo_in_optim_on_the_command_line_gets_the_same_sentence(parse: Any) -> None:
    with pytest.raises(
        ValueError, match="is not a valid OptimizerNames, please select one of.*poprisk_adamw"
    ):
        parse("--optim", "poprisk_adamww")


@pytest.mark.parametrize("name", ["adamw_torch", "sgd", OptimizerNames.ADAMW_TORCH_FUSED])
def test_other_optimizers_stay_enum_members(make: Any, name: str) -> None:
    assert make(optim=name).optim is OptimizerNames(name)


def _tiny_trainer(trainer_class: type[Any], args: Any, model_dir: Path) -> Any:
    if trainer_class is PopRiskTrainer:
        rows = [{name: tensor[0] for name, tensor in row.items()} for row in token_examples(16)]
        return trainer_class(AutoModelForCausalLM.from_pretrained(model_dir), args, train_dataset=rows)
    data = sequences(16) if trainer_class is PopRiskSFTTrainer else preferences(16)
    return trainer_class(str(model_dir), args=args, train_dataset=data)


@pytest.mark.parametrize(
    ("config_class", "trainer_class"),
    list(zip(CONFIGS, TRAINERS, strict=True)),
    indirect=["config_class"],
    ids=lambda c: c.__name__,
)
@pytest.mark.parametrize("optim", ["poprisk_adamw", "adamw_torch"])
def test_the_optim_flag_decides_what_the_trainer_runs(
    parse: Any, trainer_class: type[Any], llama_dir: Path, optim: str
) -> None:
    flags = f"--optim {optim} --max_steps 2 --logging_steps 1 --save_strategy no --weight_decay 0.1"
    args = parse(*flags.split(), "--gradient_accumulation_steps", "2", parser=HfArgumentParser)
    trainer = _tiny_trainer(trainer_class, args, llama_dir)
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
    assert logged == ({f"poprisk/{name}" for name in names} if gated else set())
    assert not any(p._backward_hooks for p in parameters)


# set_optimizer


def test_set_optimizer_takes_our_name_by_default(make: Any) -> None:
    args = make(optim="adamw_torch")
    assert args.set_optimizer(learning_rate=0.25, beta1=0.5, args="gate=soft") is args
    assert (args.optim, args.learning_rate, args.adam_beta1) == ("poprisk_adamw", 0.25, 0.5)
    assert changed_fields(args) == {"poprisk_gate": "soft"}


def test_set_optimizer_takes_the_stock_names(make: Any) -> None:
    assert make().set_optimizer("adamw_torch", weight_decay=0.1).optim is OptimizerNames.ADAMW_TORCH
    assert make().set_optimizer(OptimizerNames.SGD).optim is OptimizerNames.SGD


def test_set_optimizer_refuses_what_the_constructor_refuses(make: Any) -> None:
    with pytest.raises(ValueError, match="poprisk_adam is not a valid OptimizerNames"):
        make().set_optimizer("poprisk_adam")
    with pytest.raises(ValueError, match="optim_args has 'gaet=soft'"):
        make().set_optimizer("poprisk_adamw", args="gaet=soft")
    with pytest.raises(ValueError, match="poprisk_gate must be one of hard, soft, none; got 'open'"):
        make().set_optimizer("poprisk_adamw", args="gate=open")
    with pytest.raises(ValueError, match="poprisk_gate='soft' has no effect with optim=adamw_torch"):
        make(poprisk_gate="soft").set_optimizer("adamw_torch")


# Bad values: one sentence that names the field


BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"poprisk_gate": "open"}, "poprisk_gate must be one of hard, soft, none; got 'open'"),
    ({"poprisk_gate": None}, "poprisk_gate must be one of hard, soft, none; got None"),
    ({"poprisk_estimator": "token"}, "poprisk_estimator must be one of example, group, ema; got 'token'"),
    ({"poprisk_exclude": ["embed", 3]}, r"poprisk_exclude must be a list of strings; got \['embed', 3\]"),
    ({"poprisk_warmup_steps": -1}, "poprisk_warmup_steps must be an integer ≥ 0; got -1"),
    ({"poprisk_warmup_steps": 1.0}, r"poprisk_warmup_steps must be an integer ≥ 0; got 1\.0"),
    ({"poprisk_warmup_steps": True}, "poprisk_warmup_steps must be an integer ≥ 0; got True"),
    *(
        ({"poprisk_estimator": "ema", "poprisk_ema_alpha": alpha}, "poprisk_ema_alpha must be a number > 0")
        for alpha in (0.0, -0.5, float("nan"), True, "0.5")
    ),
    ({"poprisk_ema_alpha": 0.5}, "poprisk_ema_alpha has no effect with poprisk_estimator='example'"),
]


@pytest.mark.parametrize(("values", "message"), BAD_VALUES, ids=lambda v: str(v)[:60])
def test_bad_values_are_refused_by_name(make: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**values)


@pytest.mark.parametrize(("name", "value"), FIELDS.items(), ids=lambda v: str(v))
def test_a_gate_option_without_the_gate_is_refused(make: Any, name: str, value: Any) -> None:
    # ema_alpha is only read by ema, which is then the first option to have no effect
    extra = {"poprisk_estimator": "ema"} if name == "poprisk_ema_alpha" else {}
    first = "poprisk_estimator" if extra else name
    with pytest.raises(
        ValueError, match=rf"{first}=.* has no effect with optim=adamw_torch: .*poprisk_adamw"
    ):
        make(optim="adamw_torch", **{name: value}, **extra)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "gate=soft,",
            "optim_args has ''; .* comma-separated list of key=value, each key once, with the keys gate",
        ),
        ("soft", "optim_args has 'soft'; .* key=value"),
        ("gate=", "optim_args has 'gate='; .* key=value"),
        ("=soft", "optim_args has '=soft'; .* key=value"),
        ("gaet=soft", "optim_args has 'gaet=soft'; .* key=value"),
        ("poprisk_gate=soft", "optim_args has 'poprisk_gate=soft'; .* with the keys gate"),
        ("gate=soft;warmup_steps=3", "poprisk_gate must be one of"),
        ("gate=soft=hard", "poprisk_gate must be one of hard, soft, none; got 'soft=hard'"),
        ("warmup_steps=1.5", "poprisk_warmup_steps must be an integer ≥ 0; got '1.5'"),
        ("warmup_steps=-1", "poprisk_warmup_steps must be an integer ≥ 0; got -1"),
        ("reduction=tensor", "optim_args has 'reduction=tensor'; .* with the keys gate"),
        ("estimator=ema,ema_alpha=small", "poprisk_ema_alpha must be a number > 0; got 'small'"),
        ("gate=soft,gate=none", "optim_args has 'gate=none'; .* each key once"),
    ],
)
def test_bad_optim_args_are_refused(make: Any, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(optim_args=text)


def test_optim_args_that_contradict_a_field_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="optim_args sets gate=none and poprisk_gate is 'soft'"):
        make(poprisk_gate="soft", optim_args="gate=none")


def test_a_copy_of_the_arguments_may_change_what_optim_args_had_set() -> None:
    args = PopRiskTrainingArguments("out", use_cpu=True, optim_args="gate=soft,warmup_steps=3")
    assert (args.poprisk_gate, args.poprisk_warmup_steps) == ("soft", 3)
    again = dataclasses.replace(args, poprisk_gate="hard")
    assert (again.poprisk_gate, again.poprisk_warmup_steps) == ("hard", 3)
    args.set_optimizer(args="gate=none").set_optimizer(args="gate=hard")
    assert args.poprisk_gate == "hard"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"optim_target_modules": "all-linear"},
            "optim_target_modules has no effect with optim=poprisk_adamw",
        ),
        ({"poprisk_hub_access": "yes"}, "poprisk_hub_access must be one of auto, manual; got 'yes'"),
        ({"fp16": True}, "^fp16=True has no effect on a CPU: set bf16=True, or neither.$"),
        ({"deepspeed": "ds.json"}, "^deepspeed is not supported by optim=poprisk_adamw: train with DDP"),
        (
            {"deepspeed": "ds.json", "poprisk_gate": "none", "poprisk_label_noise": "weight"},
            "^deepspeed is not supported by .*, or set poprisk_gate=none, poprisk_label_noise=off.$",
        ),
    ],
)
def test_options_that_would_do_nothing(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        PopRiskTrainingArguments(str(tmp_path), use_cpu=True, **options).check_training()


def test_a_folder_that_cannot_be_written_is_named_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ValueError, match=f"output_dir={folder} cannot be written to .*choose another"):
            PopRiskTrainingArguments(str(folder), use_cpu=True).check_training()


def test_the_old_name_of_hub_access_still_works_and_says_so(make: Any, parse: Any) -> None:
    sentence = r"^poprisk_hub_gated is called poprisk_hub_access now: set poprisk_hub_access=manual\.$"
    with pytest.warns(FutureWarning, match=sentence) as warned:
        args = make(poprisk_hub_gated="manual", optim="adamw_torch")
    assert [w.filename for w in warned if "poprisk_hub" in str(w.message)] == [__file__]
    with pytest.warns(FutureWarning, match=sentence):
        parsed = parse(config={"poprisk_hub_gated": "manual", "poprisk_hub_access": "manual"})
    for each in (args, parsed):
        assert changed_fields(each) == {"poprisk_hub_access": "manual"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        copy = dataclasses.replace(args, poprisk_hub_access="auto")
    assert copy.poprisk_hub_access == "auto"


def test_the_old_name_must_not_contradict_the_new_one(make: Any) -> None:
    with pytest.raises(ValueError, match="poprisk_hub_gated=manual .* is auto: remove poprisk_hub_gated"):
        make(poprisk_hub_gated="manual", poprisk_hub_access="auto")
    with (
        pytest.raises(ValueError, match="poprisk_hub_access must be one of auto, manual; got 'yes'"),
        pytest.warns(FutureWarning),
    ):
        make(poprisk_hub_gated="yes")
