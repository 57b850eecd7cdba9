"""``hf-poprisk dpo``, ``sft``, …: the options of TRL's scripts, with our trainers."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import logging
import os
import sys
import textwrap
import types
import typing
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_poprisk.checkpoints import checkpoint_to_resume
from hf_poprisk.leave_one_out.data import load_data
from hf_poprisk.refusals import always
from hf_poprisk.user_errors import UserError, is_refusal, need, no_empty_folder, one_line

if TYPE_CHECKING:
    from trl import TrlParser

logger = logging.getLogger(__name__)
USAGE = "%(prog)s [--config FILE.yaml] [--option value ...]"
# command → how the names of its trainer and config begin, and what it trains on
COMMANDS = {
    "dpo": ("DPO", "preference pairs"),
    "sft": ("SFT", "sequences"),
    "reward": ("Reward", "preference pairs, for a reward model"),
    "kto": ("KTO", "completions that are good or bad"),
    "grpo": ("GRPO", "prompts and a reward"),
    "rloo": ("RLOO", "prompts and a reward"),
}
_PAIRS = ("chosen rejected", "chosen_ids rejected_ids")
# the columns that a trainer can do with, any line of them
_COLUMNS = {
    "DPO": _PAIRS,
    "Reward": _PAIRS,
    "KTO": ("completion label", "completion_ids label", *_PAIRS),
    "GRPO": ("prompt",),
    "RLOO": ("prompt",),
    "SFT": ("messages", "conversations", "prompt completion", "input_ids"),  # and dataset_text_field
}
# What --help shows of the three hundred options, with those of the script and ours.
_HELP = {
    "model": "model_name_or_path dtype",
    "training": "output_dir learning_rate num_train_epochs max_steps per_device_train_batch_size "
    "gradient_accumulation_steps max_length num_generations max_completion_length loss_type beta optim seed "
    "bf16 use_cpu resume_from_checkpoint",
    "adapters": "use_peft lora_r lora_alpha lora_target_modules load_in_4bit",
}


def add_commands(commands: Any) -> None:
    """Add the trainers to the subparsers of ``hf-poprisk``; TRL is imported for the one that is called."""
    for name, (kind, data) in COMMANDS.items():
        # no option is its own: everything is left to TRL's parser
        parser = commands.add_parser(
            name, help=f"train on {data} ({kind})", add_help=False, prefix_chars="\0"
        )
        parser.add_argument("argv", nargs="*")
        parser.set_defaults(execute=train)


def train(args: argparse.Namespace) -> None:
    """Carry out a training command.

    Raises:
        UserError: says in one sentence what is wrong with the data and the options, or what was refused. What
            fails during training for another reason keeps its traceback.
    """
    need("trl", args.command)
    import trl

    import hf_poprisk

    kind = COMMANDS[args.command][0]
    script = importlib.import_module(f"trl.scripts.{args.command}")
    options = getattr(script, f"{kind}ScriptArguments", trl.ScriptArguments)
    config_class = getattr(hf_poprisk, f"PopRisk{kind}Config")
    types_ = (options, config_class, trl.ModelConfig, trl.DatasetMixtureConfig)
    groups = parse(trl.TrlParser(types_, prog=f"hf-poprisk {args.command}"), args.argv)
    config = groups[1]
    with no_empty_folder(config.output_dir):
        with _at_the_start(groups):
            trainer = _build(kind, *groups)
        try:
            trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
            trainer.save_model()
            trainer.accelerator.print(f"model saved: {config.output_dir}")
            if config.push_to_hub:
                name = groups[0].dataset_name
                trainer.push_to_hub(dataset_name=None if name is None or Path(name).exists() else name)
                trainer.accelerator.print(f"model pushed: https://huggingface.co/{trainer.hub_model_id}")
            trainer.end()
        except Exception as error:
            if is_refusal(error):
                raise UserError(" ".join(str(error).split())) from error
            raise


@contextmanager
def _at_the_start(groups: Sequence[Any]) -> Iterator[None]:
    """Whatever fails inside this block, before training, fails for the data and the options."""
    script, config, model, _ = groups
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if config.log_level == "debug":
            raise
        said = " ".join(str(error).split())
        if isinstance(error, OSError):  # of the Hub: it does not always say of what
            asked = f"model_name_or_path={model.model_name_or_path}, dataset_name={script.dataset_name}"
            said = f"{one_line(error)} ({asked})."
        elif not isinstance(error, ValueError):
            said = (
                f"the trainer could not be made of these data and options ({type(error).__name__}: "
                f"{one_line(error)}); --log_level debug shows where."
            )
        raise UserError(said) from error


def _build(kind: str, script: Any, config: Any, model: Any, mixture: Any) -> Any:
    """The trainer; the cheapest checks come first."""
    import trl

    import hf_poprisk

    if model.model_name_or_path is None:
        raise UserError("--model_name_or_path is missing: give a folder, or a name on the Hub.")
    if script.ignore_bias_buffers:
        raise UserError("ignore_bias_buffers is not supported: leave it out.")
    config.resume_from_checkpoint = checkpoint_to_resume(config)
    for option in ("load_in_4bit", "load_in_8bit"):
        if getattr(model, option) and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(f"{option} needs bitsandbytes: pip install bitsandbytes, or leave {option} out.")
    if model.use_peft:
        need("peft", "use_peft")
    more = {"reward_funcs": _rewards(script)} if hasattr(script, "reward_funcs") else {}
    evaluates = config.eval_strategy != "no"
    splits = [script.dataset_train_split, *[script.dataset_test_split] * evaluates]
    data = [_load(script, mixture, split) for split in splits]
    for split, rows in zip(splits, data, strict=True):
        _check_columns(kind, config, split, rows)
    config.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(config.model_init_kwargs or {}),
    }
    return getattr(hf_poprisk, f"PopRisk{kind}Trainer")(
        model.model_name_or_path,
        args=config,
        train_dataset=data[0],
        eval_dataset=data[1] if evaluates else None,
        quantization_config=trl.get_quantization_config(model),
        peft_config=trl.get_peft_config(model),
        **more,
    )


def _rewards(script: Any) -> list[Any]:
    """Of the options: a model, functions of TRL's, and functions of modules that are here or installed."""
    from trl import rewards

    names = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
    known = {name: getattr(rewards, name) for name in names}
    known["get_soft_overlong_punishment"] = rewards.get_soft_overlong_punishment(1280, 256)
    found = [script.reward_model_name_or_path] * (script.reward_model_name_or_path is not None)
    for name in script.reward_funcs or ():
        module, _, function = name.rpartition(".")
        reward = known.get(name)
        if module:
            sys.path.insert(0, os.getcwd())
            try:
                reward = getattr(importlib.import_module(module), function, None)
            except ModuleNotFoundError as error:
                if not f"{module}.".startswith(f"{error.name}."):  # one that the module itself wants
                    raise
        if not callable(reward):
            raise UserError(
                f"reward_funcs={name} is none of {', '.join(known)}, and no function of a module that can be "
                "imported from here: write module.function."
            )
        found.append(reward)
    if not found:
        raise UserError("--reward_funcs is missing: give a function, or --reward_model_name_or_path.")
    return found


