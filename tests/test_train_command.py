"""``hf-poprisk dpo|sft|…``: TRL's scripts with our trainers, from the command line to the saved model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trl
from models import DATA, preferences

import hf_poprisk
from hf_poprisk import load_record, train_command
from hf_poprisk.__main__ import main

ROOT = Path(__file__).parents[1]
REWARDS = "def length(completions, **_): return [len(x) for x in completions]"
ONLINE = ["--reward_funcs", "rewards.length", "--num_generations", "2", "--max_completion_length", "4"]


def argv(command: str, model: Path, tmp_path: Path, *more: str, count: int = 8) -> list[str]:
    """A run of one step of four examples, from a YAML file and options."""
    (tmp_path / "data").mkdir(exist_ok=True)
    data = DATA.get(train_command.COMMANDS[command][0], preferences)(count)
    data.to_parquet(tmp_path / "data/train.parquet")
    settings = {"model_name_or_path": str(model), "use_cpu": True, "bf16": False, "report_to": "none"}
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    (tmp_path / "run.yaml").write_text(json.dumps({**settings, "logging_steps": 1}))
    places = ["--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    return [command, "--config", str(tmp_path / "run.yaml"), *places, *more]


@pytest.mark.parametrize("command", train_command.COMMANDS)
def test_a_command_trains_with_the_gate(
    command: str, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where TRL looks for rewards
    (tmp_path / "rewards.py").write_text(REWARDS)
    online = ONLINE if command in ("grpo", "rloo") else []
    stock = [getattr(trl, train_command.COMMANDS[command][0] + what) for what in ("Config", "Trainer")]
    main(argv(command, llama_dir, tmp_path, "--poprisk_gate", "soft", *online))
    record = load_record(tmp_path / "out")
    assert record.config["gate"] == "soft" and record.config["steps"] == 1
    assert record.statistics["parameters"] and (tmp_path / "out/model.safetensors").is_file()
    assert [getattr(trl, cls.__name__) for cls in stock] == stock  # TRL has its own classes back


@pytest.mark.parametrize("command", ["kto", "grpo", "rloo"])
def test_the_recipes_train(
    command: str, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "data").mkdir()
    preferences(40).to_parquet(tmp_path / "data/train.parquet")
    places = [
        "--model_name_or_path",
        llama_dir,
        "--dataset_name",
        tmp_path / "data",
        "--output_dir",
        tmp_path,
    ]
    recipe = f"recipes/tiny/{'kto' if command == 'kto' else 'grpo'}.yaml"
    main([command, "--config", recipe, *map(str, places), "--max_steps", "1"])
    assert load_record(tmp_path).config["units_per_step"] == (32 if command == "kto" else 16)


def test_labels_judged_and_a_leap_without_training(llama_dir: Path, tmp_path: Path) -> None:
    leap = ["--poprisk_label_noise", "weight", "--poprisk_leap", "1", "--num_train_epochs", "0"]
    main(argv("dpo", llama_dir, tmp_path, *leap, "--max_steps", "-1", count=60))
    record = load_record(tmp_path / "out")
    assert record.config["steps"] == 0 and record.config["leap"] == 1
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_run_is_resumed_from_its_last_checkpoint(llama_dir: Path, tmp_path: Path) -> None:
    saving = ["--save_strategy", "steps", "--save_steps", "1"]
    main(argv("sft", llama_dir, tmp_path, *saving))
    main(argv("sft", llama_dir, tmp_path, *saving, "--resume_from_checkpoint", "last", "--max_steps", "2"))
    state = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == [1, 2]


@pytest.mark.parametrize(("command", "examples"), [("dpo", 8), ("grpo", 4)])
def test_launched_by_accelerate(command: str, examples: int, llama_dir: Path, tmp_path: Path) -> None:
    """Two processes; the prompts of a step of GRPO are whole on either, and are its examples."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    launch = ["accelerate.commands.launch", "--config_file", str(ROOT / "recipes/accelerate/cpu2.yaml")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", *launch, "--main_process_port", "0", "-m", "hf_poprisk"),
            *argv(command, llama_dir, tmp_path, *(ONLINE if command == "grpo" else [])),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    record = load_record(tmp_path / "out")
    assert record.config["layout"]["processes"] == 2
    assert {entry["examples"] for entry in record.statistics["parameters"].values()} == {examples}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--poprisk_gaet soft", "--poprisk_gaet is no option: did you mean --poprisk_gate?"),
        ("--frobnicate", "--frobnicate is no option; --help_all shows every one."),
        ("--poprisk_gate firm", "argument --poprisk_gate/--poprisk-gate: invalid choice: 'firm'"),
        ("--per_device_train_batch_size 1 --gradient_accumulation_steps 1", "leaves nothing to hold out"),
        ("--padding_free true", "padding_free=True joins the examples"),
        ("--resume_from_checkpoint last", "holds no complete checkpoint"),
        ("--model_name_or_path nowhere", "(model_name_or_path=nowhere, dataset_name="),
        ("--dataset_name nowhere", "nowhere"),
        ("--dataset_train_split nowhere", "dataset_train_split=nowhere is not a split of the data set."),
        ("--poprisk_leap 1", "poprisk_leap=1.0 goes to where judged labels lead"),
        ("--config", "--config needs a YAML file"),
        ("--config nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_sentence(
    options: str, sentence: str, llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = argv("dpo", llama_dir, tmp_path)
    if "--config" in options:
        start = ["dpo"]
    capsys.readouterr()  # of the data
    with pytest.raises(SystemExit) as stopped:
        main([*start, *options.split()])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in error
    assert (
        error.splitlines()[-1].startswith("hf-poprisk dpo: error: ") and len(error.splitlines()) < 6
    )  # bars too
    assert not (tmp_path / "out/model.safetensors").exists()


def test_keys_of_the_file_and_what_is_missing(
    llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line, sentence in (
        ("poprisk_gaet: soft", "--poprisk_gaet is no option: did you mean --poprisk_gate?"),
        ("learning_rate: true", "learning_rate must be float; got True"),
        ("use_cpu: true", "--model_name_or_path is missing"),
    ):
        (tmp_path / "x.yaml").write_text(line + "\n")
        with pytest.raises(SystemExit, match="2"):
            main(
                [
                    "dpo",
                    "--config",
                    str(tmp_path / "x.yaml"),
                    "--use_cpu",
                    "true",
                    "--output_dir",
                    str(tmp_path),
                ]
            )
        assert sentence in capsys.readouterr().err


def test_help_is_short_and_all_of_it_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for words in ("--help", "dpo --help", "dpo --help_all", "--version"):
        with pytest.raises(SystemExit, match="0"):
            main(words.split())
        said[words] = capsys.readouterr().out
    assert all(f"    {command} " in said["--help"] for command in (*train_command.COMMANDS, "judge", "audit"))
    assert said["--version"] == f"hf-poprisk {hf_poprisk.__version__}\n"
    short = said["dpo --help"]
    assert len(short.splitlines()) < 110 < 400 < len(said["dpo --help_all"].splitlines())
    for name in ("--dataset_name", "--learning_rate [1e-06]", "--poprisk_gate [hard]", "--poprisk_leap"):
        assert f"  {name}" in short
    assert "--adam_beta2" in said["dpo --help_all"] and "--adam_beta2" not in short


def test_a_trl_with_other_scripts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its script would train with the stock classes."""
    import trl.scripts.dpo as script

    def other(*args: Any) -> None:
        from trl.trainer.dpo_trainer import DPOTrainer

        DPOTrainer(*args)

    monkeypatch.setattr(script, "main", other)
    with pytest.raises(RuntimeError, match="in trl.scripts.dpo does not take DPOTrainer from trl"):
        train_command.train(SimpleNamespace(command="dpo", argv=[]))  # type: ignore[arg-type]
