"""DPO with and without the gate, on the embedded model or on anything from the Hub.

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/dpo.py \\
        --config recipes/tiny/dpo/poprisk.yaml [--key value ...]

Writes the model, ``trainer_state.json`` (the curves) and ``results.json`` (the numbers at the end) into
``output_dir``.
"""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import (
    StepTimer,
    check_completions,
    checkpoint_to_resume,
    flip_preferences,
    gate_summary,
    load_splits,
    parse,
    require_path,
    run,
    settings,
    split,
    write_json,
)
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from hf_poprisk import PopRiskDPOConfig, PopRiskDPOTrainer

MAX_FLIPPED_EVAL = 512  # flipped training pairs scored at every evaluation


@dataclass
class DPOScriptArguments(ScriptArguments):
    """Where the preferences come from, and how many of them to spoil."""

    dataset_validation_split: str | None = field(
        default=None, metadata={"help": "A second held-out split to evaluate, for choosing settings."}
    )
    flip_fraction: float = field(
        default=0.0, metadata={"help": "Share of training pairs whose chosen and rejected are swapped."}
    )
    flip_seed: int = field(default=0, metadata={"help": "Which pairs are swapped."})


def evaluation_sets(train: Dataset, splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """The held-out splits, and the flipped training pairs as they are labelled."""
    flipped = [row for row, is_flipped in enumerate(train["is_flipped"]) if is_flipped]
    if flipped:
        splits = {**splits, "flipped": train.select(flipped[:MAX_FLIPPED_EVAL])}
    return splits


@torch.no_grad()
def kl_to_reference(trainer: PopRiskDPOTrainer, reference: torch.nn.Module | None, data: Dataset) -> float:
    """Mean over the tokens of the chosen completions of KL(policy ‖ reference), in nats per token.

    Exact over the vocabulary, on held-out pairs that the trainer has tokenized.

    Args:
        reference: the model before training; None takes the policy with its adapter disabled.
    """
    accelerator = trainer.accelerator
    policy = accelerator.unwrap_model(trainer.model).eval()
    total = torch.zeros(2, dtype=torch.float64, device="cpu")  # sum of KL, tokens
    rows = range(accelerator.process_index, len(data), accelerator.num_processes)
    for row in tqdm(rows, desc="KL to the reference", disable=not accelerator.is_main_process):
        prompt, chosen = data[row]["prompt_ids"], data[row]["chosen_ids"]
        ids = torch.tensor([(prompt + chosen)[: trainer.args.max_length]], device=accelerator.device)
        with accelerator.autocast():
            after = policy(input_ids=ids).logits[0, len(prompt) - 1 : -1]  # [tokens, vocabulary]
            with policy.disable_adapter() if reference is None else contextlib.nullcontext():
                before = (reference or policy)(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        after, before = after.float().log_softmax(-1), before.float().log_softmax(-1)
        total += torch.tensor([(after.exp() * (after - before)).sum().item(), after.shape[0]])
    summed = accelerator.reduce(total.float().to(accelerator.device))
    return (summed[0] / summed[1]).item()


def results(
    trainer: PopRiskDPOTrainer, metrics: dict[str, float], kl: float, timer: StepTimer
) -> dict[str, Any]:
    """The numbers of the comparison table; None where a run has no such number."""
    return {
        "test_accuracy": metrics["eval_test_rewards/accuracies"],
        "test_margin": metrics["eval_test_rewards/margins"],
        "test_kl_per_token": kl,
        "flipped_fitted": metrics.get("eval_flipped_rewards/accuracies"),
        "validation_accuracy": metrics.get("eval_validation_rewards/accuracies"),
        "seconds_per_step": timer.median,
        "steps": trainer.state.global_step,
        "gate": gate_summary(trainer.state.log_history),
    }


def main() -> None:
    script_args, args, model_args = parse((DPOScriptArguments, PopRiskDPOConfig, ModelConfig))
    require_path(model_args.model_name_or_path, "model_name_or_path")
    resume = checkpoint_to_resume(args)
    data = load_splits(script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming)
    train = split(data, script_args.dataset_train_split, "dataset_train_split")
    held_out = {"test": split(data, script_args.dataset_test_split, "dataset_test_split")}
    if script_args.dataset_validation_split:
        held_out["validation"] = split(data, script_args.dataset_validation_split, "dataset_validation_split")
    for name, part in {"training": train, **held_out}.items():
        check_completions(part, name)
    train = flip_preferences(train, script_args.flip_fraction, script_args.flip_seed)

    init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype or "float32",
        **(args.model_init_kwargs or {}),
    }
    args.model_init_kwargs = init_kwargs
    timer = StepTimer()
    trainer = PopRiskDPOTrainer(
        model=model_args.model_name_or_path,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation_sets(train, held_out),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        callbacks=[timer],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.save_state()

    reference = trainer.ref_model
    if reference is None and not model_args.use_peft:  # precomputed log-probabilities: nothing was kept
        reference = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **init_kwargs)
        reference = reference.to(trainer.accelerator.device).eval()
    kl = kl_to_reference(trainer, reference, trainer.eval_dataset["test"])
    if trainer.is_world_process_zero():
        content = {
            "results": results(trainer, metrics, kl, timer),
            "settings": settings(script_args, model_args, args),
        }
        write_json(Path(args.output_dir, "results.json"), content)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


if __name__ == "__main__":
    run(main)
