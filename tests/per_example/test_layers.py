"""Several examples per backward: the same G and Q as the textbook loop, for every architecture."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import reference
import torch
from models import adapted, some_bases, text, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_poprisk.per_example import BatchedGradients, Capture, Layout, Rows, products
from hf_poprisk.per_example import capture as capturing
from hf_poprisk.per_example.basis import Sides
from hf_poprisk.per_example.window import ExampleWindow

N = 4
ALL_ROWS = Rows(N, N)
KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "gpt2", "bert")
ADAPTERS = ("full", "lora", "dora", "modules_to_save")


def batch(rows: int, side: str = "right") -> dict[str, Tensor]:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    texts = [text(i, 4 + 2 * (i % 4)) for i in range(rows)]
    return dict(tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))


def example_losses(model: nn.Module, inputs: dict[str, Tensor], pairs: bool) -> Tensor:
    """[examples], in the model's own dtype; with pairs, of rows i and i + N together."""
    logits = model(**inputs).logits
    if logits.dim() == 2:
        rows = F.cross_entropy(logits, inputs["input_ids"][:, 1] % logits.shape[-1], reduction="none")
    else:
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)[:, 1:]
        rows = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none").sum(1)
    if not pairs:
        return rows
    chosen, rejected = rows.chunk(2)
    return -F.logsigmoid(rejected - chosen)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def checkpointed(model: nn.Module, reentrant: bool = False) -> None:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()


