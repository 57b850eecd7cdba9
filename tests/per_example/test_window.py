"""One accumulation window: single examples and several at once, what is refused, what is kept."""

from itertools import product

import pytest
import reference
import torch
from models import adapted, tiny_model
from test_layers import (
    ADAPTERS,
    N,
    assert_same,
    batch,
    batched,
    captured,
    checkpointed,
    example_losses,
    textbook,
    trainable,
)
from torch import Tensor, nn

from hf_poprisk import PopRiskAdamW, PopRiskGate
from hf_poprisk.per_example import BatchedGradients, Rows
from hf_poprisk.per_example import capture as capturing
from hf_poprisk.per_example.window import ExampleWindow


def parts(inputs: dict[str, Tensor], *rows: list[int]) -> list[dict[str, Tensor]]:
    return [{k: v[some] for k, v in inputs.items()} for some in rows]


@pytest.mark.parametrize(
    ("kind", "adapter", "way"),
    [*product(("llama", "gpt2"), ADAPTERS, ("plain", "checkpointing")), ("llama", "full", "compiled")],
)
def test_single_examples_equal_the_loop(kind: str, adapter: str, way: str) -> None:
    """The hooks on the parameters, which know of no layer."""
    model, inputs = adapted(tiny_model(kind, adapter == "full", torch.float64), adapter), batch(N)
    expected = textbook(model, inputs, N, False)
    if way == "checkpointing":
        checkpointed(model)
    elif way == "compiled":
        model.compile(backend="aot_eager")  # the backward is traced; no code generator needed
    alone = [(part, None) for part in parts(inputs, *([i] for i in range(N)))]
    assert_same(captured(model, alone, False, N), expected, 1e-12)


@pytest.mark.parametrize("small", [0, 1 << 17])
def test_a_window_of_several_batches_and_single_examples(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "_SMALL", small)
    model, inputs = tiny_model("llama", True, torch.float64), batch(7)
    expected = textbook(model, inputs, 7, False)
    batches = zip(parts(inputs, [0], [1, 2, 3], [4, 5], [6]), (None, 3, 2, 1), strict=True)
    assert_same(captured(model, list(batches), False, 7), expected, 1e-12)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_under_bfloat16_autocast_the_gate_is_that_of_single_examples(kind: str) -> None:
    model, inputs = tiny_model(kind), batch(2 * N)
    decided = []
    for n in (1, 2 * N):
        optimizer = PopRiskAdamW(model.parameters())
        layers = BatchedGradients(model, optimizer.gated_parameters)
        for start in range(0, 2 * N, n):
            rows = {k: v[start : start + n] for k, v in inputs.items()}
            with optimizer.batch(layers, Rows(n, n)) if n > 1 else optimizer.example():
                with torch.autocast("cpu", torch.bfloat16):
                    loss = example_losses(model, rows, False).sum() / (2 * N)
                loss.backward()
        optimizer.close_window()
        decided.append(torch.cat([optimizer._openness[p].flatten() for p in model.parameters()]))
        optimizer.zero_grad()
    assert (decided[0] != decided[1]).float().mean() <= 1e-3
    assert decided[0].mean() > 0.05


class Sparse(nn.Module):
    """Each example has features of its own; one token per row, and a bias that the ReLU shuts for most."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4 * N, 300), nn.Linear(300, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "sparse"])
def test_what_one_example_touched_stays_closed_in_low_precision(
    kind: str, dtype: torch.dtype, pairs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There G² = Q exactly, if what is squared was rounded as G is; for small layers and for large ones."""
    monkeypatch.setattr(capturing, "_SMALL", 1 << 12)
    rows = 2 * N if pairs else N
    if kind == "sparse":
        model: nn.Module = Sparse().to(dtype)
        inputs = {"x": torch.block_diag(*torch.randn(N, 1, 4)).to(dtype).repeat(rows // N, 1)}
        losses = lambda batch: model(batch["x"]).float().square().sum(1)  # noqa: E731
    else:
        model, inputs = tiny_model(kind, dtype=dtype), batch(rows)
        losses = lambda batch: example_losses(model, batch, pairs)  # noqa: E731
    examples = [{k: v[i::N] for k, v in inputs.items()} for i in range(N)]
    alone = reference.per_example_gradients(trainable(model), lambda e: losses(e).sum() / N, examples)
    seen = 0
    for name, (grad, square) in batched(model, lambda: losses(inputs).sum() / N, Rows(N, rows))[1].items():
        single = torch.stack([h[name] != 0 for h in alone]).sum(0) == 1
        assert not ((grad.to(square.dtype).square() > square) & single).any(), name
        seen += int(single.sum())
    assert seen > 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_are_squared_in_float32(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.zeros(1000, dtype=dtype))
    h = (torch.randn(6, 1000) * 1e-5).to(dtype)
    window = ExampleWindow([p])
    for row in h:
        with window.example():
            (p * row).sum().backward()
    _, sq_sums = window.reduce()
    assert sq_sums[p].dtype == torch.float32
    torch.testing.assert_close(sq_sums[p], h.float().square().sum(0), rtol=1e-6, atol=0)


def test_parameters_that_some_examples_or_none_reach() -> None:
    a, b, idle = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = PopRiskAdamW([a, b, idle])
    for scale, uses_b in ((1.0, False), (2.0, True), (3.0, True)):
        with optimizer.example():
            (scale * a.sum() + (scale * b.sum() if uses_b else 0.0)).backward()
    count, sq_sums = optimizer._window.reduce()
    assert count == 3 and sq_sums.keys() == {a, b}
    assert torch.equal(sq_sums[a], torch.full((3,), 14.0))
    assert torch.equal(sq_sums[b], torch.full((3,), 13.0))
    optimizer.step()
    assert torch.equal(idle.detach(), torch.ones(3)) and (a < 1).all()


def test_a_gradient_in_several_parts_is_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    window = ExampleWindow([p], names={p: "shared.weight"})
    with pytest.raises(RuntimeError, match=r"shared\.weight arrived in several parts"), window.example():
        p.sum().backward()
        p.sum().backward()


def test_a_gradient_nobody_saw_is_refused() -> None:
    """Sharded parameters receive gradients that no hook reports: Q = 0 would open everything."""
    seen, unseen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = PopRiskAdamW([("seen", seen), ("unseen", unseen)])
    for _ in range(2):
        with optimizer.example():
            seen.sum().backward()
            unseen.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="no example's gradient was seen for unseen"):
        optimizer.step()


def test_squares_that_underflow_were_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16 each example's gradient is zero, and the sum is not: no fault of any block."""
    monkeypatch.setattr(capturing, "_SMALL", 0)
    layer = nn.Linear(4, 4, bias=False).half()
    optimizer = PopRiskGate(torch.optim.SGD(layer.parameters(), lr=1e-3))
    layers = BatchedGradients(layer, optimizer.gated_parameters)
    x = torch.full((64, 1, 4), 1e-4, dtype=torch.float16)
    with optimizer.batch(layers, Rows(64, 64)):
        ((layer(x) + layer(x)).float() * 2e-4).sum().backward()
    sq_sum = optimizer._window.reduce()[1][layer.weight]
    assert layer.weight.grad.any() and not sq_sum.any()
    optimizer.close_window()


def test_buffers_are_reused_from_step_to_step() -> None:
    p = nn.Parameter(torch.ones(50))
    optimizer = PopRiskAdamW([p])
    addresses = set()
    for _ in range(3):
        for _ in range(2):
            with optimizer.example():
                (p * torch.randn(50)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        addresses.add(optimizer._window.squares._sums[p].data_ptr())
    assert len(addresses) == 1
