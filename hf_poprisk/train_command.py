"""``hf-poprisk dpo``, ``sft``, …: TRL's own scripts, with our trainer and config in the place of TRL's."""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import sys
import types
import typing
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hf_poprisk.user_errors import UserError, need, one_line, shorten

if TYPE_CHECKING:
    from trl import TrlParser

logger = logging.getLogger(__name__)
USAGE = "%(prog)s --config FILE.yaml [--option value ...]"
# command → how the names of its trainer and config begin, and what it trains on
COMMANDS = {
    "dpo": ("DPO", "preference pairs"),
    "sft": ("SFT", "sequences"),
    "reward": ("Reward", "preference pairs, for a reward model"),
    "kto": ("KTO", "completions that are good or bad"),
    "grpo": ("GRPO", "prompts and a reward"),
    "rloo": ("RLOO", "prompts and a reward"),
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
        UserError: says in one sentence what is wrong.
        RuntimeError: a TRL whose scripts are other ones.
    """
    need("trl", args.command)
    from hf_poprisk.checkpoints import CheckpointError
    from hf_poprisk.hub import HubError

    script = importlib.import_module(f"trl.scripts.{args.command}")
    with _ours_in_place(script, COMMANDS[args.command][0]):
        parser = script.make_parser(prog=f"hf-poprisk {args.command}")
        groups = parse(parser, args.argv)
        if groups[2].model_name_or_path is None:
            raise UserError("--model_name_or_path is missing: give a folder, or a name on the Hub.")
        try:
            groups[1].resume_from_checkpoint = checkpoint_to_resume(groups[1])
            script.main(*groups)
        except KeyError as error:
            for option in ("dataset_train_split", "dataset_test_split"):
                if error.args == (split := getattr(groups[0], option),):
                    raise UserError(f"{option}={split} is not a split of the data set.") from error
            raise
        except OSError as error:  # of the Hub: it does not always say of what
            asked = (
                f"model_name_or_path={groups[2].model_name_or_path}, dataset_name={groups[0].dataset_name}"
            )
            raise UserError(f"{one_line(error)} ({asked}).") from error
        except (ValueError, CheckpointError, HubError) as error:
            logger.debug("where it came from:", exc_info=True)
            raise UserError(" ".join(str(error).split())) from error


@contextmanager
def _ours_in_place(script: ModuleType, kind: str) -> Iterator[None]:
    """A script of TRL's takes its classes from ``trl`` when it runs; inside this block they are ours."""
    import trl

    import hf_poprisk

    users = {f"{kind}Config": script.make_parser, f"{kind}Trainer": script.main}
    for name, function in users.items():
        if not {"trl", name} <= set(function.__code__.co_names):
            raise RuntimeError(
                f"{function.__name__} in {script.__name__} does not take {name} from trl, so this TRL is "
                "another one: install the version of scripts/constraints.txt."
            )
    stock = {name: getattr(trl, name) for name in users}
    ours = {name: getattr(hf_poprisk, f"PopRisk{name}") for name in users}
    vars(trl).update(ours)
    try:
        yield
    finally:
        vars(trl).update(stock)


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


def _short_help(parser: TrlParser) -> str:
    actions = {action.dest: action for action in parser._actions}
    data = [field.name for field in fields(parser.dataclass_types[0])]
    ours = [name for name in actions if name.startswith("poprisk_") and name != "poprisk_hub_gated"]
    lines = [f"usage: {USAGE % {'prog': parser.prog}}", ""]
    for title, names in {"data": " ".join(data), **_HELP, "population risk": " ".join(ours)}.items():
        lines.append(f"{title}:")
        for action in (actions[name] for name in names.split() if name in actions):
            default = "" if action.default is None else f" [{action.default}]"
            text = " ".join((action.help or "").replace("%%", "%").split())
            lines += [f"  --{action.dest}{default}", f"      {shorten(text, 100)}"]
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
        if not kinds <= {int, float, bool, str, type(None)} or value is None:
            continue
        is_text, is_whole = isinstance(value, str) and str in kinds, type(value) is int and float in kinds
        if not (type(value) in kinds or is_text or is_whole):
            expected = " or ".join(sorted(kind.__name__ for kind in kinds - {type(None)}))
            raise UserError(f"{name} must be {expected}; got {value!r}.")


def checkpoint_to_resume(args: Any) -> str | None:
    """``resume_from_checkpoint`` as a folder; ``last`` is the newest complete one in ``output_dir``.

    Raises:
        UserError: there is none.
    """
    from hf_poprisk.checkpoints import newest_checkpoint

    wanted = args.resume_from_checkpoint
    if wanted is None or wanted.lower() in ("false", "none"):
        return None
    last = wanted.lower() in ("last", "true")
    found = newest_checkpoint(args.output_dir, args.save_only_model) if last else Path(wanted)
    if found is None:
        raise UserError(f"resume_from_checkpoint={wanted}: {args.output_dir} holds no complete checkpoint.")
    if not found.is_dir():
        raise UserError(f"resume_from_checkpoint={wanted} is not a folder.")
    return str(found)
