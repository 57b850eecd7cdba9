"""Five kinds of training in output space: one of them again, what is read from a run, and the guide."""

import re
from pathlib import Path

import output_space
import output_space_runs
import page
import pandas as pd
import pytest
import torch
from common import RecipeError
from torch import nn

HAND_WRITTEN = {"0.25", "0.07", "131%"}  # a setting, an error bar, of the last record


@pytest.fixture(autouse=True)
def _outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_space_runs, "OUTPUTS", tmp_path)


def test_benign_overfitting_is_reproduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (stored,) = pd.read_csv(output_space.results_of("benign"), engine="python").to_dict("records")
    monkeypatch.setattr(output_space, "results_of", lambda kind: tmp_path / f"{kind}.csv")
    (row,) = output_space.benign()
    assert list(row) == list(stored) and (tmp_path / "benign.png").is_file()
    tiny = {"largest error of the prediction": 1e-9, "training loss at the end": 1e-6}
    for name, value in row.items():
        assert value < tiny[name] if name in tiny else value == pytest.approx(stored[name], 1e-4, 1e-6), name


def test_what_a_direction_lost_is_known_for_a_linear_model() -> None:
    x, y = torch.eye(4).double() * torch.tensor([2.0, 1.0, 0.5, 0.0]), torch.ones(4).double()
    body, eye = nn.Linear(4, 1, bias=False), torch.eye(4)
    nn.init.zeros_(body.weight)
    rate = output_space.stable_rate(x)
    assert rate == pytest.approx(0.9)
    recording, found = output_space.train("linear", body, (x, y), (x, y), {}, rate, 10, records=5)
    assert recording.steps == [0, 1, 2, 3, 6, 10]
    for direction, feature in zip(eye, (2.0, 1.0, 0.5, 0.0), strict=True):
        kept = (1 - rate * 2 * feature**2 / 4) ** 10
        assert output_space.gone(found, direction)[-1] == pytest.approx(1 - kept**2)
    # a test output moves by 1 − r along its own direction
    expected = (1 - (1 - rate / 8) ** 10) / (1 - (1 - rate / 2) ** 10)
    assert output_space.seen_at_test(found, eye[2], eye[1])[-1] == pytest.approx(expected)


def test_the_numbers_of_the_guide_are_those_of_its_tables() -> None:
    text = page.GUIDE.read_text()
    figures = re.findall(r"\]\(([\w./]+\.png)\)", text)
    assert len(figures) == 1 and (page.GUIDE.parent / figures[0]).is_file()
    sections = [section for section in re.split(r"^## ", text, flags=re.M) if "<!-- generated" in section]
    assert len(sections) == len(output_space.KINDS)
    for section in sections:
        generated = "".join(match[0] for match in page.MARKED.finditer(section))
        told = set(re.findall(r"\d+\.\d+%?|\d+%", page.MARKED.sub("", section)))
        known = set(re.findall(r"\d+\.\d+%?|\d+%", generated))
        assert told - HAND_WRITTEN <= known | {f"{float(x):.2f}" for x in known if "%" not in x}, section[:40]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(RecipeError, match="give some of benign, descent, bias, grokking, dpo, or nothing"):
        output_space.main(["benign", "other"])
