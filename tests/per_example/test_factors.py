"""The factors of per-example gradients against autograd, one example at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models import adapted, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from hf_poprisk.per_example.basis import Features, LayerBasis, measure_bases
from hf_poprisk.per_example.factors import LinearFactors, linear_layers

N, ROWS = 3, 2  # examples, rows of each


def batch(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (N * ROWS, 5), generator=generator)


def z_of(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """Row j belongs to example j mod N; [N]."""
    logits = model(input_ids=ids).logits
    return logits.square().mean((1, 2)).view(-1, count).sum(0)


def seen(model: nn.Module, z: Callable[[], Tensor], rows: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer → A and D of every example."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, a: Tensor, d: Tensor) -> None:
        assert name not in found
        found[name] = a, d

    factors = LinearFactors(model, linear_layers(model), see)
    with factors.forward():
        value = z()
    factors.backward(value, rows)
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("frozen", [False, True])
def test_factors_multiply_to_the_gradients(kind: str, adapter: str, frozen: bool) -> None:
    model = adapted(tiny_model(kind, dtype=torch.float64), adapter).eval()
    if frozen:
        model.requires_grad_(False)
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    ids = batch(model)
    found = seen(model, lambda: z_of(model, ids, N), ROWS)
    assert needed == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    layers = linear_layers(model)
    assert found.keys() == layers.keys() and not any("lora_" in name for name in found)
    for i in range(N):
        weights = {name: layer.weight.requires_grad_() for name, layer in layers.items()}
        z = z_of(model, ids[i::N], 1).sum()
        for (name, weight), h in zip(
            weights.items(), torch.autograd.grad(z, list(weights.values())), strict=True
        ):
            expected = h if isinstance(layers[name], nn.Linear) else h.T  # Conv1D
            if weight is model.get_input_embeddings().weight:  # tied: the lookups are no part of the layer
                continue
            a, d = found[name]
            torch.testing.assert_close(d[i].T @ a[i], expected)


class Twice(nn.Module):
    """A layer that is called twice, once of no consequence, and followed by what works in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.layer(x), inplace=True)
        self.other(x)
        return self.layer(y).sum(-1) + self.layer(y).detach().sum(-1)


def check_layer(model: nn.Module, x: Tensor) -> set[str]:
    """Compare ``layer`` with autograd, example by example; returns the layers that were seen."""
    found = seen(model, lambda: model(x))
    a, d = found["layer"]
    for i in range(N):
        (expected,) = torch.autograd.grad(model(x[i : i + 1]).sum(), [model.layer.weight])
        torch.testing.assert_close(d[i].T @ a[i], expected)
    return set(found)


def test_a_layer_may_be_called_several_times_or_for_nothing() -> None:
    torch.manual_seed(0)
    model, x = Twice().double(), torch.randn(N, 4, dtype=torch.float64)
    assert check_layer(model, x) == {"layer"}


class Flat(Twice):
    """OPT and some experts see the tokens of all rows, one after the other."""

    def forward(self, x: Tensor, seen: bool = True) -> Tensor:
        x = self.other(x) if seen else x
        return self.layer(x.reshape(-1, 4)).tanh().view(len(x), -1).sum(1)


def test_tokens_of_all_rows_may_stand_one_after_the_other() -> None:
    torch.manual_seed(0)
    model, x = Flat().double(), torch.randn(N, 2, 4, dtype=torch.float64)
    assert check_layer(model, x) == {"layer", "other"}


def test_a_layer_that_hides_the_rows_is_named() -> None:
    model, x = Flat(), torch.randn(N, 2, 4)
    sentence = r"of layer do not show single examples: its input is \[6, 4\], which does not show the 3"
    with pytest.raises(ValueError, match=sentence):
        seen(model, lambda: model(x, seen=False))


def run_of(factors: dict[str, tuple[Tensor, Tensor]]) -> Callable[[Any], None]:
    """Passes over the examples of some layers two at a time."""

    def run(see: Any) -> None:
        for name, (a, d) in factors.items():
            for i in range(0, len(a), 2):
                see(name, a[i : i + 2], d[i : i + 2])

    return run


def random_factors(n: int = 6) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"wide": (5, 7, 3), "tall": (4, 2, 6), "short": (2, 9, 8)}  # tokens, in, out
    return {
        name: (torch.randn(n, t, i, generator=generator), torch.randn(n, t, o, generator=generator))
        for name, (t, i, o) in sizes.items()
    }


