"""``hf-poprisk dpo``, ``sft``, …: the options of TRL's scripts, with our trainers."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_poprisk.checkpoints import checkpoint_to_resume
from hf_poprisk.command_line import parse
from hf_poprisk.leave_one_out.data import load_data
from hf_poprisk.user_errors import UserError, is_refusal, need, no_empty_folder, one_line

logger = logging.getLogger(__name__)
# command → how the names of its trainer and config begin, and what it trains on
COMMANDS = {
    "dpo": ("DPO", "preference pairs"),
    "sft": ("SFT", "sequences"),
    "reward": ("Reward", "preference pairs, for a reward model"),
    "kto": ("KTO", "completions that are good or bad"),
    "grpo": ("GRPO", "prompts and a reward"),
    "rloo": ("RLOO", "prompts and a reward"),
    "orpo": ("ORPO", "preference pairs, without a reference model"),
    "cpo": ("CPO", "preference pairs, without a reference model; SimPO too"),
    "tpo": ("TPO", "preference pairs with a reference text"),
}
_PAIRS = ("chosen rejected", "chosen_ids rejected_ids")
# the columns that a trainer can do with, any line of them
_COLUMNS = {
    "DPO": _PAIRS,
    "Reward": _PAIRS,
    "KTO": ("completion label", "completion_ids label", *_PAIRS),
    "ORPO": _PAIRS[:1],
    "CPO": _PAIRS[:1],
    "TPO": ("chosen rejected reference",),
    "GRPO": ("prompt",),
    "RLOO": ("prompt",),
    "SFT": ("messages", "conversations", "prompt completion", "input_ids"),  # and dataset_text_field
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
    name = f"trl.scripts.{args.command}"  # those of trl.experimental have none
    script = importlib.import_module(name) if importlib.util.find_spec(name) else None
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
    trainer, quantization = getattr(hf_poprisk, f"PopRisk{kind}Trainer"), trl.get_quantization_config(model)
    if "quantization_config" in inspect.signature(trainer).parameters:
        more["quantization_config"] = quantization
    elif quantization is not None:
        raise UserError(f"load_in_4bit and load_in_8bit do not go with {kind}: leave them out.")
    else:
        config.model_init_kwargs["device_map"] = None  # trl.experimental's would split a model
    return trainer(
        model.model_name_or_path,
        args=config,
        train_dataset=data[0],
        eval_dataset=data[1] if evaluates else None,
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
