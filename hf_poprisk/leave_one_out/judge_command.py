"""Judge preference pairs without training: which labels do the other pairs speak against?

MODEL is a causal language model, or with --reward a reward model; a Hub name or a folder. DATASET is a Hub
name, a folder, or a .parquet, .jsonl, .json or .csv file, with the columns chosen and rejected, and prompt if
it is apart from them. OUT will hold judged.parquet, which hf-poprisk audit reads, and report.html, a page to
look through the suspicious rows. If the data have a bool
column is_flipped that tells which labels are mislabeled, the scores are compared with it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_poprisk.command import UserError, folder_beside, need, one_line
from hf_poprisk.leave_one_out.copies import check_target
from hf_poprisk.leave_one_out.data import TRUTH, example_ids, find_rows, known_flips, load_data
from hf_poprisk.leave_one_out.figure import plot
from hf_poprisk.leave_one_out.index import INDEX
from hf_poprisk.leave_one_out.judgement import FEWEST
from hf_poprisk.leave_one_out.page import write_page
from hf_poprisk.leave_one_out.report import report
from hf_poprisk.leave_one_out.run import load_run
from hf_poprisk.leave_one_out.table import TABLE_NAME

if TYPE_CHECKING:
    from datasets import Dataset

PAGE_NAME = "report.html"
PAIR = ("prompt", "chosen", "rejected")
# What the trainers read; other columns, such as margin, have a meaning in training alone.
_READ = (*PAIR, "tools", "chat_template_kwargs", INDEX)


def add_command(commands: Any) -> None:
    """Add ``judge`` to the subparsers of ``hf-poprisk``."""
    parser = commands.add_parser(
        "judge", help="preference pairs, without training", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("dataset", metavar="DATASET")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="OUT", help="new, or empty")
    parser.add_argument("--split", help="of the data set (default: train)")
    parser.add_argument("--config_name", metavar="C", help="configuration of the data set")
    parser.add_argument(
        "--reward", action="store_true", help="MODEL gives a reward: a classifier with one label"
    )
    parser.add_argument("--adapter", metavar="NAME_OR_FOLDER", help="a PEFT adapter on top of MODEL")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="float32",
        help="of weights and arithmetic (default: float32)",
    )
    parser.add_argument(
        "--max_length",
        type=_positive,
        metavar="N",
        help="tokens per completion with its prompt (default: TRL's)",
    )
    parser.add_argument(
        "--per_device_train_batch_size",
        type=_positive,
        default=8,
        metavar="N",
        help="pairs at a time (default: 8)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw a histogram")
    parser.set_defaults(execute=judge)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def judge(args: argparse.Namespace) -> None:
    """Carry out a command line; files are written before anything is printed.

    Raises:
        UserError: says in one sentence what is wrong; then nothing was judged, written or printed.
    """
    _check_options(args)
    tokenizer = _check_model(args)
    data = load_data(args.dataset, args.split, args.config_name, "DATASET")
    _check_pairs(data, args.dataset)
    if isinstance(data[0]["chosen"], list) and not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {args.model} has no chat template, and {args.dataset} holds conversations."
        )
    flips = known_flips(data, np.arange(len(data)))
    if flips is not None:
        need("sklearn", f"a data set with the column {TRUTH}")
    out = Path(os.path.abspath(args.output_dir))
    with folder_beside(out) as temporary, _no_cache():
        noise = _judged(args, data, tokenizer, temporary / "trainer")
        (temporary / "judged").mkdir()
        noise.save(temporary / "judged")
        run = load_run(temporary / "judged")
        rows = find_rows(data, run)
        write_page(temporary / "judged" / PAGE_NAME, replace(run, folder=args.output_dir), data, rows)
        (temporary / "judged").replace(out)
    run = replace(run, folder=args.output_dir)
    flips = known_flips(data, rows)
    done = ["", f"judged labels: {args.output_dir / TABLE_NAME}", f"page: {args.output_dir / PAGE_NAME}"]
    if args.plot:
        plot(run, args.plot, flips)
        done += [f"figure: {args.plot}"]
    print(*report(run, data, rows, flips), *done, sep="\n")


# -- refusals, before the model is loaded -------------------------------------------------------------------


def _check_options(args: argparse.Namespace) -> None:
    check_target(args.output_dir, "--output_dir")
    if Path(args.dataset).resolve() in args.output_dir.resolve().parents:
        raise UserError(
            f"--output_dir {args.output_dir} lies inside the data, {args.dataset}: give another folder."
        )
    if args.plot and args.plot.suffix.lower() != ".png":
        raise UserError(f"--plot {args.plot} must end in .png.")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("judge runs in one process: start it without a launcher.")
    if torch.cuda.device_count() > 1:
        raise UserError("judge runs on one GPU: set CUDA_VISIBLE_DEVICES to one of them.")
    for package in ("trl", "datasets", *["peft"] * bool(args.adapter), *["matplotlib"] * bool(args.plot)):
        need(package, "judge")


def _check_model(args: argparse.Namespace) -> Any:
    """The tokenizer.

    Raises:
        UserError: there is no model, or not of this kind.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(args.model)
    except Exception as error:  # the loaders raise whatever their files, parsers and networks do
        raise UserError(f"{args.model} is not a model ({one_line(error)}).") from error
    kind = next(iter(config.architectures or ()), "")
    if args.reward and not args.adapter and not kind.endswith("ForSequenceClassification"):
        raise UserError(f"{args.model} is not a reward model: it is a {kind or config.model_type}.")
    if args.reward and not args.adapter and config.num_labels != 1:
        raise UserError(f"{args.model} is not a reward model: it has {config.num_labels} labels and not one.")
    if not args.reward and kind.endswith("ForSequenceClassification"):
        raise UserError(f"{args.model} is a {kind}: add --reward if it is a reward model.")
    if args.adapter:
        _check_adapter(args.adapter)
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except Exception as error:
        raise UserError(f"{args.model} has no tokenizer ({one_line(error)}).") from error
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {args.model} has no eos_token, which ends every completion.")
    return tokenizer


