"""``hf-poprisk audit``: its options, the printed report and the figure."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_poprisk.__main__ import main
from hf_poprisk.leave_one_out import NoiseFit
from leave_one_out.judged import CHANCE, FIT, WRONG, N, command, log_odds, posterior, refused, save_run


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--to", "x"], "--to has no effect without --write."),
        (["--write", "filtered", "--to", "x"], "--write needs --dataset and --to FOLDER."),
        (["--write", "filtered", "--dataset", "x"], "--write needs --dataset and --to FOLDER."),
        (["--force"], "--force has no effect without --write."),
        (["--split", "train"], "--split has no effect without --dataset."),
        (["--config_name", "x"], "--config_name has no effect without --dataset."),
        (["--plot", "figure.pdf"], "--plot figure.pdf must end in .png."),
        (["--page", "page.html"], "--page needs --dataset."),
        (["--page", "page.txt", "--dataset", "x"], "--page page.txt must end in .html."),
    ],
)
def test_options_are_refused_before_any_work(
    tmp_path: Path, capsys: Any, options: list[str], says: str
) -> None:
    # the run is not there, and that would be noticed first if anything were read
    assert refused(capsys, tmp_path / "nowhere", *options) == says


def test_targets_are_refused_before_any_work(tmp_path: Path, saved: Path, capsys: Any) -> None:
    write = ["--dataset", saved, "--write", "filtered", "--to"]
    nowhere, file, folder = tmp_path / "nowhere", tmp_path / "file", tmp_path / "x.png"
    file.write_text("mine")
    folder.mkdir()
    (folder / "mine").write_text("")
    assert refused(capsys, nowhere, *write, folder) == f"--to {folder} is not empty: give another folder."
    assert refused(capsys, nowhere, *write, file) == f"--to {file} is a file: give a folder."
    assert f"--to {saved}/new lies inside the data" in refused(capsys, nowhere, *write, saved / "new")
    assert file.read_text() == "mine" and (folder / "mine").is_file()


@pytest.mark.parametrize("wrong", [["--writ", "filtered"], ["--write", "shuffled"], ["--shown", "5"], []])
def test_argparse_refuses(run: Path, capsys: Any, wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["audit", str(run), *wrong] if wrong else [])
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


def test_missing_packages(
    run: Path, saved: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("sklearn", "matplotlib", "datasets", "pyarrow"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            sentence = refused(capsys, run, "--dataset", saved, "--plot", tmp_path / "figure.png")
            assert f"needs {package}: pip install 'hf_poprisk[recipes]'." in sentence
    for package in ("matplotlib", "datasets", "sklearn"):
        monkeypatch.setitem(sys.modules, package, None)
    assert "most suspicious" in command(capsys, run)  # which needs none of these


def test_interrupted(run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_poprisk.leave_one_out.audit.load_run", stop)
    with pytest.raises(SystemExit) as stopped:
        main(["audit", str(run)])
    assert stopped.value.code == 130 and "interrupted" in capsys.readouterr().err


def test_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hf_poprisk", "audit", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"hf-poprisk audit: error: {tmp_path / 'nowhere'} is not a folder.\n"


def test_help_names_every_option(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["audit", "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    for option in ("--dataset", "--split", "--config_name", "--plot", "--page", "--write", "--to", "--force"):
        assert re.search(rf"^  {option}.*\n? *\w", out, re.M)


# -- the report ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fit", "says"),
    [
        (FIT, "Noise rate: 25.0%, 95% interval 15.0% to 33.0%."),
        (CHANCE, "Do not filter by it: the model's gradients predict labels hardly better than by chance: "),
        (replace(FIT, high=0.44), "by it: the pairs leave the noise rate open (0.150 to 0.440): more pairs"),
    ],
)
def test_pairs_that_tell_little_are_named(tmp_path: Path, capsys: Any, fit: NoiseFit, says: str) -> None:
    out = command(capsys, save_run(tmp_path / "run", fit=fit))
    assert says in out and ("Noise rate: open" in out) == (fit is not FIT)


def test_report_without_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = command(capsys, run)
    p_correct = np.array([posterior(float(z)) for z in log_odds()])
    below, worst = p_correct < 0.5, np.argsort(log_odds())[:10]
    assert out.splitlines() == [
        f"{run}: 60 preference pairs",
        "Noise rate: 25.0%, 95% interval 15.0% to 33.0%.",
        f"Labels below .5: {below.sum()} of 60 ({below.mean():.1%}).",
        f"Precision at that cut: {1 - p_correct[below].mean():.0%} expected to be mislabeled.",
        "",
        "The most suspicious:",
        *(f"  {i}, correct with probability {p_correct[i]:.3f}" for i in worst),
    ]


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


def test_figure(run: Path, saved: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    path, figures, save = tmp_path / "deep" / "figure.png", [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    command(capsys, run, "--dataset", saved, "--plot", path)
    assert path.read_bytes().startswith(b"\x89PNG") and [p.name for p in path.parent.iterdir()] == [path.name]
    axis = figures[0].axes[0]
    below = sum(posterior(float(z)) < 0.5 for z in log_odds())
    first, others = ([bar for bar in bars if bar.get_height()] for bars in axis.containers[:2])
    assert sum(bar.get_height() for bar in first) == below
    assert sum(bar.get_height() for bar in others) == N - below
    assert max(bar.get_x() for bar in first) < 0.5 - 1e-9 <= min(bar.get_x() for bar in others)
    names = {text.get_text() for text in axis.get_legend().get_texts()}
    assert {f"below .5 ({below})", "known to be mislabeled (15)"} <= names

    def full(self: Figure, path: Path, **kwargs: Any) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    path.write_text("before")
    monkeypatch.setattr(Figure, "savefig", full)
    assert "No space left" in refused(capsys, run, "--plot", path)
    assert path.read_text() == "before" and [p.name for p in path.parent.iterdir()] == [path.name]
