"""What each rank of ``test_layout.py`` does: all trainers over the same examples, and DDP's corner cases.

Imported once, before the ranks are forked from it. Rank 0 saves what it saw. Not a test module.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import reference
import test_online_trainers as online
import test_preference_trainers as preference
import torch
import torch.distributed as dist
from fully_sharded import join
from leave_one_out.helpers import Classifier, examples, planted
from losses import KINDS as LOSSES
from losses import SEQ2SEQ_DATA, FirstGradient, first_step, gap
from models import layout, preferences, rows, sequences, some_bases, trainer_of, trl_trainer_of
from sharded_trainers import LORA, PACKED, packed
from test_checkpoints import assert_same
from test_stock_gradient_trl import LastTokens, behind_the_mixins
from test_trainer import Record
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Seq2SeqTrainingArguments

import hf_poprisk
from hf_poprisk import PopRiskAdamW
from hf_poprisk.eigen import MeasureBases

B, STEPS = 16, 3  # of a run that is resumed, or that judges labels in between
KINDS = ("Trainer", "DPO", "SFT", "Reward", "DPO-LoRA", "DPO-one-by-one", "classes-weight", "DPO-weight")
KINDS += ("DPO-column", "SFT-column", "DPO-gate-in-basis")
STOCK = (
    *("token mean: mt5", "ctc sum: hubert", "class weights: vit", "class weights: bert", "penalty: vit"),
    *("experts: mixtral", "contrastive: bert", "adapter: adalora", "adapter: prompt"),
)
JUDGED = {"poprisk_label_noise": "weight"}  # of an odd number
OPTIONS: dict[str, dict[str, Any]] = {
    "classes-weight": JUDGED,
    "DPO-weight": JUDGED,
    # two steps are an epoch, the third has weights
    "DPO-later": {**JUDGED, "poprisk_judge_after_epochs": 1, "max_steps": STEPS},
    "DPO-LoRA": {"peft_config": LORA},
    "DPO-gate-in-basis": {"poprisk_basis": "eigen"},
    "DPO-eigen": {"poprisk_gate": "none", "poprisk_basis": "eigen"},
    "SFT-column": {"poprisk_weight_column": "w"},
    # then DDP looks for unused parameters, and hands the outputs on through a node of its own
    "DPO-column": {"poprisk_weight_column": "w", "gradient_checkpointing": False},
}
RESUMED = ("Trainer", "DPO", "DPO-LoRA", "DPO-eigen", "DPO-later")
BESIDE = ("KTO", "ORPO", "CPO", "TPO", "GRPO", "RLOO", "Seq2Seq")
LAYOUTS = [(1, 16), (2, 4)]  # processes, examples per backward; compared with (1, 1)
CASES = [(kind, *layout) for kind in KINDS for layout in LAYOUTS] + [("Trainer", 2, 1)]


def build(kind: str, model_dir: str, world: int, micro_batch: int, **changes: Any) -> Any:
    """A trainer whose step t sees examples 16 t … 16 t + 15 in any layout."""
    torch.manual_seed(0)  # of an adapter
    folder, what = changes.pop("output_dir", "unused"), kind.split("-")[0]
    per_rank = B // world * (2 if kind == "DPO-later" else 1)
    options = {**layout(micro_batch, per_rank), "max_steps": 2, **OPTIONS.get(kind, {}), **changes}
    if what == "classes":
        return trainer_of(folder, examples(B * STEPS + 13, wrong=0.2), Classifier(), **options)
    data = {"Trainer": rows, "SFT": sequences}.get(what, preferences)(B * STEPS)
    if "poprisk_label_noise" in options:
        data, _ = planted(4 * B) if kind == "DPO-later" else planted()
    if "poprisk_weight_column" in options:
        data = data.add_column("w", [i % 7 / 3 for i in range(len(data))])
    if what == "Trainer":
        return trainer_of(folder, data, **options)
    return trl_trainer_of(what, model_dir, folder, data, **options)


def run(kind: str, model_dir: str, world: int, micro_batch: int) -> dict[str, Any]:
    """b, G and Q of every window as the gate reads them, and the weights at the end."""
    trainer = build(kind, model_dir, world, micro_batch)
    if kind.endswith("one-by-one"):
        trainer._prepare_layers = lambda optimizer: trainer._say_one_by_one("the test that wants it")
    with pytest.MonkeyPatch.context() as patch:
        windows = Record(patch).windows
        if kind == "DPO-gate-in-basis":  # measured ones may differ where gradients are zero
            bases = some_bases(trainer.model)
            patch.setattr(MeasureBases, "_measure", lambda self, optimizer: optimizer.set_bases(bases))
        trainer.train()
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    found = {"windows": windows, "weights": weights, "logs": trainer.state.log_history}
    if kind == "DPO-eigen":  # a basis of each rank
        basis = next(right for _, right in trainer._poprisk_optimizer().bases.values())
        found["basis"] = trainer.accelerator.gather(basis[None])
    if trainer._label_noise is not None:
        table = trainer._label_noise.table
        found["table"] = {name: getattr(table, name) for name in ("ids", "judged", "log_odds", "weight")}
        found["fit"] = trainer._label_noise.fit
    return found


def away_from_stock(name: str, folder: Path) -> tuple[float, bool]:
    """How far the gradient of a step is from the stock trainer's on as many processes; on which path."""
    ours, trainer = first_step(LOSSES[name], folder, 2, 2)
    stock, _ = first_step(LOSSES[name], folder, 2, 2, "adamw_torch")
    return gap(ours, stock), trainer._layers is not None