def test_the_basis_is_that_of_the_materialised_gradients() -> None:
    factors = random_factors()
    bases = measure_bases(run_of(factors))
    for name, (a, d) in factors.items():
        h = d.mT @ a
        basis = bases[name]
        for vectors, side in ((basis.left, (h @ h.mT).sum(0)), (basis.right, (h.mT @ h).sum(0))):
            diagonal = vectors.T @ side @ vectors
            torch.testing.assert_close(diagonal, diagonal.diagonal().diag(), atol=1e-3, rtol=0)
            assert (diagonal.diagonal().diff() <= 1e-3).all()  # the leading ones first
            torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(vectors)), atol=1e-5, rtol=0)
        rotated = basis.left.T @ h @ basis.right
        torch.testing.assert_close(basis.rotate(a, d), rotated, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(basis.second_moment, rotated.square().mean(0), atol=1e-3, rtol=1e-4)
        root = rotated.square().mean(0).sqrt()
        torch.testing.assert_close(basis.preconditioner(), 1 / (root + 1e-3 * root.mean()), rtol=1e-3, atol=0)


def test_the_other_directions_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure_bases(run_of(random_factors()))
    monkeypatch.setattr("hf_poprisk.per_example.basis.LEADING", 2)
    for name, basis in measure_bases(run_of(random_factors())).items():
        torch.testing.assert_close(basis.left, whole[name].left[:, :2])
        torch.testing.assert_close(basis.right, whole[name].right[:, :2])
        torch.testing.assert_close(basis.second_moment, whole[name].second_moment[:2, :2])


@pytest.mark.parametrize("tokens", [5, 30])
def test_the_leading_directions_of_a_long_side_come_from_a_sketch(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_poprisk.per_example.basis.LEADING", 4)
    monkeypatch.setattr("hf_poprisk.per_example.basis.SKETCH", 8)
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    d = draw(6, tokens, 3) @ draw(3, 40)  # of rank 3: the sketch is exact
    a = draw(6, tokens, 50) * torch.arange(1, 51) ** -1.5
    basis = measure_bases(run_of({"layer": (a, d)}))["layer"]
    assert basis.left.shape == (40, 4) and basis.right.shape == (50, 4)
    h = d.mT @ a
    for vectors, side, missed in (
        (basis.left[:, :3], (h @ h.mT).sum(0), 1e-5),
        (basis.right, (h.mT @ h).sum(0), 0.02),
    ):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(vectors.shape[1]), atol=1e-5, rtol=0)
        most = torch.linalg.eigvalsh(side.double()).flip(0)[: vectors.shape[1]].sum()
        assert torch.trace(vectors.T @ side @ vectors) > (1 - missed) * most


def exact(bases: dict[str, LayerBasis], factors: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """The Gram matrix of P^½ H'."""
    roots = [
        (bases[name].rotate(a, d) * bases[name].preconditioner().sqrt()).flatten(1)
        for name, (a, d) in factors.items()
    ]
    whole = torch.cat(roots, 1)
    return whole @ whole.T


def test_projected_features_have_the_inner_products_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = random_factors()
    bases = measure_bases(run_of(factors))

    def gram(k: int, seed: int) -> Tensor:
        monkeypatch.setattr("hf_poprisk.per_example.basis.SEED", seed)
        features = Features(bases, k)
        run_of({name: (a[:2], d[:2]) for name, (a, d) in factors.items()})(features.see)
        rows = features.take(2)
        assert rows.shape == (2, k)
        return rows @ rows.T

    expected = exact(bases, factors)[:2, :2]
    drawn = torch.stack([gram(8, seed) for seed in range(800)])
    error = drawn.std(0) / 800**0.5
    assert ((drawn.mean(0) - expected).abs() < 4 * error).all()
    assert drawn.std(0).min() > 0  # k is small enough to matter
    torch.testing.assert_close(gram(8, 5), gram(8, 5), rtol=0, atol=0)


def test_with_a_bucket_for_every_coordinate_they_are_exact() -> None:
    factors = {"wide": random_factors()["wide"]}
    bases = measure_bases(run_of(factors))
    features = Features(bases, 1000)
    a, d = factors["wide"]
    features.see("wide", a, d)
    features.see("another layer", a, d)  # not asked for
    rows = features.take(6)
    assert rows.shape == (6, 21)
    assert torch.equal(features.take(4), torch.zeros(4, 21))  # no layer was run since
    torch.testing.assert_close(rows @ rows.T, exact(bases, factors), rtol=1e-4, atol=1e-5)


def test_a_layer_without_a_measured_gradient_has_no_part() -> None:
    basis = LayerBasis(torch.eye(3), torch.eye(4), torch.zeros(3, 4))
    assert not basis.preconditioner().any()


def test_a_call_with_a_table_that_all_examples_share_is_left_out() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.table = nn.Linear(4, 2), nn.Parameter(torch.randn(1, 5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return (self.layer(x) * self.layer(self.table)).sum((1, 2))

    model, x = Shared(), torch.randn(N, 5, 4)
    a, d = seen(model, lambda: model(x))["layer"]
    torch.testing.assert_close(a, x)
    torch.testing.assert_close(d, model.layer(model.table).detach().expand(N, 5, 2))
