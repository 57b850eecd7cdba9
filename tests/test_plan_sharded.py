"""The plan of a sharded run: its arithmetic, and what it refuses."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from models import tiny_model

SCRIPT = Path(__file__).parents[1] / "scripts/plan_sharded.py"
PLAN = runpy.run_path(str(SCRIPT), run_name="plan")
Plan, OFFLINE = PLAN["Plan"], {**os.environ, "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize(
    ("backwards", "held", "gigabytes"), [(1, False, (35, 59)), (8, True, (201, 224)), (8, False, (283, 472))]
)
def test_traffic_of_seven_billion_on_eight_gpus(
    backwards: int, held: bool, gigabytes: tuple[int, int]
) -> None:
    plan = Plan(6.74e9, 6.74e9, 5e8, shards=8, gradient_bytes=2)
    sent = tuple(round(plan.traffic(backwards, held, gated) / 1e9) for gated in (False, True))
    assert sent == gigabytes


def test_what_the_gate_adds() -> None:
    """4 bytes per parameter: of a shard for good, and twice of a group while it is reduced."""
    plan = Plan(8e9, 8e9, 1e9, shards=8)
    assert plan.memory(False, True) - plan.memory(False, False) == 4 * 8e9 / 8 + 2 * 4 * 1e9
    assert plan.memory(True, True) - plan.memory(False, True) == 2 * 4 * 8e9
    assert plan.traffic(2, True, True) - plan.traffic(2, True, False) == 4 * 8e9 * 7 / 8
    replicas = Plan(8e9, 8e9, 1e9, shards=8, replicas=8)
    between = 2 * 7 / 8 * 8e9 / 8 * 4
    added = replicas.traffic(1, False, True) - replicas.traffic(1, False, False)
    assert added == 4 * 8e9 * 7 / 8 + between


def test_the_command(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, SCRIPT, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=OFFLINE)

    shown = run("--parameters", "6.74e9", "--gradient_bytes", "2", "--backwards", "1", "8")
    assert shown.returncode == 0 and "472" in shown.stdout and "6.74 billion" in shown.stdout
    tiny_model().config.save_pretrained(tmp_path / "model")  # without weights
    counted = run("--model", "model", "--backwards", "1")
    assert counted.returncode == 0 and "0.00 billion parameters" in counted.stdout
    for arguments, sentence in (
        (("--parameters", "7e9", "--replicas", "3"), "--replicas 3 does not divide --gpus 8."),
        (("--model", "some/model"), "the configuration of --model some/model is in no folder"),
    ):
        refused = run(*arguments)
        assert refused.returncode == 2 and sentence in refused.stderr and "Traceback" not in refused.stderr


def test_a_model_is_counted(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    every, largest = PLAN["count"](str(tmp_path))
    assert every == sum(p.numel() for p in model.parameters()) > largest > 0