def away_without_gate(make: Callable[..., Any]) -> tuple[float, Any]:
    """How far the gradient of a step without the gate is from the one with it, and the trainer with it."""
    found = []
    for optim in ("adamw_torch", "poprisk_adamw"):
        grab = FirstGradient()
        trainer = make(optim=optim, max_grad_norm=0.0, callbacks=[grab])
        trainer.train()
        found.append(grab.gradient)
    return gap(*found), trainer


def uneven_packing(model_dir: str, folder: Path) -> tuple[float, list[float]]:
    """One rank's first packed row holds one sequence and the other's several: away from stock, and b."""
    options = {**layout(1, 2), **PACKED, "max_steps": 2, "learning_rate": 0.0}
    away, trainer = away_without_gate(partial(trl_trainer_of, "SFT", model_dir, folder, packed(), **options))
    return away, [e["poprisk/examples"] for e in trainer.state.log_history if "poprisk/examples" in e]


def beside_stock(kind: str, model_dir: str, folder: Path) -> dict[str, float]:
    """A step on all ranks, beside the stock trainer's and a loop over the parts of the stock loss."""
    data, model, options = preference.DATA.get(kind, preferences)(8), model_dir, layout(2, 4)
    ours = tuple(getattr(hf_poprisk, f"PopRisk{kind}{what}", None) for what in ("Trainer", "Config"))
    stock = {**preference.STOCK, **online.STOCK, "Seq2Seq": (LastTokens, Seq2SeqTrainingArguments)}[kind]
    if kind == "Seq2Seq":
        ours, model = behind_the_mixins(*stock), LOSSES["token mean: bart"].model()
        data = [{**row, "labels": row["input_ids"].roll(1)} for row in SEQ2SEQ_DATA]
    elif kind in online.STOCK:
        options = {**online.RUN, "reward_funcs": online.reward}
    elif kind == "KTO":  # with a KL term that is not zero
        options |= {"ref_model": preference.options_of("KTO", {}, False)["ref_model"]}
    options |= {"max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.0, "bf16": False}
    with pytest.MonkeyPatch.context() as patch:
        windows = Record(patch).windows
        trainer_of(folder, data, model, ours, **options).train()
    (b, window), grab = windows[0], FirstGradient()
    trainer = trainer_of(folder, data, model, stock, optim="adamw_torch", callbacks=[grab], **options)
    trainer.train()
    if kind in online.STOCK:
        batches = trainer._buffered_inputs
        owners = online.by_prompt(batches)
    else:
        batches = [trainer._prepare_inputs(x) for x in islice(trainer.get_train_dataloader(), 2)]
        rows_of_one = {"KTO": 1, "Seq2Seq": 1, "TPO": 3}.get(kind, 2)
        owners = [(torch.arange(2) + 2 * k).repeat(rows_of_one) for k in range(2)]
    parts = reference.parts_of_the_loss(trainer, batches, owners, 1.0 if kind == "GRPO" else 0.5)
    world, far, loop = dist.get_world_size(), 0.0, {}
    largest = max(float(q.max()) for _, q in window.values())  # rounding is all there is to some
    for name, (_, q) in window.items():
        loop[name], squares = reference.grad_and_square_sums(parts, name)
        for x in (loop[name], squares):
            dist.all_reduce(x)
        far = max(far, float((q - squares / world**2).abs().max() / (q.max() + 1e-6 * largest)))
    gradient = {name: g for name, (g, _) in window.items()}
    loop = {name: g / world for name, g in loop.items()}
    return {"b": b, "stock": gap(gradient, grab.gradient), "loop": gap(gradient, loop), "squares": far}


def resumed_is_uninterrupted(kind: str, model_dir: str, folder: Path, world: int) -> bool:
    """Three steps against two, a new trainer, and the third; every rank compares."""
    changes = {
        "output_dir": str(folder / f"resume-{kind}"),
        "save_strategy": "steps",
        "save_steps": 1,
        "train_sampling_strategy": "random",
        "lr_scheduler_type": "linear",
        "max_steps": STEPS,
    }
    one, other = (build(kind, model_dir, world, 4, **changes) for _ in range(2))
    one.train()
    other.train(resume_from_checkpoint=f"{changes['output_dir']}/checkpoint-2")
    same: list[Any] = [None] * world
    with suppress(AssertionError):
        assert_same(one, other)
        same[dist.get_rank()] = other.state.global_step == STEPS
    dist.all_gather_object(same, same[dist.get_rank()])
    return all(same)


class Branches(nn.Module):
    """``right`` is used by the examples that ask for it only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.left, self.right = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

    def forward(self, x: torch.Tensor, use_right: bool) -> torch.Tensor:
        out = self.left(x)
        return (out + self.right(x) if use_right else out).square().mean()


def branches(bucket_view: bool) -> dict[str, Any]:
    """Five steps, in four of which only rank 1 uses a branch; rank 0 has a NaN in the fourth of them.

    In the second rank 0 has used the branch before, so a stale Q would show.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    model = Branches()
    ddp = DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=bucket_view)
    optimizer = PopRiskAdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    params, worst, seen = dict(model.named_parameters()), 0.0, []
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(2 * world, 1, 4, dtype=torch.float64, generator=generator)
        # example i runs on rank i // 2
        uses = [step == 0 or i // 2 == 1 for i in range(2 * world)]
        gradients = reference.per_example_gradients(
            params, lambda i, x=inputs, u=uses: model(x[i], u[i]) / (2 * world), range(2 * world)
        )
        for micro in range(2):
            i = 2 * rank + micro
            with optimizer.example(), ddp.no_sync() if micro == 0 else nullcontext():
                (ddp(inputs[i] * (float("nan") if (step, i) == (3, 0) else 1.0), uses[i]) / 2).backward()
        optimizer.close_window()
        for name, p in params.items() if step != 3 else ():
            q = reference.openness(torch.stack([h[name] for h in gradients]))
            worst = max(worst, (optimizer._openness[p] - q).abs().max().item())
        optimizer.step()
        optimizer.zero_grad()
        seen.append(torch.cat([p.detach().flatten() for p in params.values()]))
    ranks = [torch.empty_like(seen[-1]) for _ in range(world)]
    dist.all_gather(ranks, seen[-1])
    return {
        "worst": worst,
        "moved": [not torch.equal(*pair) for pair in pairwise(seen)],
        "ranks agree": all(torch.equal(seen[-1], other) for other in ranks),
        "steps": {int(state["step"]) for state in optimizer.state.values()},
    }


def alone(model_dir: Path) -> dict[str, Any]:
    """In one process."""
    model = str(model_dir)
    kinds = [(kind, 1) for kind in KINDS] + [(kind, n) for kind, ranks, n in CASES if ranks == 1]
    return {
        "kinds": {(kind, n): run(kind, model, 1, n) for kind, n in kinds},
        **{name: run(f"DPO-{name}", model, 1, 4) for name in ("later", "eigen")},
    }


def main(rank: int, world: int, port: int, folder: Path, model_dir: Path) -> None:
    """In a process of its own."""
    os.chdir(folder)
    join(rank, world, port)
    model, kinds = str(model_dir), [(kind, n) for kind, ranks, n in CASES if ranks == world]
    saved: dict[str, Any] = {"kinds": {(kind, n): run(kind, model, world, n) for kind, n in kinds}}
    saved |= {name: run(f"DPO-{name}", model, world, 4) for name in ("later", "eigen")}
    saved["branches"] = [branches(view) for view in (False, True)]
    saved["beside"] = {kind: beside_stock(kind, model, folder / "beside") for kind in BESIDE}
    saved["packing"] = uneven_packing(model, folder / "packing")
    saved["column"], _ = away_without_gate(partial(build, "DPO-column", model, world, 4, max_steps=1))
    saved["stock"] = {name: away_from_stock(name, folder / "stock") for name in STOCK}
    saved["resume"] = {kind: resumed_is_uninterrupted(kind, model, folder, world) for kind in RESUMED}
    if rank == 0:
        torch.save(saved, folder / "two.pt")
    dist.barrier()
    dist.destroy_process_group()
