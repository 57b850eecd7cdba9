"""Training on wrong labels: what judging them is worth, beside AdamW, the gates and what others do.

    python recipes/label_noise.py run --tasks digits gauss10 --noise 0.2 0.4 --processes 2
    python recipes/label_noise.py table outputs/label_noise/results.jsonl

``run`` appends one line of JSON per training run to the results file and skips the runs that are there;
``table`` prints Markdown. The seed draws the data (digits: the split), which labels are wrong, the weights
and the order, the same for every arm. ``dpo`` is ``recipes/tiny/dpo`` with four epochs.
"""

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import common
import numpy as np
import sweep
import torch
import transformers
from comparison import mean_of, paired_difference
from controls import RandomMaskAdamW
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback

from hf_poprisk import (
    PopRiskAdamW,
    PopRiskEarlyStoppingCallback,
    PopRiskTrainer,
    PopRiskTrainingArguments,
)
from hf_poprisk.label_noise import LabelNoise

HELD_OUT = 0.1  # of the training examples, for early stopping


# -- arms -------------------------------------------------------------------------------------------------


class ShuffledWeights(LabelNoise):
    """Control: each example gets the weight of its neighbour in the (shuffled) micro-batch."""

    def _strength(self, visit: Any, log_odds: Tensor, num_labels: int) -> Tensor:
        super()._strength(visit, log_odds, num_labels)
        visit.weight = visit.weight.roll(1)
        return visit.weight


class NothingHeldOut(LabelNoise):
    """Control: the effect of an example's own steps is never subtracted, C = 0."""

    def _strength(self, visit: Any, log_odds: Tensor, num_labels: int) -> Tensor:
        self.table.columns["own_effect"].zero_()
        return super()._strength(visit, log_odds, num_labels)


class DropTold(LabelNoise):
    """From the second epoch on without the share, told, with the largest mean loss of the epochs before."""

    told = 0.0  # the share of wrong labels
    _epochs = -1

    def _strength(self, visit: Any, log_odds: Tensor, num_labels: int) -> Tensor:
        super()._strength(visit, log_odds, num_labels)
        epochs, loss = int(self.table.visits.min()), self.table.columns["loss_mean"]
        if epochs > self._epochs:
            self._epochs, self._kept = epochs, torch.ones_like(loss)
            self._kept[loss.topk(round(self.told * len(loss)) if epochs else 0).indices] = 0.0
        visit.weight = self._kept[visit.rows]
        return visit.weight


@dataclass(frozen=True)
class Arm:
    gate: str = "none"
    label_noise: str = "off"
    judge: type[LabelNoise] | None = None
    optimizer: type[PopRiskAdamW] | None = None
    early: bool = False  # by a split of the training data
    risk: bool = False  # early too, by the population gain
    alpha: float | None = None  # of the streaming form; None: the exact gate
    losses: Callable[[float], dict[str, float]] = lambda noise: {"sigmoid": 1.0}  # and their weights
    dpo_only: bool = False


def conservative(noise: float) -> dict[str, float]:
    """-(1-ε) log σ(z) - ε log σ(-z) out of TRL's losses: its ``sigmoid`` takes no label_smoothing."""
    return {"sigmoid": 2 * (1 - noise), "robust": -(1 - 2 * noise)}


ARMS = {
    "adamw": Arm(),
    "adamw-early": Arm(early=True),
    "adamw-risk": Arm(risk=True),
    "hard": Arm(gate="hard"),
    "soft": Arm(gate="soft"),
    "ema-soft": Arm(gate="soft", alpha=1 / 19, dpo_only=True),  # (1-beta1)/(1+beta1)
    "ema-soft-1": Arm(gate="soft", alpha=1.0, dpo_only=True),  # as published
    "random-mask": Arm(gate="hard", optimizer=RandomMaskAdamW),
    "drop-told": Arm(label_noise="audit", judge=DropTold),
    "robust": Arm(losses=lambda noise: {"robust": 1.0}, dpo_only=True),
    "conservative": Arm(losses=conservative, dpo_only=True),
    "ipo": Arm(losses=lambda noise: {"ipo": 1.0}, dpo_only=True),
    "weight": Arm(label_noise="weight"),
    "swap": Arm(label_noise="swap", dpo_only=True),
    "weight+soft": Arm(gate="soft", label_noise="weight"),
    "weight-shuffled": Arm(label_noise="weight", judge=ShuffledWeights),
    "weight-C0": Arm(label_noise="weight", judge=NothingHeldOut),
}


