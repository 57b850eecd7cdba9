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


def start(main: Callable[..., None], world: int, *args: Any) -> list[Any]:
    """Processes of ``main(rank, world, port, *args)``, forked from one that has imported all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["worker", "one_rank"])
    with pytest.MonkeyPatch.context() as patch, socket.socket() as free:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # or it would find nothing, and say nothing
        multiprocessing.forkserver.ensure_running()
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=main, args=(r, world, port, *args)) for r in range(world)]
    for process in ranks:
        process.start()
    return ranks


def codes(ranks: list[Any]) -> list[int]:
    """The exit codes, when all have ended; one that waits for another is killed."""
    for process in ranks:
        process.join(timeout=240)
        process.kill()
        process.join()
    return [process.exitcode for process in ranks]


def launch(main: Callable[..., None], world: int, *args: Any, ends: int = 0) -> None:
    assert codes(start(main, world, *args)) == [ends] * world


def assert_same_window(ours: Any, theirs: Any, num_examples: int) -> None:
    """b, G, Q, and the gate but for exact ties."""
    (b, entry), (expected, others) = ours, theirs
    assert b == expected == num_examples and entry.keys() == others.keys()
    compared = opened = 0
    for name, (grad, sq_sum) in others.items():
        for x, y in zip(entry[name], (grad, sq_sum), strict=True):
            assert (x - y).abs().max() <= 1e-5 * y.abs().max(), name
        far = (grad.square() - sq_sum).abs() > 1e-4 * sq_sum
        q = openness(*entry[name], b)
        assert torch.equal(q[far], openness(grad, sq_sum, b)[far]), name
        compared += int(far.sum())
        opened += int(q.sum())
    assert compared > 1000 and 0.05 < opened / compared < 0.95


def assert_same_run(ours: Any, theirs: Any, num_examples: int) -> None:
    """Of two steps; later windows than the first start from weights that differ by rounding."""
    assert [b for b, _ in ours["windows"]] == [b for b, _ in theirs["windows"]] == [num_examples] * 2
    assert_same_window(ours["windows"][0], theirs["windows"][0], num_examples)
    moved = total = 0
    for name, weight in theirs["weights"].items():
        # a gate that flips at a tie moves a weight by one learning rate; nothing may move more
        difference = (weight - ours["weights"][name]).abs()
        assert difference.max() < 2.5e-3, name
        moved, total = moved + int((difference > 1e-5).sum()), total + weight.numel()
    assert moved <= 2e-3 * total
    for a, b in zip(ours["logs"][:2], theirs["logs"][:2], strict=True):
        assert a["poprisk/examples"] == b["poprisk/examples"] == num_examples
        for entry in ("poprisk/fraction_open", "poprisk/margin", "grad_norm", "loss"):
            assert a[entry] == pytest.approx(b[entry], rel=1e-2), entry


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
    seen, layout = found[world][name], LAYOUTS[world][name]
    assert seen["held"] == 4 * seen["held_numel"]  # of its shards
    assert layout.sync == "last" or layout.replicas == world or not any(seen["whole"])


@pytest.mark.parametrize(("world", "name"), CASES)
def test_the_step_is_adamws_where_the_gate_is_open(world: int, name: str, found: dict[int, Any]) -> None:
    seen, opened, live, norm = found[world][name], 0, 0, 0.0
    for key, (before, after) in seen["steps"].items():
        grad, *squares_and_q = seen["windows"][1][key]
        is_open = squares_and_q[1].bool() if squares_and_q else torch.ones_like(before, dtype=torch.bool)
        grad, rtol = grad.float(), 1e-2 if "bf16" in name else 1e-5
        stock = before - 1e-3 * grad / (grad.abs() + 1e-8)  # the first one: m is G, and v its square
        torch.testing.assert_close(after[is_open].float(), stock[is_open], rtol=rtol, atol=1e-8)
        assert torch.equal(after[~is_open], before[~is_open]), key
        norm += float(grad.double().square().sum())
        if squares_and_q:
            opened, live = opened + int(is_open.sum()), live + int((squares_and_q[0] > 0).sum())
    assert float(seen["norm"]) == pytest.approx(norm**0.5, rel=rtol)
    assert seen["statistics"]["poprisk/fraction_open"] == pytest.approx(opened / live, rel=1e-6)
    assert seen["statistics"]["poprisk/examples"] == B


@pytest.mark.parametrize("name", ["three", "three held"])
def test_the_gate_costs_one_reduction_of_the_squares(name: str, found: dict[int, Any]) -> None:
    sent, plain = found[2][name]["traffic"], found[2][name]["plain"]
    gradients = plain["reduce_scatter_single"]
    assert len(gradients) == (6 if name == "three" else 3)  # groups × reduced backwards
    assert sent["reduce_scatter_single"] == [n for n in gradients for _ in range(2)]  # each is followed
    assert sent["all_gather_single"] == plain["all_gather_single"]
    tensors = len(found[2][name]["expected"])
    # before the first step whether any gradient is finite; b; four sums of each tensor
    assert "all_reduce" not in plain and sent["all_reduce"] == [4, 8, 16 * tensors]


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
