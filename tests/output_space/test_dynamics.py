"""Gramian, propagator and transfer against closed forms and against what training did."""

from pathlib import Path

import pytest
import torch
from runs import M, N, Regression, displacement, examples, flat, predicted, recorder, relative, train
from torch import Tensor, nn
from torch.func import jacrev

from hf_poprisk.output_space import Recording, split
from hf_poprisk.output_space.analysis import Analysis
from hf_poprisk.output_space.dynamics import evolve, nothing
from hf_poprisk.output_space.recording import FLOW, GRADIENT_DESCENT


@pytest.mark.parametrize("kind", ["linear", "a head on random features, two outputs"])
def test_a_kernel_that_stands_still_is_its_closed_form(tmp_path: Path, kind: str) -> None:
    """W, P, 𝒢, channel and reservoir of least squares, recorded three times only."""
    width, k, eta, steps = (4, 1, 0.3, 40) if kind == "linear" else (5, 2, 0.5, 30)
    head = nn.Linear(width, k, bias=False)
    below = nn.Identity() if k == 1 else nn.Sequential(nn.Linear(4, width), nn.Tanh()).requires_grad_(False)
    data, test = examples(N, 4, k), examples(M, 4, k)
    model, callback = Regression(below, head), recorder(data, test, [0, 25])
    run = train(tmp_path, model, data, callback, learning_rate=eta, max_steps=steps)
    assert run.rule == GRADIENT_DESCENT and run.steps == [0, 25, steps] and len(run.learning_rates) == steps
    phi, phi_test = (below(torch.stack([row["x"] for row in rows])) for rows in (data, test))
    kernel, cross = (torch.kron(x @ phi.T, torch.eye(k).double()) for x in (phi, phi_test))
    close = {"rtol": 1e-8, "atol": 1e-9}
    for recorded in run.series["kernel"]:
        torch.testing.assert_close(recorded, kernel, **close)
    values, vectors = torch.linalg.eigh(kernel / N)
    kept = (1 - eta * values) ** steps  # of each mode
    summed = torch.where(values > 1e-9, (1 - kept) / values, eta * steps)
    end, g = Analysis(run).evolutions[-1], flat(run, "gradients")
    torch.testing.assert_close(end.gramian, (vectors * N * (1 - kept**2) / 2) @ vectors.T, **close)
    torch.testing.assert_close(end.propagator, (vectors * kept) @ vectors.T, **close)
    torch.testing.assert_close(end.transfer, cross @ (vectors * summed) @ vectors.T, **close)
    cut = split(end.gramian)
    assert cut.channel == width * k
    reservoir = cut.vectors[:, cut.channel :]
    assert (kernel @ reservoir).abs().max() < 1e-8 and (end.transfer @ reservoir).abs().max() < 1e-8
    torch.testing.assert_close(end.propagator @ g, flat(run, "gradients", -1), **close)
    torch.testing.assert_close(-end.transfer @ g, displacement(run), **close)
    fallen = run.series["losses"][0] - run.series["losses"][-1]
    torch.testing.assert_close(g @ end.gramian @ g, fallen, rtol=1e-10, atol=0)


def test_a_mode_decays_exponentially_in_the_limit_of_small_steps() -> None:
    j = torch.randn(N, 4).double()
    values, vectors = torch.linalg.eigh(j @ j.T)
    b, time = torch.eye(N).double() / N, 3.0
    found = evolve(j @ j.T, j[:2] @ j.T, b, [time / 7] * 7, FLOW)
    decay = torch.exp(-values * time / N)
    torch.testing.assert_close(found.propagator, (vectors * decay) @ vectors.T, rtol=1e-10, atol=1e-12)
    gaps = []
    for count in (1000, 2000):  # gradient descent tends to it, in proportion to its step
        steps = evolve(j @ j.T, j[:2] @ j.T, b, [time / count] * count, GRADIENT_DESCENT)
        pairs_of = ((getattr(steps, f), getattr(found, f)) for f in ("propagator", "gramian", "transfer"))
        gaps.append(torch.stack([(a - e).abs().max() for a, e in pairs_of]))
    torch.testing.assert_close(gaps[0] / gaps[1], torch.full((3,), 2.0).double(), rtol=0.02, atol=0)
    assert gaps[1].max() < 0.01


@pytest.mark.parametrize("rule", [GRADIENT_DESCENT, FLOW])
def test_the_reservoir_is_invisible_at_test_time_whatever_the_kernel_does(rule: str) -> None:
    """K, K_QS and B of four intervals that share nothing but a null space; B as uneven as a classifier's."""
    span, whole = torch.randn(N, 6).double(), nothing(N, M)
    for _ in range(4):
        features = torch.randn(6, 9).double()
        j, j_test = span @ features, torch.randn(M, 9).double()
        curvature = torch.diag(torch.rand(N).double() ** 4) / N
        rates = (torch.rand(8).double() * 0.01).tolist()
        whole = whole.then(evolve(j @ j.T, j_test @ j.T, curvature, rates, rule))
    assert whole.stable
    values, vectors = torch.linalg.eigh(whole.gramian)
    kernel = vectors[:, values < 1e-12 * values[-1]]
    assert kernel.shape[1] == N - 6 and split(whole.gramian).channel == 6
    assert (span.T @ kernel).abs().max() < 1e-8
    assert (whole.transfer @ kernel).abs().max() < 1e-8 < whole.transfer.abs().max()


