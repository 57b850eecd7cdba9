"""What goes wrong in training, what its user sees, and what is left. Every row is made to happen below.

======================================  =======================================  ========================
fault                                   what is seen                             what is left
======================================  =======================================  ========================
NaN or infinite loss or gradient of an  "this optimizer step was left out" and   weights and moments of
example, in any layout                  ``poprisk/steps_skipped`` in the log     the step before
overflow under a loss scaler            no gate in the log of that step; the     the same
                                        scale is halved
an example that cannot be read          the data set's own exception             earlier checkpoints, for
                                                                                 the same trainer too
no room for the weights or the moments  CheckpointError: what was not written,   earlier checkpoints, and
                                        why, and which one is complete           a half that is skipped
output folder not writable              ValueError before anything is trained    the model as it was
output folder that turns into a file    CheckpointError: there is no complete    what somebody put there
                                        checkpoint
a rank killed inside a window           gloo's error on the other rank           earlier checkpoints
a rank killed in a save                 CheckpointError on the other rank        earlier checkpoints, and
                                                                                 a half that is skipped
examples that do not divide over ranks  ValueError on every rank                 ranks that can train on
                                                                                 other data
hostile ``poprisk_config.json``         one sentence of a ValueError             the model as it was,
                                                                                 every checkpoint
pickled code in a checkpoint            torch's refusal of the file              earlier checkpoints; the
                                                                                 code has not run
pickled code in a model's folder        transformers' refusal of the folder      the code has not run
======================================  =======================================  ========================

Elsewhere: a spoilt micro-batch of one example (``test_trainer.py``), a gradient that is not finite in a loop
of one's own (``test_optimizer.py``) and on one rank of two (``distributed/test_layout.py``), files that are
cut off (``test_checkpoints.py``), SIGKILL at any moment (``test_soak.py``), a gap in the data for every way
of training (``test_refusals.py``).
"""

import json
import logging
import multiprocessing
import os
import pickle
import shutil
import socket
import time
from contextlib import suppress
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fault_worker import Fragile, build, child, disk, examples, rank
from models import save_tiny_model, sequences
from safetensors.torch import load_file
from test_trainer import Scaler
from torch import Tensor
from torch.utils.data import Dataset

from hf_poprisk import PopRiskSFTConfig, PopRiskSFTTrainer, load_record
from hf_poprisk.checkpoints import CheckpointError, ResumeError, damage, newest_checkpoint

INF, NAN = float("inf"), float("nan")


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def moments(folder: Path) -> list[Tensor]:
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    return [torch.as_tensor(value) for entry in state.values() for value in entry.values()]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def finite(folder: Path) -> bool:
    return all(x.isfinite().all() for x in (*weights(folder).values(), *moments(folder)))


def assert_complete(output_dir: Path, steps: list[int]) -> None:
    """Just these checkpoints are whole, hold finite numbers and their record, and can be resumed from."""
    found = sorted(int(p.name.split("-")[1]) for p in output_dir.glob("checkpoint-*") if damage(p) is None)
    assert found == steps
    for step in steps:
        assert finite(output_dir / f"checkpoint-{step}")
        assert load_record(output_dir / f"checkpoint-{step}").config["steps"] == step
    assert newest_checkpoint(output_dir) == (output_dir / f"checkpoint-{steps[-1]}" if steps else None)


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert text.endswith(".") and "\n" not in text and len(text) < 500
    return text


# Numbers


