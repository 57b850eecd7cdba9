"""The same examples over any layout, processes × accumulation × micro-batch: the same G, Q, gate, weights."""

from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sharded import assert_same_run, codes, start
from torch import nn
from worker import BESIDE, CASES, STEPS, B, alone, main

from hf_poprisk.gate import openness
from hf_poprisk.per_example import ranks
from hf_poprisk.per_example import window as windows

GATED = [case for case in CASES if "-weight" not in case[0]]


@pytest.fixture(scope="module")
def saved(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Number of processes → what rank 0 saw."""
    folder = tmp_path_factory.mktemp("layout")
    started = start(main, 2, folder, llama_dir)
    with chdir(folder):
        found = alone(llama_dir)
    assert codes(started) == [0, 0]
    return {1: found, 2: torch.load(folder / "two.pt", weights_only=False)}


def first_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the tensor's largest value."""
    return ((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize(("kind", "world", "micro_batch"), GATED)
def test_a_run_does_not_depend_on_the_layout(
    kind: str, world: int, micro_batch: int, saved: dict[int, Any]
) -> None:
    one, two = saved[1]["kinds"][kind, 1], saved[world]["kinds"][kind, micro_batch]
    assert_same_run(two, one, B)


@pytest.mark.parametrize("kind", ["DPO", "SFT"])
def test_a_column_of_weights_is_used_on_two_processes(kind: str, saved: dict[int, Any]) -> None:
    """As on one, above, and as ``test_sample_weights.py`` compares with the textbook."""
    (_, plain), *_ = saved[2]["kinds"][kind, 4]["windows"]
    (_, weighted), *_ = saved[2]["kinds"][f"{kind}-column", 4]["windows"]
    assert max(first_difference(grad, weighted[name][0]) for name, (grad, _) in plain.items()) > 0.1
    assert saved[2]["column"] < 5e-5  # without the gate


@pytest.mark.parametrize("kind", BESIDE)
def test_other_trainers_are_the_stock_ones_and_a_loop_over_single_examples(
    kind: str, saved: dict[int, Any]
) -> None:
    """Over ranks: a step of eight examples, or prompts; losses that ranks compute together."""
    found = saved[2]["beside"][kind]
    assert found["b"] == 8 and found["stock"] < 1e-5
    assert found["loop"] < 1e-5 and found["squares"] < 1e-5


def test_a_branch_or_a_nan_of_one_rank(saved: dict[int, Any]) -> None:
    """The textbook's gate; a step that all leave out, and then they go on."""
    for found in saved[2]["branches"]:
        assert found["worst"] == 0.0 and found["ranks agree"] and found["steps"] == {4}
        assert found["moved"] == [True, True, False, True]


@pytest.mark.parametrize("kind", ["Trainer", "DPO", "DPO-LoRA", "DPO-eigen", "DPO-later"])
def test_two_processes_resume_to_the_uninterrupted_run(kind: str, saved: dict[int, Any]) -> None:
    assert saved[2]["resume"][kind]


def assert_same_column(one: torch.Tensor, two: torch.Tensor, rtol: float = 0.05, atol: float = 0.0) -> None:
    assert one.std() > 0.01
    torch.testing.assert_close(two, one, rtol=rtol, atol=atol or 0.05 * float(one.std()))


@pytest.mark.parametrize(("kind", "world", "micro_batch"), [c for c in CASES if "-weight" in c[0]])
def test_labels_are_judged_and_weighted_alike(
    kind: str, world: int, micro_batch: int, saved: dict[int, Any]
) -> None:
    """Of an odd number, which two processes share with one of them twice."""
    one, two = saved[1]["kinds"][kind, 1], saved[world]["kinds"][kind, micro_batch]
    classes, count = kind == "classes-weight", len(one["table"]["ids"])
    assert count == (B * STEPS + 13 if classes else 61)
    assert two["table"]["ids"].tolist() == one["table"]["ids"].tolist()
    assert one["table"]["judged"].all() and two["table"]["judged"].all()
    for name in ("log_odds", "weight"):
        assert_same_column(one["table"][name], two["table"][name], *([0.1, 0.05] if classes else []))
    if classes:
        assert one["table"]["weight"].min() < 0.1
        assert one["fit"].rate == pytest.approx(two["fit"].rate, abs=0.005)
    for a, b in zip(one["logs"][:2], two["logs"][:2], strict=True):
        assert a["poprisk/weight_mean"] == pytest.approx(b["poprisk/weight_mean"], abs=0.02)


def test_two_processes_judge_after_an_epoch_as_one(saved: dict[int, Any]) -> None:
    one, two = (saved[world]["later"] for world in (1, 2))
    for name in ("log_odds", "weight"):
        assert_same_column(one["table"][name], two["table"][name])
    for logs in (one["logs"], two["logs"]):
        assert ["poprisk/weight_mean" in entry for entry in logs[:3]] == [False, True, True]


def test_two_processes_find_the_bases_of_one(saved: dict[int, Any]) -> None:
    one, two = saved[1]["eigen"], saved[2]["eigen"]
    (basis,), (first, second) = one["basis"], two["basis"]
    assert torch.equal(first, second)
    # the leading directions; those that no example has a part in are free
    assert (basis.T @ first).diagonal()[:4].abs().min() > 0.999
    for name, weight in one["weights"].items():
        # rounding counts where a gradient is not above Adam's ε; a step is 1e-3
        assert (weight - two["weights"][name]).abs().max() < 1e-4, name


class ThreeRanks:
    """Stands for ``torch.distributed`` on rank 0 of three, the others having seen other parameters."""

    is_available = is_initialized = staticmethod(lambda: True)
    get_world_size = staticmethod(lambda: 3)
    all_reduce = staticmethod(lambda tensor, group=None: None)  # the others add zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_on_three_ranks_opens_no_tie(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP divides by three, which rounds: an element that one example touched must stay closed."""
    p = nn.Parameter(torch.zeros(20_000, dtype=dtype))
    window = windows.ExampleWindow([p])
    h = torch.randn(20_000).to(dtype)
    with window.example():
        (p * h).sum().backward()
        p.grad = h / 3
    exact = (h.float().square() / 9).contiguous()
    for module in (ranks, windows):
        monkeypatch.setattr(module, "dist", ThreeRanks)
    _, sq_sums = window.reduce()
    assert openness(p.grad.float(), exact, 3).sum() > 1000  # what the slack is for
    assert openness(p.grad.float(), sq_sums[p], 3).sum() == 0


def test_the_gradient_is_the_stock_one_on_two_processes(saved: dict[int, Any]) -> None:
    """Token means, sums, class weights, penalties, experts, contrastive losses, adapters."""
    gaps = {name: gap for name, (gap, _) in saved[2]["stock"].items()}
    assert max(gaps.values()) < 5e-5, gaps
    assert {together for _, together in saved[2]["stock"].values()} == {False, True}


def test_ranks_may_differ_in_how_many_sequences_a_row_holds(saved: dict[int, Any]) -> None:
    """The self-check is one that all of them make, or none."""
    gap, counts = saved[2]["packing"]
    assert gap < 5e-5 and len(counts) == 2 and len(set(counts)) == 2