def trainer_class(base: Any, arm: Arm, noise: float) -> Any:
    """The trainer with the arm's own judge and optimizer in it."""

    class ArmTrainer(base):
        def _start_label_noise(self, *ids: Any) -> None:
            super()._start_label_noise(*ids)
            self._replace_judge()

        def _start_over(self) -> None:
            super()._start_over()
            self._replace_judge()

        def _replace_judge(self) -> None:
            plain = self._label_noise
            if arm.judge is not None:
                self._label_noise = arm.judge(plain.mode, plain.preferences, plain.table, plain.sample)
                self._label_noise.told = noise

        @staticmethod
        def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
            stock, kwargs = base.get_optimizer_cls_and_kwargs(args, model)
            return arm.optimizer or stock, kwargs

    return ArmTrainer


# -- tasks ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    epochs: int
    learning_rates: tuple[float, ...]
    examples_per_step: int
    num_train: int = 0  # of a classification; 0: preferences
    shape: tuple[int, int, int] = (0, 0, 0)  # classes, clusters of each, dimensions
    wrong: str = "uniform"  # another label at random; the next "class"; a "group" of neighbours, the next one


TASKS = {
    "digits": Task(20, (3e-4, 1e-3, 3e-3, 1e-2), 48, 900, (10, 0, 64)),
    "digits-class": Task(20, (3e-4, 1e-3, 3e-3, 1e-2), 48, 900, (10, 0, 64), "class"),
    "digits-group": Task(20, (3e-4, 1e-3, 3e-3, 1e-2), 48, 900, (10, 0, 64), "group"),
    "gauss10": Task(20, (3e-4, 1e-3, 3e-3, 1e-2), 64, 1024, (10, 3, 32)),
    "gauss6": Task(20, (3e-4, 1e-3, 3e-3, 1e-2), 48, 1200, (6, 4, 24)),
    "dpo": Task(4, (1e-4, 3e-4, 1e-3), 16),
    "dpo-lora": Task(4, (1e-3, 3e-3, 1e-2), 16),  # --adapter lora
}


@dataclass(frozen=True)
class Cell:
    """One run; the fields are its place in the results file."""

    task: str
    arm: str
    noise: float
    learning_rate: float
    seed: int
    epochs: int

    def options(self, folder: str) -> dict[str, Any]:
        """The training arguments that all tasks share."""
        alpha = ARMS[self.arm].alpha
        return {
            "output_dir": folder,
            "learning_rate": self.learning_rate,
            "num_train_epochs": self.epochs,
            "seed": self.seed,
            "poprisk_gate": ARMS[self.arm].gate,
            **({} if alpha is None else {"poprisk_estimator": "ema", "poprisk_ema_alpha": alpha}),
            "poprisk_label_noise": ARMS[self.arm].label_noise,
            "disable_tqdm": True,
            "poprisk_risk": ARMS[self.arm].risk,
            "logging_strategy": "steps" if ARMS[self.arm].risk else "no",
            "logging_steps": 10,
            **dict.fromkeys(("eval_strategy", "save_strategy"), "no"),
        }


@dataclass
class Setup:
    """A run that is ready to start: a trainer, and sets of examples to score."""

    trainer: Trainer
    score: Callable[[str], dict[str, float]]  # name of a set → accuracy, and more of preferences
    wrong: np.ndarray  # [n] bool, of the examples that are trained on
    sizes: dict[str, int]  # examples of each set
    every_epoch: list[str]  # sets that are scored after every epoch; the others at the end only


