"""``scripts/soak_resume.py`` with three kills, one of them inside a save; and what it would see."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import soak_resume


class Soak(NamedTuple):
    folder: Path
    code: int
    lines: list[str]


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> Soak:
    folder = tmp_path_factory.mktemp("soak") / "run"
    command = [
        sys.executable,
        soak_resume.__file__,
        "--kills",
        "3",
        "--seed",
        "0",
        "--output_dir",
        folder,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    logs = "".join(log.read_text()[-2000:] for log in folder.glob("*.log"))
    assert done.returncode in (0, 1) and not done.stderr, done.stdout + done.stderr + logs
    return Soak(folder, done.returncode, done.stdout.splitlines())


def test_three_kills_change_nothing(soak: Soak) -> None:
    started, first, second, third, verdict = soak.lines
    assert started == "48 steps, a checkpoint every 3; 3 kills, seed 0"
    half = r"(?:half-written checkpoint-(?P<half>\d+) skipped, )"
    anew = rf"kill 1: \d+ ms after the start; {half}?no complete checkpoint, started anew"
    assert re.fullmatch(anew, first)
    in_save = r"kill 2: while checkpoint-(\d+) was written, \d files in; "
    saving = re.fullmatch(rf"{in_save}{half}resumed from step (?P<step>\d+)", second)
    assert saving and saving[1] == saving["half"] and int(saving["step"]) == int(saving["half"]) - 3 >= 3
    resumed = re.fullmatch(rf"kill 3: .*; {half}?resumed from step (?P<step>\d+)", third)
    assert resumed and int(resumed["step"]) >= int(saving["step"])
    assert verdict == "3 kills: weights, optimizer, scheduler and logs are the same, bit for bit"
    assert soak.code == 0
    for run in ("whole", "killed"):
        assert {p.name for p in (soak.folder / run).iterdir()} == {"checkpoint-45", "checkpoint-48"}


def test_the_package_skipped_what_the_script_says(soak: Soak) -> None:
    log = (soak.folder / "killed.log").read_text()
    skipped = set(re.findall(r"half-written (checkpoint-\d+)", "\n".join(soak.lines)))
    assert skipped == set(re.findall(r"killed/(checkpoint-\d+) is skipped: ", log))
    assert "is skipped" not in (soak.folder / "whole.log").read_text()


def weight(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][0] = weights["model.norm.weight"][0].nextafter(torch.tensor(9.0))
    save_file(weights, checkpoint / "model.safetensors")


def moment(checkpoint: Path) -> None:
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    state["state"][3]["exp_avg"].view(-1)[5] += 1e-3
    torch.save(state, checkpoint / "optimizer.pt")


def log_entry(checkpoint: Path) -> None:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["log_history"][7]["poprisk/fraction_open"] += 1e-12
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("change", "found"),
    [(weight, ["weights"]), (moment, ["optimizer"]), (log_entry, ["log history"]), (lambda _: None, [])],
)
def test_one_changed_bit_is_seen(
    change: Callable[[Path], None], found: list[str], soak: Soak, tmp_path: Path
) -> None:
    whole = soak.folder / "whole/checkpoint-48"
    other = Path(shutil.copytree(soak.folder / "killed/checkpoint-48", tmp_path / "other"))
    change(other)
    assert soak_resume.differences(whole, other) == found
