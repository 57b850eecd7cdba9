"""What each rank of ``test_sharded_trainers.py`` does: trainers under FSDP2, beside the same under DDP.

Imported once, before the ranks are forked from it. Not a test module.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from fully_sharded import at_call, die, join, whole
from models import layout, preferences, rows, sequences, trainer_of, trl_trainer_of
from peft import LoraConfig
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_poprisk import load_record
from hf_poprisk.per_example.window import ExampleWindow

B = 12
WRAPPED = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
SAVING = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear", "max_steps": 3}
EACH = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
PACKED = {"packing": True, "max_length": 60}
# name → kind, examples in a backward, further options; TRL's default is activation checkpointing
RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "single": ("Trainer", 1, {}),
    "several": ("Trainer", 3, {}),
    "reduced each time": ("Trainer", 3, {"accelerator_config": EACH}),
    "loaded by one rank": ("Trainer", 1, {"fsdp_config": {"cpu_ram_efficient_loading": True}}),
    "bf16": ("Trainer", 1, {"bf16": True}),
    "DPO": ("DPO", 3, {}),
    "DPO-LoRA": ("DPO-LoRA", 3, {}),
    # whose last pass, with the adapters off, leaves them frozen where FSDP2 gathered them
    "DPO-LoRA, evaluated": ("DPO-LoRA", 1, {"eval_strategy": "steps", "eval_steps": 1}),
    "SFT": ("SFT", 3, {}),
    "Reward": ("Reward", 3, {}),
}
DATA: dict[str, Callable[[int], Any]] = {"Trainer": rows, "SFT": sequences}


@contextmanager
def accelerate_shards() -> Iterator[None]:
    """accelerate has FSDP2 on GPUs only, and trains with DDP elsewhere; PyTorch's own runs here too."""
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PartialState._shared_state, "distributed_type", PartialState(cpu=True).distributed_type)
        patch.setattr(AcceleratorState, "__init__", init)
        yield