def textbook(
    model: nn.Module, inputs: dict[str, Tensor], n: int, pairs: bool, bases: dict[Tensor, Sides] | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """G, and Q of the single gradients, rotated where there is a basis."""
    examples = [{k: v[i::n] for k, v in inputs.items()} for i in range(n)]
    gradients = reference.per_example_gradients(
        trainable(model), lambda example: example_losses(model, example, pairs).sum() / n, examples
    )
    sums = {name: reference.grad_and_square_sums(gradients, name) for name in trainable(model)}
    for name, p in trainable(model).items():
        if p in (bases or {}):
            sides = zip(bases[p], p.shape, strict=True)
            left, right = (torch.eye(size).double() if u is None else u for u, size in sides)
            sums[name] = sums[name][0], sum((left.T @ h[name] @ right).square() for h in gradients)
    return sums


def captured(
    model: nn.Module,
    batches: list[tuple[dict[str, Tensor], int | None]],
    pairs: bool,
    total: int,
    bases: dict[Tensor, Sides] | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """G and Q after one window of backwards, one per (inputs, examples or None for ``example``)."""
    params = trainable(model)
    layers = BatchedGradients(model, params.values())
    window = ExampleWindow(params.values(), {p: name for name, p in params.items()}, bases=bases)
    for inputs, n in batches:
        rows = len(inputs["input_ids"])
        with window.example() if n is None else window.batch(layers, Rows(n, rows)) as capture:
            (example_losses(model, inputs, pairs).sum() / total).backward()
        assert capture is None or not capture.misfits
    assert all("forward" not in vars(module) for module in model.modules())
    b, sq_sums = window.reduce()
    assert b == total and not layers.uncovered
    return {name: (p.grad, sq_sums[p]) for name, p in params.items() if p.grad is not None}


def assert_same(got: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    seen = 0
    largest = max(g.abs().max().item() for g, _ in expected.values())
    for name, pair in expected.items():
        if pair[0].abs().max() < 1e-6 * largest:  # zero but for rounding: BERT's key biases
            continue
        if name not in got:  # a parameter that nothing reaches
            assert not pair[0].any()
            continue
        for ours, theirs in zip(got[name], pair, strict=True):
            assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max(), name
        seen += pair[1].count_nonzero().item()
    assert seen > 100


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        *((kind, adapter) for kind in KINDS for adapter in ("full", "lora", "dora")),
        ("llama", "rslora"),
        ("llama", "modules_to_save"),
    ],
)
def test_sums_equal_the_loop(
    kind: str, adapter: str, checkpointing: bool, pairs: bool, dtype: torch.dtype
) -> None:
    left = kind in ("qwen3", "mistral")  # eager attention gives NaN for a row of nothing but padding
    model = adapted(tiny_model(kind, kind == "gpt2", dtype, "sdpa" if left else "eager"), adapter)
    with torch.no_grad():  # at this size the weights are so large that float32 rounding is amplified
        for name, p in model.named_parameters():
            p.mul_(0.25 if "lora_" in name else 0.5 if p.dim() == 2 else 1.0)
    inputs = batch(2 * N if pairs else N, "left" if left else "right")
    expected = textbook(model, inputs, N, pairs)
    if checkpointing:
        checkpointed(model)
    got = captured(model, [(inputs, N)], pairs, N)
    exact = dtype == torch.float64 and kind != "gemma3"  # whose norms run in float32 whatever the model is in
    assert_same(got, expected, 1e-12 if exact else 1e-5)
    assert adapter != "modules_to_save" or any("lm_head" in name for name in got)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the way of large layers, in blocks of a few rows, at the size of the tests."""
    monkeypatch.setattr(capturing, "_SMALL", 0)
    monkeypatch.setattr(products, "_BLOCK", 100)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_large_layers_equal_the_loop(kind: str, tied: bool, pairs: bool, large: None) -> None:
    model = tiny_model(kind, tied, torch.float64)
    inputs = batch(2 * N if pairs else N)
    got = captured(model, [(inputs, N)], pairs, N)
    assert_same(got, textbook(model, inputs, N, pairs), 1e-12 if kind != "gemma3" else 1e-5)


@pytest.mark.parametrize("way", ["alone", "small", "large"])
@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("llama", True), ("gpt2", True)])
def test_squares_in_a_basis_equal_the_loop(
    kind: str, tied: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop rotates single gradients, as does ``alone``; the others the factors of large layers."""
    monkeypatch.setattr(capturing, "_SMALL", 0 if way == "large" else 1 << 17)
    model, inputs = tiny_model(kind, tied, torch.float64), batch(2 * N)
    bases = some_bases(model)
    expected = textbook(model, inputs, N, True, bases)
    examples = [({k: v[i::N] for k, v in inputs.items()}, None) for i in range(N)]
    got = captured(model, examples if way == "alone" else [(inputs, N)], True, N, bases)
    assert_same(got, expected, 1e-12)
    in_coordinates = textbook(model, inputs, N, True)
    names = [name for name, p in trainable(model).items() if p in bases]
    assert len(names) > 8
    for name in names:
        assert (in_coordinates[name][1] - got[name][1]).abs().max() > 0.1 * got[name][1].abs().max(), name


class Uses(nn.Module):
    """A linear layer used twice, its weight once more from outside, a table without a row axis."""

    def __init__(self, outside: bool = False, flat: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 1)
        self.outside, self.flat = outside, flat

    def twice(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        h = self.twice(x)
        if self.outside:
            h = h + x @ self.layer.weight
        if self.flat:
            return self.last(h.reshape(-1, 6)).reshape(len(x), -1).sum(1)
        return self.last(h).sum((1, 2))


def batched(
    model: nn.Module, loss: Callable[[], Tensor], layout: Layout = ALL_ROWS
) -> tuple[Capture, dict[str, tuple[Tensor, Tensor]]]:
    """G and Q after one backward of several examples."""
    params = trainable(model)
    layers = BatchedGradients(model, params.values())
    window = ExampleWindow(params.values(), {p: name for name, p in params.items()})
    with window.batch(layers, layout) as capture:
        loss().backward()
    sq_sums = window.reduce()[1]
    return capture, {name: (p.grad, sq_sums[p]) for name, p in params.items() if p.grad is not None}


def assert_follows_the_loop(
    model: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor | None = None, n: int = N
) -> None:
    """G, Q and the gate's decisions; row j of ``x`` is of example j mod n."""
    if x is None:
        x = torch.randn(n, 3, 6, dtype=torch.float64, requires_grad=True)  # for reentrant checkpointing
    gradients = reference.per_example_gradients(trainable(model), loss, [x[i::n] for i in range(n)])
    (_, got), seen = batched(model, lambda: loss(x), Rows(n, len(x))), 0
    largest = max(p.abs().max() for h in gradients for p in h.values())
    for name in trainable(model):
        g, q = reference.grad_and_square_sums(gradients, name)
        if g.abs().max() < 1e-10 * largest:  # zero but for rounding: key biases
            continue
        torch.testing.assert_close(got[name], (g, q), rtol=1e-9, atol=1e-12 * largest.item())
        assert torch.equal(got[name][0].square() > got[name][1], g.square() > q), name
        seen += q.count_nonzero().item()
    assert seen > 20


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("width_of_small", [0, 1 << 17])
def test_a_layer_used_twice(width_of_small: int, reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "_SMALL", width_of_small)
    model = Uses().double()
    if not reentrant:
        assert_follows_the_loop(model, lambda x: model(x).square().sum())
    model.zero_grad()
    model.last.requires_grad_(False)
    model.layer.bias.requires_grad_(False)

    def loss(x: Tensor) -> Tensor:
        # the loop takes gradients for given parameters, which reentrant checkpointing cannot
        recomputed = reentrant and len(x) > 1
        return (checkpoint(model.twice, x, use_reentrant=True) if recomputed else model.twice(x)).sum()

    assert_follows_the_loop(model, loss)


def test_a_gradient_that_the_loss_takes_for_itself_is_not_captured() -> None:
    """The input's gradient, as adversarial training wants it, on the way to the loss."""
    model = Uses().double()

    def loss(rows: Tensor) -> Tensor:
        rows = rows.detach().requires_grad_()
        (slope,) = torch.autograd.grad(model(rows).sum(), rows)
        return model(rows.detach() + 0.1 * slope.sign()).square().sum()

    assert_follows_the_loop(model, loss)


def test_a_use_outside_the_layers_is_an_error_that_names_it() -> None:
    model, x = Uses(outside=True), torch.randn(N, 3, 6)
    with pytest.raises(RuntimeError, match="of layer.weight cannot be formed: a part of its gradient"):
        batched(model, lambda: model(x).sum())


class Positions(nn.Module):
    """Looks positions up as [1, T] and takes the first row of the result; or as [T]."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.table, self.last, self.flat = nn.Embedding(8, 6), nn.Linear(6, 1), flat

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(x.shape[1])
        return self.last(x + (self.table(ids) if self.flat else self.table(ids[None])[0])).sum((1, 2))


@pytest.mark.parametrize(
    ("model", "tokens", "hidden"),
    [
        (Uses(flat=True), 3, "last.(weight|bias)"),
        (Uses(flat=True), 1, None),  # one token per row: nothing is hidden
        (Positions(flat=False), N, "table.weight"),  # as many positions as rows: not guessed at
        (Positions(flat=True), N, "table.weight"),
    ],
)
def test_rows_that_a_layer_cannot_see_are_refused(model: nn.Module, tokens: int, hidden: str | None) -> None:
    sentence = f"of {hidden} cannot be formed: a layer does not see the examples: its input is"
    with nullcontext() if hidden is None else pytest.raises(RuntimeError, match=sentence):
        batched(model, lambda: model(torch.randn(N, tokens, 6)).sum())


class Scale(nn.Module):
    """Looks like a norm, and scales the rows; counts its calls and draws from the generator."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.weight, self.fault, self.calls = nn.Parameter(torch.ones(6)), fault, 0

    def forward(self, x: Tensor) -> Tensor:
        assert self.fault != "refuses"
        self.calls += 1
        torch.rand(1)
        return x * (self.weight.sum() if self.fault == "couples" else self.weight.float().to(x.dtype))


def test_what_is_covered_is_found_out_by_trying_without_a_trace() -> None:
    faults = Scale("couples"), Scale("refuses"), nn.ConvTranspose1d(6, 6, 1), nn.BatchNorm1d(6)
    model = nn.Sequential(Scale(), nn.Linear(6, 6), *faults)
    torch.manual_seed(0)
    fresh = torch.rand(3)
    torch.manual_seed(0)
    layers = BatchedGradients(model, model.parameters())
    assert torch.equal(torch.rand(3), fresh)
    assert model[0].calls == 0 and model[5].num_batches_tracked == 0
    wrong = {"2.weight", "3.weight", *(f"{i}.{name}" for i in (4, 5) for name in ("weight", "bias"))}
    assert set(layers.uncovered) == wrong and layers.uncovered["2.weight"] == "a parameter of Scale"
    assert not BatchedGradients(model, model[:2].parameters()).uncovered


def test_reentrant_checkpointing_gives_the_same_sums() -> None:
    model, inputs = tiny_model("llama", True, torch.float64), batch(N)
    expected = textbook(model, inputs, N, False)
    checkpointed(model, reentrant=True)
    assert_same(captured(model, [(inputs, N)], False, N), expected, 1e-12)


def test_a_linear_layer_with_other_parameters_is_not_covered() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    with pytest.warns(FutureWarning):
        old = nn.utils.weight_norm(nn.Linear(6, 6))
    assert BatchedGradients(normed, normed.parameters()).uncovered
    assert set(BatchedGradients(old, old.parameters()).uncovered) >= {"weight_g", "weight_v"}


def test_arguments_by_name_and_a_forward_replaced_later() -> None:
    layer, norm, x = nn.Linear(6, 6), nn.LayerNorm(6), torch.randn(N, 3, 6)
    model = nn.ModuleList([layer, norm])
    layers, window = BatchedGradients(model, model.parameters()), ExampleWindow(model.parameters())
    with window.batch(layers, ALL_ROWS):
        norm(input=layer(input=x)).square().sum().backward()
    assert window.squares.so_far()[layer.weight].any()
    window.reset()
    model.zero_grad()
    layer.forward = lambda x: x
    with (
        pytest.raises(RuntimeError, match="forward of Linear was replaced"),
        window.batch(layers, ALL_ROWS),
    ):
        pass
    assert layer.forward(3) == 3  # and it is not lost


def test_a_loss_that_is_held_on_to_holds_no_buffers(large: None) -> None:
    model, x = nn.Linear(6, 6), torch.randn(N, 3, 6)
    losses = []
    capture, _ = batched(model, lambda: losses.append(model(x).sum()) or losses[0])
    assert losses[0].grad_fn is not None and not capture._products.scratch and not capture._kept
