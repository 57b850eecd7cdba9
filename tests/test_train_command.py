"""``hf-poprisk dpo|sft|…``: from the command line to the saved model, and what a user sees of a mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import DatasetDict, Value
from models import DATA, completions, layout, preferences, tiny_model, trainer_of, trl_trainer_of
from torch.utils.data import IterableDataset

import hf_poprisk
from hf_poprisk import load_record, train_command
from hf_poprisk.__main__ import main
from hf_poprisk.per_example.self_check import SelfCheck, Verdict

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
    main(argv(command, llama_dir, tmp_path, "--poprisk_gate", "soft", *online))
    record = load_record(tmp_path / "out")
    assert record.config["gate"] == "soft" and record.config["steps"] == 1
    assert record.statistics["parameters"] and (tmp_path / "out/model.safetensors").is_file()


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


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "save_to_disk", "splits"])
def test_the_data_may_be_a_file_or_what_save_to_disk_wrote(
    form: str, llama_dir: Path, tmp_path: Path
) -> None:
    data, path = preferences(8), tmp_path / f"pairs.{form}"
    if form == "splits":
        DatasetDict({"train": data, "test": data}).save_to_disk(path)
    elif form == "save_to_disk":
        data.save_to_disk(path)
    else:
        getattr(data, {"jsonl": "to_json"}.get(form, f"to_{form}"))(path)
    more = ["--eval_strategy", "steps", "--eval_steps", "1"] if form == "splits" else []
    main([*argv("dpo", llama_dir, tmp_path), "--dataset_name", str(path), *more])
    assert load_record(tmp_path / "out").config["data"]["examples"] == 8


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is said of a command line that ends in one sentence."""
    capsys.readouterr()  # of the data
    with pytest.raises(SystemExit) as stopped:
        main(words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    last = error.splitlines()[-1]
    assert last.startswith(f"hf-poprisk {words[0]}: error: ")
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if " examples" not in line]) < 5
    return last


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--poprisk_gaet soft", "--poprisk_gaet is no option: did you mean --poprisk_gate?"),
        ("--frobnicate", "--frobnicate is no option; --help_all shows every one."),
        ("--poprisk_gate firm", "argument --poprisk_gate/--poprisk-gate: invalid choice: 'firm'"),
        ("--per_device_train_batch_size 1 --gradient_accumulation_steps 1", "leaves nothing to hold out"),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size must be 1 or more; got 0"),
        ("--learning_rate 1e400", "learning_rate=inf is not a finite number"),
        ("--beta 0", "beta must be above 0, where the loss would be constant"),
        ("--resume_from_checkpoint last", "holds no complete checkpoint"),
        ("--model_name_or_path nowhere", "(model_name_or_path=nowhere, dataset_name="),
        ("--dataset_name nowhere", "--dataset_name nowhere is no folder here, and cannot be read"),
        ("--dataset_name nowhere.jsonl", "--dataset_name nowhere.jsonl is not there."),
        ("--dataset_name {tmp}/empty.jsonl", "empty.jsonl is empty"),
        ("--dataset_name {tmp}/sft.jsonl", "DPO wants the columns chosen and rejected, or"),
        ("--dataset_name {tmp}/numbers.jsonl", "chosen of row 0 of the train split is 3, where text or"),
        ("--dataset_name {tmp}/holes.jsonl", "rejected of row 1 of the train split is None"),
        ("--dataset_name {tmp}/roles.jsonl", "the trainer could not be made of these data and options ("),
        ("--dataset_train_split nowhere", 'Unknown split "nowhere"'),
        ("--dataset_name {tmp}/sft.jsonl --dataset_config a", "--dataset_config has no effect, because"),
        ("--load_in_4bit", "load_in_4bit needs bitsandbytes: pip install bitsandbytes, or leave"),
        ("--use_peft --lora_target_modules nowhere", "nowhere"),
        ("--ignore_bias_buffers", "ignore_bias_buffers is not supported"),
        ("--poprisk_leap 1", "poprisk_leap=1.0 goes to where judged labels lead"),
        ("--dataloader_drop_last --per_device_train_batch_size 16", "no step would be made: 8 examples do"),
        ("--config", "--config needs a YAML file"),
        ("--config nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_a_mistake_is_one_sentence(
    options: str, sentence: str, llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = argv("dpo", llama_dir, tmp_path)
    if "--config" in options.split():
        start = ["dpo"]
    pair = {"chosen": "a b", "rejected": "b a"}
    turns = [{"speaker": "user", "text": "a"}]
    lines = {
        "empty": [],
        "sft": [{"text": "a b"}],
        "numbers": [{"chosen": 3, "rejected": 4}],
        "holes": [pair, {**pair, "rejected": None}],
        "roles": [{"chosen": turns, "rejected": turns}],
    }
    for name, rows in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    said = refused(capsys, *start, *options.format(tmp=tmp_path).split())
    assert sentence in said
    assert not (tmp_path / "out").exists()  # nothing was made on the way


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("", "--reward_funcs is missing"),
        ("--reward_funcs length", "reward_funcs=length is none of accuracy_reward, "),
        ("--reward_funcs nowhere.length", "reward_funcs=nowhere.length is none of"),
        ("--reward_funcs rewards.width", "no function of a module that can be imported from here"),
        (
            "--per_device_train_batch_size 32",
            "no step would be made: 8 examples do not fill a batch (per_dev",
        ),
    ],
)
def test_mistakes_in_rewards_and_generations(
    options: str,
    sentence: str,
    llama_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARDS)
    online = ONLINE if "batch" in options else ONLINE[2:]
    said = refused(capsys, *argv("grpo", llama_dir, tmp_path), *online, *options.split())
    assert sentence in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("labels", [[1.0, 0.0], [1, -1], [2, 0], ["true", "false"]], ids=str)
