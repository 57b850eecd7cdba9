"""The recipes end to end, their YAML, and what a user sees of a mistake."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from datasets import Dataset, DatasetDict
from models import preferences, save_tiny_model, text

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "scripts")]

import common  # noqa: E402
import compare  # noqa: E402
import dpo  # noqa: E402
import prepare_tiny  # noqa: E402
import train  # noqa: E402

RECIPES = sorted({*ROOT.glob("recipes/*/dpo*.yaml"), *ROOT.glob("recipes/tiny/c*.yaml")})
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, preferences and labelled texts in the layout that prepare_tiny.py writes."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder / "model", "llama", tied=True)
    rows = {"train": preferences(24), "validation": preferences(4, 100), "test": preferences(6, 200)}
    texts = {"text": [text(i, 8) for i in range(12)], "label": [i % 2 for i in range(12)]}
    labelled = dict.fromkeys(rows, Dataset.from_dict(texts))
    for name, splits in (("preferences", rows), ("labelled", labelled)):
        (folder / name).mkdir()
        for split, data in splits.items():
            data.to_parquet(folder / name / f"{split}.parquet")
    return folder


def recipe(script: Any, *argv: str | Path) -> None:
    """Run a recipe in this process, as its command line would."""
    with mock.patch.object(sys, "argv", ["recipe.py", *map(str, argv)]):
        common.run(script.main)


def dpo_argv(tiny: Path, out: Path, task: str = "dpo") -> list[str | Path]:
    return [
        *("--config", ROOT / f"recipes/tiny/{task}.yaml"),
        *("--model_name_or_path", tiny / "model", "--dataset_name", tiny / "preferences"),
        *("--output_dir", out, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"),
        *("--max_steps", "3", "--logging_steps", "1", "--eval_steps", "3", "--save_strategy", "no"),
    ]


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())["results"]


@pytest.mark.parametrize("optim", ["poprisk_adamw", "adamw_torch"])
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: "/".join(p.parts[-2:]))
def test_every_recipe_parses_and_may_start(path: Path, optim: str) -> None:
    """As it is, and as plain AdamW, which is the same but for the optimizer."""
    script = dpo if "dpo" in path.stem else train
    argv = ["--config", str(path), *(["--use_cpu", "true"] if "qwen" in str(path) else [])]
    if optim == "adamw_torch":
        argv += ["--optim", optim, "--poprisk_gate", "hard", "--poprisk_label_noise", "off"]
    _, args, _ = common.parse(script.ARGUMENTS, argv)
    assert args.optim == optim
    assert args.units_per_step >= 16
    assert args.output_dir == f"outputs/{path.parent.name}-{path.stem}"  # a folder of its own


@pytest.mark.parametrize("name", ["cpu", "cpu2", "gpu", "ddp", "fsdp2", "hsdp"])
def test_launch_configs_are_what_accelerate_reads(name: str) -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    config = ClusterConfig.from_yaml_file(ROOT / f"recipes/accelerate/{name}.yaml")
    assert config.num_processes == {"cpu": 1, "cpu2": 2, "gpu": 1, "ddp": 8, "fsdp2": 8, "hsdp": 64}[name]
    assert config.use_cpu == name.startswith("cpu")


@pytest.mark.parametrize("task", ["dpo", "dpo-lora"])
def test_dpo_from_yaml_to_results(task: str, tiny: Path, tmp_path: Path) -> None:
    for arm, optim in (("adamw", "adamw_torch"), ("poprisk", "poprisk_adamw")):
        recipe(dpo, *dpo_argv(tiny, tmp_path / arm, task), "--optim", optim)
    adamw, poprisk = results_of(tmp_path / "adamw"), results_of(tmp_path / "poprisk")
    for results in (adamw, poprisk):
        assert results["steps"] == 3 and results["seconds_per_step"] > 0
        assert set(results["scores"]) == {"test", "validation", "flipped"}
        # exact, so positive as soon as anything moved
        assert all(scores["kl_per_token"] > 0 for scores in results["scores"].values())
    assert adamw["gate"] == {} and poprisk["gate"]["examples"] == 4
    assert poprisk["gate"]["fraction_open_null"] == pytest.approx(0.391, abs=1e-3)
    content = json.loads((tmp_path / "poprisk/results.json").read_text())
    assert content["settings"]["optim"] == "poprisk_adamw"
    # the scores are not TRL's, and agree with its own: one batch each here, evaluated after the last step
    history = json.loads((tmp_path / "poprisk/trainer_state.json").read_text())["log_history"]
    for name, scores in poprisk["scores"].items():
        theirs = next(entry for entry in history if f"eval_{name}_loss" in entry)
        assert theirs["step"] == 3
        assert scores["margin"] == pytest.approx(theirs["eval_rewards/margins"], abs=1e-5)
        assert scores["loss"] == pytest.approx(theirs[f"eval_{name}_loss"], abs=1e-5)
        assert scores["accuracy"] == pytest.approx(theirs["eval_rewards/accuracies"], abs=1e-5)
    weights = "adapter_model.safetensors" if task == "dpo-lora" else "model.safetensors"
    assert (tmp_path / "poprisk" / weights).is_file()
    compare.plot({arm: compare.load(tmp_path / arm)[1] for arm in ("adamw", "poprisk")}, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_the_sources_experiment_from_its_command_to_its_table(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same script and settings on a random Qwen2 and pairs in UltraFeedback's form."""
    save_tiny_model(tmp_path / "model", "qwen2", tied=True)
    chat = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (tmp_path / "model/chat_template.jinja").write_text(chat)
    (tmp_path / "data").mkdir()
    for split, rows in (("train", preferences(64)), ("test", preferences(4, 200))):
        talks = [
            {
                **{
                    name: [
                        {"role": "user", "content": row["prompt"]},
                        {"role": "assistant", "content": row[name]},
                    ]
                    for name in ("chosen", "rejected")
                },
                "score_chosen": 8.0,
                "score_rejected": 5.0,
            }
            for row in rows
        ]
        Dataset.from_list(talks).to_parquet(tmp_path / f"data/{split}.parquet")
    here = {"model_name_or_path": tmp_path / "model", "dataset_name": tmp_path / "data", "logging_steps": 1}
    here |= {"use_cpu": "true", "bf16": "false", "output_dir": tmp_path / "out"}
    argv = ["arms.py", *(str(x) for name, value in here.items() for x in (f"--{name}", value))]
    ran: list[str] = []

    def in_this_process(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        script = Path(command[1])
        ran.append(script.name)
        with mock.patch.object(sys, "argv", command[1:]):
            {"dpo.py": dpo, "compare.py": compare}[script.name].main()
        return subprocess.CompletedProcess(command, 0)

    def command() -> None:
        with (
            mock.patch.object(sys, "argv", argv),
            mock.patch.object(subprocess, "run", in_this_process),
        ):
            runpy.run_path(str(ROOT / "recipes/qwen2.5-0.5b/arms.py"), run_name="__main__")

    command()
    assert ran == ["dpo.py"] * 3 + ["compare.py"]
    printed = capsys.readouterr().out
    settings = {}
    for arm in ("adamw", "gate", "weights"):
        content = json.loads((tmp_path / "out" / arm / "results.json").read_text())
        assert content["results"]["steps"] == 2 and f"{arm} " in printed
        assert content["settings"]["flip_fraction"] == 0.3 and content["settings"]["model_revision"]
        settings[arm] = content["settings"]
        gate = content["results"]["gate"]
        assert ("fraction_open" in gate) == (arm == "gate") and ("noise_rate" in gate) == (arm == "weights")
    own = {"optim", "poprisk_gate", "poprisk_label_noise", "output_dir", "logging_dir"}
    shared = [{k: v for k, v in s.items() if k not in own} for s in settings.values()]
    assert shared[0] == shared[1] == shared[2]
    assert (tmp_path / "out/comparison.png").is_file()
    (tmp_path / "out/gate/results.json").unlink()
    command()
    assert ran[4:] == ["dpo.py", "compare.py"]


def test_a_run_prints_short_lines_and_no_bars(tiny: Path, tmp_path: Path) -> None:
    argv = [sys.executable, ROOT / "recipes/dpo.py", *dpo_argv(tiny, tmp_path)]
    env = {name: value for name, value in ENV.items() if name != "TQDM_DISABLE"}
    quiet = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=240)
    assert quiet.returncode == 0, quiet.stderr
    lines = quiet.stdout.splitlines()
    assert len([line for line in lines if ": loss " in line and "poprisk/fraction_open " in line]) == 3
    assert any(line.startswith("step 3/3: eval_test_loss ") for line in lines)
    assert all(line.startswith("step ") and len(line) < 110 for line in lines)
    [summary] = quiet.stderr.splitlines()
    assert summary.startswith("population-risk gate: hard")


