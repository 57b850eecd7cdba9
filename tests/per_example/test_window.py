"""G and Q from leaf hooks against the textbook loop, on real architectures."""

from typing import Any

import pytest
import reference
import torch
from models import adapted, tiny_model, token_examples
from torch import Tensor, nn

from hf_poprisk import PopRiskAdamW
from hf_poprisk.per_example.window import ExampleWindow

B = 5


def assert_sums_equal_the_loop(model: nn.Module, examples: list[dict[str, Tensor]], gradients: Any) -> None:
    """One window of one-example backwards."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    window = ExampleWindow(params.values())
    for example in examples:
        with window.example():
            (model(**example).loss / B).backward()
    b, sq_sums = window.reduce()
    assert b == B and len(sq_sums) == len(params)
    seen = 0
    for name, p in params.items():
        tolerance = 1e-12 if p.dtype == torch.float64 else 1e-5
        expected = reference.grad_and_square_sums(gradients, name)
        for ours, theirs in zip((p.grad, sq_sums[p]), expected, strict=True):
            assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max(), name
        seen += expected[1].count_nonzero().item()
    assert seen > 100


MODELS = [
    *((kind, tied, "full") for kind in ("llama", "qwen2", "gpt2") for tied in (False, True)),
    *(
        (kind, False, adapter)
        for kind in ("llama", "gpt2")
        for adapter in ("lora", "dora", "modules_to_save")
    ),
]
WAYS = [(way, dtype) for way in ("plain", "checkpointing") for dtype in (torch.float64, torch.float32)]


@pytest.mark.parametrize(
    ("model", "way", "dtype"),
    [
        *((model, way, dtype) for model in MODELS for way, dtype in WAYS),
        (("llama", True, "full"), "compiled", torch.float64),
    ],
)
def test_sums_equal_the_loop(model: Any, way: str, dtype: torch.dtype) -> None:
    kind, tied, adapter = model
    model = adapted(tiny_model(kind, tied, dtype), adapter)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    examples = token_examples(B)
    gradients = reference.per_example_gradients(params, lambda e: model(**e).loss / B, examples)
    if way == "checkpointing":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    elif way == "compiled":
        model.compile(backend="aot_eager")  # the backward is traced; no code generator needed
    assert_sums_equal_the_loop(model, examples, gradients)


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
