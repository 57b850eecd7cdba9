"""Kill a training run again and again, resume it each time, and compare it with one that nobody killed.

    python scripts/soak_resume.py --kills 20 --seed 0 [--output_dir DIR] [--during_save]

Two processes train the same small model on the same random tokens, made on the spot. The first is left
alone. The second is killed with SIGKILL at moments that the seed draws, counted from its first step, and
started again, with ``resume_from_checkpoint=True`` if ``newest_checkpoint`` finds one. Before its first
checkpoint, where the first kill comes on purpose, there is nothing to resume from and it starts anew. The
second kill and about a third of the others (all of them with ``--during_save``) hit while a checkpoint is
being written. One line per kill says when it came, what it left, and from which step the run went on.

At the end the last checkpoints of both must agree bit for bit: weights, optimizer, scheduler, and the log of
every step. The exit code is 1 if they do not, or if a restart passed over a complete checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

STEPS, SAVE_STEPS, SAVED_FILES = 48, 3, 9  # files before the seal
SEAL = "trainer_state.json"


def train(folder: Path) -> int:
    """What the worker does: train to the end from the newest complete checkpoint, announcing every step."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments
    from hf_poprisk.checkpoints import newest_checkpoint

    class Announce(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            print(state.global_step, flush=True)

        on_step_end = on_train_begin

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
    trainer.train(resume_from_checkpoint=True if newest_checkpoint(folder) is not None else None)
    return 0


class Worker:
    """A process that trains in a folder; what it says on stderr is appended to a file beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, __file__, "--worker", folder]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with open(f"{folder}.log", "a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env)

    def step(self) -> int | None:
        """The next step that it announces: first where it starts from; None when it has ended."""
        return next((int(line) for line in self.process.stdout or () if line.strip().isdecimal()), None)

    def kill_in_step(self, steps: int, delay: float) -> str | None:
        """Kill it some seconds after so many steps; says when, or None if it had ended."""
        step = None
        while steps and step != STEPS - 1 and (step := self.step()) is not None:
            steps -= 1
        time.sleep(delay)
        self.process.kill()
        landed = self.process.wait() == -signal.SIGKILL
        return f"{1000 * delay:.0f} ms after {f'step {step}' if step else 'the start'}" if landed else None

    def kill_in_save(self, saves: int, files: int) -> str | None:
        """Kill it after so many saves, in the next one that has so many files; says when, or None."""
        since = time.time_ns()
        while (step := self.step()) is not None:
            checkpoint = self.folder / f"checkpoint-{step}"
            if step % SAVE_STEPS or (saves := saves - 1) >= 0:
                continue
            while not sealed(checkpoint) and self.process.poll() is None:
                if written(checkpoint, since) >= files:
                    self.process.send_signal(signal.SIGSTOP)  # it may have come to the end meanwhile
                    if count := written(checkpoint, since):
                        self.process.kill()
                        return f"while {checkpoint.name} was written, {count} files in"
                    self.process.send_signal(signal.SIGCONT)
        return None


def sealed(checkpoint: Path) -> bool:
    with suppress(OSError, ValueError):
        return bool(json.loads((checkpoint / SEAL).read_text()))
    return False


def written(checkpoint: Path, since: int) -> int:
    """How many files a checkpoint without a seal got since that moment."""
    with suppress(OSError):  # a temporary file that is gone, or a folder that is not there yet
        count = sum(entry.stat().st_mtime_ns > since for entry in os.scandir(checkpoint))
        return 0 if (checkpoint / SEAL).exists() else count
    return 0


def differences(one: Path, other: Path) -> list[str]:
    """The parts of two checkpoints that differ in any bit."""
    import torch
    from safetensors.torch import load_file

    def parts(folder: Path) -> dict[str, Any]:
        states = {n: torch.load(folder / f"{n}.pt", weights_only=True) for n in ("optimizer", "scheduler")}
        history = json.loads((folder / SEAL).read_text())["log_history"]
        return {"weights": load_file(folder / "model.safetensors"), **states, "log history": history}

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    those = parts(other)
    return [name for name, part in parts(one).items() if not same(part, those[name])]


def soak(folder: Path, kills: int, seed: int, during_save: bool) -> int:
    draw, landed, lost = random.Random(seed), 0, 0
    print(f"{STEPS} steps, a checkpoint every {SAVE_STEPS}; {kills} kills, seed {seed}", flush=True)
    whole, run = Worker(folder / "whole"), Worker(folder / "killed")
    run.step()
    for kill in range(1, kills + 1):
        if during_save or kill == 2 or kill > 2 and draw.random() < 0.3:
            moment = run.kill_in_save(1 if kill == 2 else draw.randrange(2), draw.randint(1, SAVED_FILES))
        else:
            moment = run.kill_in_step(0 if kill == 1 else draw.randrange(5), draw.uniform(0, 0.1))
        run.process.wait()
        if moment is None:
            print(f"kill {kill}: the run had ended", flush=True)
            break
        landed += 1
        left = {int(p.name.split("-")[1]): sealed(p) for p in run.folder.glob("checkpoint-*")}
        complete = max((step for step in left if left[step]), default=0)
        halves = ", ".join(f"checkpoint-{step}" for step in sorted(left) if not left[step])
        run = Worker(run.folder)
        resumed = run.step()
        lost += resumed != complete
        went_on = f"resumed from step {resumed}" if resumed else "no complete checkpoint, started anew"
        skipped = f"half-written {halves} skipped, " if halves else ""
        print(f"kill {kill}: {moment}; {skipped}{went_on}", flush=True)
    for worker in (run, whole):
        worker.process.communicate()
        if worker.process.returncode:
            print(f"FAILED: {Path(f'{worker.folder}.log').read_text()[-2000:]}")
            return 1
    found = differences(*(worker.folder / f"checkpoint-{STEPS}" for worker in (run, whole)))
    found += [f"{lost} restarts passed over a complete checkpoint"] if lost else []
    same = "weights, optimizer, scheduler and logs are the same, bit for bit"
    print(f"{landed} kills: " + (f"DIFFERENT: {', '.join(found)}" if found else same))
    return 1 if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, help="empty, and kept; the default is a temporary one")
    parser.add_argument("--during_save", action="store_true", help="every kill hits a save")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return train(args.worker)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output_dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"{folder} is not empty")
        return soak(folder, args.kills, args.seed, args.during_save)


if __name__ == "__main__":
    sys.exit(main())
