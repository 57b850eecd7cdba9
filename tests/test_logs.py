"""GateStatistics: sums per parameter, whichever of them have a gradient together."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_poprisk.logs import GateStatistics

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
