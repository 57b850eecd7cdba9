"""The recipe of five kinds of training: one of them again, its page, and what it refuses."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "recipes" / "experiments")]

import output_space  # noqa: E402
import output_space_training  # noqa: E402
from common import RecipeError  # noqa: E402

from hf_poprisk.output_space import load_recording  # noqa: E402


def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    output_space.main(["page"])
    page = ROOT / "hf_poprisk" / "output_space" / "README.md"
    text = page.read_text()
    assert text == capsys.readouterr().out
    figures = re.findall(r"\]\(([\w./]+\.png)\)", text)
    assert len(figures) == 3 and all((page.parent / figure).is_file() for figure in figures)


def test_benign_overfitting_is_reproduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_space_training, "OUTPUTS", tmp_path)
    row, figure = output_space.benign()
    stored = json.loads(output_space.RESULTS.read_text())["benign"]
    exact = {name: value for name, value in stored.items() if name not in ("transfer_error", "train_loss")}
    assert {name: row[name] for name in exact} == pytest.approx(exact, rel=1e-4, abs=1e-6)
    assert row["transfer_error"] < 1e-9 and row["train_loss"] < 1e-6 and len(figure.axes) == 2


def test_what_a_direction_lost_is_known_for_a_linear_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_space_training, "OUTPUTS", tmp_path)
    x = torch.eye(4).double() * torch.tensor([2.0, 1.0, 0.5, 0.0])
    y = torch.ones(4).double()
    model = output_space_training.Regressor(nn.Linear(4, 1, bias=False))
    nn.init.zeros_(model.body.weight)
    rate, data = (
        output_space_training.stable_rate(x),
        (output_space_training.rows(x, y), output_space_training.rows(x, y)),
    )
    assert rate == pytest.approx(0.9)
    directions = {str(i): torch.eye(4)[i] for i in range(4)}
    folder = output_space_training.train("linear", model, data, rate, 10, directions, 5)
    assert load_recording(folder).steps == [0, 1, 2, 3, 6, 10]
    for i, feature in enumerate((2.0, 1.0, 0.5, 0.0)):
        kept = (1 - rate * 2 * feature**2 / 4) ** 10
        assert output_space_training.gone(folder, str(i))[-1] == pytest.approx(1 - kept**2)
    # a test output moves by 1 − r along its own direction
    assert output_space_training.seen_at_test(folder, "2", "1")[-1] == pytest.approx(
        (1 - (1 - rate / 8) ** 10) / (1 - (1 - rate / 2) ** 10)
    )


def test_unknown_names_are_refused() -> None:
    for argv in (["benign", "other"], ["page", "benign"]):
        with pytest.raises(RecipeError, match="give some of benign, descent, bias, grokking, dpo, or page"):
            output_space.main(argv)