def _load(script: Any, mixture: Any, split: str) -> Any:
    if mixture.datasets:
        import trl

        if script.dataset_name:
            raise UserError("dataset_name has no effect beside datasets: give one of them.")
        mixed = trl.get_dataset(mixture)
        if split not in mixed:
            raise UserError(f"{split} is not a split of datasets: it has {', '.join(mixed)}.")
        return mixed[split]
    if not script.dataset_name:
        raise UserError("--dataset_name is missing: give a file, a folder, or a name on the Hub.")
    if script.dataset_streaming:
        from datasets import load_dataset

        return load_dataset(script.dataset_name, script.dataset_config, split=split, streaming=True)
    asked = None if split == "train" else split
    flags = ("--dataset_name", "--dataset_config", "the split")
    return load_data(script.dataset_name, asked, script.dataset_config, *flags)


def _check_columns(kind: str, config: Any, split: str, data: Any) -> None:
    """Refuse data of another kind; of a stream only what it says of itself."""
    names = data.column_names
    if names is None:
        return
    options = [*((config.dataset_text_field,) if kind == "SFT" else ()), *_COLUMNS[kind]]
    fit = next((columns for line in options if {*(columns := line.split())} <= {*names}), None)
    if fit is None:
        wanted = ", or ".join(" and ".join(line.split()) for line in options)
        raise UserError(f"{kind} wants the columns {wanted}; the {split} split has {', '.join(names)}.")
    if not hasattr(data, "__len__"):
        return
    if not len(data):
        raise UserError(f"the {split} split has no rows.")
    for column in dict.fromkeys([*fit, *({"prompt"} & {*names})]):
        if column == "label":  # the trainer's
            continue
        for row, value in enumerate(data[column]):
            if not isinstance(value, str | list):
                raise UserError(
                    f"{column} of row {row} of the {split} split is {value!r}, where text or a list belongs."
                )


