"""Disks that are full and ranks that are killed: who says what, and which checkpoints are left."""

import multiprocessing
import socket
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fault_worker import assert_complete, build, child, disk, examples, rank

DEATHS = [(where, victim) for where in ("window", "save") for victim in (0, 1)]  # of one rank of two


class Ended(NamedTuple):
    stdout: str
    stderr: str
    code: int


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Ended]]:
    """The folder that all processes wrote to, and how each of them ended."""
    folder = tmp_path_factory.mktemp("killed")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.trainer"])  # seconds for each process otherwise

    def start(name: str, environment: dict[str, Any], *task: Any) -> Any:
        environment = {key: str(value) for key, value in environment.items()}
        process = context.Process(target=child, args=(folder, name, environment, *task))
        process.start()
        return process

    processes = {"disk": start("disk", {}, disk, "disk")}
    for where, victim in DEATHS:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
        for r in (0, 1):
            run, environment = f"{where}{victim}", {**address, "WORLD_SIZE": 2, "RANK": r, "LOCAL_RANK": r}
            processes[f"{run}-{r}"] = start(f"{run}-{r}", environment, rank, run, where, victim)
    found = {}
    for name, process in processes.items():
        process.join(timeout=120)
        process.kill()  # a survivor must not wait for the dead: its exit code is then none of those below
        process.join()
        said = [(folder / f"{name}.{suffix}").read_text() for suffix in ("out", "err")]
        found[name] = Ended(*said, process.exitcode)
    return folder, found


@pytest.mark.parametrize("lacking", ["moments", "weights"])
def test_no_room_for_a_checkpoint(lacking: str, launched: tuple[Path, dict[str, Ended]]) -> None:
    folder, processes = launched
    process, run = processes["disk"], f"disk/{lacking}"
    if lacking == "moments":  # torch does not pass on what the system said
        [sentence] = [line for line in process.stdout.splitlines() if "could not be written" in line]
    else:
        name, _, sentence = process.stderr.splitlines()[-1].partition(": ")
        assert process.code == 1 and name == "hf_poprisk.checkpoints.CheckpointError"
        assert "File too large" in sentence
    assert sentence.startswith(f"{run}/checkpoint-2 could not be written (")
    assert sentence.endswith(f"); {run}/checkpoint-1 is complete.")
    assert_complete(folder / run, [1])
    assert (folder / run / "checkpoint-2").is_dir()
    # with room again, the run goes on from there
    build(folder / run, examples(12)).train(resume_from_checkpoint=True)
    assert_complete(folder / run, [1, 2, 3])


@pytest.mark.parametrize(("where", "victim"), DEATHS)
def test_a_rank_that_is_killed(where: str, victim: int, launched: tuple[Path, dict[str, Ended]]) -> None:
    folder, processes = launched
    run = f"{where}{victim}"
    killed, survivor = (processes[f"{run}-{r}"] for r in (victim, 1 - victim))
    assert (killed.code, survivor.code) == (-9, 1)
    last = survivor.stderr.splitlines()[-1]
    assert "reset by peer" in last or "closed by peer" in last
    if where == "save":
        assert f"CheckpointError: {run}/checkpoint-3 could not be written (" in last
        assert last.endswith(f"; {run}/checkpoint-2 is complete.")
        assert (folder / run / "checkpoint-3").is_dir()
    assert_complete(folder / run, [1, 2])
    for process in (killed, survivor):  # a data set that does not divide was refused on both, without harm
        said = process.stdout.splitlines()[0]
        assert said.startswith("3 training examples do not divide over 2 processes")
        assert said.endswith("set dataloader_drop_last=True or train on a multiple of 2.")