class Classifier(nn.Module):
    """A perceptron with two hidden layers of 96."""

    def __init__(self, dimensions: int, classes: int) -> None:
        super().__init__()
        hidden = (nn.Linear(dimensions, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU())
        self.layers = nn.Sequential(*hidden, nn.Linear(96, classes))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def draw(task: str, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Inputs [n, d] and clean labels [n] of the training, validation and test sets."""
    rng, n = np.random.default_rng([seed, 0]), TASKS[task].num_train
    if task.startswith("digits"):
        x, y = load_digits(return_X_y=True)
        order, end = rng.permutation(len(y)), n + 300
        x, y = x[order] / 16, y[order]
        x = (x - x[:n].mean(0)) / (x[:n].std(0) + 0.1)  # some pixels are always empty
    else:
        classes, clusters, dimensions = TASKS[task].shape
        means, end = rng.normal(size=(classes * clusters, dimensions)), n + 1000
        cluster = rng.integers(len(means), size=end + 3000)
        x, y = means[cluster] + rng.normal(size=(len(cluster), dimensions)), cluster % classes
    parts = {"train": slice(n), "validation": slice(n, end), "test": slice(end, None)}
    return {name: (x[rows].astype(np.float32), y[rows]) for name, rows in parts.items()}


def hold_out(n: int, early: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training examples to train on and to stop early by, ascending."""
    order, count = np.random.default_rng([seed, 2]).permutation(n), round(HELD_OUT * n) if early else 0
    return np.sort(order[count:]), np.sort(order[:count])


def classification(cell: Cell, folder: str) -> Setup:
    arm, task, sets = ARMS[cell.arm], TASKS[cell.task], draw(cell.task, cell.seed)
    x, labels = sets.pop("train")
    rng, n = np.random.default_rng([cell.seed, 1]), len(labels)
    step = rng.integers(1, task.shape[0], size=n) if task.wrong == "uniform" else 1
    other, order = (labels + step) % task.shape[0], rng.permutation(n)
    if task.wrong == "group":
        order = np.square(x - x[order[0]]).sum(1).argsort()
    wrong = order.argsort() < round(cell.noise * n)
    labels = np.where(wrong, other, labels)
    kept, held = hold_out(n, arm.early, cell.seed)
    sets |= {name: (x[i], labels[i]) for name, i in (("wrong", kept[wrong[kept]]), ("held", held))}
    tensors = {name: [torch.from_numpy(a) for a in part] for name, part in sets.items() if len(part[1])}

    transformers.set_seed(cell.seed)
    model = Classifier(task.shape[2], task.shape[0])
    args = PopRiskTrainingArguments(
        **cell.options(folder),
        per_device_train_batch_size=task.examples_per_step,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
    )
    trainer = trainer_class(PopRiskTrainer, arm, cell.noise)(
        model=model,
        args=args,
        train_dataset=[{"x": torch.from_numpy(x[i]), "labels": torch.tensor(labels[i])} for i in kept],
        data_collator=torch.utils.data.default_collate,
    )

    @torch.no_grad()
    def score(name: str) -> dict[str, float]:
        inputs, truth = tensors[name]
        return {"accuracy": (model(inputs, truth)["logits"].argmax(1) == truth).float().mean().item()}

    sizes = {name: len(truth) for name, (_, truth) in tensors.items()}
    return Setup(trainer, score, wrong[kept], sizes, list(sizes))


def preferences(cell: Cell, folder: str) -> Setup:
    import dpo  # here, because TRL is slow to import
    from trl import ModelConfig, get_peft_config

    from hf_poprisk import PopRiskDPOConfig, PopRiskDPOTrainer

    dpo.tqdm = lambda rows, **kwargs: rows  # one bar is enough
    arm, config = ARMS[cell.arm], Path(__file__).parent / "tiny" / cell.task / "poprisk.yaml"
    options = {**cell.options(folder), "flip_fraction": cell.noise, "flip_seed": cell.seed}
    losses = arm.losses(cell.noise)
    options |= {"label_smoothing": cell.noise if "robust" in losses else 0}
    argv = [str(item) for name, value in options.items() for item in (f"--{name}", value)]
    argv += ["--loss_type", *losses, "--loss_weights", *map(str, losses.values())]
    types = (dpo.DPOScriptArguments, PopRiskDPOConfig, ModelConfig)
    script_args, args, model_args = common.parse(types, ["--config", str(config), *argv])
    data = common.load_splits(script_args.dataset_name, None, False)
    train = common.flip_preferences(data["train"], cell.noise, cell.seed)
    wrong = np.array(train["is_flipped"])
    kept, held = hold_out(len(train), arm.early, cell.seed)
    sets = {name: data[name] for name in ("validation", "test")}
    sets |= {name: train.select(i) for name, i in (("wrong", kept[wrong[kept]]), ("held", held)) if len(i)}
    args.model_init_kwargs = {"dtype": model_args.dtype}
    peft_config, reference = get_peft_config(model_args), None
    if peft_config is None:
        load = transformers.AutoModelForCausalLM.from_pretrained
        reference = load(model_args.model_name_or_path, **args.model_init_kwargs).eval()
    transformers.set_seed(cell.seed)
    trainer = trainer_class(PopRiskDPOTrainer, arm, cell.noise)(
        model=model_args.model_name_or_path,
        args=args,
        train_dataset=train.select(kept),
        eval_dataset=sets,
        peft_config=peft_config,
    )
    sizes = {name: len(part) for name, part in sets.items()}
    every_epoch = list(sizes) if arm.early else ["test"] if cell.arm == "adamw" else []
    return Setup(trainer, lambda name: dpo.score(trainer, reference, name), wrong[kept], sizes, every_epoch)


# -- runs -------------------------------------------------------------------------------------------------


class Curves(TrainerCallback):
    """Scores sets of examples after every epoch."""

    def __init__(self, setup: Setup) -> None:
        self._score = setup.score
        self.scores: dict[str, list[dict[str, float]]] = {name: [] for name in setup.every_epoch}

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, curve in self.scores.items():
            curve.append(self._score(name))


def run_cell(place: dict[str, Any]) -> dict[str, Any]:
    """Train once; takes the fields of a ``Cell`` and returns what came out."""
    cell = Cell(**place)
    with tempfile.TemporaryDirectory() as folder:
        setup = (classification if TASKS[cell.task].num_train else preferences)(cell, folder)
        trainer, timer, curves = setup.trainer, common.StepTimer(), Curves(setup)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(timer)
        trainer.add_callback(curves)
        if ARMS[cell.arm].risk:
            trainer.add_callback(PopRiskEarlyStoppingCallback())
        trainer.train()
    curve = curves.scores
    epoch = min((len(scores) for scores in curve.values()), default=cell.epochs) - 1  # or stopped before
    if ARMS[cell.arm].early:  # the first of the best
        epoch = int(np.argmax([scores["accuracy"] for scores in curve["held"]]))
    final = {name: curve[name][epoch] if name in curve else setup.score(name) for name in setup.sizes}
    per_epoch = {name: [scores["accuracy"] for scores in curve[name]] for name in curve}
    judge, aurocs = trainer._label_noise, {}
    if not isinstance(judge, ARMS[cell.arm].judge or type(judge)):
        raise RuntimeError(f"the judge of {cell.arm} was not the one that it is about")
    if judge is not None and setup.wrong.any():
        columns = {"suspicion": -judge.table.columns["heldout_logodds"]}
        columns |= {"loss_mean": judge.table.columns["loss_mean"]}
        finite = {name: column.nan_to_num() for name, column in columns.items()}
        aurocs = {name: float(roc_auc_score(setup.wrong, column)) for name, column in finite.items()}
    return {
        "validation_accuracy": final["validation"]["accuracy"],
        "test_accuracy": final["test"]["accuracy"],
        "test_margin": final["test"].get("margin"),
        "test_kl_per_token": final["test"].get("kl_per_token"),
        "validation_accuracy_per_epoch": per_epoch.get("validation"),
        "test_accuracy_per_epoch": per_epoch.get("test"),
        "reported_epoch": epoch + 1,
        "wrong_fitted": final.get("wrong", {}).get("accuracy"),
        "noise_rate": judge.fits[-1].rate if judge is not None and judge.fits else None,
        "judging_since": None if judge is None else judge.judging_since,
        "auroc_suspicion": aurocs.get("suspicion"),
        "auroc_loss_mean": aurocs.get("loss_mean"),
        "sizes": {"train": len(setup.wrong), **setup.sizes},
        "steps": trainer.state.global_step,
        "seconds_per_step": timer.median,
    }


def plan(args: argparse.Namespace) -> list[Cell]:
    """The cells that were asked for, seed by seed: an interrupted comparison is a balanced one.

    Raises:
        RecipeError: arguments that make no sense, or a missing model or data set.
    """
    tasks = [f"{task}-lora" if task == "dpo" and args.adapter == "lora" else task for task in args.tasks]
    rates = args.learning_rates or [1.0]
    for wrong, message in (
        (args.adapter == "lora" and "dpo" not in args.tasks, "--adapter lora is for the task dpo."),
        (min(args.processes, args.epochs or 1) < 1, "--processes and --epochs must be at least 1."),
        (min(args.seeds) < 0, "--seeds must be at least 0."),
        (not all(0 <= noise < 0.5 for noise in args.noise), "--noise must lie in [0, 0.5)."),
        (not all(0 < rate < 100 for rate in rates), "--learning_rates must be positive."),
    ):
        if wrong:
            raise common.RecipeError(message)
    for arm in args.arms:
        if ARMS[arm].dpo_only and "dpo" not in args.tasks and args.arms != list(ARMS):
            raise common.RecipeError(f"the arm {arm} is for preference pairs: add dpo to --tasks.")
    if "dpo" in args.tasks:  # as in the YAML
        common.require_path("outputs/tiny/model", "model_name_or_path")
        common.require_path("outputs/tiny/preferences", "dataset_name")
    cells = (
        Cell(task, arm, noise, rate, seed, args.epochs or TASKS[task].epochs)
        for task in tasks
        for seed in args.seeds
        for noise in args.noise
        for rate in args.learning_rates or TASKS[task].learning_rates
        for arm in args.arms
        if not (ARMS[arm].dpo_only and TASKS[task].num_train)
    )
    return list(dict.fromkeys(cells))


def load_rows(path: Path) -> list[dict[str, Any]]:
    return sweep.load_rows(path, list(Cell.__dataclass_fields__))


def run(args: argparse.Namespace) -> int:
    cells = [asdict(cell) for cell in plan(args)]
    return sweep.run_cells(cells, run_cell, args.out, args.processes, alike="task")


# -- the table --------------------------------------------------------------------------------------------

HEADER = (
    "arm | learning rate | validation | test ± s.e. | difference to adamw [95 %] | wrong labels fitted | ε̂ "
    "| AUROC suspicion / mean loss | time per step"
)


def best_rate(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the rate with the highest mean validation accuracy, among those with the most seeds."""
    rates = defaultdict(list)
    for row in rows:
        rates[row["learning_rate"]].append(row)
    most = max(map(len, rates.values()))
    full = [rates[rate] for rate in sorted(rates) if len(rates[rate]) == most]
    return max(full, key=lambda at_rate: fmean(row["validation_accuracy"] for row in at_rate))


def table_row(
    name: str, rows: list[dict[str, Any]], best: list[dict[str, Any]], base: Any, per: float
) -> str:
    tests = [row["test_accuracy"] for row in best]
    error = f" ± {stdev(tests) / len(tests) ** 0.5:.3f}" if len(tests) > 1 else ""
    rate, rates = best[0]["learning_rate"], {row["learning_rate"] for row in rows}
    edge = "*" if len(rates) > 1 and rate in (min(rates), max(rates)) else ""
    entries = [name, f"{rate:g}{edge}", mean_of(best, "validation_accuracy"), f"{fmean(tests):.3f}{error}"]
    entries += [
        "" if name == "adamw" or not base else paired_difference(best, base, "test_accuracy"),
        mean_of(best, "wrong_fitted"),
    ]
    entries += [mean_of(best, "noise_rate")]
    entries += [" / ".join(mean_of(best, f"auroc_{of}") for of in ("suspicion", "loss_mean"))]
    entries += [f"{median(row['seconds_per_step'] for row in rows) / per:.2f}" if per else "–"]
    if "test_margin" in best[0] and best[0]["test_margin"] is not None:
        entries += [mean_of(best, "test_margin", 2), mean_of(best, "test_kl_per_token")]
    return f"| {' | '.join(entries)} |"


def oracle_row(rows: list[dict[str, Any]]) -> str | None:
    """adamw at the rate and the epoch of the best test accuracy, which nobody can choose."""
    rates = defaultdict(list)
    for row in rows:
        if row["test_accuracy_per_epoch"]:
            rates[row["learning_rate"]].append(max(row["test_accuracy_per_epoch"]))
    if not rates:
        return None
    rate = max(rates, key=lambda r: (len(rates[r]), fmean(rates[r])))
    return f"| *adamw, oracle: best epoch on test* | {rate:g} | | {fmean(rates[rate]):.3f} | | | | | |"


def remarks(arms: dict[str, list[dict[str, Any]]], expected: list[str]) -> list[str]:
    """Missing cells, and rates that are not the same for every arm."""
    seeds = {row["seed"] for rows in arms.values() for row in rows}
    counts = {arm: len({row["learning_rate"] for row in rows}) for arm, rows in arms.items()}
    missing = [f"{arm} altogether" for arm in expected if arm not in arms]
    for arm, rows in arms.items():
        for rate in sorted({row["learning_rate"] for row in rows}):
            gone = sorted(seeds - {row["seed"] for row in rows if row["learning_rate"] == rate})
            missing += [f"{arm} at {rate:g}, seeds {', '.join(map(str, gone))}"] if gone else []
    uneven = (
        ", ".join(f"{arm} {count}" for arm, count in counts.items()) if len(set(counts.values())) > 1 else ""
    )
    lines = [f"**Not the same number of learning rates for every arm: {uneven}.**"] if uneven else []
    return lines + ([f"**Missing: {'; '.join(missing)}.**"] if missing else [])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one table per task, epochs and noise."""
    groups: Any = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["task"], row["epochs"], row["noise"]][row["arm"]].append(row)
    out = [
        "The learning rate of every arm is the one with the highest mean accuracy on CLEAN validation "
        "labels, for all arms alike (* at the end of its grid); adamw-early chooses its epoch by noisy "
        "labels, 10 % of the training set. Differences are paired over the seeds, each arm at its own rate. "
        "drop-told, robust and conservative are told the true share of wrong labels. Times are medians, "
        "adamw = 1."
    ]
    for (task, epochs, noise), found in sorted(groups.items()):
        expected = [
            a for a in ARMS if any(a in arms for at, arms in groups.items() if at[:2] == (task, epochs))
        ]
        arms = {arm: found[arm] for arm in expected if arm in found}
        every, sizes = [row for part in arms.values() for row in part], next(iter(arms.values()))[0]["sizes"]
        rates, seeds = (sorted({row[name] for row in every}) for name in ("learning_rate", "seed"))
        told = {name: " ".join(f"{x:g}" for x in values) for name, values in (("lr", rates), ("s", seeds))}
        n = sizes["train"] + sizes.get("held", 0)
        command = f"run --tasks {task.removesuffix('-lora')} --arms {' '.join(arms)} --noise {noise:g} "
        command += f"--learning_rates {told['lr']} --seeds {told['s']} --epochs {epochs}"
        command += " --adapter lora" * task.endswith("-lora")
        base = best_rate(arms["adamw"]) if "adamw" in arms else []
        per = median(row["seconds_per_step"] for row in arms["adamw"]) if base else 0.0
        header = HEADER + " | margin | KL per token" * (TASKS[task].num_train == 0)
        lines = [table_row(arm, part, best_rate(part), base, per) for arm, part in arms.items()]
        oracle = oracle_row(arms.get("adamw", []))
        versions = sorted({f"{name} {v}" for row in every for name, v in row["versions"].items()})
        out += [
            f"### {task}, {100 * noise:g} % wrong labels",
            f"n = {n} training examples, {sizes['validation']} validation, {sizes['test']} test; "
            f"{epochs} epochs of {TASKS[task].examples_per_step} examples per step; {len(seeds)} seeds; "
            f"{', '.join(versions)}.",
            f"`python recipes/label_noise.py {command}`",
            *remarks(arms, expected),
            "\n".join(
                [f"| {header} |", "|---" * (header.count("|") + 1) + "|", *lines, *([oracle] * bool(oracle))]
            ),
        ]
    return "\n\n".join(out)


def frontier(rows: list[dict[str, Any]], path: Path) -> None:
    """Preferences: accuracy against KL, a line per arm over its learning rates, a panel per task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups: Any = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        if row["test_kl_per_token"] is not None:
            groups[row["task"], row["epochs"], row["noise"]][row["arm"]][row["learning_rate"]].append(row)
    groups = {at: arms for at, arms in sorted(groups.items()) if len(arms) > 1}
    if not groups:
        raise common.RecipeError(
            "no two arms with preferences are among the results: run the task dpo first."
        )
    size = (5 * len(groups), 4.5)
    figure, axes = plt.subplots(1, len(groups), figsize=size, squeeze=False, layout="constrained")
    for axis, ((task, epochs, noise), arms) in zip(axes[0], groups.items(), strict=True):
        for arm, rates in arms.items():
            points = [
                (
                    fmean(row["test_kl_per_token"] for row in part),
                    fmean(row["test_accuracy"] for row in part),
                    stdev(row["test_accuracy"] for row in part) / len(part) ** 0.5 if len(part) > 1 else 0.0,
                )
                for _, part in sorted(rates.items())
            ]
            number, (x, y, error) = list(ARMS).index(arm), zip(*points, strict=True)
            style = {"color": f"C{number % 10}", "marker": "os^Dv<>PX*hdp8H"[number % 15], "lw": 1}
            axis.errorbar(x, y, error, label=arm, elinewidth=0.5, **style)
        axis.set(
            xscale="log", xlabel="KL to the reference (nats per token)", ylabel="accuracy on clean test pairs"
        )
        axis.set_title(f"{task}, {100 * noise:g} % wrong labels, {epochs} epochs")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("run", help="train, and append to the results")
    training.add_argument("--tasks", nargs="+", choices=[t for t in TASKS if t != "dpo-lora"], required=True)
    training.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help="all"
    )
    training.add_argument("--noise", nargs="+", type=float, default=[0.0, 0.2, 0.3, 0.4], help="shares")
    training.add_argument("--learning_rates", nargs="+", type=float, help="default: a grid per task")
    training.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    training.add_argument("--epochs", type=int, help="default: 20, and 4 for dpo")
    training.add_argument("--adapter", choices=("none", "lora"), default="none", help="of dpo")
    training.add_argument("--out", type=Path, default=Path("outputs/label_noise/results.jsonl"))
    training.add_argument("--processes", type=int, default=1)
    printing = commands.add_parser("table", help="print Markdown")
    printing.add_argument("results", type=Path)
    printing.add_argument("--plot", type=Path, help="also draw accuracy against KL, of preferences")
    args = parser.parse_args()
    try:
        if args.command == "run":
            sys.exit(run(args))
        rows = load_rows(args.results)
        if not rows:
            raise common.RecipeError(f"{args.results} holds no finished run: start one first.")
        if args.plot is not None:
            frontier(rows, args.plot)
        print(table(rows))
    except (common.RecipeError, OSError, BrokenExecutor) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted: finished runs are kept, and the same command goes on.\n")


if __name__ == "__main__":
    main()
