"""What a user meets first: names and signatures, classes of one's own, the install, and early words."""

import inspect
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from models import preferences, tiny_model, token_examples
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from trl import DPOTrainer, RewardTrainer, SFTTrainer

import hf_poprisk
from hf_poprisk import PopRiskArgumentsMixin, PopRiskMixin, PopRiskTrainer, PopRiskTrainingArguments

COMMON: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


# Names and signatures


def test_dir_lists_the_public_names_before_anything_of_trl_is_imported() -> None:
    code = "import sys, hf_poprisk; print(*dir(hf_poprisk)); assert 'trl' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {*hf_poprisk.__all__, "__version__"} <= set(done.stdout.split())


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
    assert hf_poprisk.__version__ == project["version"]


@pytest.mark.parametrize(
    ("ours", "stock"),
    [
        (PopRiskTrainer, Trainer),
        (hf_poprisk.PopRiskDPOTrainer, DPOTrainer),
        (hf_poprisk.PopRiskSFTTrainer, SFTTrainer),
        (hf_poprisk.PopRiskRewardTrainer, RewardTrainer),
    ],
)
def test_the_signature_is_the_stock_trainers(ours: type[Any], stock: type[Any]) -> None:
    assert inspect.signature(ours) == inspect.signature(stock)
    assert "train_dataset" in inspect.signature(ours.__init__).parameters

    class Own(ours):
        def __init__(self, extra: int) -> None: ...

    assert list(inspect.signature(Own).parameters) == ["extra"]  # what is not inherited is not hidden


# The install


def build(kind: str, root: Path, out: Path) -> Path:
    """What pip does: ask the build backend of the folder for a wheel, "wheel" or "editable"."""
    backend = tomllib.loads((root / "pyproject.toml").read_text())["build-system"]["build-backend"]
    pytest.importorskip(backend.partition(".")[0])
    out.mkdir()
    code = f"import {backend} as backend, sys; print(backend.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the project in a folder of the package's name, as `git clone` makes it."""
    source = Path(__file__).parents[1]
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source / "hf_poprisk", tmp_path / "hf_poprisk" / "hf_poprisk", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(source / name, tmp_path / "hf_poprisk")
    return tmp_path / "hf_poprisk"


def test_an_editable_install_is_found_from_above_the_clone(clone: Path, tmp_path: Path) -> None:
    wheel = build("editable", clone, tmp_path / "wheel")
    venv.create(tmp_path / "venv")
    [site] = (tmp_path / "venv").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # what the package needs, without this environment's own installation of it
    (site / "zz_dependencies.pth").write_text("\n".join(p for p in sys.path if "-packages" in p))
    code = "import hf_poprisk; print(hf_poprisk.__file__, hf_poprisk.__version__, hf_poprisk.PopRiskAdamW)"
    done = subprocess.run(
        [tmp_path / "venv/bin/python", "-c", code],
        cwd=clone.parent,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    file, version, *_ = done.stdout.split()
    assert (Path(file), version) == (clone / "hf_poprisk/__init__.py", hf_poprisk.__version__)


def test_the_wheel_holds_the_package_and_nothing_else(clone: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build("wheel", clone, tmp_path / "wheel")) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licenses = [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    files = {str(p.relative_to(clone)) for p in clone.glob("hf_poprisk/**/*") if p.is_file()}
    assert names == files and "hf_poprisk/py.typed" in names and licenses


# A trainer and a config of one's own


@dataclass
class Seq2SeqArguments(PopRiskArgumentsMixin, Seq2SeqTrainingArguments):
    """As a user writes it."""

    beams: int = field(default=1, metadata={"help": "A field of the user's own."})


class GatedSeq2SeqTrainer(PopRiskMixin, Seq2SeqTrainer):
    """As a user writes it."""


def translator() -> BartForConditionalGeneration:
    layers = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in _SIZES.items()}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return BartForConditionalGeneration(BartConfig(vocab_size=50, d_model=16, **layers, **ids))


_SIZES = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}


def translations(count: int) -> list[dict[str, torch.Tensor]]:
    return [{name: torch.randint(3, 50, (6,)) for name in ("input_ids", "labels")} for _ in range(count)]


def test_a_sequence_to_sequence_trainer_of_ones_own_is_gated(tmp_path: Path) -> None:
    args = Seq2SeqArguments(str(tmp_path), max_steps=2, logging_steps=1, predict_with_generate=True, **COMMON)
    data = translations(16)
    trainer = GatedSeq2SeqTrainer(translator(), args, train_dataset=data, eval_dataset=data[:2])
    trainer.train()
    assert 0 < trainer.state.log_history[0]["poprisk/fraction_open"] < 1
    assert "eval_loss" in trainer.evaluate()  # with generation, by the stock trainer


@pytest.mark.parametrize(
    ("config_class", "message"),
    [
        (
            Seq2SeqTrainingArguments,
            "^GatedSeq2SeqTrainer does not take Seq2SeqTrainingArguments: put PopRiskArgumentsMixin before "
            r"Seq2SeqTrainingArguments in a dataclass of your own\.$",
        ),
        (
            PopRiskTrainingArguments,
            r"^GatedSeq2SeqTrainer does not take PopRiskTrainingArguments \(generation_config is missing\): "
            r"put PopRiskArgumentsMixin before the config class of the stock trainer in a dataclass of your "
            r"own\.$",
        ),
        (
            TrainingArguments,
            r"^GatedSeq2SeqTrainer does not take TrainingArguments: use PopRiskTrainingArguments\.$",
        ),
    ],
)
def test_a_config_without_the_fields_is_refused_with_what_to_write(
    config_class: type[Any], message: str, tmp_path: Path
) -> None:
    args = config_class(str(tmp_path), **COMMON)
    with pytest.raises(TypeError, match=message):
        GatedSeq2SeqTrainer(translator(), args, train_dataset=translations(8))


