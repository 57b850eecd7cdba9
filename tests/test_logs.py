"""GateStatistics: sums per parameter, whichever of them have a gradient together."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_poprisk.logs import GateStatistics, noise_scale

NAMES = [f"layer.{i}" for i in range(12)]


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(3, i + 1)) for i, name in enumerate(NAMES)}


def of_run(statistics: GateStatistics, params: dict[str, nn.Parameter]) -> dict[str, Any]:
    return statistics.of_run({p: name for name, p in params.items()})


@pytest.mark.parametrize("resumed", [False, True])
def test_random_sets_of_parameters_are_summed_as_single_ones(resumed: bool) -> None:
    generator, params, statistics = random.Random(0), parameters(), GateStatistics()
    expected: dict[str, dict[str, Any]] = {}
    for step in range(200):
        some = generator.sample(NAMES, generator.randint(1, len(NAMES)))
        sums = torch.tensor([[generator.uniform(1, 9) for _ in range(4)] for _ in some])
        null, b = generator.random(), generator.randint(2, 5)
        statistics.add([params[name] for name in some], sums, null, b)
        for name, row in zip(some, sums.double(), strict=True):
            entry = expected.setdefault(name, {"steps": 0, "examples": 0, "null": 0.0, "sums": 0.0})
            for key, value in {"steps": 1, "examples": b, "null": null, "sums": row}.items():
                entry[key] += value
        if resumed and step == 100:
            saved, params, statistics = of_run(statistics, params), parameters(), GateStatistics()
            statistics.load(saved, params)
            assert of_run(statistics, params) == saved

    found = of_run(statistics, params)["parameters"]
    assert found.keys() == expected.keys()
    for name, entry in expected.items():
        opened, live, energy, sq_sum = entry["sums"] = entry["sums"].tolist()
        b = entry["examples"] / entry["steps"]
        entry |= {
            "numel": params[name].numel(),
            "fraction_open": opened / live,
            "fraction_open_null": entry["null"] / entry["steps"],
            "margin": b / (b - 1) * (energy - sq_sum) / energy,
        }
        assert found[name].pop("sums") == pytest.approx(entry.pop("sums"), rel=1e-12)
        assert found[name] == pytest.approx(entry, rel=1e-12)


def test_what_is_kept_grows_with_the_parameters_and_not_with_their_sets() -> None:
    generator, params = random.Random(0), list(parameters().values())
    statistics, sizes = GateStatistics(), []
    for _ in range(300):
        statistics.add(generator.sample(params, 6), torch.rand(6, 4), 0.5, 4)
        sizes.append(held(statistics))
    assert max(sizes[100:]) == max(sizes[:100])


def held(value: Any) -> int:
    """How many values are held, all the way down, parameters aside."""
    if isinstance(value, Tensor):
        return 0 if isinstance(value, nn.Parameter) else value.numel()
    if hasattr(value, "__dict__"):
        value = vars(value)
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return sum(map(held, value)) if isinstance(value, list | tuple | set) else 1


def test_a_record_of_parameters_that_are_gone_is_left_out() -> None:
    params, statistics, resumed = parameters(), GateStatistics(), GateStatistics()
    statistics.add(list(params.values()), torch.ones(len(params), 4), 0.5, 4)
    saved = of_run(statistics, params)
    del params["layer.3"]
    resumed.load(saved, params)
    assert of_run(resumed, params)["parameters"].keys() == params.keys()


def test_the_noise_scale_is_the_ratio_of_two_unbiased_estimates() -> None:
    """By hand from single gradients, and near the closed form where mean and covariance are known."""
    torch.manual_seed(0)
    b, mean, std = 8, torch.linspace(-0.2, 0.2, 500), torch.linspace(0.5, 1.5, 500)
    statistics, traces, norms = GateStatistics(), [], []
    param = nn.Parameter(torch.zeros(500))
    for _ in range(400):
        gradients = (mean + std * torch.randn(b, 500)).double()  # of the examples; h is 1/b of them
        g, q = gradients.mean(0), (gradients / b).square().sum(0)
        traces.append(gradients.var(0, correction=1).sum())
        norms.append(g.square().sum() - traces[-1] / b)
        sums = torch.stack([torch.tensor(250.0), torch.tensor(500.0), g.square().sum(), q.sum()])
        statistics.add([param], sums[None].double(), 0.35, b)
    found = statistics.pop("examples")["poprisk/noise_scale"]
    assert found == pytest.approx(float(sum(traces) / sum(norms)), rel=1e-6)
    assert found == pytest.approx(float(std.square().sum() / mean.square().sum()), rel=0.05)
    assert noise_scale(4, 16.0, 4.0) == 0  # four times the same gradient
    statistics.add([param], torch.tensor([[1.0, 2.0, 3.0, 3.0]]), 0.35, b)  # no signal
    statistics.add([param], torch.tensor([[1.0, 2.0, 3.0, 1.0]]), 0.35, b)
    assert "poprisk/noise_scale" not in statistics.pop("groups")
    statistics.add([param], torch.tensor([[1.0, 2.0, 3.0, 3.0]]), 0.35, b)
    assert "poprisk/noise_scale" not in statistics.pop("examples")
