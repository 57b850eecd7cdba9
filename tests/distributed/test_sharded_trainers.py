"""Trainers under FSDP2: the windows of DDP, and checkpoints that are resumed bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sharded_trainers import RUNS, B, killed, main
from test_sharded import launch

from hf_poprisk.gate import openness


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


def assert_same_window(ours: Any, theirs: Any, tolerance: float = 2e-6) -> None:
    (b, entry), (expected, others) = ours, theirs
    assert b == expected == B and entry.keys() == others.keys()
    compared = opened = 0
    for name, (grad, sq_sum) in others.items():
        our_grad, our_sq = entry[name]
        assert (our_grad - grad).abs().max() <= tolerance * grad.abs().max(), name
        assert (our_sq - sq_sum).abs().max() <= tolerance * sq_sum.abs().max(), name
        far = (grad.square() - sq_sum).abs() > 10 * tolerance * sq_sum
        q = openness(our_grad, our_sq, B)
        assert torch.equal(q[far], openness(grad, sq_sum, B)[far]), name
        compared += int(far.sum())
        opened += int(q.sum())
    assert compared > 1000 and 0.05 < opened / compared < 0.95


@pytest.mark.parametrize("name", [name for name in RUNS if name != "bf16"])
def test_the_windows_are_those_of_ddp(name: str, found: dict[int, Any]) -> None:
    kind, micro, _ = RUNS[name]
    ours, theirs = found[2]["fsdp"][name], found[2]["ddp"][kind]
    assert ours["sharded"] and not theirs["sharded"]
    assert theirs["together"] and ours["together"] == (micro > 1)
    assert len(ours["windows"]) == len(theirs["windows"]) == 2
    assert_same_window(ours["windows"][0], theirs["windows"][0], 1e-5)
    moved = total = 0
    for key, weight in theirs["weights"].items():
        difference = (weight - ours["weights"][key]).abs()
        assert difference.max() < 2.5e-3, key  # a tie that rounding opens moves by a learning rate
        moved, total = moved + int((difference > 1e-5).sum()), total + weight.numel()
    assert moved <= 2e-3 * total
    for a, b in zip(ours["logs"], theirs["logs"], strict=True):
        assert a["poprisk/examples"] == b["poprisk/examples"] == B
        for entry in ("poprisk/fraction_open", "poprisk/margin", "grad_norm", "loss"):
            assert a[entry] == pytest.approx(b[entry], rel=1e-2), entry


@pytest.mark.parametrize("micro", [1, 3])
def test_a_model_that_transformers_shards_as_it_loads_it(micro: int, found: dict[int, Any]) -> None:
    ours = found[2]["loaded"][micro]
    assert ours["sharded"] and ours["together"] == (micro > 1)
    assert_same_window(ours["windows"][0], found[2]["ddp"]["Trainer"]["windows"][0], 1e-5)


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
    assert "would change poprisk_gate from 'hard' to 'soft'" in seen["refused"]


def test_the_weights_are_saved_whole_in_the_end(folder: Path, found: dict[int, Any]) -> None:
    weights = load_file(folder / "final/model.safetensors")
    assert weights.keys() == found[2]["saved"]["whole"]["weights"].keys()
    for name, weight in found[2]["saved"]["whole"]["weights"].items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize("world", [4, 1])
def test_other_ranks_go_on_from_a_sharded_checkpoint(world: int, found: dict[int, Any]) -> None:
    (resumed,) = found[world]["resumed"]["windows"]
    assert_same_window(resumed, found[2]["saved"]["whole"]["windows"][-1], 1e-5)


def test_ranks_need_not_have_as_many_examples_as_one_another(found: dict[int, Any]) -> None:
    steps = found[3]
    assert len(steps["packed"]) == 2 and min(steps["packed"]) > 6  # of six rows
    assert steps["filled up"] == [18, 9] and steps["left short"] == [9, 7] and steps["silent"] == [12, 12]
