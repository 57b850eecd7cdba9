"""The command line."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_poprisk.__main__ import main
from leave_one_out.judged import command, refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--to", "x"], "--to has no effect without --write."),
        (["--write", "filtered", "--to", "x"], "--write needs --dataset and --to FOLDER."),
        (["--write", "filtered", "--dataset", "x"], "--write needs --dataset and --to FOLDER."),
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


@pytest.mark.parametrize("package", ["sklearn", "matplotlib", "datasets", "pyarrow"])
def test_missing_packages(
    run: Path, saved: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    sentence = refused(capsys, run, "--dataset", saved, "--plot", tmp_path / "figure.png")
    assert f"needs {package}: pip install 'hf_poprisk[recipes]'." in sentence


def test_matplotlib_is_needed_for_figures_only(
    run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("matplotlib", "datasets", "sklearn"):
        monkeypatch.setitem(sys.modules, package, None)
    assert "most suspicious" in command(capsys, run)


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
    for option in ("--dataset", "--split", "--config_name", "--plot", "--page", "--write", "--to"):
        assert re.search(rf"^  {option} .*\n? *\w", out, re.M)
