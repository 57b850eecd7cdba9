"""The rule against its textbook form, its invariances, its bias, and its level under pure noise."""

import pytest
import reference
import torch

from hf_poprisk.gate import (
    margin,
    null_openness,
    openness,
)
from hf_poprisk.streaming import streaming_null_openness, streaming_openness

BATCHES = (2, 4, 8, 16, 64)


def sums(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return h.sum(0), h.square().sum(0)


def contributions(b: int, n: int = 50_000, signal: float = 0.3) -> torch.Tensor:
    """[b, n] float64, with a population gradient that differs from coordinate to coordinate."""
    return torch.randn(b, n, dtype=torch.float64) + signal * torch.randn(n, dtype=torch.float64)


@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("gate", ["hard", "soft", "none"])
def test_two_sums_decide_as_mean_and_variance_do(b: int, gate: str) -> None:
    h = contributions(b)
    q = openness(*sums(h), b, gate)
    torch.testing.assert_close(q, reference.openness(h, gate), rtol=1e-9, atol=1e-9)
    if gate == "hard":
        assert 0.1 < q.mean() < 0.9  # neither all open nor all closed, or the comparison says nothing


def test_the_other_variance_would_be_another_rule() -> None:
    h = contributions(4)
    mu, var = h.mean(0), h.var(0, unbiased=True)
    wrong = mu.square() > var / 3
    assert (wrong != openness(*sums(h), 4).bool()).double().mean() > 0.02


@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_scale_sign_and_order_do_not_matter(gate: str) -> None:
    h = contributions(8)
    q = openness(*sums(h), 8, gate)
    for other in (1024.0 * h, -h, h[torch.randperm(8)], 1e-6 * h):
        torch.testing.assert_close(openness(*sums(other), 8, gate), q, rtol=1e-9, atol=1e-9)


def test_margin_is_the_sum_of_cross_terms() -> None:
    h = contributions(6, n=100)
    cross = sum(h[i] * h[j] for i in range(6) for j in range(6) if i != j)
    torch.testing.assert_close(margin(*sums(h)), cross)


@pytest.mark.parametrize("b", [2, 8])
def test_margin_is_unbiased_for_the_squared_population_gradient(b: int) -> None:
    population, n = 0.5, 400_000
    h = torch.randn(b, n, dtype=torch.float64) + population
    estimate = margin(*sums(h)) / (b * (b - 1))
    error = (estimate.mean() - population**2).abs()
    noise = estimate.std() / n**0.5
    assert error < 4 * noise
    # with the variance divided by b − 1 once too often the same test must fail
    mu, var = h.mean(0), h.var(0, unbiased=True)
    wrong = (mu.square() - var / (b - 1)).mean()
    assert (wrong - population**2).abs() > 8 * noise


@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_noise_opens_as_often_as_the_null_level_says(b: int, gate: str) -> None:
    n = 200_000
    h = torch.randn(b, n, dtype=torch.float64)
    q = openness(*sums(h), b, gate)
    assert abs(q.mean().item() - null_openness(b, gate)) < 4 * q.std().item() / n**0.5


def test_null_levels_of_the_hard_gate() -> None:
    # Student's t with b − 1 degrees of freedom beyond 1, from a table
    expected = {2: 0.5, 4: 0.3910, 8: 0.3506, 16: 0.3332, 256: 0.3183}
    for b, level in expected.items():
        assert null_openness(b, "hard") == pytest.approx(level, abs=1e-4)


def test_soft_gate_grows_with_the_signal_and_stays_between_zero_and_one() -> None:
    h = torch.randn(8, 1000, dtype=torch.float64)
    h -= h.mean(0)  # the noise alone; the signal is added
    levels = [openness(*sums(h + s), 8, "soft") for s in torch.linspace(0, 5, 40, dtype=torch.float64)]
    for lower, higher in zip(levels, levels[1:], strict=False):
        assert (higher >= lower - 1e-12).all()
    assert levels[0].max() < 1e-12
    assert levels[-1].min() > 0.9 and levels[-1].max() <= 1


def test_one_example_on_a_coordinate_stays_closed() -> None:
    h = torch.zeros(8, 1000)
    h[3] = torch.randn(1000)  # G² = Q exactly, in float32 too
    for gate in ("hard", "soft"):
        assert openness(*sums(h), 8, gate).count_nonzero() == 0


def test_untouched_coordinates_are_closed_and_finite() -> None:
    zero = torch.zeros(10)
    for gate in ("hard", "soft"):
        assert torch.equal(openness(zero, zero, 8, gate), zero)


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"gate": "firm"}, "gate must be one of"),
        ({"num_examples": 1}, "at least 2 examples"),
    ],
)
def test_bad_input_is_named(kwargs: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        openness(torch.ones(2), torch.ones(2), **{"num_examples": 4, **kwargs})  # type: ignore[arg-type]


@pytest.mark.parametrize("gate", ["hard", "soft"])
@pytest.mark.parametrize("alpha", [0.1 / 1.9, 0.5])
def test_streaming_rule_on_white_noise_matches_its_null_level(gate: str, alpha: float) -> None:
    beta1, rho, n = 0.9, 0.999, 20_000
    m, s = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for _ in range(4000):
        g = torch.randn(n, dtype=torch.float64)
        s = rho * s + (1 - rho) * (g - m).square()
        m = beta1 * m + (1 - beta1) * g
    q = streaming_openness(m.square(), s / (1 - rho**4000), alpha, gate)
    assert q.mean().item() == pytest.approx(streaming_null_openness(alpha, beta1, gate), abs=0.012)


def test_the_published_alpha_closes_almost_everything() -> None:
    assert streaming_null_openness(1.0, 0.9, "hard") < 1e-4
    assert 0.25 < streaming_null_openness(0.1 / 1.9, 0.9, "hard") < 0.35
