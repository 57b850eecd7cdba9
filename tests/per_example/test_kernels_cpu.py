"""The CPU loops against plain PyTorch and against float64."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from models import tiny_model
from test_layers import N, assert_same, batch, captured, textbook

from hf_poprisk import PopRiskAdamW
from hf_poprisk.gate import openness
from hf_poprisk.per_example import capture as capturing
from hf_poprisk.per_example import kernels_cpu, products

pytest.importorskip("numba", reason="without numba the plain code runs, which the other files test")

SHAPES = [(0,), (), (1,), (7, 13), (3, 2048), (2049,)]


@pytest.fixture(params=[1, 3], ids=["one thread", "threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Torch's number of threads; small tensors are shared among them as well."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    monkeypatch.setattr(kernels_cpu, "_SHARE", 8)
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("first", "fresh"), [(True, True), (True, False), (False, False)])
def test_add_squares(shape: tuple[int, ...], first: bool, fresh: bool, threads: int) -> None:
    h = torch.randn(5, *shape)
    grad = torch.full(shape, torch.nan if first else 2.0)
    square = torch.full(shape, torch.nan if fresh else 3.0)
    kernels_cpu.add_squares(h, grad, square, first, fresh)
    expected_grad = h.double().sum(0) + (0 if first else 2)
    expected = h.double().square().sum(0) + (0 if fresh else 3)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(square.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_decide(gate: str, shape: tuple[int, ...], threads: int) -> None:
    h = torch.randn(4, *shape)
    grad, square = h.sum(0), h.square().sum(0)
    expected = openness(grad, square, 4, gate)
    exact = torch.stack([x.double().sum() for x in (expected, square > 0, grad.double().square(), square)])
    sums = kernels_cpu.decide(grad, square, 4, gate == "soft")
    if gate == "hard":
        assert torch.equal(square, expected)
    torch.testing.assert_close(square, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sums.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_decide_at_the_edges(gate: str) -> None:
    """Ties, zeros, rounding and what is not finite: as the plain code, bit for bit."""
    values = [0.0, -0.0, 1e-30, 1e-23, 0.1, 1 / 3, -1.0, 3.0, 1e15, 1e20, torch.inf, torch.nan]
    g = torch.tensor(values).repeat_interleave(6)
    tie = g * g
    up, down = (torch.nextafter(tie, torch.tensor(x)) for x in (torch.inf, 0.0))
    s = torch.stack([tie, up, down, tie / 2, torch.zeros(len(g)), torch.full_like(g, torch.nan)])
    for square in s:
        q = square.clone()
        sums = kernels_cpu.decide(g, q, 3, gate == "soft")
        assert torch.equal(q, openness(g, square, 3, gate))
        assert not sums.isfinite().all()  # which is how a step is found not to be
    random = torch.randn(100_000)
    q = random * random  # rounded products, which a fused multiply-subtract would tell from g·g
    kernels_cpu.decide(random, q, 3, gate == "soft")
    assert not q.any()


def test_sums_are_accurate() -> None:
    """Of 4 million numbers, where a running float32 sum is off by a part in a thousand."""
    grad, square = torch.full((1 << 22,), 0.1), torch.full((1 << 22,), 1e-3)
    exact = [grad.double().square().sum(), square.double().sum()]
    assert (np.cumsum(square.numpy())[-1] / exact[1] - 1).abs() > 1e-4  # the test can fail
    expected = torch.tensor([1 << 22, 1 << 22, *exact], dtype=torch.float32)
    torch.testing.assert_close(kernels_cpu.decide(grad, square, 4, False), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_adamw_is_the_textbook(shape: tuple[int, ...], threads: int) -> None:
    hyper = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    state = [torch.randn(shape), torch.randn(shape), torch.randn(shape), torch.rand(shape)]
    q = (2 * torch.rand(shape) - 0.5).clamp(0, 1)  # closed, open, and between
    w, g, m, v = (x.double() for x in state)
    expected = reference.adamw_step(w, g, q, m, v, 3, **hyper)
    kernels_cpu.gated_adamw(*state, q, 3.0, hyper)
    for got, exact in zip([state[0], *state[2:]], expected, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_steps_with_and_without_numba(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for on in (True, False):
        if not on:
            monkeypatch.setattr(kernels_cpu, "_loops", lambda: None)
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(50, 60))
        optimizer = PopRiskAdamW([param], lr=1e-2, weight_decay=0.1, gate=gate)
        for step in range(5):
            for _ in range(3):
                with optimizer.example():
                    noise = torch.randn(50, 60)
                    (param * (noise * torch.inf if step == 2 else noise)).sum().backward()
            version = param._version
            optimizer.step()
            assert (param._version > version) == (step != 2)  # autograd must notice what was written
            optimizer.zero_grad()
        logged = optimizer.statistics.pop("examples")
        assert logged["poprisk/steps_skipped"] == 1 and optimizer.state[param]["step"] == 4
        results.append((param.detach(), logged))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("pairs", [False, True])
def test_a_model_side_by_side(kind: str, pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers as large ones, in blocks of a few rows and three examples, over two micro-batches."""
    calls: list[tuple[Any, ...]] = []
    loop = kernels_cpu.add_squares
    watched = lambda *args, **options: (calls.append(args), loop(*args, **options))  # noqa: E731
    monkeypatch.setattr(kernels_cpu, "add_squares", watched)
    monkeypatch.setattr(capturing, "_SMALL", 0)
    monkeypatch.setattr(products, "_BLOCK", 1000)
    monkeypatch.setattr(products, "_SIDE_BY_SIDE", 3000)
    model, inputs = tiny_model(kind), batch(2 * N if pairs else N)
    got = captured(model, [(inputs, N)], pairs, N)
    assert_same(got, textbook(model, inputs, N, pairs), 1e-5)
    assert {len(h) for h, *_ in calls} >= {3, N % 3}
    model.zero_grad()
    twice = captured(model, [(inputs, N), (inputs, N)], pairs, 2 * N)  # of half the loss each
    assert_same(twice, {name: (g.double(), q.double() / 2) for name, (g, q) in got.items()}, 1e-5)