def build(name: str, model_dir: Path, folder: Path, sharded: bool, **changes: Any) -> Any:
    """A trainer whose step t sees examples 12 t … 12 t + 11 in any layout."""
    kind, micro, options = copy.deepcopy(RUNS.get(name, (name, 3, {})))  # transformers writes into them
    options = {**layout(micro, B // dist.get_world_size()), "max_steps": 2, **options, **changes}
    config = options.pop("fsdp_config", {})
    if sharded:
        options |= {"fsdp": True, "fsdp_config": {**WRAPPED, **config}}
    kind, _, adapter = kind.partition("-")
    make = DATA.get(kind, preferences)
    data = options.pop("data", None) or make(3 * B)
    if "eval_steps" in options:
        options["eval_dataset"] = make(4)
    if adapter:
        options["peft_config"] = LORA
    if kind == "Trainer":
        return trainer_of(folder, data, **options)
    return trl_trainer_of(kind, str(model_dir), folder, data, **options)


@contextmanager
def recorded() -> Iterator[list[tuple[int, dict[str, tuple[Tensor, Tensor]]]]]:
    """b, and G and Q of every parameter, whole, of the windows that end inside this block."""
    original, windows = ExampleWindow.reduce, []

    def reduce(window: ExampleWindow) -> Any:
        b, sq_sums = original(window)
        entry = {}
        for p, q in sq_sums.items():
            sharded = isinstance(p, DTensor)
            pair = (p.grad.full_tensor(), whole(q, p)) if sharded else (p.grad, q)
            entry[window.names[p]] = tuple(x.clone() for x in pair)  # one rank's whole tensor is its shard
        windows.append((b, entry))
        return b, sq_sums

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExampleWindow, "reduce", reduce)
        yield windows


def seen(trainer: Any, resume: Any = None) -> dict[str, Any]:
    with recorded() as windows:
        trainer.train(resume_from_checkpoint=resume)
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {"windows": windows, "weights": weights, "logs": logs, "sharded": trainer._sharded}
    return found | {"together": trainer._layers is not None}


def loaded_sharded(micro: int, model_dir: Path, folder: Path, **options: Any) -> Any:
    """A trainer of a model that transformers itself shards."""
    config = DistributedConfig(fsdp_size=dist.get_world_size(), fsdp_mixed_precision=False)
    model = AutoModelForCausalLM.from_pretrained(model_dir, distributed_config=config)
    options = {**layout(micro, B // dist.get_world_size()), "max_steps": 2, **options}
    return trainer_of(folder, rows(3 * B), model, **options)


def saving(model_dir: Path, folder: Path, state: str = "SHARDED_STATE_DICT", **changes: Any) -> Any:
    config = {"poprisk_exclude": ["norm"], "fsdp_config": {"state_dict_type": state}}
    return build("several", model_dir, folder, True, **SAVING, **config, **changes)


def killed(rank: int, world: int, port: int, folder: Path, model_dir: Path) -> None:
    """In a process of its own, which dies in the third of the run's windows, between its backwards."""
    join(rank, world, port)
    with accelerate_shards():
        trainer = saving(model_dir, folder / "killed")
        at_call(6, trainer, "training_step", die)
        trainer.train()


def saved_and_resumed(model_dir: Path, folder: Path) -> dict[str, Any]:
    """Three steps, and the third of the run that was killed by a new trainer; the weights in one file."""
    trainer = saving(model_dir, folder / "saved")
    found = {"whole": seen(trainer), "resumed": seen(saving(model_dir, folder / "killed"), True)}
    trainer.save_model(folder / "final")
    gathered = partial(saving, model_dir, folder / "gathered", state="FULL_STATE_DICT")
    gathered().train()
    found["gathered"] = seen(gathered(), str(folder / "gathered/checkpoint-2"))
    dist.barrier()
    found["files"] = sorted(p.name for p in (folder / "saved/checkpoint-2").iterdir())
    found["record"] = dict(load_record(folder / "saved/checkpoint-2").config)
    other = saving(model_dir, folder / "saved", poprisk_gate="soft")
    with pytest.raises(ValueError, match="would change poprisk_gate from 'hard' to 'soft'"):
        other.train(resume_from_checkpoint=str(folder / "saved/checkpoint-2"))
    return found


def packed() -> Dataset:
    """Sequences of which a row holds one, or several."""
    lengths = [60] * 5 + [8, 7, 9, 8, 7, 9, 8] * 7
    return Dataset.from_dict(
        {"input_ids": [[(7 * i + k) % 200 + 3 for k in range(n)] for i, n in enumerate(lengths)]}
    )


def uneven(model_dir: Path, folder: Path) -> dict[str, list[int]]:
    """b of each step where ranks do not have as many examples, or labels, as one another."""
    silent = rows(12)
    for i in (2, 3, 8, 9):  # one rank's
        silent[i]["labels"] = silent[i]["labels"].new_full((24,), -100)
    epoch = {"num_train_epochs": 1, "max_steps": -1}
    short = {**layout(3, 3), "accelerator_config": {"even_batches": False}}
    runs: dict[str, tuple[str, Any, dict[str, Any]]] = {
        "packed": ("SFT", packed(), {**layout(1, 2), **PACKED}),
        "filled up": ("Trainer", rows(20), {**layout(3, 6), **epoch}),
        "left short": ("Trainer", rows(16), {**short, **epoch}),
        "silent": ("Trainer", silent, layout(2, 4)),
    }
    found = {}
    for name, (kind, data, options) in runs.items():
        windows = seen(build(kind, model_dir, folder, True, data=data, **options))["windows"]
        found[name] = [b for b, _ in windows]
    return found


def fault(model_dir: Path, folder: Path) -> None:
    """One rank fails in the second backward of a step."""
    trainer = build("Trainer", model_dir, folder, True, **layout(1, 4))
    if dist.get_rank() == 1:
        at_call(2, trainer, "compute_loss", lambda: 1 / 0)
    trainer.train()


def main(rank: int, world: int, port: int, folder: Path, model_dir: Path) -> None:
    """In a process of its own."""
    join(rank, world, port)
    found: dict[str, Any] = {}
    if world == 2:
        kinds = dict.fromkeys(kind for kind, *_ in RUNS.values())
        found["ddp"] = {kind: seen(build(kind, model_dir, folder, False)) for kind in kinds}
        loaded = partial(loaded_sharded, model_dir=model_dir, folder=folder / "loaded", save_strategy="steps")
        found["loaded"] = {n: seen(loaded(n, save_only_model=True, save_steps=2)) for n in (1, 3)}
        with pytest.raises(ValueError, match="Pass `save_only_model=True` or `save_strategy='no'`"):
            loaded(1)
        with accelerate_shards():
            found["fsdp"] = {name: seen(build(name, model_dir, folder, True)) for name in RUNS}
            found["saved"] = saved_and_resumed(model_dir, folder)
    elif world == 3:
        with accelerate_shards():
            torch.save(uneven(model_dir, folder), folder / f"trainers-{world}-{rank}.pt")
            fault(model_dir, folder)
    else:
        with accelerate_shards():
            trainer = saving(model_dir, folder / f"on-{world}")
            found["resumed"] = seen(trainer, str(folder / "saved/checkpoint-2"))
    torch.save(found, folder / f"trainers-{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
