"""PopRiskTrainer with and without the gate: causal language modelling, or text classification.

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/train.py \\
        --config recipes/tiny/classification.yaml [--key value ...]

Writes the model, ``trainer_state.json`` and ``results.json`` into ``output_dir``.
"""

from dataclasses import dataclass, field
from typing import Any

import common
import numpy as np
from common import RecipeError
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, ScriptArguments, get_peft_config

from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments
from hf_poprisk.train_command import checkpoint_to_resume

TASKS = ("causal-lm", "classification")


@dataclass
class TrainScriptArguments(ScriptArguments):
    """The task and its columns."""

    task: str = field(default="causal-lm", metadata={"help": f"One of {', '.join(TASKS)}."})
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})
    label_column: str = field(default="label", metadata={"help": "The column that holds the class."})
    max_length: int = field(default=512, metadata={"help": "Tokens per example; longer ones are cut."})
    flip_fraction: float = field(
        default=0.0, metadata={"help": "Share of training labels replaced by another class."}
    )
    flip_seed: int = field(default=0, metadata={"help": "Which labels, and by what."})


ARGUMENTS = (TrainScriptArguments, PopRiskTrainingArguments, ModelConfig)


def prepare(
    data: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, args: TrainScriptArguments
) -> Dataset:
    """Token ids, for classification with the text and ``labels``; empty texts are refused by row."""
    wanted = [args.text_column] + ([args.label_column] if args.task == "classification" else [])
    for column in wanted:
        if column not in data.column_names:
            columns = ", ".join(data.column_names)
            raise RecipeError(f"the {name} split has no column {column}: it has {columns}.")
    for row, text in enumerate(data[args.text_column]):
        if not (text or "").strip():
            raise RecipeError(f"row {row} of the {name} split has an empty {args.text_column!r}.")

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        out = tokenizer(row[args.text_column], truncation=True, max_length=args.max_length)
        return {**out, "labels": row[args.label_column]} if args.task == "classification" else dict(out)

    # the audit of labels shows the text, and the trainer leaves it out
    dropped = [c for c in data.column_names if args.task != "classification" or c != args.text_column]
    return data.map(tokenize, remove_columns=dropped, desc=f"Tokenizing the {name} split")


def flip_classes(data: Dataset, num_labels: int, fraction: float, seed: int) -> Dataset:
    """Replace exactly ``round(fraction · n)`` labels by another class; ``is_flipped`` says which."""
    if not 0.0 <= fraction <= 1.0:
        raise RecipeError(f"flip_fraction must be between 0 and 1; got {fraction}.")
    rng = np.random.default_rng(seed)
    labels = np.array(data["labels"])
    chosen = rng.permutation(len(labels))[: round(fraction * len(labels))]
    labels[chosen] = (labels[chosen] + rng.integers(1, num_labels, len(chosen))) % num_labels
    flipped = np.isin(np.arange(len(labels)), chosen)

    def flip(_: Any, row: int) -> dict[str, Any]:
        return {"labels": int(labels[row]), "is_flipped": bool(flipped[row])}

    return data.map(flip, with_indices=True, desc="Flipping labels")


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    script_args, args, model_args = common.parse(ARGUMENTS)
    if script_args.task not in TASKS:
        raise RecipeError(f"task must be one of {', '.join(TASKS)}; got {script_args.task!r}.")
    if script_args.flip_fraction and script_args.task != "classification":
        raise RecipeError("flip_fraction needs labels to flip: set task=classification or flip_fraction=0.")
    common.require_path(model_args.model_name_or_path, "model_name_or_path")
    resume = checkpoint_to_resume(args)
    data = common.load_splits(script_args)
    train, test = (common.split(data, script_args, f"dataset_{name}_split") for name in ("train", "test"))

    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    train = prepare(train, "training", tokenizer, script_args)
    test = prepare(test, "test", tokenizer, script_args)
    load = {"revision": model_args.model_revision, "dtype": model_args.dtype or "float32"}
    if script_args.task == "classification":
        num_labels = max(train["labels"]) + 1
        train = flip_classes(train, num_labels, script_args.flip_fraction, script_args.flip_seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            model_args.model_name_or_path, num_labels=num_labels, **load
        )
        model.config.pad_token_id = tokenizer.pad_token_id
        collator: Any = DataCollatorWithPadding(tokenizer)
    else:
        model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **load)
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    peft_config = get_peft_config(model_args)
    if peft_config is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)

    trainer = PopRiskTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=test,
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=accuracy if script_args.task == "classification" else None,
    )
    timer = common.train(trainer, train, resume)
    metrics = trainer.evaluate()
    trainer.save_state()
    results = {"test_loss": metrics["eval_loss"], "test_accuracy": metrics.get("eval_accuracy")}
    common.finish(trainer, results, timer, (script_args, model_args, args))


if __name__ == "__main__":
    common.run(main)
