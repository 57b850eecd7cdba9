"""Trainers under FSDP2: the windows of DDP, and checkpoints that are resumed bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_trainers import RUNS, STEPS, B, main
from test_sharded import launch

from hf_poprisk.gate import openness


@pytest.fixture(scope="module")
def found(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """World size → what rank 0 saw; three ranks go on from the checkpoint of two."""
    folder = tmp_path_factory.mktemp("trainers")
    for world in (2, 3):
        launch("sharded_trainers", main, world, folder, llama_dir)
    return {world: torch.load(folder / f"trainers-{world}-0.pt", weights_only=False) for world in (2, 3)}


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
    ours, theirs = found[2]["fsdp"][name], found[2]["ddp"][name]
    assert ours["sharded"] and not theirs["sharded"]
    assert ours["together"] == theirs["together"] == (RUNS[name][1] > 1)
    assert len(ours["windows"]) == len(theirs["windows"]) == STEPS
    assert_same_window(ours["windows"][0], theirs["windows"][0], 1e-5)
    moved = total = 0
    for key, weight in theirs["weights"].items():
        difference = (weight - ours["weights"][key]).abs()
        assert difference.max() < 3.5e-3, key  # a tie that rounding opens moves by a learning rate
        moved, total = moved + int((difference > 1e-5).sum()), total + weight.numel()
    assert moved <= 2e-3 * total
    for a, b in zip(ours["logs"][:STEPS], theirs["logs"][:STEPS], strict=True):
        assert a["poprisk/examples"] == b["poprisk/examples"] == B
        for entry in ("poprisk/fraction_open", "poprisk/margin", "grad_norm", "loss"):
            assert a[entry] == pytest.approx(b[entry], rel=1e-2), entry


@pytest.mark.parametrize("micro", [1, 3])
def test_a_model_that_transformers_shards_as_it_loads_it(micro: int, found: dict[int, Any]) -> None:
    ours = found[2]["loaded"][micro]
    assert ours["sharded"] and ours["together"] == (micro > 1)
    assert_same_window(ours["windows"][0], found[2]["ddp"]["single"]["windows"][0], 1e-5)


def test_bfloat16_is_summed_in_float32(found: dict[int, Any]) -> None:
    """accelerate's own policy sums bfloat16; G would be coarse, and a gate decided by its rounding."""
    _, entry = found[2]["fsdp"]["bf16"]["windows"][0]
    coarse = [grad for grad, _ in entry.values() if torch.equal(grad, grad.bfloat16().float()) and grad.any()]
    assert not coarse and all(grad.dtype == torch.float32 for grad, _ in entry.values())


def test_a_resumed_run_is_the_uninterrupted_one(found: dict[int, Any]) -> None:
    seen = found[2]["saved"]
    (resumed,), last = seen["resumed"]["windows"], seen["whole"]["windows"][-1]
    for name, pair in last[1].items():
        assert all(map(torch.equal, resumed[1][name], pair)), name
    for name, weight in seen["whole"]["weights"].items():
        assert torch.equal(weight, seen["resumed"]["weights"][name]), name
    assert {"poprisk_config.json", "poprisk_statistics.json", "trainer_state.json"} <= set(seen["files"])
    assert seen["record"]["steps"] == 2 and seen["record"]["exclude"] == ["norm"]
    assert "would change poprisk_gate from 'hard' to 'soft'" in seen["refused"]


def test_more_ranks_go_on_from_a_sharded_checkpoint(found: dict[int, Any]) -> None:
    (resumed,) = found[3]["resumed"]["windows"]
    assert_same_window(resumed, found[2]["saved"]["whole"]["windows"][-1], 1e-5)
