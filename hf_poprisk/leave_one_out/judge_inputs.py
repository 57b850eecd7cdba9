"""What ``hf-poprisk judge`` reads: data and models, refused before they are loaded where that can be told."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from hf_poprisk.leave_one_out.data import example_ids
from hf_poprisk.leave_one_out.index import INDEX
from hf_poprisk.leave_one_out.judgement import FEWEST
from hf_poprisk.user_errors import UserError, one_line

if TYPE_CHECKING:
    from datasets import Dataset

_PAIR = ("prompt", "chosen", "rejected")
TEXT, LABEL = "text", "label"
# What the trainers read; other columns, such as margin, have a meaning in training alone.
PAIR_COLUMNS = (*_PAIR, "tools", "chat_template_kwargs", INDEX)
CLASS_COLUMNS = (TEXT, LABEL, INDEX)
_CLASSIFIER = "ForSequenceClassification"
_MAX_LENGTH = 1024  # TRL's


def holds_pairs(data: Dataset, name: str) -> bool:
    """Whether the data are preference pairs; if not, they are labelled texts."""
    columns = set(data.column_names)
    has = f"(it has {', '.join(sorted(columns))})"
    if {"chosen", "rejected"} <= columns:
        return True
    if LABEL not in columns:
        raise UserError(
            f"{name} has no columns chosen and rejected {has}, for pairs, and no columns {TEXT} and {LABEL}, "
            "for classes."
        )
    if TEXT not in columns:
        raise UserError(f"{name} has a column {LABEL} and no column {TEXT} {has}: rename the one of texts.")
    return False


def check_pairs(data: Dataset, name: str) -> None:
    """Refuse pairs that are not whole, or say nothing."""
    _check_rows(data, name, "pairs")
    pairs = {column: list(data[column]) for column in _PAIR if column in data.column_names}
    for column, values in pairs.items():
        missing = next((row for row, value in enumerate(values) if value is None or value == []), None)
        if missing is not None:
            raise UserError(f"{name} has no {column} in row {missing}.")
    kinds = {type(value) for values in pairs.values() for value in values}
    if kinds not in ({str}, {list}):
        raise UserError(f"{name} must hold either texts or conversations in all of {', '.join(pairs)}.")
    if pairs["chosen"] == pairs["rejected"]:
        raise UserError(f"chosen and rejected are the same in all pairs of {name}.")
    if all(value == values[0] for values in pairs.values() for value in values):
        raise UserError(f"all pairs of {name} are the same, so none says anything about another's label.")


def check_classes(data: Dataset, name: str) -> int:
    """Refuse labelled texts that are not whole, or say nothing.

    Returns:
        K: labels are in [0, K); as many as their feature names, or up to the highest one.
    """
    _check_rows(data, name, "examples")
    if tokens := sorted({"input_ids", "attention_mask", "token_type_ids"} & set(data.column_names)):
        raise UserError(f"{name} holds tokens, and judge makes its own: remove the column {tokens[0]}.")
    feature, texts, labels = data.features[LABEL], list(data[TEXT]), list(data[LABEL])
    if not str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        raise UserError(f"the column {LABEL} of {name} must hold integers, one for each text.")
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if label is None or label < 0:
            what = "no label" if label is None else f"the label {label}"
            raise UserError(f"{name} has {what} in row {row}: give the rows with labels of 0 or more alone.")
        if text is not None and not isinstance(text, str):
            raise UserError(f"the column {TEXT} of {name} must hold texts.")
        if not (text or "").strip():
            raise UserError(f"{name} has no {TEXT} in row {row}.")
    if len(set(labels)) == 1:
        raise UserError(f"all labels of {name} are {labels[0]}, so none says anything about another.")
    if len(set(texts)) == 1:
        raise UserError(f"all texts of {name} are the same, so none says anything about another's label.")
    return max(getattr(feature, "num_classes", 0), max(labels) + 1)


def _check_rows(data: Dataset, name: str, what: str) -> None:
    if {"image", "images"} & set(data.column_names):
        raise UserError(f"{name} holds images, and judge reads texts alone.")
    if len(data) < FEWEST:
        raise UserError(
            f"{name} has {len(data)} {what}, too few to judge labels by: it takes {FEWEST} or more."
        )
    example_ids(data)


def load_config(name: str) -> Any:
    """The config of a model."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # the loaders raise whatever their files, parsers and networks do
        raise UserError(f"{name} is not a model ({one_line(error)}).") from error


def check_pair_model(args: argparse.Namespace, config: Any) -> Any:
    """The tokenizer of a model that judges pairs."""
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
    """The tokenizer, which can pad, and truncates to ``--max_length`` tokens, of a model for such classes."""
    problem = getattr(config, "problem_type", None) or "single_label_classification"
    for wrong, sentence in (
        (args.reward, f"--reward is for preference pairs, and {args.dataset} holds labels: remove it."),
        (
            problem != "single_label_classification",
            f"{args.model} is for {problem} (its problem_type), and judge takes one label of several "
            "classes.",
        ),
        (
            has_head(config) and config.num_labels == 1,
            f"{args.model} gives one number and no classes: it is for regression or a reward.",
        ),
        (
            has_head(config) and config.num_labels < num_classes,
            f"{args.dataset} has {num_classes} classes, and {args.model} {config.num_labels}: give a model "
            "for these labels, or one without a head.",
        ),
        (
            not has_head(config) and num_classes > num_examples,
            f"{args.dataset} has labels up to {num_classes - 1} in {num_examples} rows: count them from 0.",
        ),
    ):
        if wrong:
            raise UserError(sentence)
    tokenizer = _load_tokenizer(args)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"the tokenizer of {args.model} has no pad_token, which fills up a batch.")
    tokenizer.model_max_length = length_of(args, min(_MAX_LENGTH, tokenizer.model_max_length))
    return tokenizer


def length_of(args: argparse.Namespace, default: int | None) -> int | None:
    """``--max_length``, or the default, as far as the model's positions go."""
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
        from peft import PeftConfig

        try:
            PeftConfig.from_pretrained(args.adapter)
        except Exception as error:
            raise UserError(f"--adapter {args.adapter} is not a PEFT adapter ({one_line(error)}).") from error
    try:
        return AutoTokenizer.from_pretrained(args.model)
    except Exception as error:
        raise UserError(f"{args.model} has no tokenizer ({one_line(error)}).") from error


def load_model(
    args: argparse.Namespace,
    kind: Any,
    may_be_new: Callable[[Any, str], bool] = lambda model, name: False,
    **options: Any,
) -> tuple[Any, bool]:
    """The model with its adapter, whole and finite, and whether some of it is new.

    Args:
        kind: one of transformers' Auto classes.
        may_be_new: (model, name of a weight) → whether it may be drawn at random.
        **options: of ``from_pretrained``.
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