def _check_adapter(name: str) -> None:
    from peft import PeftConfig

    try:
        PeftConfig.from_pretrained(name)
    except Exception as error:
        raise UserError(f"--adapter {name} is not a PEFT adapter ({one_line(error)}).") from error


def _check_pairs(data: Dataset, name: str) -> None:
    columns = set(data.column_names)
    if not {"chosen", "rejected"} <= columns:
        raise UserError(
            f"{name} has no columns chosen and rejected (it has {', '.join(sorted(columns))}): labelled "
            "classes are judged by PopRiskTrainer with poprisk_label_noise=audit."
        )
    if columns & {"image", "images"}:
        raise UserError(f"{name} holds images, and judge reads texts alone.")
    if len(data) < FEWEST:
        raise UserError(
            f"{name} has {len(data)} pairs, too few to judge labels by: it takes {FEWEST} or more."
        )
    example_ids(data)
    pairs = {column: list(data[column]) for column in PAIR if column in columns}
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


# -- judging ------------------------------------------------------------------------------------------------


def _judged(args: argparse.Namespace, data: Dataset, tokenizer: Any, folder: Path) -> Any:
    """What a trainer finds before its first step: its ``LabelNoise``.

    Raises:
        UserError: the model or the data are not fit for it.
    """
    from hf_poprisk.trl import PopRiskDPOConfig, PopRiskDPOTrainer, PopRiskRewardConfig, PopRiskRewardTrainer

    options = {} if args.max_length is None else {"max_length": args.max_length}
    try:
        config = (PopRiskRewardConfig if args.reward else PopRiskDPOConfig)(
            str(folder),
            poprisk_gate="none",
            poprisk_label_noise="audit",
            per_device_train_batch_size=args.per_device_train_batch_size,
            bf16=False,  # the dtype of the weights is that of the arithmetic
            activation_checkpointing=False,
            report_to="none",
            **options,
        )
        config.check_training()
        model = _load_model(args)
        data = data.select_columns([column for column in _READ if column in data.column_names])
        common = {"args": config, "train_dataset": data, "processing_class": tokenizer}
        if args.reward:
            trainer: Any = PopRiskRewardTrainer(model, **common)
        else:
            trainer = PopRiskDPOTrainer(model, _no_reference(model), **common)
        trainer.judge_labels()
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the device has too little memory: lower --per_device_train_batch_size or --max_length, or set "
            "--dtype bfloat16."
        ) from error
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from error
    return trainer._label_noise


def _load_model(args: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if args.reward else AutoModelForCausalLM
    options = {"num_labels": 1} if args.reward else {}
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    try:
        model, info = kind.from_pretrained(args.model, dtype=dtype, output_loading_info=True, **options)
    except Exception as error:
        raise UserError(f"{args.model} cannot be loaded ({one_line(error)}).") from error
    missing = set(info["missing_keys"])
    if args.adapter:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, args.adapter)
        except Exception as error:
            raise UserError(
                f"--adapter {args.adapter} does not fit {args.model} ({one_line(error)})."
            ) from error
        brought = getattr(model.peft_config["default"], "modules_to_save", None) or ()
        missing = {key for key in missing if key.rpartition(".")[0].rpartition(".")[2] not in brought}
    if missing:
        raise UserError(
            f"labels cannot be judged by {args.model}: it holds no {min(missing)}, which would be random."
        )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            raise UserError(f"the weights of {args.model} are not finite: {name} holds NaN or inf.")
    return model


def _no_reference(model: Any) -> Any:
    """Stands for the reference model, of which the gradients of the labels' log-odds do not depend."""

    class NoReference(torch.nn.Module):
        config = model.config

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError("judging needs no reference model")

    return NoReference()


@contextmanager
def _no_cache() -> Iterator[None]:
    """The trainers' tokens would be kept beside the data, in somebody's folder."""
    import datasets

    before = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if before:
            datasets.enable_caching()