def parse(parser: TrlParser, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """The dataclasses of a parser, from ``--config FILE.yaml`` and the command line, which wins.

    The second one holds the training arguments. ``--help`` shows the options that matter most, ``--help_all``
    all of them.

    Raises:
        UserError: a bad key or value, in one sentence; nothing was loaded.
    """
    import yaml

    # TRL switches checkpointing on through its old name and asks for it by that.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    parser.usage = USAGE
    _hide_refused(parser)
    argv = list(sys.argv[1:] if argv is None else argv)
    # TRL's parser reads the file only if its name is a word of its own
    argv = [
        word for part in argv for word in (part.split("=", 1) if part.startswith("--config=") else [part])
    ]
    if argv.count("--config") > 1:
        raise UserError("--config was given twice: put all options in one file.")
    if "--help_all" in argv:
        print(parser.format_help())
        parser.exit()
    parser.format_help = lambda: _short_help(parser)  # type: ignore[method-assign]
    if argv[-1:] == ["--config"]:
        raise UserError("--config needs a YAML file.")
    try:
        *parsed, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
        if unknown:
            raise UserError(_unknown(parser, unknown))
        for group in parsed:
            check_types(group)
        parsed[1].check_training()
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        raise UserError(" ".join(str(error).split())) from error
    return tuple(parsed)


def _unknown(parser: TrlParser, words: Sequence[str]) -> str:
    name = next((word for word in words if word.startswith("--")), words[0]).partition("=")[0]
    known = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(name, [*known, "--config"], 1)
    return f"{name} is no option" + (
        f": did you mean {near[0]}?" if near else "; --help_all shows every one."
    )


def _hide_refused(parser: TrlParser) -> None:
    """Leave out of the help what this trainer never takes."""
    config = parser.dataclass_types[1]
    options = {
        "_label_rules": "label_noise judge_after_epochs leap",
        "_weight_rules": "weight_column",
        "_basis_rules": "basis",
    }
    hidden = " ".join(
        names for rules, names in options.items() if any(r.found is always for r in getattr(config, rules))
    )
    for action in parser._actions:
        if action.dest.removeprefix("poprisk_") in hidden.split():
            action.help = argparse.SUPPRESS


def _short_help(parser: TrlParser) -> str:
    actions = {a.dest: a for a in parser._actions if a.help != argparse.SUPPRESS}
    data = [field.name for field in fields(parser.dataclass_types[0])]
    ours = [name for name in actions if name.startswith("poprisk_")]
    lines = [f"usage: {USAGE % {'prog': parser.prog}}", ""]
    for title, names in {"data": " ".join(data), **_HELP, "population risk": " ".join(ours)}.items():
        lines.append(f"{title}:")
        for action in (actions[name] for name in names.split() if name in actions):
            default = "" if action.default is None else f" [{action.default}]"
            text = " ".join((action.help or "").replace("%%", "%").split())
            lines += [f"  --{action.dest}{default}", textwrap.indent(textwrap.fill(text, 94), " " * 6)]
        lines.append("")
    return "\n".join([*lines, "--help_all shows every option; each may be a key of the YAML file.", ""])


def check_types(group: Any) -> None:
    """YAML has types of its own, and the parser lets those pass that are not text.

    Raises:
        UserError: a plain field with a value of another type.
    """
    for name, hint in typing.get_type_hints(type(group)).items():
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = set(typing.get_args(hint)) if union else {hint}
        value = getattr(group, name, None)
        if name == "fsdp":  # of which transformers itself makes a bool
            continue
        if value is None:
            continue
        if any(typing.get_origin(kind) is list for kind in kinds) and not isinstance(
            value, list | str | dict
        ):
            raise UserError(f"{name} must be a list; got {value!r}.")
        if not kinds <= {int, float, bool, str, type(None)}:
            continue
        is_text, is_whole = isinstance(value, str) and str in kinds, type(value) is int and float in kinds
        if not (type(value) in kinds or is_text or is_whole):
            expected = " or ".join(sorted(kind.__name__ for kind in kinds - {type(None)}))
            raise UserError(f"{name} must be {expected}; got {value!r}.")
