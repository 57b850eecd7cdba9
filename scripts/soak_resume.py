"""Kill a training run again and again, resume it each time, and compare it with one that nobody killed.

    python scripts/soak_resume.py --kills 20 --seed 0 [--output_dir DIR]

Two processes train the same small model on the same random tokens. The first is left alone. The second is
killed with SIGKILL at moments that the seed draws and started again from the newest complete checkpoint;
before the first one, where the first kill comes on purpose, it starts anew. The second kill and about a third
of the others come while a checkpoint is being written. One line per kill says when it came, what it left, and
from which step the run went on.

At the end the last checkpoints of both must agree bit for bit: weights, optimizer, scheduler, and the log of
every step. The exit code is 1 if they do not, or if a restart passed over a complete checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments
from hf_poprisk.checkpoints import newest_checkpoint

STEPS, SAVE_STEPS = 48, 3


class Announce(TrainerCallback):
    """Prints the step that the run starts from, and each that it has made."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(state.global_step, flush=True)

    on_step_end = on_train_begin


def train(folder: Path) -> None:
    """What the worker does: train to the end from the newest complete checkpoint."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4}
    # with dropout, so that the state of the random numbers must come back as well
    config = LlamaConfig(vocab_size=2048, max_position_embeddings=64, attention_dropout=0.1, **sizes)
    layout = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "use_cpu": True}
    saving = {"save_steps": SAVE_STEPS, "save_total_limit": 2}
    quiet = {"logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    args = PopRiskTrainingArguments(str(folder), max_steps=STEPS, **layout, **saving, **quiet)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(2048, (100, 16))]
    model = LlamaForCausalLM(config)
    trainer = PopRiskTrainer(model, args=args, train_dataset=rows, callbacks=[Announce()])
    trainer.train(resume_from_checkpoint=newest_checkpoint(folder) is not None)


def start(folder: Path) -> subprocess.Popen[str]:
    """A process that trains in a folder; what it says on stderr is appended to a file beside it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--worker", folder]
    with open(f"{folder}.log", "a") as log:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env)


def next_step(run: subprocess.Popen[str]) -> int | None:
    """The next step that it announces: first where it starts from; None when it has ended."""
    return next((int(line) for line in run.stdout if line.strip().isdecimal()), None)


def kill(
    run: subprocess.Popen[str], folder: Path, steps: int, in_save: bool, draw: random.Random
) -> str | None:
    """Kill it after so many steps, or in the save that follows them; says when, or None if it had ended."""
    step = 0
    for _ in range(steps):
        step = next_step(run)
    while in_save and step and step % SAVE_STEPS:
        step = next_step(run)
    if step in (None, STEPS):
        return None
    if in_save:
        checkpoint, files = folder / f"checkpoint-{step}", draw.randint(1, 6)
        while run.poll() is None and len(list(checkpoint.glob("*"))) < files:
            pass
        moment = f"in the save of {checkpoint.name}"
    else:
        time.sleep(draw.uniform(0, 0.1))
        moment = f"after step {step}" if steps else "after the start"
    run.kill()
    run.wait()
    return moment


def sealed(checkpoint: Path) -> bool:
    """Whether the file that is written last is there."""
    with suppress(OSError, ValueError):
        return bool(json.loads((checkpoint / "trainer_state.json").read_text()))
    return False


def differences(one: Path, other: Path) -> list[str]:
    """The parts of two checkpoints that differ in any bit."""

    def parts(folder: Path) -> dict[str, Any]:
        states = {n: torch.load(folder / f"{n}.pt", weights_only=True) for n in ("optimizer", "scheduler")}
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return {"weights": load_file(folder / "model.safetensors"), **states, "log history": history}

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    those = parts(other)
    return [name for name, part in parts(one).items() if not same(part, those[name])]


def soak(folder: Path, kills: int, seed: int) -> int:
    draw, landed, lost = random.Random(seed), 0, 0
    print(f"{STEPS} steps, a checkpoint every {SAVE_STEPS}; {kills} kills, seed {seed}", flush=True)
    whole, killed = folder / "whole", folder / "killed"
    undisturbed, run = start(whole), start(killed)
    next_step(run)
    for n in range(1, kills + 1):
        in_save = n == 2 or n > 2 and draw.random() < 0.3
        moment = kill(run, killed, {1: 0, 2: 2 * SAVE_STEPS}.get(n, draw.randint(1, 5)), in_save, draw)
        if moment is None:
            break
        landed += 1
        left = {int(p.name.split("-")[1]): sealed(p) for p in killed.glob("checkpoint-*")}
        halves = "".join(f"half-written checkpoint-{step} skipped, " for step in left if not left[step])
        run = start(killed)
        resumed = next_step(run)
        lost += resumed != max((step for step in left if left[step]), default=0)
        print(f"kill {n}: {moment}; {halves}went on from step {resumed}", flush=True)
    for process, path in ((run, killed), (undisturbed, whole)):
        process.communicate()
        if process.returncode:
            print(f"FAILED: {Path(f'{path}.log').read_text()[-2000:]}")
            return 1
    found = differences(whole / f"checkpoint-{STEPS}", killed / f"checkpoint-{STEPS}")
    found += [f"{lost} restarts passed over a complete checkpoint"] if lost else []
    same = "weights, optimizer, scheduler and logs are the same, bit for bit"
    print(f"{landed} kills: " + (f"DIFFERENT: {', '.join(found)}" if found else same))
    return 1 if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, help="new, and kept; the default is a temporary one")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        train(args.worker)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output_dir or Path(temporary, "soak")
        folder.mkdir(parents=True)
        return soak(folder, args.kills, args.seed)


if __name__ == "__main__":
    sys.exit(main())
