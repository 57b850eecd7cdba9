"""How the training commands and the recipes read their options, and which of them ``--help`` shows."""

from __future__ import annotations

import argparse
import difflib
import sys
import textwrap
import types
import typing
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from hf_poprisk.refusals import always
from hf_poprisk.user_errors import UserError

if TYPE_CHECKING:
    from trl import TrlParser

USAGE = "%(prog)s [--config FILE.yaml] [--option value ...]"
# What --help shows of the three hundred options, with those of the script and ours.
_HELP = {
    "model": "model_name_or_path dtype",
    "training": "output_dir learning_rate num_train_epochs max_steps per_device_train_batch_size "
    "gradient_accumulation_steps max_length num_generations max_completion_length loss_type beta optim seed "
    "bf16 use_cpu resume_from_checkpoint",
    "adapters": "use_peft lora_r lora_alpha lora_target_modules load_in_4bit",
}


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