def test_the_bars_and_the_whole_logs_can_be_asked_for(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe(dpo, *dpo_argv(tiny, tmp_path), "--disable_tqdm", "false")
    printed = capsys.readouterr()
    assert "'rewards/margins': " in printed.out and "step 1/3: " not in printed.out
    assert "3/3" in printed.err


def test_the_table_shows_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {
        "scores": {"test": {"accuracy": 0.751, "margin": 1.25, "kl_per_token": 0.1}},
        "seconds_per_step": 0.5,
        "gate": {"fraction_open": 0.4, "fraction_open_null": 0.333},
    }
    (tmp_path / "soft").mkdir()
    (tmp_path / "soft" / "results.json").write_text(json.dumps({"results": run}))
    (tmp_path / "soft" / "trainer_state.json").write_text('{"log_history": []}')
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "soft")])
    compare.main()
    row = next(line for line in capsys.readouterr().out.splitlines() if "soft" in line)
    for cell in ("0.751", "1.25", "0.100", "–", "0.400 / 0.333", "0.50"):
        assert cell in row
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="holds no finished run"):
        compare.main()


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_train_from_yaml_to_results(task: str, tiny: Path, tmp_path: Path) -> None:
    recipe(
        train,
        *("--config", ROOT / f"recipes/tiny/{task}.yaml"),
        *("--model_name_or_path", tiny / "model", "--dataset_name", tiny / "labelled"),
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"),
        *("--output_dir", tmp_path, "--max_steps", "2", "--logging_steps", "1"),
    )
    results = results_of(tmp_path)
    assert results["test_loss"] > 0 and results["gate"]["examples"] == 4
    assert (results["test_accuracy"] is not None) == (task == "classification")


