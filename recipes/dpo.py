"""DPO with and without the gate, on the embedded model or on anything from the Hub.

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/dpo.py \\
        --config recipes/tiny/dpo.yaml [--key value ...]

Writes the model, ``trainer_state.json`` (the curves) and ``results.json`` (the numbers at the end) into
``output_dir``.
"""

import contextlib
from dataclasses import dataclass, field

import common
import torch
from datasets import Dataset
from torch.nn.functional import softplus
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from hf_poprisk import PopRiskDPOConfig, PopRiskDPOTrainer
from hf_poprisk.train_command import checkpoint_to_resume

MAX_FLIPPED_EVAL = 512  # flipped training pairs scored at every evaluation


@dataclass
class DPOScriptArguments(ScriptArguments):
    """Where the preferences come from, and how many of them to spoil."""

    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a data set from the Hub."}
    )
    dataset_validation_split: str | None = field(
        default=None, metadata={"help": "A second held-out split, for choosing settings; '' for none."}
    )
    flip_fraction: float = field(
        default=0.0, metadata={"help": "Share of training pairs whose chosen and rejected are swapped."}
    )
    flip_seed: int = field(default=0, metadata={"help": "Which pairs are swapped."})


ARGUMENTS = (DPOScriptArguments, PopRiskDPOConfig, ModelConfig)


def load(script_args: DPOScriptArguments) -> tuple[Dataset, dict[str, Dataset]]:
    """The training pairs with their labels as they are, and the held-out splits.

    Returns:
        The training split; ``test``, and ``validation`` where the recipe names one.
    """
    data = common.load_splits(script_args, script_args.dataset_revision)
    train = common.split(data, script_args, "dataset_train_split")
    held_out = {"test": common.split(data, script_args, "dataset_test_split")}
    if script_args.dataset_validation_split:
        held_out["validation"] = common.split(data, script_args, "dataset_validation_split")
    for name, part in {"training": train, **held_out}.items():
        common.check_completions(part, name)
    return train, held_out


def make_trainer(
    trainer_class: type[PopRiskDPOTrainer],
    args: PopRiskDPOConfig,
    model_args: ModelConfig,
    train: Dataset,
    held_out: dict[str, Dataset],
) -> PopRiskDPOTrainer:
    """A trainer with the recipe's model, quantization and adapter."""
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype or "float32",
        **(args.model_init_kwargs or {}),
    }
    return trainer_class(
        model=model_args.model_name_or_path,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


def reference_of(trainer: PopRiskDPOTrainer, model_args: ModelConfig) -> torch.nn.Module | None:
    """The model before training; None where it is the policy with its adapter disabled."""
    if trainer.ref_model is not None or model_args.use_peft:
        return trainer.ref_model
    # precomputed log-probabilities: nothing was kept
    kwargs = trainer.args.model_init_kwargs
    reference = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **kwargs)
    return reference.to(trainer.accelerator.device).eval()


@torch.no_grad()
def score(trainer: PopRiskDPOTrainer, reference: torch.nn.Module | None, name: str) -> dict[str, float]:
    """Preference accuracy, reward margin and KL to the reference on one of the evaluation sets.

    Per pair, from the logits of both models: the trainer's own metrics are means over batches.

    Args:
        reference: the model before training; None takes the policy with its adapter disabled.
        name: a key of ``trainer.eval_dataset``.

    Returns:
        ``accuracy`` (share of margins > 0), ``margin`` (mean, nats times beta), ``loss`` (mean of
        -log σ(margin), nats), and ``kl_per_token``: the mean over the tokens of the chosen completions of
        KL(policy ‖ reference), exact over the vocabulary, in nats.
    """
    accelerator, data = trainer.accelerator, trainer.eval_dataset[name]
    policy = accelerator.unwrap_model(trainer.model).eval()
    mine = list(range(accelerator.process_index, len(data), accelerator.num_processes))
    size = trainer.args.per_device_eval_batch_size
    total = torch.zeros(6, dtype=torch.float64)  # correct, margin, loss, pairs, KL, tokens
    quiet = trainer.args.disable_tqdm or not accelerator.is_main_process
    for start in tqdm(range(0, len(mine), size), desc=f"Scoring {name}", disable=quiet):
        pairs = [data[row] for row in mine[start : start + size]]
        batch = {key: value.to(accelerator.device) for key, value in trainer.data_collator(pairs).items()}
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with accelerator.autocast():
            after = policy(**inputs).logits  # [2N, T, vocabulary], chosen rows first
            with policy.disable_adapter() if reference is None else contextlib.nullcontext():
                before = (reference or policy)(**inputs).logits
        rewards = []
        for row in range(len(after)):  # row by row: a float32 copy of all logits may not fit
            kept = batch["completion_mask"][row, 1:].bool()
            labels = batch["input_ids"][row, 1:][kept]
            new = after[row, :-1][kept].float().log_softmax(-1)  # [tokens, vocabulary]
            old = before[row, :-1][kept].float().log_softmax(-1)
            rewards.append(trainer.beta * (new - old).gather(-1, labels[:, None]).sum().item())
            if row < len(pairs):
                total[4] += (new.exp() * (new - old)).sum().item()
                total[5] += len(labels)
        for chosen, rejected in zip(rewards[: len(pairs)], rewards[len(pairs) :], strict=True):
            margin = torch.tensor(chosen - rejected, dtype=torch.float64)
            total[:4] += torch.stack([margin > 0, margin, softplus(-margin), torch.ones_like(margin)])
    right, margin, loss, count, kl, tokens = accelerator.reduce(total.float().to(accelerator.device)).tolist()
    means = {"accuracy": right / count, "margin": margin / count, "loss": loss / count}
    return means | {"kl_per_token": kl / tokens}


def main() -> None:
    script_args, args, model_args = common.parse(ARGUMENTS)
    common.require_path(model_args.model_name_or_path, "model_name_or_path")
    resume = checkpoint_to_resume(args)
    train, sets = load(script_args)
    train = common.flip_preferences(train, script_args.flip_fraction, script_args.flip_seed)
    flipped = [row for row, is_flipped in enumerate(train["is_flipped"]) if is_flipped]
    if flipped:  # as they are labelled
        sets["flipped"] = train.select(flipped[:MAX_FLIPPED_EVAL])
    trainer = make_trainer(PopRiskDPOTrainer, args, model_args, train, sets)
    timer = common.train(trainer, train, resume)
    reference = reference_of(trainer, model_args)
    scores = {name: score(trainer, reference, name) for name in trainer.eval_dataset}
    groups = (script_args, model_args, args)
    common.finish(trainer, {"scores": scores}, timer, groups, dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    common.run(main)
