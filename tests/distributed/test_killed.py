"""Ranks that are killed: what the other one says, and which checkpoints are left."""

import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_worker import assert_complete, build, examples

DEATHS = [(where, victim) for where in ("window", "save") for victim in (0, 1)]  # of one rank of two


def rank(folder: Path, environment: dict[str, str], where: str, victim: int) -> None:
    """In a process of its own: the victim dies in the third step, or in its save."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    os.dup2(os.open(folder / f"{environment['RANK']}.err", os.O_WRONLY | os.O_CREAT), 2)
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


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, tuple[Path, list[int | None]]]:
    """Death → the folder of the run, and the exit codes of its ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.trainer"])  # seconds for each process otherwise
    started = {}
    for death in DEATHS:
        folder, processes = tmp_path_factory.mktemp("killed"), []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        for r in "01":
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
            environment |= {"RANK": r, "LOCAL_RANK": r}
            processes.append(context.Process(target=rank, args=(folder, environment, *death)))
            processes[-1].start()
        started[death] = folder, processes
    for _, processes in started.values():
        for process in processes:
            process.join(timeout=120)
            process.kill()  # a survivor must not wait for the dead: its exit code is then none of those below
            process.join()
    return {death: (folder, [p.exitcode for p in both]) for death, (folder, both) in started.items()}


@pytest.mark.parametrize(("where", "victim"), DEATHS)
def test_a_rank_that_is_killed(where: str, victim: int, ended: Any) -> None:
    run, codes = ended[where, victim]
    assert (codes[victim], codes[1 - victim]) == (-9, 1)
    last = (run / f"{1 - victim}.err").read_text().splitlines()[-1]
    assert "reset by peer" in last or "closed by peer" in last
    if where == "save":
        assert f"CheckpointError: {run}/checkpoint-3 could not be written (" in last
        assert last.endswith(f"; {run}/checkpoint-2 is complete.")
        assert (run / "checkpoint-3").is_dir()
    assert_complete(run, [1, 2])