def test_an_interrupted_run_is_taken_up_again(tiny: Path, tmp_path: Path) -> None:
    saving = ["--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "5"]
    recipe(dpo, *dpo_argv(tiny, tmp_path), *saving)
    first = results_of(tmp_path)
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    (tmp_path / "results.json").unlink()
    recipe(dpo, *dpo_argv(tiny, tmp_path), *saving, "--resume_from_checkpoint", "last")
    again = results_of(tmp_path)
    assert again["steps"] == first["steps"] == 3
    assert again["scores"]["test"] == pytest.approx(first["scores"]["test"], rel=1e-6)


def test_flips_are_exact_seeded_and_marked() -> None:
    clean = preferences(50)
    flipped = common.flip_preferences(clean, 0.3, seed=1)
    assert sum(flipped["is_flipped"]) == 15
    for before, after in zip(clean, flipped, strict=True):
        swapped = (before["rejected"], before["chosen"])
        assert (after["chosen"], after["rejected"]) == (
            swapped if after["is_flipped"] else (before["chosen"], before["rejected"])
        )
    assert flipped["is_flipped"] == common.flip_preferences(clean, 0.3, seed=1)["is_flipped"]
    assert flipped["is_flipped"] != common.flip_preferences(clean, 0.3, seed=2)["is_flipped"]
    assert common.flip_preferences(flipped, 0.0, seed=5)["is_flipped"] == flipped["is_flipped"]
    with pytest.raises(common.RecipeError, match="is_flipped column already"):
        common.flip_preferences(flipped, 0.1, seed=0)
    classes = train.flip_classes(Dataset.from_dict({"labels": [0, 1, 2] * 20}), 3, 0.25, seed=0)
    changed = [a != b for a, b in zip(classes["labels"], [0, 1, 2] * 20, strict=True)]
    assert sum(changed) == 15 and classes["is_flipped"] == changed


@pytest.mark.parametrize(
    ("line", "sentence"),  # of the command line, or of the YAML file
    [
        ("--poprisk_gaet soft", "--poprisk_gaet"),
        ("--poprisk_gate firm", "--poprisk-gate: invalid choice: 'firm' (choose from"),
        ("--optim poprisk_adam", "poprisk_adam is not a valid OptimizerNames"),
        ("--per_device_train_batch_size 1 --gradient_accumulation_steps 1", "leaves nothing to hold out"),
        ("--per_device_train_batch_size 4 --padding_free true", "padding_free=True joins"),
        ("--learning_rate fast", "invalid float value: 'fast'"),
        ("--optim_args gate=soft", "optim_args has no effect with optim=poprisk_adamw"),
        ("--packing true", "--packing"),
        ("poprisk_gate: firm", "poprisk_gate must be one of"),
        ("poprisk_gaet: soft", "poprisk_gaet"),
        ("num_train_epochs: three", "invalid float value: 'three'"),
        ("poprisk_exclude: 3", "poprisk_exclude must be a list of regular expressions"),
        ("learning_rate: [1", "expected ',' or ']'"),
        ("flip_fraction: [0.3]", "flip_fraction must be float; got [0.3]"),
        ("learning_rate: true", "learning_rate must be float; got True"),
        ("per_device_train_batch_size: 8.5", "per_device_train_batch_size must be int; got 8.5"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_loaded(
    line: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    on_line = line.startswith("--")
    text = (ROOT / "recipes/tiny/dpo.yaml").read_text() if on_line else f"use_cpu: true\n{line}\n"
    config.write_text(re.sub("^output_dir:.*", "", text, flags=re.M) + f"\noutput_dir: {tmp_path / 'out'}\n")
    with pytest.raises(SystemExit) as stopped:
        recipe(dpo, "--config", config, *(line.split() if on_line else ()))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in error
    assert "Traceback" not in error and len(error.splitlines()) < 5
    assert on_line or not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--model_name_or_path outputs/nowhere/model", "outputs/nowhere/model is not a folder"),
        ("--model_name_or_path outputs/tiny/modle", "prepare_tiny.py` makes it"),
        ("--dataset_name ./nowhere", "dataset_name=./nowhere is not a folder"),
        ("--dataset_test_split held", "it has train, validation, test"),
        ("--flip_fraction 1.5", "flip_fraction must be between 0 and 1"),
        ("--resume_from_checkpoint last", "holds no complete checkpoint"),
        ("--resume_from_checkpoint nowhere", "is not a folder"),
        ("--dataset_streaming true", "dataset_streaming=true is not supported"),
    ],
)
def test_a_wrong_place_is_one_sentence(line: str, sentence: str, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        recipe(dpo, *dpo_argv(tiny, tmp_path / "new"), *line.split())
    assert not (tmp_path / "new" / "results.json").exists()


@pytest.mark.parametrize("conversational", [False, True])
def test_an_empty_completion_is_named_by_row(conversational: bool, tiny: Path, tmp_path: Path) -> None:
    rows = preferences(8).to_list()
    rows[5]["rejected"] = "  "
    if conversational:
        rows = [{k: [{"role": "assistant", "content": v}] for k, v in row.items()} for row in rows]
    good = Dataset.from_list(rows[:5])
    DatasetDict(train=Dataset.from_list(rows), validation=good, test=good).save_to_disk(tmp_path / "data")
    argv = [*dpo_argv(tiny, tmp_path / "out"), "--dataset_name", tmp_path / "data"]
    with pytest.raises(SystemExit, match="row 5 of the training split has an empty 'rejected'"):
        recipe(dpo, *argv)


def test_the_embedded_model_and_a_launched_recipe(tmp_path: Path) -> None:
    """scripts/prepare_tiny.py at its smallest, twice; then two launched processes train on what it made."""
    out = tmp_path / "tiny"
    small = [
        *(sys.executable, ROOT / "scripts/prepare_tiny.py", "--output_dir", out, "--steps", "12"),
        *("--num_train_pairs", "16", "--num_eval_pairs", "4"),
    ]

    def prepare() -> str:
        done = subprocess.run(small, env=ENV, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stderr

    prepare()
    metadata = json.loads((out / "metadata.json").read_text())
    files = {path: path.read_bytes() for path in out.rglob("*.parquet")}
    assert len(files) == 9 and metadata["pairs"] == {"train": 16, "validation": 4, "test": 8}
    assert "up to date" in prepare()
    rows = {s: Dataset.from_parquet(str(out / f"preferences/{s}.parquet")) for s in metadata["pairs"]}
    topics = [set(data["topic"]) for data in rows.values()]
    assert not topics[0] & topics[1] and not topics[1] & topics[2] and not topics[0] & topics[2]
    texts = [{row["prompt"] for row in data} for data in rows.values()]
    assert not texts[0] & texts[2] and all(row["chosen"].strip() for data in rows.values() for row in data)
    (out / "metadata.json").write_text("{")  # damage is seen, and the same comes back, byte for byte
    assert "is damaged" in prepare()
    assert json.loads((out / "metadata.json").read_text()) == metadata
    assert all(path.read_bytes() == content for path, content in files.items())
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    made_from = {key: metadata[key] for key in ("script_sha256", "text_sha256", "settings", "libraries")}
    assert prepare_tiny.is_current(out, made_from)
    for key in made_from:
        assert not prepare_tiny.is_current(out, {**made_from, key: "another"})
    (out / "detection" / "test.parquet").unlink()
    assert not prepare_tiny.is_current(out, made_from)

    run = tmp_path / "run"
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", ROOT / "recipes/accelerate/cpu2.yaml", "--main_process_port", "0"),
            *(ROOT / "recipes/dpo.py", *dpo_argv(out, run)),
        ],
        env=ENV,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert "8 examples per step (2 process(es) × 4 backwards)" in launched.stderr
    assert json.loads((run / "results.json").read_text())["results"]["gate"]["examples"] == 8
