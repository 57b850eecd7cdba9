"""The loops of a CPU and the kernels of a GPU, in Triton's interpreter, against plain PyTorch and float64."""

import os
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
from hf_poprisk.per_example import kernels_cpu, kernels_gpu, products

# where one of them is not installed, it is never used
NUMBA = pytest.mark.skipif(kernels_cpu._loops() is None, reason="numba is not installed")
TRITON = pytest.mark.skipif(kernels_gpu.triton is None, reason="there is no triton for this platform")
# in what Triton's interpreter masks out, which a GPU does not compute
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")
KERNELS = [pytest.param(kernels_cpu, marks=NUMBA), pytest.param(kernels_gpu, marks=TRITON)]
SHAPES = [(0,), (), (1,), (7, 13), (3, 2048), (2049,)]


@pytest.fixture(params=[1, 3], ids=["one thread", "threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Torch's number of threads; small tensors are shared among them as well."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    monkeypatch.setattr(kernels_cpu, "_SHARE", 8)
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gate", ["hard", "soft"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_decide(kernels: Any, gate: str, shape: tuple[int, ...], threads: int) -> None:
    h = torch.randn(4, *shape)
    h[1:] *= torch.rand(shape) < 0.5  # half is of one example only: G² = Q stays closed
    seen = torch.rand(shape) < 0.8
    grad = torch.where(seen, h.sum(0), 1.0)  # the rest is of a penalty on the weights: open, but not counted
    square = h.square().sum(0) * seen
    expected = openness(grad, square, 4, gate)
    exact = torch.stack([x.double().sum() for x in (expected * seen, seen, grad.double().square(), square)])
    sums = kernels.decide(grad, square, 4, gate == "soft")
    if gate == "hard":
        assert torch.equal(square, expected)
    torch.testing.assert_close(square, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sums.double(), exact, rtol=1e-6, atol=0)


@NUMBA
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


@NUMBA
def test_sums_are_accurate() -> None:
    """Of 4 million numbers, where a running float32 sum is off by a part in a thousand."""
    grad, square = torch.full((1 << 22,), 0.1), torch.full((1 << 22,), 1e-3)
    exact = [grad.double().square().sum(), square.double().sum()]
    assert (np.cumsum(square.numpy())[-1] / exact[1] - 1).abs() > 1e-4  # the test can fail
    expected = torch.tensor([1 << 22, 1 << 22, *exact], dtype=torch.float32)
    torch.testing.assert_close(kernels_cpu.decide(grad, square, 4, False), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernels", KERNELS)
def test_gated_adamw_is_the_textbook(kernels: Any, shape: tuple[int, ...], threads: int) -> None:
    hyper = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    state = [torch.randn(shape), torch.randn(shape), torch.randn(shape), torch.rand(shape)]
    q = (2 * torch.rand(shape) - 0.5).clamp(0, 1)  # closed, open, and between
    w, g, m, v = (x.double() for x in state)
    expected = reference.adamw_step(w, g, q, m, v, 3, **hyper)
    kernels.gated_adamw(*state, q, 3.0, hyper)
    for got, exact in zip([state[0], *state[2:]], expected, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gate", ["hard", "soft"])
@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [
        pytest.param(kernels_cpu, torch.float32, marks=NUMBA),
        pytest.param(kernels_gpu, torch.float32, marks=TRITON),
    ],
)
def test_steps_with_and_without(
    kernels: Any, dtype: torch.dtype, gate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights and moments as the plain code, over steps that open and close the gate."""
    results = []
    for on in (True, False):
        monkeypatch.setattr(kernels_gpu, "_interpreted", on and kernels is kernels_gpu)
        if not on:
            monkeypatch.setattr(kernels_cpu, "_loops", lambda: None)
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(50, 60).to(dtype))
        optimizer = PopRiskAdamW([param], lr=1e-2, weight_decay=0.1, eps=1e-6, gate=gate)
        for step in range(5):
            for _ in range(3):
                with optimizer.example():
                    noise = torch.randn(50, 60).to(dtype)
                    (param * (noise * torch.inf if step == 2 else noise)).sum().backward()
            version = param._version
            optimizer.step()
            assert (param._version > version) == (step != 2)  # autograd must notice what was written
            optimizer.zero_grad()
        logged, state = optimizer.statistics.pop("examples"), optimizer.state[param]
        assert logged["poprisk/steps_skipped"] == 1 and state["step"] == 4
        results.append((param.detach(), state["exp_avg"], state["exp_avg_sq"], logged))
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 4e-3, "atol": 1e-4}
    for got, expected in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(got, expected, **close)
    scales = [logged.pop("poprisk/noise_scale") for *_, logged in results]  # a small difference divides it
    assert scales[0] == pytest.approx(scales[1], rel=1e-3)
    assert results[0][3] == pytest.approx(results[1][3], rel=1e-5, abs=1e-6)


# On a CPU


@NUMBA
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


@NUMBA
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


@NUMBA
def test_what_the_cpu_leaves_to_plain_code(monkeypatch: pytest.MonkeyPatch) -> None:
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


@NUMBA
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


@NUMBA
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


# On a GPU


@TRITON
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter has no bfloat16 product
@pytest.mark.parametrize(("rows", "shape"), [(1, (5, 20, 65)), (2, (37, 130, 70))], ids=["rows", "pairs"])
def test_weight_gradient(rows: int, shape: tuple[int, int, int], dtype: torch.dtype, fresh: bool) -> None:
    tokens, out, width = shape
    d, a = torch.randn(3 * rows, tokens, out).to(dtype), torch.randn(3 * rows, tokens, width).to(dtype)
    h = torch.stack(
        [torch.einsum("rto,rti->oi", d[i::3].double(), a[i::3].double()).to(dtype) for i in range(3)]
    ).double()
    grad, square = torch.full((out, width), torch.nan), torch.ones(out, width)
    kernels_gpu.weight_gradient(d, a, 3, grad, square, fresh)
    expected = h.square().sum(0) + (not fresh)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3  # of products that round to either neighbour
    assert (grad - h.sum(0)).abs().max() <= tolerance * h.sum(0).abs().max()
    assert (square - expected).abs().max() <= tolerance * expected.max()


@TRITON
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_through_the_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors count as GPU tensors, small layers as large ones, and the kernel always wins."""
    monkeypatch.setattr(kernels_gpu, "_interpreted", True)
    monkeypatch.setattr(kernels_gpu, "faster", lambda key, ways: True)
    monkeypatch.setattr(capturing, "_SMALL", 0)
    calls: list[Any] = []
    kernel = kernels_gpu.weight_gradient
    monkeypatch.setattr(kernels_gpu, "weight_gradient", lambda *args: (calls.append(args), kernel(*args))[1])
    model = tiny_model(kind, tied=True)
    inputs = batch(2 * N)
    got = captured(model, [(inputs, N)], True, N)
    assert_same(got, textbook(model, inputs, N, True), 1e-5)
    assert len(calls) == {"llama": 14, "gpt2": 8}[kind]  # every linear layer but the tied head


@TRITON
def test_the_faster_way_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_gpu, "_chosen", {})
    seconds = iter([1.0, 2.0, 2.0, 1.0])
    monkeypatch.setattr(kernels_gpu, "_seconds", lambda run: next(seconds))
    ways = lambda: (lambda: None, lambda: None)  # noqa: E731
    assert [kernels_gpu.faster((key,), ways) for key in (1, 1, 2, 2)] == [True, True, False, False]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not kernels_gpu.faster((1,), ways)


@TRITON
def test_what_the_gpu_leaves_to_plain_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not kernels_gpu.usable(torch.zeros(2))  # a CPU
    monkeypatch.setattr(kernels_gpu, "_interpreted", True)
    assert kernels_gpu.usable(torch.zeros(2, 3), torch.zeros(2, dtype=torch.bfloat16))
    assert not kernels_gpu.usable(torch.zeros(2, 3).T)
    assert not kernels_gpu.usable(torch.zeros(2, dtype=torch.float64))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_poprisk.per_example import kernels_gpu

def compiled(kernel, constants, **types):
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "fp32") for n in names}
    constants = {(names.index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]

tile = {"BO": kernels_gpu._TILE_OUT, "BI": kernels_gpu._TILE_IN, "BT": kernels_gpu._TILE_TOKENS}
sizes = {n: "i32" for n in ("rows", "tokens", "out", "width", "numel")}
ptx = compiled(kernels_gpu._weight_gradient, {"N": 8, "FRESH": False, **tile},
               d="*bf16", a="*bf16", grad="*fp32", square="*fp32", **sizes)
print("tensor cores" if "wgmma.mma_async" in ptx else "no tensor cores")
block = {"BLOCK": kernels_gpu._ELEMENTS}
compiled(kernels_gpu._decide, {"SOFT": True, **block}, grad="*bf16", sq_sum="*fp32", sums="*fp32", **sizes)
moments = {n: "*bf16" for n in ("param", "grad", "exp_avg", "exp_avg_sq")}
compiled(kernels_gpu._gated_adamw, block, openness="*fp32", **moments, **sizes)
print("compiled")
"""


@TRITON
def test_the_kernels_compile_for_a_gpu() -> None:
    """For compute capability 9.0, which needs no GPU; the weight gradient must use its tensor cores."""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[:2] == ["tensor cores", "compiled"]