def test_what_is_left_to_plain_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_cpu.usable(torch.zeros(2, 3), torch.zeros(()))
    assert not kernels_cpu.usable(torch.zeros(2, 3).T)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert not kernels_cpu.usable(torch.zeros(2), torch.zeros(2, dtype=dtype))
    assert not kernels_cpu.usable(torch.zeros(2, device="meta"))
    kernels_cpu._loops.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)  # not installed
    try:
        assert not kernels_cpu.usable(torch.zeros(2))
    finally:
        kernels_cpu._loops.cache_clear()


def test_a_package_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    """Neither it nor the user's cache folder: compiled anew in every process. (A file where the folders
    should be stops even root.)"""
    package = Path(kernels_cpu.__file__)
    copy = tmp_path / "loops.py"
    copy.write_text(package.read_text())
    (tmp_path / "__pycache__").write_text("")
    code = "import loops, torch; x = torch.ones(3); print(loops.decide(x, x / 2, 2, False).tolist())"
    env = {"PYTHONPATH": str(tmp_path), "HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/x",
           "PYTHONDONTWRITEBYTECODE": "1", "PATH": ""}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[3.0, 3.0, 3.0, 1.5]", done.stderr[-1000:]


def test_a_forked_process_has_threads_of_its_own() -> None:
    code = """
import os, torch
from hf_poprisk.per_example import kernels_cpu
kernels_cpu._SHARE = 1
torch.set_num_threads(2)
run = lambda: kernels_cpu.decide(torch.ones(9), torch.full((9,), 0.5), 2, False)[0].item()
run()
child = os.fork()
if child == 0:
    os._exit(run() != 9)
print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0", done.stderr[-1000:]
