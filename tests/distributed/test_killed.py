"""Ranks that are killed: what the other one says, and which checkpoints are left."""

import os
from pathlib import Path
from typing import Any

import pytest
from fault_worker import assert_complete, build, examples
from fully_sharded import at_call, die, join
from test_sharded import codes, start

DEATHS = [(where, victim) for where in ("window", "save") for victim in (0, 1)]  # of one rank of two


def main(rank: int, world: int, port: int, folder: Path, where: str, victim: int) -> None:
    """In a process of its own: the victim dies in the third step, or in its save."""
    os.dup2(os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    join(rank, world, port)
    trainer = build(folder, examples(64), max_steps=5)
    if rank == victim:
        at_call(
            *{"window": (10, trainer, "training_step"), "save": (3, trainer, "_save_rng_state")}[where], die
        )
    trainer.train()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, tuple[Path, list[int]]]:
    """Death → the folder of the run, and the exit codes of its ranks."""
    folders = {death: tmp_path_factory.mktemp("killed") for death in DEATHS}
    started = {death: start(main, 2, folder, *death) for death, folder in folders.items()}
    return {death: (folder, codes(started[death])) for death, folder in folders.items()}


@pytest.mark.parametrize(("where", "victim"), DEATHS)
def test_a_rank_that_is_killed(where: str, victim: int, ended: Any) -> None:
    run, found = ended[where, victim]
    assert (found[victim], found[1 - victim]) == (-9, 1)
    last = (run / f"{1 - victim}.err").read_text().splitlines()[-1]
    assert "reset by peer" in last or "closed by peer" in last
    if where == "save":
        assert f"CheckpointError: {run}/checkpoint-3 could not be written (" in last
        assert last.endswith(f"; {run}/checkpoint-2 is complete.")
        assert (run / "checkpoint-3").is_dir()
    assert_complete(run, [1, 2])
