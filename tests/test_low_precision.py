"""scripts/low_precision.py."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import low_precision


@pytest.mark.parametrize("problem", ["regression", "language_model"])
def test_kahan_follows_float32(problem: str) -> None:
    run, setting, steps = {
        "regression": (low_precision.regression, 0.99, 200),
        "language_model": (low_precision.language_model, 3e-5, 20),
    }[problem]
    fell = {}
    for name, kind in low_precision.KINDS.items():
        start, end = run(*kind, steps, setting)
        fell[name] = start - end
    assert fell["float32"] > 0
    wrong = {name: abs(x - fell["float32"]) for name, x in fell.items()}
    assert wrong["bfloat16, kahan"] < 0.5 * wrong["bfloat16"]
