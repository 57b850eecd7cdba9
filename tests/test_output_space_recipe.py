"""The recipe of five kinds of training: one of them again, its page, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import output_space
from common import RecipeError

from hf_poprisk.output_space import load_recording


def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    output_space.main(["page"])
    page = output_space.RESULTS.parents[1] / "OUTPUT_SPACE.md"
    assert page.read_text() == capsys.readouterr().out
    for kind in output_space.KINDS:
        figure = f"results/output_space_{kind.__name__}.png"
        assert f"]({figure})" in page.read_text() and (page.parent / figure).is_file()


def test_benign_overfitting_is_reproduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_space, "OUTPUTS", tmp_path)
    row, figure = output_space.benign()
    stored = json.loads(output_space.RESULTS.read_text())["benign"]
    exact = {name: value for name, value in stored.items() if name not in ("transfer_error", "train_loss")}
    assert {name: row[name] for name in exact} == pytest.approx(exact, rel=1e-4, abs=1e-6)
    assert row["transfer_error"] < 1e-9 and row["train_loss"] < 1e-6 and len(figure.axes) == 2


def test_what_a_direction_lost_is_known_for_a_linear_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_space, "OUTPUTS", tmp_path)
    x = torch.eye(4).double() * torch.tensor([2.0, 1.0, 0.5, 0.0])
    y = torch.ones(4).double()
    model = output_space.Regressor(nn.Linear(4, 1, bias=False))
    nn.init.zeros_(model.body.weight)
    rate, data = output_space.stable_rate(x), (output_space.rows(x, y), output_space.rows(x, y))
    assert rate == pytest.approx(0.9)
    directions = {str(i): torch.eye(4)[i] for i in range(4)}
    folder = output_space.train("linear", model, data, rate, 10, directions, 5)
    assert load_recording(folder).steps == [0, 1, 2, 3, 6, 10]
    for i, feature in enumerate((2.0, 1.0, 0.5, 0.0)):
        kept = (1 - rate * 2 * feature**2 / 4) ** 10
        assert output_space.gone(folder, str(i))[-1] == pytest.approx(1 - kept**2)
    # a test output moves by 1 − r along its own direction
    assert output_space.seen_at_test(folder, "2", "1")[-1] == pytest.approx(
        (1 - (1 - rate / 8) ** 10) / (1 - (1 - rate / 2) ** 10)
    )


def test_unknown_names_are_refused() -> None:
    for argv in (["benign", "other"], ["page", "benign"]):
        with pytest.raises(RecipeError, match="give some of benign, descent, bias, grokking, dpo, or page"):
            output_space.main(argv)
