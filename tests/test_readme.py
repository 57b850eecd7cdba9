"""The guides' loops, run as they are printed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import rows, tiny_model, token_examples
from torch.utils.data import DataLoader

from hf_poprisk import PopRiskAdamW
from hf_poprisk.output_space import load_recording
from hf_poprisk.output_space.analysis import Analysis

README = Path(__file__).parents[1] / "README.md"
GUIDES = [
    README.parent / "hf_poprisk" / folder / "README.md" for folder in ("", "per_example", "output_space")
]


def block(name: str) -> str:
    text = "".join(page.read_text() for page in GUIDES)
    found = re.search(rf"<!-- test: {name} -->\n```python\n(.*?)```", text, re.S)
    assert found, f"no guide has a block {name}"
    return found.group(1)


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def run(name: str, **names: Any) -> dict[str, Any]:
    exec(block(name), names)
    return names


def test_both_loops_run_and_agree() -> None:
    """The same sixteen examples in two steps, through README's plain loop and its accelerate loop."""
    examples = token_examples(16)
    plain, prepared, before = tiny_model(), tiny_model(), weights(tiny_model())
    after = run("plain", model=plain, batches=[examples[:8], examples[8:]])
    names = run("accelerate", model=prepared, loader=DataLoader(rows(16), batch_size=1), use_cpu=True)
    for optimizer in (after["optimizer"], names["gated"]):
        assert isinstance(optimizer, PopRiskAdamW)
        logs = optimizer.statistics.pop("examples")
        assert logs["poprisk/examples"] == 8 and 0.05 < logs["poprisk/fraction_open"] < 0.95
    for p, q in zip(weights(plain), weights(prepared), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert any((p != w).any() for w, p in zip(before, weights(plain), strict=True))


def test_the_batched_loop_runs(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    names = run("batched", model=model, collated=DataLoader(rows(16), batch_size=8))
    assert not names["layers"].uncovered and "'poprisk/examples': 8.0" in capsys.readouterr().out
    assert any((p != w).any() for w, p in zip(weights(tiny_model()), weights(model), strict=True))


def test_the_loop_around_other_optimizers_runs() -> None:
    model, examples = tiny_model(), token_examples(16)
    gate, plain = run("around", model=model, batches=[examples[:8], examples[8:]])["gates"]
    assert gate.statistics.pop("examples")["poprisk/examples"] == 8 and not plain.statistics.pop("examples")
    assert any((p != w).any() for w, p in zip(weights(tiny_model()), weights(model), strict=True))


def test_every_file_readme_names_is_there() -> None:
    root = README.parent
    text = "".join(page.read_text() for page in (README, *GUIDES))
    for path in re.findall(r"`((?:recipes|scripts|hf_poprisk)/[\w./-]+)`", text):
        assert (root / path).exists(), path


def test_the_class_of_ones_own_can_be_made() -> None:
    """README's example of both mixins before a trainer."""
    found = re.search(r"```python\n(.*?)```", README.read_text(), re.S)
    names: dict[str, Any] = {}
    exec(found[1], names)  # type: ignore[index]
    assert names["Arguments"](output_dir="unused", use_cpu=True).optim == "poprisk_adamw"


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layer(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_the_recorded_run_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = [{"x": torch.randn(4), "labels": i % 3} for i in range(32)]
    run("output space", model=Classifier(), train_data=data[:24], test_data=data[24:])
    recording = load_recording("seen")
    assert recording.steps == list(range(0, 31, 3)) and recording.rule == "gradient descent"
    assert recording.series["outputs"][0].shape == (24, 3)
    assert Analysis(recording).transfer_error.max() < 0.05
