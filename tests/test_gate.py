"""The rule against its textbook form, and its level under pure noise."""

from typing import Any

import pytest
import reference
import torch

from hf_poprisk.gate import margin, null_openness, openness
from hf_poprisk.streaming import streaming_null_openness, streaming_openness

BATCHES = (2, 4, 8, 16, 64)


def sums(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return h.sum(0), h.square().sum(0)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("gate", ["hard", "soft", "none"])
def test_two_sums_decide_as_mean_and_variance_do(gate: str, b: int, scale: float) -> None:
    population = 0.3 * torch.randn(50_000, dtype=torch.float64)
    h = scale * (population + torch.randn(b, 50_000, dtype=torch.float64))
    q = openness(*sums(h), b, gate)
    torch.testing.assert_close(q, reference.openness(h, gate), rtol=1e-9, atol=1e-9)
    if gate == "hard":
        assert 0.1 < q.mean() < 0.9  # neither all open nor all closed, or the comparison says nothing


def test_margin_is_the_sum_of_cross_terms() -> None:
    h = torch.randn(6, 100, dtype=torch.float64)
    cross = sum(h[i] * h[j] for i in range(6) for j in range(6) if i != j)
    torch.testing.assert_close(margin(*sums(h)), cross)


@pytest.mark.parametrize("b", BATCHES)
@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_noise_opens_as_often_as_the_null_level_says(gate: str, b: int) -> None:
    n = 200_000
    q = openness(*sums(torch.randn(b, n, dtype=torch.float64)), b, gate)
    assert abs(q.mean().item() - null_openness(b, gate)) < 4 * q.std().item() / n**0.5


def test_null_levels_of_the_hard_gate() -> None:
    # Student's t with b − 1 degrees of freedom beyond 1, from a table
    expected = {2: 0.5, 4: 0.3910, 8: 0.3506, 16: 0.3332, 256: 0.3183}
    assert {b: null_openness(b, "hard") for b in expected} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_coordinates_of_one_example_or_of_none_stay_closed(gate: str) -> None:
    h = torch.zeros(8, 1000)
    h[3, :900] = torch.randn(900)  # G² = Q exactly, in float32 too
    assert torch.equal(openness(*sums(h), 8, gate), torch.zeros(1000))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"gate": "firm"}, "gate must be one of"), ({"num_examples": 1}, "at least 2 examples")],
)
def test_bad_input_is_named(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        openness(torch.ones(2), torch.ones(2), **{"num_examples": 4, **options})


@pytest.mark.parametrize("gate", ["hard", "soft"])
@pytest.mark.parametrize("alpha", [0.1 / 1.9, 0.5])
def test_streaming_rule_on_white_noise_matches_its_null_level(alpha: float, gate: str) -> None:
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