def test_an_error_of_the_users_own_keeps_its_own_words(tmp_path: Path) -> None:
    args = PopRiskTrainingArguments(str(tmp_path), **COMMON)

    def model_init() -> Any:
        return object().weights  # type: ignore[attr-defined]

    with pytest.raises(AttributeError, match="'object' object has no attribute 'weights'"):
        PopRiskTrainer(args=args, model_init=model_init, train_dataset=translations(8))


# Early words


def small(tmp_path: Path, **options: Any) -> PopRiskTrainer:
    args = PopRiskTrainingArguments(str(tmp_path), max_steps=1, **{**COMMON, **options})
    rows = [{name: tensor[0] for name, tensor in row.items()} for row in token_examples(8)]
    return PopRiskTrainer(tiny_model(), args, train_dataset=rows)


def test_a_run_without_the_gate_says_so_once_and_on_the_main_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = "optim=sgd: plain sgd, no population-risk gate; set optim=poprisk_adamw for it."
    trainer = small(tmp_path, optim="sgd")
    trainer.train()
    trainer.train()
    assert [r.message for r in caplog.records if "population-risk gate" in r.message] == [sentence]
    caplog.clear()
    other = small(tmp_path, optim="sgd")
    monkeypatch.setattr(other, "is_world_process_zero", lambda: False)
    other.train()
    small(tmp_path).train()
    assert "no population-risk gate" not in caplog.text


class OwnLossTrainer(PopRiskTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs.pop("label_weight")
        return super().compute_loss(model, inputs, *args, **kwargs)


class WeightedModel(torch.nn.Module):
    def forward(self, x: torch.Tensor, label_weight: torch.Tensor) -> dict[str, torch.Tensor]:
        raise NotImplementedError


@pytest.mark.parametrize("noise", ["off", "weight"])
def test_label_weights_that_nothing_reads_are_refused(noise: str, tmp_path: Path, llama_dir: Path) -> None:
    data = preferences(8).add_column("label_weight", [1.0] * 8)
    sentence = (
        r"^PopRisk(DPO|Reward)?Trainer does not read the column label_weight: remove it, train with "
        r"poprisk_label_noise=weight, take the copy that hf-poprisk audit --write filtered "
        r"makes, or read it in a compute_loss of your own\.$"
    )
    options = {**COMMON, "bf16": False, "poprisk_label_noise": noise}
    for kind in ("DPO", "Reward"):
        args = getattr(hf_poprisk, f"PopRisk{kind}Config")(str(tmp_path), **options)
        with pytest.raises(ValueError, match=sentence):
            getattr(hf_poprisk, f"PopRisk{kind}Trainer")(str(llama_dir), args=args, train_dataset=data)
    args = PopRiskTrainingArguments(str(tmp_path), **options)
    with pytest.raises(ValueError, match=sentence):
        PopRiskTrainer(tiny_model(), args, train_dataset=data)


def test_label_weights_are_let_through_to_a_loss_of_ones_own(tmp_path: Path) -> None:
    data = preferences(8).add_column("label_weight", [1.0] * 8)
    args = PopRiskTrainingArguments(str(tmp_path), **COMMON)
    for trainer in (
        OwnLossTrainer(tiny_model(), args, train_dataset=data),
        PopRiskTrainer(WeightedModel(), args, train_dataset=data),
    ):
        assert "label_weight" in trainer.train_dataset.column_names


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"per_device_train_batch_size": 2}, "With 2 per step"),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}, "With 3 per step"),
        ({"per_device_train_batch_size": 4}, ""),
        ({"per_device_train_batch_size": 2, "poprisk_estimator": "ema"}, ""),
        ({"gradient_accumulation_steps": 2, "poprisk_estimator": "group"}, "With 2 per step"),
        ({"per_device_train_batch_size": 2, "poprisk_gate": "none"}, ""),
    ],
)
def test_the_summary_hints_at_too_few_examples(
    options: dict[str, Any], hint: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small(tmp_path, **options).train()
    [line] = [r.message for r in caplog.records if r.message.startswith("population-risk gate:")]
    said = f"{hint} the test has little power, and noise often passes: raise gradient_accumulation_steps."
    assert line.endswith(said) if hint else "little power" not in line


@pytest.mark.parametrize("kind", ["SFT", "DPO", "Reward"])
def test_a_max_length_that_drops_every_row_is_named(kind: str, tmp_path: Path, llama_dir: Path) -> None:
    data = preferences(8)
    if kind == "SFT":
        data = data.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
    config = getattr(hf_poprisk, f"PopRisk{kind}Config")
    trainer = getattr(hf_poprisk, f"PopRisk{kind}Trainer")
    sentence = r"^no training example is left of 8: max_length=2 drops them all, so raise max_length\.$"
    args = config(str(tmp_path), bf16=False, max_length=2, **COMMON)
    with pytest.raises(ValueError, match=sentence):
        trainer(str(llama_dir), args=args, train_dataset=data)
    with pytest.raises(ValueError, match="^train_dataset is empty: give it at least one example"):
        trainer(str(llama_dir), args=args, train_dataset=data.select([]))
