"""What every launched process runs: all trainers over the same examples, and DDP's corner cases.

    accelerate launch … worker.py OUT.pt MODEL_DIR

Rank 0 saves what it saw. Not a test module: ``test_layout.py`` launches it and compares.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401
import reference
import torch
import torch.distributed as dist
from datasets import Dataset
from losses import KINDS as LOSSES
from losses import FirstGradient, first_step, gap
from models import preferences, sequences, tiny_model, token_examples
from peft import LoraConfig
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hf_poprisk
from hf_poprisk import PopRiskAdamW
from hf_poprisk.per_example.window import ExampleWindow

B, STEPS = 16, 3
KINDS = ("Trainer", "DPO", "SFT", "Reward", "DPO-LoRA", "DPO-one-by-one", "DPO-audit")
STOCK = (
    *("token mean: mt5", "ctc sum: hubert", "class weights: vit", "class weights: bert", "penalty: vit"),
    *("experts: mixtral", "contrastive: bert", "adapter: adalora", "adapter: prompt"),
)
RESUMED = ("Trainer", "DPO", "DPO-LoRA")
MICRO_BATCHES = {1: (1, 4, 16), 2: (1, 4)}


def build(kind: str, model_dir: str, world: int, micro_batch: int, **changes: Any) -> Any:
    """A trainer whose step t sees examples 16 t … 16 t + 15 in any layout."""
    output_dir = changes.pop("output_dir", "unused")
    options: dict[str, Any] = {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": B // (world * micro_batch),
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        **changes,
    }
    if kind == "Trainer":
        rows = [{k: v[0] for k, v in example.items()} for example in token_examples(B * STEPS)]
        args = hf_poprisk.PopRiskTrainingArguments(output_dir, **options)
        return hf_poprisk.PopRiskTrainer(tiny_model(), args=args, train_dataset=rows)
    if kind == "DPO-audit":
        options |= {"poprisk_label_noise": "audit", "max_steps": 2 * STEPS}  # two epochs
    name = kind.split("-")[0]
    args = getattr(hf_poprisk, f"PopRisk{name}Config")(output_dir, bf16=False, **options)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
    return getattr(hf_poprisk, f"PopRisk{name}Trainer")(
        model_dir,
        args=args,
        train_dataset=sequences(B * STEPS) if kind == "SFT" else preferences(B * STEPS),
        peft_config=lora if kind == "DPO-LoRA" else None,
    )


def run(kind: str, model_dir: str, world: int, micro_batch: int) -> dict[str, Any]:
    """b, G and Q of every window as the gate reads them, and the weights at the end."""
    windows: list[Any] = []
    original = ExampleWindow.reduce

    def reduce(window: ExampleWindow) -> Any:
        b, sq_sums = original(window)
        windows.append((b, {window.names[p]: (p.grad.clone(), q.clone()) for p, q in sq_sums.items()}))
        return b, sq_sums

    trainer = build(kind, model_dir, world, micro_batch)
    if kind.endswith("one-by-one"):
        trainer._prepare_layers = lambda optimizer: trainer._say_one_by_one("the test that wants it")
    ExampleWindow.reduce = reduce
    try:
        trainer.train()
    finally:
        ExampleWindow.reduce = original
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    found = {"windows": windows, "weights": weights, "logs": trainer.state.log_history}
    if trainer._label_noise is not None:
        table = trainer._label_noise.table
        found["table"] = {"visits": table.visits, **table.columns}
        found["fits"] = trainer._label_noise.fits
    return found


def away_from_stock(name: str, folder: Path) -> tuple[float, bool]:
    """How far the gradient of a step is from the stock trainer's on as many processes; on which path."""
    ours, trainer = first_step(LOSSES[name], folder, 2, 2)
    stock, _ = first_step(LOSSES[name], folder, 2, 2, "adamw_torch")
    return gap(ours, stock), trainer._layers is not None


def uneven_packing(model_dir: str, folder: Path) -> tuple[float, list[float]]:
    """One rank's first packed row holds one sequence and the other's several: away from stock, and b."""
    lengths = [60] * 5 + [8, 7, 9, 8, 7, 9, 8] * 7
    rows = [[(7 * i + k) % 200 + 3 for k in range(n)] for i, n in enumerate(lengths)]
    data, found, counts = Dataset.from_dict({"input_ids": rows}), [], []
    for optim in ("poprisk_adamw", "adamw_torch"):
        grab = FirstGradient()
        args = hf_poprisk.PopRiskSFTConfig(
            str(folder), packing=True, max_length=60, bf16=False, use_cpu=True, report_to="none", optim=optim,
            per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=2, max_grad_norm=0.0,
            save_strategy="no", disable_tqdm=True, logging_steps=1, learning_rate=0.0,
        )  # fmt: skip
        trainer = hf_poprisk.PopRiskSFTTrainer(model_dir, args=args, train_dataset=data, callbacks=[grab])
        trainer.train()
        found.append(grab.gradient)
        examples = [e["poprisk/examples"] for e in trainer.state.log_history if "poprisk/examples" in e]
        counts = examples or counts
    return gap(*found), counts


