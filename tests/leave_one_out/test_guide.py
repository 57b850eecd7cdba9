"""The example of the package's README, run as it is printed."""

import re
from pathlib import Path

import pytest
import torch

import hf_poprisk
from hf_poprisk.leave_one_out.table import load_run
from leave_one_out.helpers import Classifier, examples


def test_the_judged_trainer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = Path(hf_poprisk.__file__).with_name("leave_one_out").joinpath("README.md").read_text()
    names = {"model": Classifier(), "data": examples()}
    torch.manual_seed(0)
    exec(re.search("<!-- test: judged -->\n```python\n(.*?)```", text, re.S)[1], names)
    run = load_run("judged")
    assert len(run.judged) == 60 and run.judged.all() and ((run.p_correct >= 0) & (run.p_correct <= 1)).all()