LAYOUTS: dict[str, dict[str, Any]] = {
    "one by one": {},
    "batched": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
    "groups": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "poprisk_estimator": "group",
    },
    "ema": {"poprisk_estimator": "ema"},
}
NUMBERS: dict[str, dict[str, float]] = {
    "NaN loss": {"loss_factor": NAN},
    "infinite gradient": {"grad_factor": INF},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("factors", NUMBERS.values(), ids=NUMBERS)
def test_numbers_that_are_not_finite_leave_the_step_out(
    factors: dict[str, float], layout: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = examples(12, faulty=5, **factors)
    trainer = build(tmp_path, data, **layout)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    seen = [r.message for r in caplog.records if "left out" in r.message]
    assert seen == ["a gradient is not finite: this optimizer step was left out."]
    skipped = [entry.get("poprisk/steps_skipped") for entry in trainer.state.log_history[:3]]
    assert skipped == [None, 1.0, None]
    assert_complete(tmp_path, [1, 2, 3])
    first, second, third = (tmp_path / f"checkpoint-{step}" for step in (1, 2, 3))
    assert equal(weights(first), weights(second)) and not equal(weights(second), weights(third))
    assert all(map(torch.equal, moments(first), moments(second)))
    assert load_record(third).statistics["steps_skipped"] == 1
    # what was saved after the step that was left out is as good as any
    end = weights(third)
    build(tmp_path, data, **layout).train(resume_from_checkpoint=str(second))
    assert equal(end, weights(third))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_an_overflow_under_a_loss_scaler_leaves_the_step_out(layout: dict[str, Any], tmp_path: Path) -> None:
    data = examples(12, faulty=5, grad_factor=1e38)
    trainer = build(tmp_path, data, **layout)
    Scaler(trainer)
    scaler = trainer.accelerator.scaler
    try:
        trainer.train()
    finally:
        trainer.accelerator.state._mixed_precision = "no"  # the state is shared by all accelerators
    gated = ["poprisk/fraction_open" in entry for entry in trainer.state.log_history[:3]]
    assert gated == [True, False, True]
    assert scaler.get_scale() == 512.0
    assert_complete(tmp_path, [1, 2, 3])
    first, second, third = (tmp_path / f"checkpoint-{step}" for step in (1, 2, 3))
    assert equal(weights(first), weights(second)) and not equal(weights(second), weights(third))


# Data


class Broken(Dataset):
    """One row cannot be read until somebody repairs it."""

    def __init__(self, rows: list[dict[str, Tensor]], broken: int | None) -> None:
        self.rows, self.broken = rows, broken

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index == self.broken:
            raise LookupError(f"row {index} cannot be read")
        return self.rows[index]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_an_example_that_cannot_be_read(layout: dict[str, Any], tmp_path: Path) -> None:
    undisturbed = build(tmp_path / "undisturbed", examples(16), max_steps=4, **layout)
    undisturbed.train()
    data = Broken(examples(16), broken=10)  # in the middle of the third step
    trainer = build(tmp_path / "run", data, max_steps=4, **layout)
    with pytest.raises(LookupError, match="^row 10 cannot be read$"):
        trainer.train()
    # accelerate reads one batch ahead, which is a whole step where nothing is accumulated
    assert_complete(tmp_path / "run", [1] if layout.get("gradient_accumulation_steps") == 1 else [1, 2])
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    data.broken = None
    trainer.train(resume_from_checkpoint=True)  # with half a window behind it
    assert_complete(tmp_path / "run", [1, 2, 3, 4])
    end, expected = (tmp_path / name / "checkpoint-4" for name in ("run", "undisturbed"))
    assert equal(weights(end), weights(expected))
    assert all(map(torch.equal, moments(end), moments(expected)))


# Disks


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/below", "/proc"])
def test_an_output_folder_that_cannot_be_written_to(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    model = Fragile()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"^output_dir=.* cannot be written to \(.*\): choose another"
    ) as error:
        build(tmp_path / place, examples(12))
    assert str(tmp_path / place) in one_sentence(error.value)
    trainer = build(tmp_path, examples(12))
    trainer.model, trainer.args.output_dir = model, str(tmp_path / place)
    with pytest.raises(ValueError, match="cannot be written to"):
        trainer.train()
    assert equal(model.state_dict(), before)
    assert (tmp_path / "file").read_text() == "not a folder"


def test_an_output_folder_that_turns_into_a_file(tmp_path: Path) -> None:
    trainer = build(tmp_path / "run", examples(12))
    shutil.rmtree(tmp_path / "run")
    checked = trainer.args.check_training

    def check_training() -> None:
        checked()
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").write_text("somebody's file")

    trainer.args.check_training = check_training
    with pytest.raises(
        CheckpointError, match="checkpoint-1 could not be written .*; there is no complete"
    ) as error:
        trainer.train()
    one_sentence(error.value)
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert (tmp_path / "run").read_text() == "somebody's file"


# Processes


class Ended(NamedTuple):
    code: int
    stdout: str
    stderr: str
    moment: float


DEATHS = [(where, victim) for where in ("window", "save") for victim in (0, 1)]  # of one rank of two


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Ended]]:
    """The folder that all processes wrote to, and how each of them ended."""
    folder = tmp_path_factory.mktemp("faults")
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
            environment = {**address, "WORLD_SIZE": 2, "RANK": r, "LOCAL_RANK": r}
            name = f"{where}{victim}-{r}"
            processes[name] = start(name, environment, rank, f"{where}{victim}", where, victim)
    moments: dict[int, float] = {}
    running = {process.sentinel for process in processes.values()}
    while running and (ready := connection.wait(running, timeout=120)):
        moments |= dict.fromkeys(ready, time.monotonic())
        running -= set(ready)
    found = {}
    for name, process in processes.items():
        process.kill()  # what hangs
        process.join()
        said = [(folder / f"{name}.{suffix}").read_text() for suffix in ("out", "err")]
        found[name] = Ended(process.exitcode, *said, moments.get(process.sentinel, INF))
    return folder, found


