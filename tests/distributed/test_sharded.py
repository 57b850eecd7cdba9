"""FSDP2 over any layout: the G, Q and gate of single examples in one process, and what it costs."""

import multiprocessing.forkserver
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fully_sharded import LAYOUTS, B, main

from hf_poprisk.gate import openness

CASES = [(world, name) for world, layouts in LAYOUTS.items() for name in layouts]


def launch(main: Callable[..., None], world: int, *args: Any, ends: int = 0) -> None:
    """Run ``main(rank, world, port, *args)`` in as many processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sharded_trainers"])  # seconds for each process otherwise
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # or it would find nothing, and say nothing
        multiprocessing.forkserver.ensure_running()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=main, args=(r, world, port, *args)) for r in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=240)
        process.kill()  # one that waits for another, which failed
    assert [process.exitcode for process in ranks] == [ends] * world


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """World size → what rank 0 saw."""
    folder = tmp_path_factory.mktemp("sharded")
    for world in LAYOUTS:
        launch(main, world, folder)
    return {world: torch.load(folder / f"{world}-0.pt", weights_only=False) for world in LAYOUTS}


@pytest.mark.parametrize(("world", "name"), CASES)
def test_sums_and_gate_are_those_of_one_process(world: int, name: str, found: dict[int, Any]) -> None:
    layout, seen = LAYOUTS[world][name], found[world][name]
    low = layout.dtype == torch.bfloat16
    tolerance = 2e-2 if low else 1e-5  # of G, which is held in the parameters' dtype
    compared = opened = 0
    for entry in seen["windows"]:
        assert entry["b"] == B
        for key, (grad, sq_sum) in seen["expected"].items():
            ours, *squares = entry[key]
            assert (ours.double() - grad).abs().max() <= tolerance * grad.abs().max(), key
            if layout.ungated and "mlp" in key:
                assert not squares
                continue
            ours_sq, q = squares
            assert (ours_sq.double() - sq_sum).abs().max() <= 1e-5 * sq_sum.abs().max(), key
            # exact ties apart, and what G's own rounding decides
            far = (grad.square() - sq_sum).abs() > (3e-2 if low else 3e-5) * sq_sum
            assert torch.equal(q.double()[far], openness(grad, sq_sum, B)[far]), key
            if world & (world - 1) == 0:  # a power of two divides G exactly: one example opens nothing
                single = ours.float().square() == ours_sq
                assert not q[single].any()
            compared += int(far.sum())
            opened += int(q.sum())
    assert compared > 1000 and 0.05 < opened / compared < 0.95


@pytest.mark.parametrize(("world", "name"), CASES)
def test_a_window_leaves_nothing_to_the_next(world: int, name: str, found: dict[int, Any]) -> None:
    first, second = found[world][name]["windows"]
    for key, tensors in first.items():
        if key != "b":
            assert all(map(torch.equal, tensors, second[key])), key


@pytest.mark.parametrize(("world", "name"), CASES)
def test_the_step_is_adamws_where_the_gate_is_open(world: int, name: str, found: dict[int, Any]) -> None:
    seen = found[world][name]
    for key, (before, ours, stock) in seen["steps"].items():
        q = seen["windows"][1][key][2:]
        is_open = q[0].bool() if q else torch.ones_like(before, dtype=torch.bool)
        torch.testing.assert_close(ours[is_open], stock[is_open], rtol=1e-6, atol=1e-9)
        assert torch.equal(ours[~is_open], before[~is_open]), key
    torch.testing.assert_close(*seen["norm"])
    opened = sum(float(e[2].sum()) for k, e in seen["windows"][1].items() if k != "b" and len(e) > 1)
    live = sum(int((e[1] > 0).sum()) for k, e in seen["windows"][1].items() if k != "b" and len(e) > 1)
    assert seen["statistics"]["poprisk/fraction_open"] == pytest.approx(opened / live, rel=1e-6)
    assert seen["statistics"]["poprisk/examples"] == B


@pytest.mark.parametrize("name", ["several, each", "several, held"])
def test_the_gate_costs_one_reduction_of_the_squares(name: str, found: dict[int, Any]) -> None:
    sent, plain = found[2][name]["traffic"], found[2][name]["plain"]
    gradients = plain["reduce_scatter_single"]
    assert len(gradients) == (6 if name == "several, each" else 3)  # groups × reduced backwards
    assert sent["reduce_scatter_single"] == [n for n in gradients for _ in range(2)]  # each is followed
    assert sent["all_gather_single"] == plain["all_gather_single"]
    tensors = len(found[2][name]["expected"])
    # before the first step whether any gradient is finite; b; four sums of each tensor
    assert sent["all_reduce"] == [*plain["all_reduce"], 4, 8, 16 * tensors]


@pytest.mark.parametrize(("world", "name"), CASES)
def test_a_rank_holds_the_squares_of_its_shards(world: int, name: str, found: dict[int, Any]) -> None:
    seen, layout = found[world][name], LAYOUTS[world][name]
    assert seen["held"] == 4 * seen["held_numel"]
    if layout.sync != "last" and name != "unsharded":
        assert not any(seen["whole"])


def test_the_loop_of_the_guide_runs(found: dict[int, Any]) -> None:
    logs = found[2]["guide"]
    assert logs["poprisk/examples"] == 8 and 0.05 < logs["poprisk/fraction_open"] < 0.95


def test_a_nan_in_one_shard_is_a_step_left_out_on_all_ranks(found: dict[int, Any]) -> None:
    assert found[2]["nan"]["kept"] == [True, True]
    assert found[2]["nan"]["logs"]["poprisk/steps_skipped"] == 1


def test_what_the_gate_cannot_follow_is_refused(found: dict[int, Any]) -> None:
    coarse, offloaded, part = found[2]["refused"]
    assert (
        "would be summed over the ranks in torch.bfloat16" in coarse
        and "reduce_dtype=torch.float32" in coarse
    )
    assert "keeps in the memory of the CPU: leave offload_policy out" in offloaded
    assert part.startswith("lm_head.weight is not sharded by FSDP2 in this model")