def test_kto_labels_that_are_neither_good_nor_bad(
    labels: list[Any], llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = argv("kto", llama_dir, tmp_path)
    data = completions(8).remove_columns("label").add_column("label", labels * 4)
    data.to_json(tmp_path / "labels.jsonl")
    said = refused(capsys, *start, "--dataset_name", str(tmp_path / "labels.jsonl"))
    assert "the column label holds " in said and "KTO wants true or 1 for good" in said


def test_kto_labels_may_be_numbers_and_those_of_a_stream_are_looked_at(
    llama_dir: Path, tmp_path: Path
) -> None:
    """0 and 1 train as false and true do."""
    data, ends = completions(8), []
    options = {**layout(2, 4), "max_steps": 2}
    numbers = data.cast_column("label", Value("int64"))
    for given in (data, numbers, numbers.to_iterable_dataset()):
        trainer = trl_trainer_of("KTO", str(llama_dir), tmp_path, given, **options)
        trainer.train()
        ends.append(list(trainer.model.parameters()))
    assert all(map(torch.equal, ends[0], ends[1])) and not all(
        map(torch.equal, ends[0], tiny_model().parameters())
    )
    bad = data.remove_columns("label").add_column("label", [1, 7] * 4).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"^the column label holds 7 \(row 1\)"):
        trl_trainer_of("KTO", str(llama_dir), tmp_path, bad, **options).train()


def test_a_stream_that_gives_nothing_is_said(tmp_path: Path) -> None:
    class Nothing(IterableDataset):
        def __iter__(self) -> Any:
            return iter(())

    with pytest.raises(ValueError, match="^no step was made: the stream ended before one was full"):
        trainer_of(tmp_path, Nothing(), **layout(1, 4), max_steps=2).train()


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (ValueError("zip() argument 2 is shorter than argument 1"), True),
        (KeyError("chosen"), True),
        (OSError("no space left"), True),
        (None, False),
    ],
)
def test_what_fails_during_training_keeps_its_traceback_unless_it_was_refused(
    error: Any, kept: bool, llama_dir: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = argv("dpo", llama_dir, tmp_path)

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        raise error

    if kept:
        monkeypatch.setattr(trl.DPOTrainer, "compute_loss", compute_loss)
        with pytest.raises(type(error), match=str(error).replace("(", r"\(").replace(")", r"\)")):
            main(start)
        return
    # a self-check of the first micro-batch that finds no way
    monkeypatch.setattr(SelfCheck, "run", lambda *_: Verdict("this", "that"))
    said = refused(capsys, *start)
    assert "would not be the stock trainer's (this; that)" in said


def test_keys_of_the_file_and_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line, sentence in (
        ("poprisk_gaet: soft", "--poprisk_gaet is no option: did you mean --poprisk_gate?"),
        ("learning_rate: true", "learning_rate must be float; got True"),
        ("lora_target_modules: 3", "lora_target_modules must be a list; got 3"),
        ("use_cpu: true", "--model_name_or_path is missing"),
        ("model_name_or_path: x", "--dataset_name is missing"),
        (
            "{model_name_or_path: x, dataset_name: y, datasets: [{path: z}]}",
            "dataset_name has no effect beside",
        ),
    ):
        (tmp_path / "x.yaml").write_text(line + "\n")
        options = ["--use_cpu", "true", "--output_dir", str(tmp_path)]
        assert sentence in refused(capsys, "dpo", "--config", str(tmp_path / "x.yaml"), *options)


def test_help_is_short_and_all_of_it_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for words in ("--help", "dpo --help", "dpo --help_all", "kto --help", "grpo --help_all", "--version"):
        with pytest.raises(SystemExit, match="0"):
            main(words.split())
        said[words] = capsys.readouterr().out
    assert all(f"    {command} " in said["--help"] for command in (*train_command.COMMANDS, "judge", "audit"))
    assert said["--version"] == f"hf-poprisk {hf_poprisk.__version__}\n"
    short = said["dpo --help"]
    assert short.startswith("usage: hf-poprisk dpo [--config FILE.yaml] [--option value ...]\n")
    assert len(short.splitlines()) < 150 < 400 < len(said["dpo --help_all"].splitlines())
    for name in ("--dataset_name", "--learning_rate [1e-06]", "--poprisk_gate", "--poprisk_leap"):
        assert f"  {name}" in short
    assert "--adam_beta2" in said["dpo --help_all"] and "--adam_beta2" not in short
    assert " …" not in short and max(map(len, short.splitlines())) <= 100
    # what a trainer never takes is not offered
    for option in ("poprisk_label_noise", "poprisk_leap"):
        assert option in said["dpo --help_all"] and option not in said["kto --help"] + said["grpo --help_all"]
    for option in ("poprisk_weight_column", "poprisk_basis"):
        assert option in said["kto --help"] and option not in said["grpo --help_all"]
