"""The report on a recorded run, and what the command line refuses."""

import base64
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import M, N, Regression, examples, network, recorder, train
from torch import nn

from hf_poprisk.__main__ import main
from hf_poprisk.output_space import RecordingError, load_recording
from hf_poprisk.output_space.analysis import Analysis
from hf_poprisk.output_space.recording import FILE_NAME, FLOW
from hf_poprisk.output_space.report import SECTIONS, about_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run <b>")
    torch.manual_seed(0)
    data = examples(N)
    train(folder, network(8), data, recorder(data, examples(M), 2), learning_rate=0.1, max_steps=9)
    return folder


def test_the_page_is_whole_and_needs_nothing_else(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["output-space", str(run)])
    printed, text = capsys.readouterr().out, (run / "output_space.html").read_text()
    sources = re.findall(r'(?:src|href)="(.*?)"', text)  # what a browser would load
    assert len(sources) == 5 and "<b>" not in text  # the folder's name is escaped
    for source in sources:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert re.findall("<h2>(.*?)</h2>", text) == list(SECTIONS)
    recording = load_recording(run)
    analysis = Analysis(recording)
    assert "6 records from step 0 to 9; 12 probe and 5 test examples with 1 output each" in printed
    assert "full-batch gradient descent on the probe, and is followed as it was" in printed
    assert f"off by {100 * float(analysis.transfer_error[-1]):.3g} %" in printed
    assert f"has {analysis.splits[-1].channel} of 12 directions" in printed
    for line in printed.splitlines()[:2]:
        assert line in text
    assert sorted(p.name for p in run.iterdir()) == ["output_space.html", FILE_NAME]


def test_the_analysis_says_what_happened(run: Path) -> None:
    recording = load_recording(run)
    analysis = Analysis(recording)
    torch.testing.assert_close(analysis.predicted, analysis.measured, rtol=0.05, atol=1e-4)
    assert analysis.transfer_error.max() < 0.01 and analysis.stable
    assert analysis.leading == 6 and analysis.kernel_change[0] == 0
    assert float(analysis.alignment[0]) == pytest.approx(1) and 0 < analysis.alignment.min() < 1
    whole, cut = analysis.evolutions[-1].transfer, analysis.splits[-1]
    g = recording.series["gradients"][0].reshape(-1)
    inside = cut.vectors[:, : cut.channel] @ cut.vectors[:, : cut.channel].T @ g
    seen = (whole @ (g - inside)).norm() / (whole @ g).norm()
    torch.testing.assert_close(analysis.visible["initial error"][-1], seen)
    assert 0 < seen < 1
    total = torch.stack(recording.series["gradients"]).flatten(1).square().sum(1)
    torch.testing.assert_close(analysis.error_by_mode.sum(1), total)


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 1e9}])
def test_steps_too_large_for_the_theory_are_said(tmp_path: Path, settings: dict[str, float]) -> None:
    data, model = examples(6, 2), Regression(nn.Linear(2, 1))
    recording = train(tmp_path, model, data, recorder(data, data), learning_rate=4.0, **settings)
    assert (recording.rule == FLOW) == bool(settings)
    analysis = Analysis(recording)
    assert not analysis.stable and "no prediction below holds" in about_run(recording, analysis)[-1]


def test_nothing_moved_or_too_much_is_one_sentence(run: Path, tmp_path: Path) -> None:
    recording = load_recording(run)
    rates = recording.learning_rates
    recording.learning_rates = [0.0, 0.0, *rates[2:]]
    assert not Analysis(recording).splits[1].channel  # a warm-up that begins at 0
    recording.save(tmp_path)
    main(["output-space", str(tmp_path)])
    for wrong, message in ((0.0, "nothing moved"), (1e200, "from step 0 to 2 the picture")):
        recording.learning_rates = [wrong] * len(rates)
        with pytest.raises(RecordingError, match=message):
            Analysis(recording)


def test_bad_input_is_one_sentence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FILE_NAME).write_bytes((run / FILE_NAME).read_bytes()[:-9])
    (tmp_path / "f.html").mkdir()
    for options, message in (
        ([str(tmp_path / "none")], "holds no output_space.safetensors"),
        ([str(tmp_path)], "is damaged"),
        ([str(run), "--to", str(tmp_path / "page.pdf")], "must be a file that ends in .html"),
        ([str(run), "--to", str(tmp_path / "f.html")], "must be a file that ends in .html"),
        ([str(run), "--to", str(tmp_path / "none" / "page.html")], "does not exist"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["output-space", *options])
        printed = capsys.readouterr()
        assert stopped.value.code == 2 and message in printed.err and printed.err.count("\n") == 1
        assert not printed.out
    assert not list(tmp_path.glob("*page*"))


def test_importing_needs_neither_trl_nor_matplotlib() -> None:
    code = "import sys, hf_poprisk.__main__; print({'trl', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