@pytest.mark.parametrize("lacking", ["moments", "weights"])
def test_no_room_for_a_checkpoint(lacking: str, launched: Any) -> None:
    folder, processes = launched
    process = processes["disk"]
    if lacking == "moments":  # torch does not pass on what the system said
        sentences = [line for line in process.stdout.splitlines() if "could not be written" in line]
        assert len(sentences) == 1
    else:
        assert process.code == 1
        name, _, sentence = process.stderr.splitlines()[-1].partition(": ")
        assert name == "hf_poprisk.checkpoints.CheckpointError"
        assert "File too large" in sentence
        sentences = [sentence]
    run = f"disk/{lacking}"
    assert sentences[0].startswith(f"{run}/checkpoint-2 could not be written (")
    assert sentences[0].endswith(f"); {run}/checkpoint-1 is complete.")
    assert_complete(folder / run, [1])
    assert (folder / run / "checkpoint-2").is_dir()
    # with room again, the run goes on from there
    build(folder / run, examples(12)).train(resume_from_checkpoint=True)
    assert_complete(folder / run, [1, 2, 3])


@pytest.mark.parametrize(("where", "victim"), DEATHS)
def test_a_rank_that_is_killed(where: str, victim: int, launched: Any) -> None:
    folder, processes = launched
    run = f"{where}{victim}"
    killed, survivor = (processes[f"{run}-{r}"] for r in (victim, 1 - victim))
    assert killed.code == -9
    assert survivor.code == 1 and survivor.moment - killed.moment < 60
    last = survivor.stderr.splitlines()[-1]
    assert "reset by peer" in last or "closed by peer" in last
    if where == "save":
        assert f"CheckpointError: {run}/checkpoint-3 could not be written (" in last
        assert last.endswith(f"; {run}/checkpoint-2 is complete.")
        assert (folder / run / "checkpoint-3").is_dir()
    assert_complete(folder / run, [1, 2])


@pytest.mark.parametrize("r", [0, 1])
def test_examples_that_do_not_divide_over_real_ranks(r: int, launched: Any) -> None:
    _, processes = launched
    for where, victim in DEATHS:
        said = processes[f"{where}{victim}-{r}"].stdout.splitlines()[0]
        assert said.startswith("3 training examples do not divide over 2 processes")
        assert said.endswith("set dataloader_drop_last=True or train on a multiple of 2.")


# Hostile files


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    build(folder, examples(16)).train()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


class Hostile(NamedTuple):
    """What stands in ``poprisk_config.json``: changed values, or bytes."""

    content: dict[str, Any] | bytes
    sentence: str
    parses: bool = True  # as JSON; if not, the checkpoint does not count as whole


HOSTILE = {
    "huge integer": Hostile({"units_per_step": 10**400}, "units_per_step is 1000"),
    "infinity": Hostile({"ema_alpha": INF}, "ema_alpha is Infinity"),
    "negative": Hostile({"warmup_steps": -1}, "warmup_steps is -1"),
    "null": Hostile({"gate": None}, "gate is null"),
    "number in a list": Hostile({"exclude": [1]}, r"exclude is \[1\]"),
    "true for a number": Hostile({"steps": True}, "steps is true"),
    "list for an object": Hostile({"layout": []}, r"layout is \[\]"),
    "lines in a value": Hostile({"gate": "hard\n\nrm -rf /"}, r'gate is "hard\\n\\nrm'),
    "path for a name": Hostile({"gate": "../secret.json"}, r'gate is "\.\./secret\.json"'),
    "no object": Hostile(b"[1]", "it holds no schema_version"),
    "nothing": Hostile(b"", "Expecting value", False),
    "not UTF-8": Hostile('{"schema_version": 1}'.encode("utf-16"), "'utf-8' codec can't decode", False),
    "nested without end": Hostile(b"[" * 100_000, "maximum recursion", False),
    "later schema": Hostile({"schema_version": 2**62}, f"has schema version {2**62}, .*: update hf_poprisk"),
}


