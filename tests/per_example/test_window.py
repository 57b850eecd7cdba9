"""One accumulation window: single examples and several at once, what is refused, what is kept."""

from itertools import product

import pytest
import torch
from models import adapted, tiny_model
from test_layers import ADAPTERS, N, assert_same, batch, captured, checkpointed, textbook
from torch import Tensor, nn

from hf_poprisk import PopRiskAdamW
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
