"""GateStatistics: sums per parameter, whichever of them have a gradient together."""

import random
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_poprisk.statistics import GateStatistics

NAMES = [f"layer.{i}" for i in range(12)]


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(3, i + 1)) for i, name in enumerate(NAMES)}


def names(params: dict[str, nn.Parameter]) -> dict[Tensor, str]:
    return {p: name for name, p in params.items()}


def random_step(generator: random.Random) -> tuple[list[str], Tensor, float, int]:
    """Some parameters in any order, their sums, the null level, b."""
    some = generator.sample(NAMES, generator.randint(1, len(NAMES)))
    sums = torch.tensor([[generator.uniform(1, 9) for _ in range(4)] for _ in some])
    return some, sums, generator.random(), generator.randint(2, 5)


def textbook(steps: list[Any]) -> dict[str, dict[str, Any]]:
    """Plain loops over steps and parameters."""
    expected: dict[str, dict[str, Any]] = {}
    for some, sums, null, b in steps:
        for name, row in zip(some, sums.tolist(), strict=True):
            entry = expected.setdefault(
                name, {"steps": 0, "examples": 0, "null": 0.0, "sums": [0.0, 0.0, 0.0, 0.0]}
            )
            entry["steps"] += 1
            entry["examples"] += b
            entry["null"] += null
            entry["sums"] = [x + y for x, y in zip(entry["sums"], row, strict=True)]
    return expected


def assert_are(found: dict[str, Any], expected: dict[str, dict[str, Any]]) -> None:
    assert found.keys() == expected.keys()
    for name, entry in expected.items():
        for key, value in entry.items():
            assert found[name][key] == pytest.approx(value, rel=1e-12), (name, key)
        openness, live, energy, sq_sum = entry["sums"]
        b = entry["examples"] / entry["steps"]
        assert found[name]["fraction_open"] == pytest.approx(openness / live)
        assert found[name]["fraction_open_null"] == pytest.approx(entry["null"] / entry["steps"])
        assert found[name]["margin"] == pytest.approx(b / (b - 1) * (energy - sq_sum) / energy)


@pytest.mark.parametrize("resumed", [False, True])
def test_random_sets_of_parameters_are_summed_as_single_ones(resumed: bool) -> None:
    generator, params = random.Random(0), parameters()
    statistics, steps = GateStatistics(), []
    for i in range(200):
        steps.append(random_step(generator))
        some, sums, null, b = steps[-1]
        statistics.add([params[name] for name in some], sums, null, b)
        if resumed and i == 100:
            saved, params, statistics = statistics.of_run(names(params)), parameters(), GateStatistics()
            statistics.load(saved, params)
            assert statistics.of_run(names(params)) == saved
    assert_are(statistics.of_run(names(params))["parameters"], textbook(steps))


def test_what_is_kept_grows_with_the_parameters_and_not_with_their_sets() -> None:
    generator, params = random.Random(0), list(parameters().values())
    statistics, sizes = GateStatistics(), []
    for _ in range(300):
        some = generator.sample(params, 6)
        statistics.add(some, torch.rand(6, 4), 0.5, 4)
        sizes.append(size(vars(statistics)))
    assert max(sizes[100:]) == max(sizes[:100])


def size(value: Any) -> int:
    """Bytes of containers and tensors all the way down, parameters aside."""
    if isinstance(value, nn.Parameter):
        return 0
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    inner = [*value, *value.values()] if isinstance(value, dict) else value
    inner = list(vars(value).values()) if hasattr(value, "__dict__") else inner
    held = sum(map(size, inner)) if isinstance(inner, list | tuple) else 0
    return sys.getsizeof(value) + held


def test_a_record_of_parameters_that_are_gone_is_left_out() -> None:
    params = parameters()
    statistics = GateStatistics()
    statistics.add(list(params.values()), torch.ones(len(params), 4), 0.5, 4)
    saved = statistics.of_run(names(params))
    del params["layer.3"]
    statistics.load(saved, params)
    assert statistics.of_run(names(params))["parameters"].keys() == params.keys()
    statistics.load({**saved, "parameters": {}}, params)
    assert statistics.of_run(names(params))["parameters"] == {}
