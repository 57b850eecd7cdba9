"""A model whose examples can be faulty, its checkpoints, and the processes of ``test_killed.py``."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments, load_record
from hf_poprisk.checkpoints import CheckpointError, damage, newest_checkpoint

WIDTH = 1024  # so that the weights (36 kB) and the moments (73 kB) are the largest files of a checkpoint


class Fragile(nn.Module):
    """Squared error of two layers; an example's loss and its gradient are multiplied by its factors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)

    def forward(
        self, x: Tensor, labels: Tensor, loss_factor: Tensor, grad_factor: Tensor
    ) -> dict[str, Tensor]:
        """x, labels: [batch, 4]; the factors: [batch]."""
        hidden = self.first(x)
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * grad_factor[:, None])
        output = self.second(hidden)
        return {"loss": ((output - labels).square().mean(-1) * loss_factor).mean(), "logits": output}


def examples(count: int, faulty: int = -1, **factors: float) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = [{name: torch.randn(4, generator=generator) for name in ("x", "labels")} for _ in range(count)]
    for i, row in enumerate(rows):
        given = factors if i == faulty else {}
        row |= {name: torch.tensor(given.get(name, 1.0)) for name in ("loss_factor", "grad_factor")}
    return rows


def build(folder: str | Path, data: Any, **options: Any) -> PopRiskTrainer:
    """Steps of four examples, a checkpoint after each."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    args = PopRiskTrainingArguments(str(folder), **{**defaults, **options})
    return PopRiskTrainer(Fragile(), args=args, train_dataset=data)


def state_of(checkpoint: Path) -> list[Tensor]:
    """Weights, moments and step counts."""
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    entries = [torch.as_tensor(value) for entry in state.values() for value in entry.values()]
    return [*load_file(checkpoint / "model.safetensors").values(), *entries]


def assert_complete(output_dir: Path, steps: list[int]) -> None:
    """Just these checkpoints are whole, hold finite numbers and their record, and can be resumed from."""
    found = sorted(int(p.name.split("-")[1]) for p in output_dir.glob("checkpoint-*") if damage(p) is None)
    assert found == steps
    for step in steps:
        checkpoint = output_dir / f"checkpoint-{step}"
        assert all(x.isfinite().all() for x in state_of(checkpoint))
        assert load_record(checkpoint).config["steps"] == step
    assert newest_checkpoint(output_dir) == output_dir / f"checkpoint-{steps[-1]}"


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert text.endswith(".") and "\n" not in text and len(text) < 500
    return text


class FullDisk(TrainerCallback):
    """From a step on, no file can grow beyond so many bytes."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            limit(self.size)


def limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def child(
    folder: Path, name: str, environment: dict[str, str], function: Callable[..., None], *args: Any
) -> None:
    """In a new process: run the function in the folder, with its output in two files there."""
    os.chdir(folder)
    for stream, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{suffix}", os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*args)


def disk(folder: str) -> None:
    """The moments do not fit, which is caught; then the weights do not, which ends the process."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error of write(2) instead, as on a full disk
    first, second = (build(f"{folder}/{name}", examples(12)) for name in ("moments", "weights"))
    first.add_callback(FullDisk(2, 50_000))
    try:
        first.train()
    except CheckpointError as error:
        print(error, flush=True)
    limit(resource.RLIM_INFINITY)
    second.add_callback(FullDisk(2, 20_000))
    second.train()


def rank(folder: str, where: str, victim: int) -> None:
    """Refuse three examples for two ranks; then the victim dies in the third step or in its save."""
    try:
        build(folder, examples(3)).train()
    except ValueError as error:
        print(error, flush=True)
    trainer = build(folder, examples(64), max_steps=5)
    name, last = {"window": ("training_step", 10), "save": ("_save_rng_state", 3)}[where]
    original, calls = getattr(trainer, name), []

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if trainer.args.process_index == victim and len(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(trainer, name, count)
    trainer.train()
