"""Noisy preferences in output space, with AdamW and the hard gate."""

import time
from typing import Any

import common
import torch
from output_space_training import OUTPUTS
from torch import Tensor
from transformers import PrinterCallback

from hf_poprisk import PopRiskDPOConfig, PopRiskDPOTrainer
from hf_poprisk.output_space import DPOMargin, OutputSpaceCallback, empirical_ntk, load_recording
from hf_poprisk.output_space.analysis import analyse


def dpo() -> tuple[dict[str, Any], None]:
    """The embedded model on preference pairs with flipped labels, AdamW and the hard gate."""
    found: dict[str, Any] = {}
    for arm, gate in (("adamw", "none"), ("gated", "hard")):
        trainer, flipped = _train_pairs(arm, gate)
        recording = load_recording(trainer.args.output_dir)
        run = analyse(recording)
        cut = run.splits[-1]
        u = torch.stack(recording.series["outputs"]).double().squeeze(-1)
        moved = u[-1] - u[0]
        parts = cut.vectors * (cut.vectors.T @ moved)  # [pair, mode]
        groups, tenth = {"clean": ~flipped, "flipped": flipped}, len(moved) // 10
        found[arm] = {
            "channel": cut.channel,
            "flatness_of_w": float(cut.eigenvalues[0] / cut.eigenvalues[-1]),
            "channel_first": run.splits[1].channel,
            "flips_in_reservoir_first": run.reservoir["label noise"][1].item(),
            "loss_explained": float(run.predicted.sum() / run.measured.sum()),
            "flips_in_reservoir": run.reservoir["label noise"][-1].item(),
            "flips_seen_from_reservoir": run.visible["label noise"][-1].item(),
            "margin_in_smallest": float(parts[:, -1].mean() / moved.mean()),
            "test_accuracy": (recording.series["test_outputs"][-1] > 0).double().mean().item(),
            "transfer_error": run.transfer_error[-1].item(),
        }
        for name, group in groups.items():
            found[arm] |= {
                f"{name}_fitted": (u[-1][group] > 0).double().mean().item(),
                f"{name}_margin": u[-1][group].mean().item(),
                f"{name}_margin_in_channel": parts[group][:, : cut.channel].sum(1).mean().item(),
                f"{name}_margin_in_leading": parts[group][:, :tenth].sum(1).mean().item(),
                f"{name}_share_in_leading": float(parts[group][:, :tenth].sum() / moved[group].sum()),
            }
    many = [trainer.data_collator([row]) for row in trainer.train_dataset] * 3
    start = time.process_time()
    empirical_ntk(trainer.model, many, DPOMargin().outputs)
    sizes = {"pairs": len(flipped), "flipped": int(flipped.sum()), "test_pairs": len(trainer.eval_dataset)}
    timed = {"kernel_pairs": len(many), "kernel_seconds": time.process_time() - start}
    timed["parameters"] = sum(p.numel() for p in trainer.model.parameters())
    return {**sizes, "steps": trainer.state.global_step, **timed, **found}, None


def _train_pairs(arm: str, gate: str) -> tuple[PopRiskDPOTrainer, Tensor]:
    """12 steps of all of 96 training pairs; the trainer, and which of them are flipped, [n] bool."""
    data = common.load_splits("outputs/tiny/preferences", None, False)
    pairs = common.flip_preferences(data["train"].select(range(96)), 0.3, 0)
    flipped = torch.tensor(pairs["is_flipped"])
    args = PopRiskDPOConfig(
        output_dir=str(OUTPUTS / f"dpo-{arm}"),
        poprisk_gate=gate,
        learning_rate=3e-4,
        weight_decay=0.0,
        max_steps=12,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=6,
        precompute_ref_log_probs=True,
        model_init_kwargs={"dtype": "float32"},
        max_length=160,
        gradient_checkpointing=False,
        bf16=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = PopRiskDPOTrainer(
        "outputs/tiny/model", args=args, train_dataset=pairs, eval_dataset=data["test"].select(range(48))
    )
    trainer.remove_callback(PrinterCallback)
    parts = trainer.train_dataset, trainer.eval_dataset
    probe, test = ([trainer.data_collator([row]) for row in part] for part in parts)
    noise = -flipped.float()  # softplus(−u) was to be softplus(u): its gradient is off by −1
    trainer.add_callback(
        # often at first, where Adam's preconditioner changes fastest
        OutputSpaceCallback(DPOMargin(args.beta), probe, test, [1, 2, 4, 6, 9], 96, {"label noise": noise})
    )
    trainer.train()
    return trainer, flipped
