"""Files beside the weights that somebody else wrote: one sentence, nothing is executed, nothing is lost."""

import json
import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fault_worker import assert_complete, build, examples, one_sentence

from hf_poprisk import load_record
from hf_poprisk.checkpoints import newest_checkpoint

INF = float("inf")


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
    """What stands in a file of the record: changed values, or bytes."""

    content: dict[str, Any] | bytes
    sentence: str
    file: str = "poprisk_config.json"
    parses: bool = True  # as JSON; if not, the checkpoint does not count as whole


STATISTICS = "poprisk_statistics.json"
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
    "nothing": Hostile(b"", "Expecting value", parses=False),
    "not UTF-8": Hostile('{"schema_version": 1}'.encode("utf-16"), "'utf-8' codec can't", parses=False),
    "nested without end": Hostile(b"[" * 100_000, "maximum recursion", parses=False),
    "later schema": Hostile({"schema_version": 2**62}, f"has schema version {2**62}, .*: update hf_poprisk"),
    "negative count": Hostile({"steps_skipped": -1}, "is damaged: steps_skipped is ", STATISTICS),
    "list of statistics": Hostile({"parameters": []}, "is damaged: parameters is ", STATISTICS),
    "no statistics": Hostile({"parameters": {"first.weight": {}}}, "is damaged: parameters is ", STATISTICS),
    "huge statistics": Hostile(
        {"interval": {"sums": None, "null": 10**400, "examples": 0, "steps": 0, "skipped": 0}},
        "is damaged: interval is ",
        STATISTICS,
    ),
}


def listing(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every file with its size and the time it was last written."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.glob("*/*")}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_record_is_one_sentence_and_changes_nothing(hostile: Hostile, run: Path) -> None:
    checkpoint = run / "checkpoint-3"
    path, content = checkpoint / hostile.file, hostile.content
    if isinstance(content, dict):
        text = json.dumps({**json.loads(path.read_text()), **content})
        content = text.replace(" Infinity", " 1e999").encode()  # which every parser reads as infinity
    path.write_bytes(content)
    with pytest.raises(ValueError, match=hostile.sentence) as error:
        load_record(checkpoint)
    assert str(checkpoint) in str(error.value) and hostile.file in one_sentence(error.value)

    files = listing(run)
    trainer = build(run, examples(16), max_steps=4)
    before = [p.clone() for p in trainer.model.parameters()]
    sentence = hostile.sentence if hostile.parses else r"poprisk_config\.json is cut off; take an older"
    with pytest.raises(ValueError, match=sentence) as error:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    one_sentence(error.value)
    assert all(map(torch.equal, trainer.model.parameters(), before))
    assert listing(run) == files
    if not hostile.parses:
        assert newest_checkpoint(run) == run / "checkpoint-2"


class Payload:
    """Pickled code: whoever unpickles it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zipped", "bare"])  # as torch.save does, or pickle
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_pickled_code_in_a_checkpoint_does_not_run(name: str, zipped: bool, run: Path) -> None:
    marker, checkpoint = run / "marker", run / "checkpoint-3"
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    if zipped:
        torch.save({"state": Payload(marker)}, checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps({"state": Payload(marker)}, protocol=2))
    with suppress(RuntimeError):  # a bare one runs, and then it is no file of torch's
        torch.load(checkpoint / name, weights_only=False)
    marker.rmdir()  # it was made: the payload works
    trainer = build(run, examples(16), max_steps=4)
    # a zipped one is whole, as far as anybody can tell without reading it
    refusal = r"Weights only load failed[\s\S]*mkdir" if zipped else f"{name} is cut off; take an older"
    with pytest.raises((pickle.UnpicklingError, ValueError), match=refusal):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    shutil.rmtree(checkpoint)
    trainer.train(resume_from_checkpoint=True)
    assert_complete(run, [1, 2, 3, 4])
    assert not marker.exists()