def resumed_is_uninterrupted(kind: str, model_dir: str, folder: Path, world: int) -> dict[str, bool]:
    """Three steps against two, a new trainer, and the third; every rank compares."""
    changes = {
        "output_dir": str(folder / f"resume-{kind}"),
        "save_strategy": "steps",
        "save_steps": 1,
        "train_sampling_strategy": "random",
        "lr_scheduler_type": "linear",
    }
    seen = []
    for resume in (None, f"{changes['output_dir']}/checkpoint-2"):
        trainer = build(kind, model_dir, world, 4, **changes)
        trainer.train(resume_from_checkpoint=resume)
        state = trainer.optimizer.state_dict()["state"]
        moments = {(i, n): torch.as_tensor(value) for i, e in state.items() for n, value in e.items()}
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        seen.append((weights, moments, trainer.state.log_history[:STEPS]))
    clocked = ("num_tokens", "total_flos")
    histories = [[{k: v for k, v in e.items() if k not in clocked} for e in logs] for _, _, logs in seen]
    same = {
        part: all(torch.equal(value, seen[1][k][key]) for key, value in seen[0][k].items())
        for k, part in enumerate(("weights", "moments"))
    }
    return {**same, "history": histories[0] == histories[1], "steps": len(histories[0]) == STEPS}


class Branches(nn.Module):
    """``right`` is used by the examples that ask for it only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.left, self.right = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

    def forward(self, x: torch.Tensor, use_right: bool) -> torch.Tensor:
        out = self.left(x)
        return (out + self.right(x) if use_right else out).square().mean()


def unused_on_one_rank(bucket_view: bool) -> float:
    """Largest difference from the textbook when only rank 1 uses a branch, over two windows.

    In the second window rank 0 has used the branch before, so a stale Q would show.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    model = Branches()
    ddp = DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=bucket_view)
    optimizer = PopRiskAdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    params, worst = dict(model.named_parameters()), 0.0
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(2 * world, 1, 4, dtype=torch.float64, generator=generator)
        # example i runs on rank i // 2; in the first step everybody uses the branch
        uses = [step == 0 or i // 2 == 1 for i in range(2 * world)]
        gradients = reference.per_example_gradients(
            params, lambda i, x=inputs, u=uses: model(x[i], u[i]) / (2 * world), range(2 * world)
        )
        before = {name: p.detach().clone() for name, p in params.items()}
        for micro in range(2):
            i = 2 * rank + micro
            with optimizer.example():
                if micro == 0:
                    with ddp.no_sync():
                        (ddp(inputs[i], uses[i]) / 2).backward()
                else:
                    (ddp(inputs[i], uses[i]) / 2).backward()
        optimizer.close_window()
        for name, p in params.items():
            q = reference.openness(torch.stack([h[name] for h in gradients]))
            worst = max(worst, (optimizer._openness[p] - q).abs().max().item())
        optimizer.step()
        optimizer.zero_grad()
        assert any((p != before[name]).any() for name, p in params.items())
    return worst


def nan_on_one_rank() -> dict[str, Any]:
    """A NaN on rank 0 only: every rank must leave the same step out."""
    rank = dist.get_rank()
    model = Branches()
    ddp = DistributedDataParallel(model)
    optimizer = PopRiskAdamW(model.parameters(), lr=1e-2)
    seen = []
    for step in range(3):
        for micro in range(2):
            x = torch.randn(1, 4, dtype=torch.float64) * (
                float("nan") if step == 1 and micro == 0 and rank == 0 else 1.0
            )
            with optimizer.example():
                ddp(x, True).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    ranks = [torch.empty_like(seen[-1]) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, seen[-1])
    return {
        "kept": torch.equal(seen[0], seen[1]),
        "went_on": not torch.equal(seen[1], seen[2]) and bool(seen[2].isfinite().all()),
        "ranks_agree": all(torch.equal(ranks[0], other) for other in ranks),
        "steps": sorted({int(state["step"]) for state in optimizer.state.values()}),
    }


def main() -> None:
    out, model_dir = sys.argv[1:]
    # the first config starts the process group; without it there is no world to ask for
    world = hf_poprisk.PopRiskTrainingArguments("unused", use_cpu=True).world_size
    saved: dict[str, Any] = {"world": world}
    saved["kinds"] = {(k, m): run(k, model_dir, world, m) for k in KINDS for m in MICRO_BATCHES[world]}
    if world > 1:
        saved["unused"] = {view: unused_on_one_rank(view) for view in (False, True)}
        saved["nan"] = nan_on_one_rank()
        saved["packing"] = uneven_packing(model_dir, Path(out).parent / "packing")
        saved["stock"] = {name: away_from_stock(name, Path(out).parent / "stock") for name in STOCK}
        folder = Path(out).parent
        saved["resume"] = {k: resumed_is_uninterrupted(k, model_dir, folder, world) for k in RESUMED}
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(saved, out)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
