"""Trainers under FSDP2: the windows of DDP, and checkpoints that are resumed bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sharded_trainers import RUNS, B, killed, main
from test_sharded import assert_same_run, assert_same_window, launch


@pytest.fixture(scope="module")
def folder(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks leave what they saw; four of them, and one, go on from the checkpoint of two."""
    folder = tmp_path_factory.mktemp("trainers")
    launch(killed, 2, folder, llama_dir, ends=-9)
    for world in (2, 4, 1):
        launch(main, world, folder, llama_dir)
    launch(main, 3, folder, llama_dir, ends=1)  # with a fault of one rank, for which the others do not wait
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, Any]:
    """World size → what rank 0 saw."""
    return {n: torch.load(folder / f"trainers-{n}-0.pt", weights_only=False) for n in (1, 2, 3, 4)}


@pytest.mark.parametrize("name", [name for name in RUNS if name != "bf16"])
def test_the_windows_are_those_of_ddp(name: str, found: dict[int, Any]) -> None:
    kind, micro, _ = RUNS[name]
    ours, theirs = found[2]["fsdp"][name], found[2]["ddp"][kind]
    assert ours["sharded"] and not theirs["sharded"]
    assert theirs["together"] and ours["together"] == (micro > 1)
    assert_same_run(ours, theirs, B)


@pytest.mark.parametrize("micro", [1, 3])
def test_a_model_that_transformers_shards_as_it_loads_it(micro: int, found: dict[int, Any]) -> None:
    ours = found[2]["loaded"][micro]
    assert ours["sharded"] and ours["together"] == (micro > 1)
    assert_same_window(ours["windows"][0], found[2]["ddp"]["Trainer"]["windows"][0], B)


def test_bfloat16_is_summed_in_float32(found: dict[int, Any]) -> None:
    """accelerate's own policy sums bfloat16; G would be coarse, and a gate decided by its rounding."""
    _, entry = found[2]["fsdp"]["bf16"]["windows"][0]
    coarse = [grad for grad, _ in entry.values() if torch.equal(grad, grad.bfloat16().float()) and grad.any()]
    assert not coarse and all(grad.dtype == torch.float32 for grad, _ in entry.values())


@pytest.mark.parametrize("which", ["resumed", "gathered"])
def test_a_resumed_run_is_the_undisturbed_one(which: str, found: dict[int, Any]) -> None:
    """One that was killed; one whose checkpoints are whole."""
    seen = found[2]["saved"]
    (resumed,), last = seen[which]["windows"], seen["whole"]["windows"][-1]
    assert resumed[1].keys() == last[1].keys() and not any("norm" in name for name in last[1])
    for name, pair in last[1].items():
        assert all(map(torch.equal, resumed[1][name], pair)), name
    for name, weight in seen["whole"]["weights"].items():
        assert torch.equal(weight, seen[which]["weights"][name]), name


def test_a_sharded_checkpoint_has_its_record(found: dict[int, Any]) -> None:
    seen = found[2]["saved"]
    assert {"poprisk_config.json", "poprisk_statistics.json", "trainer_state.json"} <= set(seen["files"])
    assert seen["record"]["steps"] == 2 and seen["record"]["exclude"] == ["norm"]


@pytest.mark.parametrize("saved", ["final", "loaded/checkpoint-2"])
def test_the_weights_are_saved_whole(saved: str, folder: Path, found: dict[int, Any]) -> None:
    weights = load_file(folder / saved / "model.safetensors")
    run = found[2]["saved"]["whole"] if saved == "final" else found[2]["loaded"][3]
    assert weights.keys() == run["weights"].keys()
    for name, weight in run["weights"].items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize("world", [4, 1])
def test_other_ranks_go_on_from_a_sharded_checkpoint(world: int, found: dict[int, Any]) -> None:
    (resumed,) = found[world]["resumed"]["windows"]
    assert_same_window(resumed, found[2]["saved"]["whole"]["windows"][-1], B)


def test_ranks_need_not_have_as_many_examples_as_one_another(found: dict[int, Any]) -> None:
    steps = found[3]
    assert len(steps["packed"]) == 2 and min(steps["packed"]) > 6  # of six rows
    assert steps["filled up"] == [18, 9] and steps["left short"] == [9, 7] and steps["silent"] == [12, 12]
