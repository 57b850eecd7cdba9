"""The CPU loops against plain PyTorch and against float64."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_model
from test_layers import N, assert_same, batch, captured, textbook
from torch import Tensor

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


def group(**options: Any) -> dict[str, Any]:
    return {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, **options}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("first", "fresh"), [(True, True), (True, False), (False, False)])
def test_add_squares(shape: tuple[int, ...], first: bool, fresh: bool, threads: int) -> None:
    h = torch.randn(5, *shape)
    grad, square = (
        torch.full(shape, torch.nan if first else 2.0),
        torch.full(shape, torch.nan if fresh else 3.0),
    )
    kernels_cpu.add_squares(h, grad, square, first, fresh)
    exact = h.double()
    torch.testing.assert_close(grad.double(), exact.sum(0) + (0 if first else 2), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        square.double(), exact.square().sum(0) + (0 if fresh else 3), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("numel", [0, 1, 91, 2048, 5000])
def test_weigh(numel: int) -> None:
    h, precondition = torch.randn(5, numel), torch.rand(numel) * 10
    exact = h.double()
    expected = (exact * (exact * precondition).clamp(-2.5, 2.5)).sum(1)
    torch.testing.assert_close(
        kernels_cpu.weigh(h, precondition, 2.5).double(), expected, rtol=1e-5, atol=1e-3
    )
    if numel > 1:
        h[2, 1] = torch.nan
        assert kernels_cpu.weigh(h, precondition, 2.5).isnan().tolist() == [i == 2 for i in range(5)]


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
    grad = torch.full((1 << 22,), 0.1)
    square = torch.full_like(grad, 1e-3)
    expected = torch.stack([torch.tensor(float(1 << 22)), torch.tensor(float(1 << 22)),
                            grad.double().square().sum().float(), square.double().sum().float()])  # fmt: skip
    assert (np.cumsum(square.numpy())[-1] / expected[3] - 1).abs() > 1e-4  # the test can fail
    torch.testing.assert_close(kernels_cpu.decide(grad, square, 4, False), expected, rtol=1e-6, atol=0)


def adamw_state(shape: tuple[int, ...]) -> list[Tensor]:
    """param, grad, exp_avg, exp_avg_sq."""
    return [torch.randn(shape), torch.randn(shape), torch.randn(shape), torch.rand(shape)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_adamw_is_the_textbook(shape: tuple[int, ...], threads: int) -> None:
    state, q = adamw_state(shape), torch.rand(shape)
    w, g, m, v = (x.double() for x in state)
    kernels_cpu.gated_adamw(*state, q, 3.0, group())
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    decay = 1 - 1e-2 * 0.1
    w = w * decay - 1e-2 * q * (m / (1 - 0.9**3)) / ((v / (1 - 0.999**3)).sqrt() + 1e-8)
    for got, expected in zip([state[0], state[2], state[3]], [w, m, v], strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


def test_open_is_adamw_and_closed_is_decay() -> None:
    plain, step = adamw_state((9999,)), torch.tensor(5.0)
    gated = [x.clone() for x in plain]
    start = plain[0].clone()
    q = (torch.arange(9999) % 2).float()
    kernels_cpu.gated_adamw(*gated, q, 5.0, group())
    torch._fused_adamw_(
        *([x] for x in plain), [], [step], lr=1e-2, beta1=0.9, beta2=0.999, weight_decay=0.1, eps=1e-8,
        amsgrad=False, maximize=False,
    )  # fmt: skip
    for got, expected in zip(gated[2:], plain[2:], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gated[0][1::2], plain[0][1::2], rtol=1e-6, atol=1e-7)
    assert torch.equal(gated[0][::2], start[::2] * (1 - 1e-2 * 0.1))


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
    monkeypatch.setattr(
        kernels_cpu, "add_squares", lambda *args, **kw: (calls.append(args), loop(*args, **kw))
    )
    monkeypatch.setattr(capturing, "_SMALL", 0)
    monkeypatch.setattr(products, "_BLOCK", 1000)
    monkeypatch.setattr(products, "_SIDE_BY_SIDE", 3000)
    model, inputs = tiny_model(kind), batch(2 * N if pairs else N)
    got = captured(model, [(inputs, N)], pairs, N)
    assert_same(got, textbook(model, inputs, N, pairs), 1e-5)
    assert {len(h) for h, *_ in calls} >= {3, N % 3}
    one = {name: (2 * g, 2 * q) for name, (g, q) in got.items()}
    for p in model.parameters():
        p.grad = None
    twice = captured(model, [(inputs, N), (inputs, N)], pairs, 2 * N)
    assert_same(twice, {n: ((g / 2).double(), (q / 4).double()) for n, (g, q) in one.items()}, 1e-5)


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