def test_feature_learning_is_predicted_and_better_with_smaller_steps(tmp_path: Path) -> None:
    """Where it ends within 5 % for every step, on the way better with smaller ones."""
    ends, worst, fallen = [], [], []
    for eta in (1.6, 0.8, 0.4):
        torch.manual_seed(3)
        data, test = examples(N), examples(M)
        for row in (*data, *test):
            row["labels"] = torch.tanh(row["x"][:1] - row["x"][1:2])
        model = Regression(nn.Linear(3, 20, bias=False), nn.Tanh(), nn.Linear(20, 1, bias=False))
        with torch.no_grad():  # from a small start the kernel must grow before anything is learned
            for p in model.parameters():
                p.mul_(0.3)
        settings = {"learning_rate": eta, "max_steps": round(60 / eta)}
        run = train(tmp_path / str(eta), model, data, recorder(data, test), **settings)
        kernels = run.series["kernel"]
        assert relative(kernels[-1], kernels[0]) > 1  # it moves by more than its own norm
        found = Analysis(run)
        ends.append(float(found.transfer_error[-1]))
        worst.append(float(found.transfer_error.max()))
        fallen.append(abs(float(found.predicted.sum() / found.measured.sum()) - 1))
        curvature = torch.block_diag(*run.series["curvatures"][0])
        frozen = evolve(kernels[0], run.series["cross_kernel"][0], curvature, run.learning_rates, run.rule)
        lazy = -frozen.transfer @ flat(run, "gradients")
        assert relative(lazy, displacement(run)) > 0.15  # lazy training is not it
    assert max(ends) < 0.05 and worst[-1] < 0.05 and fallen[-1] < 0.01, (ends, worst, fallen)
    for errors, least in ((ends, 1.5), (worst, 3.0), (fallen, 3.0)):
        assert all(a / b > least for a, b in zip(errors, errors[1:], strict=False)), errors


def descent(eta: float, time: float) -> Recording:
    """Gradient descent of a small network without a trainer, every step recorded."""
    torch.manual_seed(3)
    x, x_test, w = torch.randn(6, 3).double(), torch.randn(4, 3).double(), torch.randn(32).double() / 4
    y = torch.tanh(x[:, 0] - x[:, 1])

    def network(w: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ w[:24].view(3, 8)) @ w[24:]

    run = Recording(GRADIENT_DESCENT, "SGD", "none", learning_rates=[eta] * round(time / eta))
    for step in range(len(run.learning_rates) + 1):
        u, u_test, j, j_test = (f(w, part) for f in (network, jacrev(network)) for part in (x, x_test))
        g = (u - y) / len(y)
        values = {"kernel": j @ j.T, "cross_kernel": j_test @ j.T, "gradients": g[:, None]}
        values |= {"curvatures": torch.ones(6, 1, 1).double() / 6, "losses": (u - y).square().mean() / 2}
        values |= {"outputs": u[:, None], "test_outputs": u_test[:, None], "test_losses": u.new_zeros(())}
        run.add(step, values)
        w = w - eta * j.T @ g
    return run


def test_the_loss_is_followed_to_second_order_and_displacements_to_first() -> None:
    errors = []
    for eta in (0.1, 0.05):
        run = descent(eta, 12.0)
        found = Analysis(run)
        missed = abs(float(found.predicted.sum() - found.measured.sum()))
        errors.append((float((predicted(run) - displacement(run)).norm()), missed))
    (far, loss_far), (near, loss_near) = errors
    assert far / near == pytest.approx(2, abs=0.15) and loss_far / loss_near == pytest.approx(4, abs=0.15)


def test_the_flow_of_a_moving_kernel_is_followed_from_the_middle() -> None:
    """Gradient descent in tiny steps, 60 or 30 of which are given as one: an error of second order."""
    whole, errors = descent(0.01, 6.0), []
    for gap in (60, 30):
        series = {name: values[::gap] for name, values in whole.series.items()}
        count = 600 // gap
        rates = [0.01 * gap] * count
        found = Analysis(Recording(FLOW, "SGD", "none", {}, [*range(count + 1)], rates, series))
        errors.append(abs(float(found.predicted.sum() / found.measured.sum()) - 1))
    assert errors[1] < 0.001 and errors[0] / errors[1] > 2.5


@pytest.mark.parametrize(
    ("values", "channel"),
    [
        ((5, 4, 3, 1e-3, 1e-4), 3),
        ((5, 1, 0.5, 0, 0, 0), 3),
        ((5, 4, 3, 2.6), 4),  # of one piece
        ((5, 4.9, 1.5, 1.4), 2),
        ((0, 0, 0), 0),
        ((1, 0), 1),
    ],
)
def test_the_cut_of_a_spectrum(values: tuple[float, ...], channel: int) -> None:
    basis = torch.linalg.qr(torch.randn(len(values), len(values)).double()).Q
    cut = split((basis * torch.tensor(values).double()) @ basis.T)
    assert cut.channel == channel
    mixed = 3 * cut.vectors[:, 0] + 4 * cut.vectors[:, -1]
    expected = {0: 1.0, len(values): 0.0}.get(channel, 16 / 25)
    assert cut.reservoir_share(mixed[:, None]) == pytest.approx(expected)