def listing(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every file with its size and the time it was last written."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.glob("*/*")}


def infect(checkpoint: Path, hostile: Hostile) -> None:
    path = checkpoint / "poprisk_config.json"
    content = hostile.content
    if isinstance(content, dict):
        text = json.dumps({**json.loads(path.read_text()), **content})
        content = text.replace(" Infinity", " 1e999").encode()  # which every parser reads as infinity
    path.write_bytes(content)


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_record_is_one_sentence(hostile: Hostile, run: Path) -> None:
    checkpoint = run / "checkpoint-3"
    infect(checkpoint, hostile)
    with pytest.raises(ValueError, match=hostile.sentence) as error:
        load_record(checkpoint)
    assert str(checkpoint) in str(error.value) and "poprisk_config.json" in one_sentence(error.value)


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_resuming_from_a_hostile_record(hostile: Hostile, run: Path) -> None:
    infect(run / "checkpoint-3", hostile)
    files = listing(run)
    trainer = build(run, examples(16), max_steps=4)
    before = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    sentence = hostile.sentence if hostile.parses else r"poprisk_config\.json is cut off; take an older"
    with pytest.raises(ValueError, match=sentence) as error:
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    one_sentence(error.value)
    assert equal(trainer.model.state_dict(), before)
    assert listing(run) == files
    if not hostile.parses:
        assert newest_checkpoint(run) == run / "checkpoint-2"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"steps_skipped": -1}, "steps_skipped"),
        ({"parameters": []}, "parameters"),
        ({"parameters": {"first.weight": {}}}, "parameters"),
        ({"interval": {"sums": None, "null": 10**400, "examples": 0, "steps": 0, "skipped": 0}}, "interval"),
    ],
)
def test_hostile_statistics_are_one_sentence(changes: dict[str, Any], name: str, run: Path) -> None:
    path = run / "checkpoint-3/poprisk_statistics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=f"^poprisk_statistics.json of .* is damaged: {name} is ") as error:
        load_record(run / "checkpoint-3")
    one_sentence(error.value)


class Payload:
    """Pickled code: whoever unpickles it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def plant(path: Path, marker: Path, zipped: bool) -> None:
    """Write the payload as ``torch.save`` does, or as ``pickle`` does."""
    content = {"state": Payload(marker)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with suppress(RuntimeError):  # a bare one runs, and then it is no file of torch's
        torch.load(path, weights_only=False)
    marker.rmdir()  # it was made: the payload works


@pytest.mark.parametrize("zipped", [True, False], ids=["zipped", "bare"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_pickled_code_in_a_checkpoint_does_not_run(name: str, zipped: bool, run: Path) -> None:
    marker, checkpoint = run / "marker", run / "checkpoint-3"
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    plant(checkpoint / name, marker, zipped)
    trainer = build(run, examples(16), max_steps=4)
    if zipped:  # whole, as far as anybody can tell without reading it
        with pytest.raises(pickle.UnpicklingError, match=r"Weights only load failed[\s\S]*mkdir"):
            trainer.train(resume_from_checkpoint=True)
    else:
        with pytest.raises(
            ResumeError, match=f"checkpoint-3 cannot be resumed from: {name} is cut off; take an"
        ):
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert newest_checkpoint(run) == run / "checkpoint-2"
    assert not marker.exists()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    shutil.rmtree(checkpoint)
    trainer.train(resume_from_checkpoint=True)
    assert_complete(run, [1, 2, 3, 4])
    assert not marker.exists()


@pytest.mark.parametrize("name", ["training_args.bin", "pytorch_model.bin"])
def test_pickled_code_that_nobody_reads(name: str, run: Path) -> None:
    """Beside ``model.safetensors`` the other weights are not looked at, and the arguments never."""
    plant(run / "checkpoint-3" / name, run / "marker", True)
    build(run, examples(16), max_steps=4).train(resume_from_checkpoint=True)
    assert not (run / "marker").exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zipped", "bare"])
def test_pickled_code_in_a_model_does_not_run(zipped: bool, tmp_path: Path) -> None:
    model, marker = save_tiny_model(tmp_path / "model", "llama"), tmp_path / "marker"
    (model / "model.safetensors").unlink()
    plant(model / "pytorch_model.bin", marker, zipped)
    args = PopRiskSFTConfig(
        str(tmp_path / "run"), gradient_accumulation_steps=4, use_cpu=True, bf16=False, report_to="none"
    )
    with pytest.raises(Exception, match="(?s)Weights only load failed|pytorch_model.bin"):
        PopRiskSFTTrainer(str(model), args=args, train_dataset=sequences(4))
    assert not marker.exists()
