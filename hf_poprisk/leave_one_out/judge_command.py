"""Judge labels without training: which ones do the other examples speak against?

DATASET is a Hub name, a folder, or a .parquet, .jsonl, .json or .csv file. It holds preference pairs, in the
columns chosen and rejected, and prompt if it is apart from them; or classes, in the columns text and label,
an integer. MODEL is a Hub name or a folder: for pairs a causal language model, with --reward a reward model;
for classes a text classifier, or any other text model, which gets a new head. OUT will hold judged.parquet,
which hf-poprisk audit reads, and report.html, a page to look through the suspicious rows. A command that was
killed goes on from what OUT holds of it when it is given again. If the data have a bool column is_flipped
that tells which labels are mislabeled, the scores are compared with it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_poprisk.leave_one_out.audit import check_target
from hf_poprisk.leave_one_out.chunks import UNFINISHED, Chunks
from hf_poprisk.leave_one_out.data import TRUTH, find_rows, known_flips, load_data
from hf_poprisk.leave_one_out.judge_inputs import (
    CLASS_COLUMNS,
    PAIR_COLUMNS,
    TEXT,
    check_class_model,
    check_classes,
    check_pair_model,
    check_pairs,
    has_head,
    holds_pairs,
    length_of,
    load_config,
    load_model,
    of_head,
)
from hf_poprisk.leave_one_out.page import write_page
from hf_poprisk.leave_one_out.report import report
from hf_poprisk.leave_one_out.table import RULE, TABLE_NAME, load_run
from hf_poprisk.user_errors import UserError, folder_beside, need

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
PAGE_NAME = "report.html"


def add_command(commands: Any) -> None:
    """Add ``judge`` to the subparsers of ``hf-poprisk``."""
    parser = commands.add_parser(
        "judge", help="preference pairs or classes, without training", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("dataset", metavar="DATASET")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="OUT", help="new, or empty")
    parser.add_argument("--split", help="of the data set (default: train)")
    parser.add_argument("--config_name", metavar="C", help="configuration of the data set")
    parser.add_argument(
        "--reward", action="store_true", help="of pairs: MODEL gives a reward, a classifier with one label"
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
        help="tokens per completion with its prompt (default: TRL's), or per text (default: 1024, or what "
        "MODEL takes)",
    )
    parser.add_argument(
        "--per_device_train_batch_size",
        type=_positive,
        default=8,
        metavar="N",
        help="pairs or texts at a time (default: 8)",
    )
    parser.add_argument(
        "--push_to_hub",
        metavar="REPO",
        help="push OUT, which holds texts of the data, as a data set; a new repository is private",
    )
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
    config = load_config(args.model)
    data = load_data(args.dataset, args.split, args.config_name, "DATASET")
    if holds_pairs(data, args.dataset):
        need("trl", "judge")
        tokenizer = check_pair_model(args, config)
        check_pairs(data, args.dataset)
        if isinstance(data[0]["chosen"], list) and not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {args.model} has no chat template, and {args.dataset} holds conversations."
            )
        pairs = _columns(data, PAIR_COLUMNS)
        new_trainer = partial(_pair_trainer, args, pairs, tokenizer)
    else:
        classes = check_classes(data, args.dataset)
        tokenizer = check_class_model(args, config, classes, len(data))
        # a head that is there has as many as it has
        options = {} if has_head(config) else {"num_labels": classes}
        new_trainer = partial(_class_trainer, args, _columns(data, CLASS_COLUMNS), tokenizer, options)
    if known_flips(data, np.arange(len(data))) is not None:
        need("sklearn", f"a data set with the column {TRUTH}")
    if args.push_to_hub:
        from hf_poprisk.leave_one_out.publish import make_repository, push

        repo = make_repository(args.push_to_hub)
    out = Path(os.path.abspath(args.output_dir))
    with folder_beside(out):
        pass  # it can be written to, which is asked before labels are judged
    with TemporaryDirectory() as folder, _no_cache():  # beside OUT a killed command would leave it behind
        noise, said, chunks = _judged(new_trainer, Path(folder), out)
    with folder_beside(out) as temporary:
        (temporary / "judged").mkdir()
        noise.save(temporary / "judged")
        run = replace(load_run(temporary / "judged"), folder=args.output_dir)
        rows = find_rows(data, run)
        write_page(temporary / "judged" / PAGE_NAME, run, data, rows)
        chunks.remove()
        (temporary / "judged").replace(out)
    files = [args.output_dir / TABLE_NAME, args.output_dir / PAGE_NAME]
    done = [f"judged labels: {files[0]}", f"page: {files[1]}"]
    print(*report(run, data, rows, known_flips(data, rows)), "", *said, *done, sep="\n")
    if args.push_to_hub:
        print(f"pushed: {push(repo, run, files, args.dataset, args.model)}")


def _check_options(args: argparse.Namespace) -> None:
    out = args.output_dir
    if (out / TABLE_NAME).is_file():
        raise UserError(
            f"--output_dir {out} holds labels that were judged: hf-poprisk audit {out} shows them; to judge "
            "anew, give another folder or remove this one."
        )
    check_target(out, "--output_dir", args.dataset, but=UNFINISHED)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("judge runs in one process: start it without a launcher.")
    if torch.cuda.device_count() > 1:
        raise UserError("judge runs on one GPU: set CUDA_VISIBLE_DEVICES to one of them.")
    for package in ("datasets", *["peft"] * bool(args.adapter)):
        need(package, "judge")


def _judged(
    new_trainer: Callable[[Path], tuple[Any, list[str]]], folder: Path, out: Path
) -> tuple[Any, list[str], Chunks]:
    """What a trainer finds before its first step, its ``LabelNoise``, and what to say of the model.

    Args:
        new_trainer: output folder → the trainer, and that.
        out: where chunks are kept until they are removed, which a refusal does.
    """
    try:
        trainer, said = new_trainer(folder)
        trainer._chunks = chunks = Chunks(out, _fingerprint(trainer))
        if chunks.found:
            logger.warning(f"judge goes on from what {out} holds of it.")
        elif chunks.others:
            logger.warning(f"{out} held chunks of another model, other data or options: judge starts anew.")
        try:
            trainer.judge_labels()
        except (ValueError, torch.OutOfMemoryError):
            chunks.remove()
            raise
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the device has too little memory: lower --per_device_train_batch_size or --max_length, or set "
            "--dtype bfloat16."
        ) from error
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from error
    return trainer._label_noise, said, chunks


def _fingerprint(trainer: Any) -> str:
    """Of the weights, the tokens and labels, and what else the features depend on."""
    args, model = trainer.args, trainer.model
    versions = (RULE, torch.__version__, str(args.device))
    cut = [getattr(args, name, None) for name in ("max_length", "truncation_mode")]  # by the collator
    sizes = [args.per_device_train_batch_size, *cut]
    what = [*versions, *sizes, type(model).__name__, model.config.to_json_string()]
    digest = hashlib.sha256(repr(what).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for rows in trainer.train_dataset.with_format(None).iter(1000):
        digest.update(json.dumps(rows).encode())
    return digest.hexdigest()[:16]


def _common(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of every trainer; the dtype of the weights is that of the arithmetic."""
    return {
        "poprisk_gate": "none",
        "poprisk_label_noise": "audit",
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "bf16": False,
        "report_to": "none",
    }


