"""What each rank of ``test_sharded_trainers.py`` does: trainers under FSDP2, beside the same under DDP.

Imported once, before the ranks are forked from it. Not a test module.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from fully_sharded import whole
from models import layout, preferences, rows, trainer_of, trl_trainer_of
from peft import LoraConfig
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_poprisk import load_record
from hf_poprisk.per_example.window import ExampleWindow

B, STEPS = 12, 3
# gathered state dicts, which accelerate makes for GPUs, cannot be saved on a CPU
WRAPPED = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": "SHARDED_STATE_DICT"}
FSDP = {"fsdp": True, "fsdp_config": WRAPPED}
SAVING = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear"}
# name → kind, examples in a backward, further options
RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "single": ("Trainer", 1, {}),
    "several": ("Trainer", 3, {"poprisk_exclude": ["norm"]}),
    "reduced each time": (
        "Trainer",
        3,
        {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}},
    ),
    "DPO": ("DPO", 1, {}),
    "DPO with LoRA": ("DPO-LoRA", 1, {}),
    "bf16": ("Trainer", 1, {"bf16": True}),
    "loaded by one rank": ("Trainer", 1, {}),
}


@contextmanager
def accelerate_shards() -> Iterator[None]:
    """accelerate has FSDP2 on GPUs only, and trains with DDP elsewhere; PyTorch's own runs here too."""
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AcceleratorState, "__init__", init)
        yield


def build(name: str, model_dir: Path, folder: Path, sharded: bool, **changes: Any) -> Any:
    """A trainer whose step t sees examples 12 t … 12 t + 11 in any layout."""
    kind, micro, options = copy.deepcopy(RUNS[name])  # transformers writes into them
    per_rank = B // dist.get_world_size()
    options = {**layout(micro, per_rank), "max_steps": STEPS, **options}
    if sharded:
        more = {"cpu_ram_efficient_loading": True} if name == "loaded by one rank" else {}
        options |= {**FSDP, "fsdp_config": {**WRAPPED, **more}}
    options |= changes
    if kind != "Trainer":
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
        options["peft_config"] = lora if kind == "DPO-LoRA" else None
        return trl_trainer_of("DPO", str(model_dir), folder, preferences(B * STEPS), **options)
    return trainer_of(folder, rows(B * STEPS), **options)


@contextmanager
def recorded() -> Iterator[list[tuple[int, dict[str, tuple[Tensor, Tensor]]]]]:
    """b, and G and Q of every parameter, whole, of the windows that end inside this block."""
    original, windows = ExampleWindow.reduce, []

    def reduce(window: ExampleWindow) -> Any:
        b, sq_sums = original(window)
        entry = {}
        for p, q in sq_sums.items():
            sharded = isinstance(p, DTensor)
            grad = p.grad.full_tensor() if sharded else p.grad.clone()
            entry[window.names[p]] = grad, whole(q, p) if sharded else q.clone()
        windows.append((b, entry))
        return b, sq_sums

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExampleWindow, "reduce", reduce)
        yield windows


def seen(trainer: Any, resume: str | None = None) -> dict[str, Any]:
    with recorded() as windows:
        trainer.train(resume_from_checkpoint=resume)
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return {
        "windows": windows,
        "weights": weights,
        "logs": trainer.state.log_history,
        "sharded": trainer._sharded,
        "together": trainer._layers is not None,
    }


def loaded_sharded(micro: int, model_dir: Path, folder: Path) -> dict[str, Any]:
    """The run "single", or "several" without exclusions, on a model that transformers itself shards."""
    config = DistributedConfig(fsdp_size=dist.get_world_size(), fsdp_mixed_precision=False)
    model = AutoModelForCausalLM.from_pretrained(model_dir, distributed_config=config)
    options = {**layout(micro, B // dist.get_world_size()), "max_steps": STEPS}
    return seen(trainer_of(folder, rows(B * STEPS), model, **options))


def saved_and_resumed(model_dir: Path, folder: Path) -> dict[str, Any]:
    """Three steps, and the third again from the second's checkpoint by a new trainer."""
    folder = folder / "saved"
    found = {"whole": seen(build("several", model_dir, folder, True, **SAVING))}
    dist.barrier()
    found["files"] = sorted(p.name for p in (folder / "checkpoint-2").iterdir())
    found["record"] = dict(load_record(folder / "checkpoint-2").config)
    again = build("several", model_dir, folder, True, **SAVING)
    found["resumed"] = seen(again, str(folder / "checkpoint-2"))
    other = build("several", model_dir, folder, True, **SAVING, poprisk_gate="soft")
    try:
        other.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    except ValueError as error:
        found["refused"] = str(error)
    return found


def main(rank: int, world: int, port: int, folder: Path, model_dir: Path) -> None:
    """In a process of its own."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found: dict[str, Any] = {}
    if world == 2:
        found["ddp"] = {name: seen(build(name, model_dir, folder, False)) for name in RUNS}
        found["loaded"] = {micro: loaded_sharded(micro, model_dir, folder) for micro in (1, 3)}
        with accelerate_shards():
            found["fsdp"] = {name: seen(build(name, model_dir, folder, True)) for name in RUNS}
            found["saved"] = saved_and_resumed(model_dir, folder)
    else:
        with accelerate_shards():
            trainer = build("single", model_dir, folder / "more", True, **SAVING, poprisk_exclude=["norm"])
            found["resumed"] = seen(trainer, str(folder / "saved/checkpoint-2"))
    torch.save(found, folder / f"trainers-{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
