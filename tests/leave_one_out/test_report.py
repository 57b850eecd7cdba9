"""The printed report and the figure."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_poprisk.__main__ import main
from hf_poprisk.leave_one_out import NoiseFit
from leave_one_out.judged import CHANCE, FIT, WRONG, N, command, log_odds, posterior, refused, save_run


@pytest.mark.parametrize(
    ("fit", "says"),
    [
        (FIT, "Noise rate: 25.0%, 95% interval 15.0% to 33.0%."),
        (CHANCE, "Do not filter by it: the model's gradients predict labels hardly better than by chance: "),
        (
            replace(FIT, high=0.44),
            "Do not filter by it: the pairs leave the noise rate open (0.150 to 0.440)",
        ),
        (
            replace(FIT, low=0.0, high=0.31),
            "leave the noise rate open (0.000 to 0.310): more pairs may tell.",
        ),
    ],
)
def test_pairs_that_tell_little_are_named(tmp_path: Path, capsys: Any, fit: NoiseFit, says: str) -> None:
    out = command(capsys, save_run(tmp_path / "run", fit=fit))
    assert says in out and ("Noise rate: open" in out) == (fit is not FIT)


def test_report_without_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = command(capsys, run)
    p_correct = np.array([posterior(float(z)) for z in log_odds()])
    below, worst = p_correct < 0.5, np.argsort(log_odds())[:10]
    assert out.splitlines()[:6] == [
        f"{run}: 60 preference pairs",
        "Noise rate: 25.0%, 95% interval 15.0% to 33.0%.",
        f"Labels below .5: {below.sum()} of 60 ({below.mean():.1%}).",
        f"Precision at that cut: {1 - p_correct[below].mean():.0%} expected to be mislabeled.",
        "",
        "The most suspicious:",
    ]
    assert out.splitlines()[6:] == [f"  {i}, correct with probability {p_correct[i]:.3f}" for i in worst]


def test_report_with_truth(tmp_path: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = command(capsys, save_run(tmp_path / "run", never=(0, 1)), "--dataset", saved)
    seen = np.arange(N) > 1
    below = np.array([posterior(float(z)) < 0.5 for z in log_odds()]) & seen
    hits = (below & WRONG).sum()
    precision, recall = hits / below.sum(), hits / (WRONG & seen).sum()
    above = log_odds()[seen & ~WRONG][:, None], log_odds()[seen & WRONG]
    auroc = (above[0] > above[1]).mean()
    assert 0 < recall < 1 and auroc < 1  # the example has something to miss
    assert "58 preference pairs (2 more were never judged)" in out
    assert (
        f"Known to be mislabeled (is_flipped): {(WRONG & seen).sum()} of 58. Below .5: precision "
        f"{precision:.1%}, recall {recall:.1%}; AUROC {auroc:.3f}." in out
    )
    worst = int(np.argmin(log_odds()))
    assert f"  {worst}, correct with probability 0.0" in out and ", mislabeled\n" in out
    assert all(f"{name} {worst}\n" in out for name in ("prompt: prompt", "chosen: good", "rejected: bad"))


def test_figure(run: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    path, figures, save = tmp_path / "deep" / "figure.png", [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    main(["audit", str(run), "--dataset", str(saved), "--plot", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG") and [p.name for p in path.parent.iterdir()] == [path.name]
    axis = figures[0].axes[0]
    below = sum(posterior(float(z)) < 0.5 for z in log_odds())
    first, others = ([bar for bar in bars if bar.get_height()] for bars in axis.containers[:2])
    assert sum(bar.get_height() for bar in first) == below
    assert sum(bar.get_height() for bar in others) == N - below
    assert max(bar.get_x() for bar in first) < 0.5 - 1e-9 <= min(bar.get_x() for bar in others)
    names = {text.get_text() for text in axis.get_legend().get_texts()}
    assert {f"below .5 ({below})", "known to be mislabeled (15)"} <= names


def test_figure_is_not_left_half_written(
    run: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    def full(self: Figure, path: Path, **kwargs: Any) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "figure.png").write_text("before")
    monkeypatch.setattr(Figure, "savefig", full)
    assert "No space left" in refused(capsys, run, "--plot", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_text() == "before" and not list(tmp_path.glob(".*"))