def _pair_trainer(
    args: argparse.Namespace, data: Dataset, tokenizer: Any, folder: Path
) -> tuple[Any, list[str]]:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from hf_poprisk.trl import PopRiskDPOConfig, PopRiskDPOTrainer, PopRiskRewardConfig, PopRiskRewardTrainer

    kind = PopRiskRewardConfig if args.reward else PopRiskDPOConfig
    config = kind(str(folder), activation_checkpointing=False, **_common(args))
    config.max_length = length_of(args, config.max_length)
    config.check_training()
    common = {"args": config, "train_dataset": data, "processing_class": tokenizer}
    if args.reward:
        model, _ = load_model(args, AutoModelForSequenceClassification, num_labels=1)
        return PopRiskRewardTrainer(model, **common), []
    model, _ = load_model(args, AutoModelForCausalLM)
    return PopRiskDPOTrainer(model, _no_reference(model), **common), []


def _class_trainer(
    args: argparse.Namespace, data: Dataset, tokenizer: Any, options: dict[str, Any], folder: Path
) -> tuple[Any, list[str]]:
    from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, set_seed

    from hf_poprisk.trainer import PopRiskTrainer, PopRiskTrainingArguments

    config = PopRiskTrainingArguments(str(folder), **_common(args))
    config.check_training()
    set_seed(config.seed)  # of a new head
    model, new = load_model(args, AutoModelForSequenceClassification, of_head, **options)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # where a decoder's text ends
    trainer = PopRiskTrainer(
        model,
        args=config,
        # texts and labels stay, by which the audit knows the rows again
        train_dataset=data.map(lambda rows: tokenizer(rows[TEXT], truncation=True), batched=True),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    head = f"head: {args.model} has none for these labels, so a random one was used; it need not be trained"
    return trainer, [head] * new


def _columns(data: Dataset, columns: Iterable[str]) -> Dataset:
    """Those of some columns that are there."""
    return data.select_columns([column for column in columns if column in data.column_names])


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
