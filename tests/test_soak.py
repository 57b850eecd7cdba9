"""``scripts/soak_resume.py`` with three kills, one of them inside a save; and what it would see."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import soak_resume


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the runs, and what the script said."""
    folder = tmp_path_factory.mktemp("soak") / "run"
    command = [sys.executable, soak_resume.__file__, "--kills", "3", "--output_dir", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    logs = "".join(log.read_text()[-2000:] for log in folder.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    return folder, done.stdout


def test_three_kills_change_nothing(soak: tuple[Path, str]) -> None:
    folder, said = soak
    _, first, second, third, verdict = said.splitlines()
    assert re.fullmatch(r"kill 1: after the start; (half.*, )?went on from step 0", first)
    half = r"kill 2: in the save of (checkpoint-\d+); half-written \1 skipped, went on from step (\d+)"
    step = int(re.fullmatch(half, second)[2])
    assert step >= 3 and int(re.fullmatch(r"kill 3: .*went on from step (\d+)", third)[1]) >= step
    assert verdict == "3 kills: weights, optimizer, scheduler and logs are the same, bit for bit"
    for run in ("whole", "killed"):
        assert {p.name for p in (folder / run).iterdir()} == {"checkpoint-45", "checkpoint-48"}
    # the package skipped what the script says
    log = (folder / "killed.log").read_text()
    skipped = set(re.findall(r"half-written (checkpoint-\d+)", said))
    assert skipped == set(re.findall(r"killed/(checkpoint-\d+) is skipped: ", log))


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
    ("change", "found"), [(weight, "weights"), (moment, "optimizer"), (log_entry, "log history")]
)
def test_one_changed_bit_is_seen(
    change: Callable[[Path], None], found: str, soak: tuple[Path, str], tmp_path: Path
) -> None:
    whole = soak[0] / "whole/checkpoint-48"
    other = Path(shutil.copytree(soak[0] / "killed/checkpoint-48", tmp_path / "other"))
    change(other)
    assert soak_resume.differences(whole, other) == [found]
