"""The model of ``hf-poprisk judge``: refused by its config where that tells enough, then loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from hf_poprisk.command import UserError, one_line

_CLASSIFIER = "ForSequenceClassification"
_MAX_LENGTH = 1024  # TRL's


def load_config(name: str) -> Any:
    """The config of a model.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # the loaders raise whatever their files, parsers and networks do
        raise UserError(f"{name} is not a model ({one_line(error)}).") from error


def check_pair_model(args: argparse.Namespace, config: Any) -> Any:
    """The tokenizer.

    Raises:
        UserError: the model is not of the kind that judges pairs.
    """
    kind = _kind(config)
    if args.reward and not args.adapter and not kind.endswith(_CLASSIFIER):
        raise UserError(f"{args.model} is not a reward model: it is a {kind or config.model_type}.")
    if args.reward and not args.adapter and config.num_labels != 1:
        raise UserError(f"{args.model} is not a reward model: it has {config.num_labels} labels and not one.")
    if not args.reward and kind.endswith(_CLASSIFIER):
        raise UserError(f"{args.model} is a {kind}: add --reward if it is a reward model.")
    tokenizer = _load_tokenizer(args)
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {args.model} has no eos_token, which ends every completion.")
    return tokenizer


def check_class_model(args: argparse.Namespace, config: Any, num_classes: int, num_examples: int) -> Any:
    """The tokenizer, which can pad, and truncates to ``--max_length`` tokens.

    Raises:
        UserError: the model does not judge such classes.
    """
    if args.reward:
        raise UserError(f"--reward is for preference pairs, and {args.dataset} holds labels: remove it.")
    problem = getattr(config, "problem_type", None) or "single_label_classification"
    if problem != "single_label_classification":
        raise UserError(
            f"{args.model} is for {problem} (its problem_type), and judge takes one label of several classes."
        )
    if has_head(config) and config.num_labels == 1:
        raise UserError(f"{args.model} gives one number and no classes: it is for regression or a reward.")
    if has_head(config) and config.num_labels < num_classes:
        raise UserError(
            f"{args.dataset} has {num_classes} classes, and {args.model} {config.num_labels}: give a model "
            "for these labels, or one without a head."
        )
    if not has_head(config) and num_classes > num_examples:
        raise UserError(
            f"{args.dataset} has labels up to {num_classes - 1} in {num_examples} rows: count them from 0."
        )
    tokenizer = _load_tokenizer(args)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"the tokenizer of {args.model} has no pad_token, which fills up a batch.")
    tokenizer.model_max_length = length_of(args, min(_MAX_LENGTH, tokenizer.model_max_length))
    return tokenizer


def length_of(args: argparse.Namespace, default: int | None) -> int | None:
    """``--max_length``, or the default, as far as the model's positions go.

    Raises:
        UserError: they do not go as far as what was asked for.
    """
    limit = getattr(load_config(args.model).get_text_config(), "max_position_embeddings", None)
    if args.max_length is not None and limit is not None and args.max_length > limit:
        raise UserError(f"--max_length {args.max_length} is too long: {args.model} takes {limit} tokens.")
    if args.max_length is not None:
        return args.max_length
    return default if limit is None else min(limit, default or limit)


def _kind(config: Any) -> str:
    return next(iter(config.architectures or ()), "")


def has_head(config: Any) -> bool:
    """Whether the model was trained, or at least saved, as a classifier."""
    return _kind(config).endswith(_CLASSIFIER)


def _load_tokenizer(args: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer

    if args.adapter:
        _check_adapter(args.adapter)
    try:
        return AutoTokenizer.from_pretrained(args.model)
    except Exception as error:
        raise UserError(f"{args.model} has no tokenizer ({one_line(error)}).") from error


def _check_adapter(name: str) -> None:
    from peft import PeftConfig

    try:
        PeftConfig.from_pretrained(name)
    except Exception as error:
        raise UserError(f"--adapter {name} is not a PEFT adapter ({one_line(error)}).") from error


def load_model(
    args: argparse.Namespace,
    kind: Any,
    may_be_new: Callable[[Any, str], bool] = lambda model, name: False,
    **options: Any,
) -> tuple[Any, bool]:
    """The model with its adapter, and whether some of it is new.

    Args:
        kind: one of transformers' Auto classes.
        may_be_new: (model, name of a weight) → whether it may be drawn at random.
        **options: of ``from_pretrained``.

    Raises:
        UserError: it cannot be loaded, is not whole or not finite.
    """
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    try:
        model, info = kind.from_pretrained(args.model, dtype=dtype, output_loading_info=True, **options)
    except Exception as error:
        raise UserError(f"{args.model} cannot be loaded ({one_line(error)}).") from error
    missing = set(info["missing_keys"])
    new = {name for name in missing if may_be_new(model, name)}
    if args.adapter:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, args.adapter)
        except Exception as error:
            raise UserError(
                f"--adapter {args.adapter} does not fit {args.model} ({one_line(error)})."
            ) from error
        brought = set(getattr(model.peft_config["default"], "modules_to_save", None) or ())
        missing = {name for name in missing if not brought & set(name.split("."))}
    if missing - new:
        raise UserError(
            f"labels cannot be judged by {args.model}: it holds no {min(missing - new)}, which would be "
            "random."
        )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            raise UserError(f"the weights of {args.model} are not finite: {name} holds NaN or inf.")
    return model, bool(missing)


def of_head(model: Any, name: str) -> bool:
    """Whether a weight is above the layers that every task shares; a pooler comes with the classifier."""
    body = f"{model.base_model_prefix}."
    return model.base_model is not model and (not name.startswith(body) or ".pooler." in name)
