"""The GPU kernels against plain PyTorch, in Triton's interpreter; and that they compile for a GPU."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from models import tiny_model
from test_layers import N, assert_same, batch, captured, textbook

from hf_poprisk import PopRiskAdamW
from hf_poprisk.gate import openness
from hf_poprisk.per_example import capture as capturing
from hf_poprisk.per_example import kernels_gpu

pytest.importorskip("triton", reason="there is no triton for this platform, so the kernels are never used")


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


@pytest.mark.parametrize("gate", ["hard", "soft"])
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")  # masked out
def test_decide(gate: str) -> None:
    h = torch.randn(4, 3000)
    h[1:, :500] = 0  # one example only: G² = Q stays closed
    h[:, 500:700] = 0
    grad, square = h.sum(0), h.square().sum(0)
    expected = openness(grad, square, 4, gate)
    noise = square.sum()
    sums = kernels_gpu.decide(grad, square, 4, gate == "soft")
    torch.testing.assert_close(square, expected, rtol=1e-5, atol=1e-6)
    assert not square[:700].any() and 0.2 < (square[700:] > 0).float().mean() < 0.6
    torch.testing.assert_close(sums, torch.stack([square.sum(), torch.tensor(2800.0), grad.dot(grad), noise]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gated_adamw(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights and moments as the plain code, over steps that open and close the gate."""
    results = []
    for on in (False, True):
        monkeypatch.setattr(kernels_gpu, "_interpreted", on)
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(50, 60).to(dtype))
        optimizer = PopRiskAdamW([param], lr=1e-2, weight_decay=0.1, eps=1e-6)
        for _ in range(4):
            for _ in range(3):
                with optimizer.example():
                    (param * torch.randn(50, 60).to(dtype)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        state = optimizer.state[param]
        results.append([param.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"]])
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 4e-3, "atol": 1e-4}
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, **tolerance)
    assert results[1][3] == 4


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


def test_the_faster_way_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_gpu, "_chosen", {})
    seconds = iter([1.0, 2.0, 2.0, 1.0])
    monkeypatch.setattr(kernels_gpu, "_seconds", lambda run: next(seconds))
    ways = lambda: (lambda: None, lambda: None)  # noqa: E731
    assert [kernels_gpu.faster((key,), ways) for key in (1, 1, 2, 2)] == [True, True, False, False]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not kernels_gpu.faster((1,), ways)


def test_what_is_left_to_plain_code(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_kernels_compile_for_a_gpu() -> None:
    """For compute capability 9.0, which needs no GPU; the weight gradient must use its tensor cores."""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[:2] == ["tensor cores", "compiled"]
