"""What the theory says of five kinds of training, looked at in output space.

    python recipes/output_space.py                  # all of them, some minutes on one core
    python recipes/output_space.py benign dpo       # some
    python recipes/output_space.py page             # print OUTPUT_SPACE.md

Every run goes through a stock ``Trainer`` (``dpo``: ours) with an ``OutputSpaceCallback`` and leaves its
recording in ``outputs/output_space/NAME``, to be looked at with ``hf-poprisk output-space``. The
numbers go to ``recipes/results/output_space.json`` and one plot each beside it. ``dpo`` needs
``outputs/tiny``, which ``python scripts/prepare_tiny.py`` makes.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import torch
import transformers
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_poprisk import PopRiskDPOConfig, PopRiskDPOTrainer
from hf_poprisk.output_space import (
    DPOMargin,
    OutputSpaceCallback,
    Split,
    SquaredError,
    cumulative,
    empirical_ntk,
    load_recording,
    split,
)
from hf_poprisk.output_space.analysis import analyse

OUTPUTS = Path("outputs/output_space")
RESULTS = Path(__file__).parent / "results" / "output_space.json"
TEMPLATE = Path(__file__).with_name("output_space_template.md")
Rows = list[dict[str, Tensor]]


class Regressor(nn.Module):
    """Any network, with the loss of transformers' regression heads."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body.double()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"loss": F.mse_loss(logits, labels.reshape(logits.shape)), "logits": logits}


def rows(x: Tensor, y: Tensor) -> Rows:
    return [{"x": a, "labels": b} for a, b in zip(x.double(), y.double(), strict=True)]


def together(examples: Rows) -> Rows:
    """One batch of all: such small networks spend their time between operations."""
    return [torch.utils.data.default_collate(examples)]


def train(
    name: str,
    model: nn.Module,
    data: tuple[Rows, Rows],
    rate: float,
    steps: int,
    directions: dict[str, Tensor],
    records: int = 25,
    **settings: Any,
) -> Path:
    """Full-batch training, recorded at steps that are evenly spaced in log time."""
    folder = OUTPUTS / name
    when = {0, *(round(steps ** (i / (records - 1))) for i in range(records - 1))}
    callback = OutputSpaceCallback(
        SquaredError(), together(data[0]), together(data[1]), when, 256, directions
    )
    settings = {"optim": "sgd", "max_grad_norm": 0.0, **settings}
    args = TrainingArguments(
        output_dir=str(folder),
        learning_rate=rate,
        max_steps=steps,
        per_device_train_batch_size=len(data[0]),
        lr_scheduler_type="constant",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = Trainer(model, args, train_dataset=data[0], callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return folder


def seen_at_test(folder: Path, direction: str, than: str) -> list[float]:
    """How much a unit of one direction moves test outputs, against a unit of another, from record two on."""
    recording = load_recording(folder)
    vectors = [recording.directions[name].reshape(-1).double() for name in (direction, than)]
    found = []
    for evolution in cumulative(recording)[1:]:
        one, other = (float((evolution.transfer @ v).norm() / v.norm()) for v in vectors)
        found.append(one / other)
    return found


def gone(folder: Path, direction: str) -> list[float]:
    """At each record, the share of the squared error along a direction that training has dissipated.

    Of a squared loss of one output, whose curvature is 2/n: vᵀWv / (n/4) for a unit v.
    """
    recording = load_recording(folder)
    v = recording.directions[direction].reshape(-1).double()
    return [float(v @ e.gramian @ v / v.square().sum()) * 4 / len(v) for e in cumulative(recording)]


def stable_rate(x: Tensor) -> float:
    """Nine tenths of the largest stable learning rate of least squares on x [n, d]: its curvature is 2λ/n."""
    return 0.9 * len(x) / float(torch.linalg.matrix_norm(x.double(), 2)) ** 2


def benign() -> tuple[dict[str, Any], Figure]:
    """Least squares with 5 strong and 2400 weak features, noisy labels, trained until it interpolates."""
    torch.manual_seed(0)
    n, strong, weak, noise, steps = 60, 5, 2400, 0.5, 800
    scale = torch.cat([torch.ones(strong), torch.full((weak,), 0.02)]).double()
    x = torch.randn(n + 400, strong + weak).double() * scale
    clean = x[:, :strong].sum(1) / strong**0.5
    wrong = noise * torch.randn(n).double()
    y = clean.clone()
    y[:n] += wrong
    model = Regressor(nn.Linear(strong + weak, 1, bias=False))
    nn.init.zeros_(model.body.weight)
    data = rows(x[:n], y[:n]), rows(x[n:], clean[n:])
    directions = {"label noise": wrong, "signal": clean[:n]}
    folder = train("benign", model, data, stable_rate(x[:n]) / 2, steps, directions)
    found, visible = analyse(load_recording(folder)), seen_at_test(folder, "label noise", "signal")
    best = int(found.test_losses.argmin())
    full = next(i for i, cut in enumerate(found.splits) if cut.channel == n)
    noise_gone = gone(folder, "label noise")
    row = {
        "examples": n,
        "noise_variance": noise**2,
        "train_loss": found.losses[-1].item(),
        "test_loss": found.test_losses[-1].item(),
        "test_loss_best": found.test_losses[best].item(),
        "step_best": found.steps[best].item(),
        "channel_best": found.splits[best].channel,
        "noise_in_reservoir_best": found.reservoir["label noise"][best].item(),
        "noise_seen_from_reservoir_best": found.visible["label noise"][best].item(),
        "signal_in_reservoir_best": found.reservoir["signal"][best].item(),
        "noise_gone_best": noise_gone[best],
        "step_full": found.steps[full].item(),
        "noise_gone_full": noise_gone[full],
        "noise_gone_end": noise_gone[-1],
        "channel_end": found.splits[-1].channel,
        "noise_in_reservoir_end": found.reservoir["label noise"][-1].item(),
        "flatness_of_w": float(found.splits[-1].eigenvalues[0] / found.splits[-1].eigenvalues[-1]),
        "noise_seen_first": visible[0],
        "noise_seen_end": visible[-1],
        "transfer_error": found.transfer_error.max().item(),
    }
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    x_axis = found.steps[1:]
    left.plot(x_axis, found.losses[1:], label="training loss (noisy labels)")
    left.plot(x_axis, found.test_losses[1:], label="test loss (clean labels)")
    left.set(xscale="log", yscale="log", xlabel="step", title="Benign overfitting")
    for name in ("label noise", "signal"):
        right.plot(x_axis, found.reservoir[name][1:], label=f"{name} in the reservoir of W")
    right.plot(x_axis, noise_gone[1:], ":", label="noise that is fitted (of its square)")
    right.plot(x_axis, visible, "--", label="noise seen at test, signal = 1")
    right.set(xscale="log", xlabel="step", ylim=(-0.03, 1.03), title="Where the noise is")
    return row, _legends(figure)


def descent() -> tuple[dict[str, Any], Figure]:
    """Random tanh features of growing width under a trained head, the same data and noise."""
    torch.manual_seed(0)
    n, inputs, noise, steps = 60, 12, 0.5, 1500
    x = torch.randn(n + 400, inputs).double()
    clean = x @ torch.ones(inputs).double() / inputs**0.5
    wrong = noise * torch.randn(n).double()
    y = clean.clone()
    y[:n] += wrong
    data, found = (rows(x[:n], y[:n]), rows(x[n:], clean[n:])), []
    for width in (6, 20, 40, 60, 90, 240, 960):
        torch.manual_seed(width)
        body = nn.Sequential(nn.Linear(inputs, width, bias=False), nn.Tanh(), nn.Linear(width, 1, bias=False))
        body = body.double().requires_grad_(False)
        nn.init.normal_(body[0].weight)
        nn.init.zeros_(body[2].weight.requires_grad_())
        rate = stable_rate(body[:2](x[:n]))
        directions = {"label noise": wrong, "signal": clean[:n]}
        folder = train(f"descent-{width}", Regressor(body), data, rate, steps, directions)
        run = analyse(load_recording(folder))
        found.append(
            {
                "width": width,
                "train_loss": run.losses[-1].item(),
                "test_loss": run.test_losses[-1].item(),
                "noise_in_reservoir": run.reservoir["label noise"][-1].item(),
                "noise_seen_from_reservoir": run.visible["label noise"][-1].item(),
                "channel": run.splits[-1].channel,
                "noise_seen_at_test": seen_at_test(folder, "label noise", "signal")[-1],
                "transfer_error": run.transfer_error.max().item(),
            }
        )
    widths = [entry["width"] for entry in found]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in (("train_loss", "training loss"), ("test_loss", "test loss (clean labels)")):
        left.plot(widths, [entry[name] for entry in found], "o-", label=label)
    left.set(xscale="log", yscale="log", xlabel="width", title=f"Double descent, {n} examples")
    right.plot(
        widths, [e["noise_in_reservoir"] for e in found], "o-", label="label noise in the reservoir of W"
    )
    right.plot(
        widths, [e["noise_seen_at_test"] for e in found], "o--", label="noise seen at test, signal = 1"
    )
    right.set(xscale="log", xlabel="width", title="Where the noise is")
    for axis in (left, right):
        axis.axvline(n, color="gray", linestyle=":", linewidth=1)
    return {"examples": n, "steps": steps, "widths": found}, _legends(figure)


def bias() -> tuple[dict[str, Any], Figure]:
    """A two-layer network on digits, below five against the rest: which modes the channel takes in first."""
    torch.manual_seed(0)
    n, steps = 120, 2500
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    picked = torch.randperm(len(images))[: n + 200]
    x, y = (images[picked] - 8) / 8, (labels[picked] >= 5).double() * 2 - 1
    body = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 1))
    folder = train(
        "bias", Regressor(body), (rows(x[:n], y[:n]), rows(x[n:], y[n:])), 0.005, steps, {"labels": y[:n]}
    )
    recording = load_recording(folder)
    found = analyse(recording)
    values, vectors = torch.linalg.eigh(recording.series["kernel"][0])
    values, vectors = values.flip(0), vectors.flip(1)
    g = torch.stack(recording.series["gradients"]).flatten(1).double() @ vectors
    left_of = (g / g[0]).square()  # [record, mode] of the squared error
    first, last = _halved(left_of, found.steps.tolist())
    # W has the eigenvalue n/4 for what is gone of a squared loss of curvature 2/n
    by_w = 1 - torch.stack(
        [torch.einsum("ij,ik,kj->j", vectors, e.gramian, vectors) * 4 / n for e in cumulative(recording)]
    )
    predicted, _ = _halved(by_w, found.steps.tolist())
    row = {
        "examples": n,
        "steps": steps,
        "kernel_change": found.kernel_change[-1].item(),
        "stable": found.stable,
        "halved": len(first),
        "order": _order(first),
        "halved_for_good": len(last),
        "order_for_good": _order(last),
        "grown": int((left_of[-1] > 1).sum()),
        "halved_by_w": len(predicted),
        "order_by_w": _order(predicted),
        "first_at": first[0],
        "tenth_at": first[9],
        "channel_first": found.splits[1].channel,
        "channel_end": found.splits[-1].channel,
        "labels_in_reservoir_first": found.reservoir["labels"][1].item(),
        "labels_in_reservoir_end": found.reservoir["labels"][-1].item(),
        "alignment_end": found.alignment[-1, -1].item(),
        "transfer_error": found.transfer_error.max().item(),
        "test_accuracy": _accuracy(recording.series["test_outputs"][-1], y[n:]),
    }
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    gone_of = (1 - left_of).clamp(0, 1).T
    image = left.pcolormesh(range(len(found.steps)), range(1, n + 1), gone_of, shading="nearest")
    left.set_xticks(range(0, len(found.steps), 4), found.steps[::4].tolist())
    left.invert_yaxis()
    left.set(
        xlabel="step", ylabel="mode of the first kernel", title="Share of a mode's squared error that is gone"
    )
    figure.colorbar(image, ax=left)
    for moments, style, label in (
        (first, "o", "half of its error is gone"),
        (last, "o", "and stays so"),
        (predicted, ".", "by W alone"),
    ):
        right.plot([i + 1 for i in moments], list(moments.values()), style, label=label, alpha=0.7)
    right.set(yscale="log", xlabel="mode of the first kernel, largest eigenvalue first", ylabel="step")
    right.set_title("When a mode is learned")
    return row, _legends(figure)


def _halved(left_of: Tensor, steps: list[int]) -> tuple[dict[int, int], dict[int, int]]:
    """Mode → the first record at which its squared error [record, mode] is below half; and for good."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for mode, column in enumerate((left_of < 0.5).T.tolist()):
        if True in column:
            first[mode] = steps[column.index(True)]
        if column[-1]:
            last[mode] = steps[len(column) - column[::-1].index(False)]
    return first, last


def _order(moments: dict[int, int]) -> float:
    """How far the moments are in the order of the modes, Spearman."""
    return float(spearmanr(list(moments), list(moments.values())).statistic)


class SumNetwork(nn.Module):
    """Two one-hot numbers through one layer of squares: it can add modulo p exactly."""

    def __init__(self, p: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2 * p, width, bias=False), nn.Linear(width, p, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).square())


def grokking() -> tuple[dict[str, Any], Figure]:
    """Addition modulo 11 from 70 % of the table, AdamW with weight decay: memorised, then understood."""
    torch.manual_seed(0)
    p, steps = 11, 1000
    a, b = torch.cartesian_prod(torch.arange(p), torch.arange(p)).T
    x = torch.cat([F.one_hot(a, p), F.one_hot(b, p)], 1).double()
    y = F.one_hot((a + b) % p, p).double()
    order = torch.randperm(p * p)
    x, y, n = x[order], y[order], round(0.7 * p * p)
    signal = y[:n] - 1 / p
    settings = {"optim": "adamw_torch", "weight_decay": 1.0}
    data = rows(x[:n], y[:n]), rows(x[n:], y[n:])
    folder = train(
        "grokking", Regressor(SumNetwork(p, 64)), data, 0.01, steps, {"signal": signal}, 17, **settings
    )
    recording = load_recording(folder)
    found = analyse(recording)
    v = signal.reshape(-1) / signal.norm()
    kernels = [kernel.double() for kernel in recording.series["kernel"]]
    cuts = [split(kernel) for kernel in kernels]
    guesses = [
        _kernel_regression(*pair, signal) for pair in zip(cuts, recording.series["cross_kernel"], strict=True)
    ]
    accuracy = [
        [_hits(outputs, labels) for outputs in recording.series[name]]
        for name, labels in (("outputs", y[:n]), ("test_outputs", y[n:]))
    ]
    row = {
        "examples": n,
        "outputs": len(v),
        "steps": found.steps.tolist(),
        "train_accuracy": accuracy[0],
        "test_accuracy": accuracy[1],
        "kernel_test_accuracy": [_hits(guess, y[n:]) for guess in guesses],
        "signal_in_kernel_channel": [1 - cut.reservoir_share(v) for cut in cuts],
        "kernel_channel": [cut.channel for cut in cuts],
        "signal_in_reservoir": found.reservoir["signal"].tolist(),
        "channel": [cut.channel for cut in found.splits],
        "kernel_change": found.kernel_change[-1].item(),
        "transfer_error": found.transfer_error[-1].item(),
    }
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for values, label in zip(accuracy, ("training", "test"), strict=True):
        left.plot(found.steps[1:], values[1:], label=label)
    left.plot(
        found.steps[1:], row["kernel_test_accuracy"][1:], "--", label="test, regression with the kernel"
    )
    left.set(xscale="log", xlabel="step", ylabel="accuracy", title="Grokking, addition modulo 11")
    inside = row["signal_in_kernel_channel"]
    right.plot(found.steps[1:], inside[1:], label="signal in the channel of the kernel of the moment")
    right.plot(found.steps[1:], row["signal_in_reservoir"][1:], label="signal in the reservoir of W")
    right.set(xscale="log", xlabel="step", ylim=(-0.03, 1.03), title="Where the signal is")
    return row, _legends(figure)


def _kernel_regression(kernel: Split, cross_kernel: Tensor, targets: Tensor) -> Tensor:
    """What ridge regression with the kernel of the moment says of the test examples, [m, k]."""
    ridge = 1e-3 * kernel.eigenvalues.mean()
    parts = kernel.vectors.T @ targets.reshape(-1) / (kernel.eigenvalues + ridge)
    return (cross_kernel @ kernel.vectors @ parts).reshape(-1, targets.shape[1])


def _hits(outputs: Tensor, labels: Tensor) -> float:
    return (outputs.argmax(1) == labels.argmax(1)).double().mean().item()


def dpo() -> tuple[dict[str, Any], Figure]:
    """The embedded model on preference pairs with flipped labels, AdamW and the hard gate."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    found: dict[str, Any] = {}
    for arm, gate, style in (("adamw", "none", "-"), ("gated", "hard", "--")):
        trainer, flipped = _train_pairs(arm, gate)
        recording = load_recording(trainer.args.output_dir)
        run = analyse(recording)
        cut = run.splits[-1]
        u = torch.stack(recording.series["outputs"]).double().squeeze(-1)
        moved = u[-1] - u[0]
        parts = cut.vectors * (cut.vectors.T @ moved)  # [pair, mode]
        groups, tenth = {"clean": ~flipped, "flipped": flipped}, len(moved) // 10
        found[arm] = {
            "channel": cut.channel,
            "flatness_of_w": float(cut.eigenvalues[0] / cut.eigenvalues[-1]),
            "channel_first": run.splits[1].channel,
            "flips_in_reservoir_first": run.reservoir["label noise"][1].item(),
            "loss_explained": float(run.predicted.sum() / run.measured.sum()),
            "flips_in_reservoir": run.reservoir["label noise"][-1].item(),
            "flips_seen_from_reservoir": run.visible["label noise"][-1].item(),
            "margin_in_smallest": float(parts[:, -1].mean() / moved.mean()),
            "test_accuracy": (recording.series["test_outputs"][-1] > 0).double().mean().item(),
            "transfer_error": run.transfer_error[-1].item(),
        }
        for name, group in groups.items():
            found[arm] |= {
                f"{name}_fitted": (u[-1][group] > 0).double().mean().item(),
                f"{name}_margin": u[-1][group].mean().item(),
                f"{name}_margin_in_channel": parts[group][:, : cut.channel].sum(1).mean().item(),
                f"{name}_margin_in_leading": parts[group][:, :tenth].sum(1).mean().item(),
                f"{name}_share_in_leading": float(parts[group][:, :tenth].sum() / moved[group].sum()),
            }
        for (name, group), color in zip(groups.items(), ("#2f5d9b", "#d9773c"), strict=True):
            label = f"{name} pairs, {arm}"
            left.plot(run.steps, u[:, group].mean(1), style, color=color, label=label)
            curve = [0.0, *parts[group].mean(0).cumsum(0).tolist()]
            right.plot(range(len(curve)), curve, style, color=color, label=label)
    left.set(xlabel="step", ylabel="mean reward margin as labelled", title="Noisy DPO, 30 % flipped")
    right.set(xlabel="leading eigenvectors of W", ylabel="mean margin that they carry")
    right.set_title("The margins in the eigenbasis of W")
    many = [trainer.data_collator([row]) for row in trainer.train_dataset] * 3
    start = time.process_time()
    empirical_ntk(trainer.model, many, DPOMargin().outputs)
    sizes = {"pairs": len(flipped), "flipped": int(flipped.sum()), "test_pairs": len(trainer.eval_dataset)}
    timed = {"kernel_pairs": len(many), "kernel_seconds": time.process_time() - start}
    timed["parameters"] = sum(p.numel() for p in trainer.model.parameters())
    return {**sizes, "steps": trainer.state.global_step, **timed, **found}, _legends(figure)


def _train_pairs(arm: str, gate: str) -> tuple[PopRiskDPOTrainer, Tensor]:
    """12 steps of all of 96 training pairs; the trainer, and which of them are flipped, [n] bool."""
    data = common.load_splits("outputs/tiny/preferences", None, False)
    pairs = common.flip_preferences(data["train"].select(range(96)), 0.3, 0)
    flipped = torch.tensor(pairs["is_flipped"])
    args = PopRiskDPOConfig(
        output_dir=str(OUTPUTS / f"dpo-{arm}"),
        poprisk_gate=gate,
        learning_rate=3e-4,
        weight_decay=0.0,
        max_steps=12,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=6,
        precompute_ref_log_probs=True,
        model_init_kwargs={"dtype": "float32"},
        max_length=160,
        gradient_checkpointing=False,
        bf16=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = PopRiskDPOTrainer(
        "outputs/tiny/model", args=args, train_dataset=pairs, eval_dataset=data["test"].select(range(48))
    )
    trainer.remove_callback(PrinterCallback)
    parts = trainer.train_dataset, trainer.eval_dataset
    probe, test = ([trainer.data_collator([row]) for row in part] for part in parts)
    noise = -flipped.float()  # softplus(−u) was to be softplus(u): its gradient is off by −1
    trainer.add_callback(
        # often at first, where Adam's preconditioner changes fastest
        OutputSpaceCallback(DPOMargin(args.beta), probe, test, [1, 2, 4, 6, 9], 96, {"label noise": noise})
    )
    trainer.train()
    return trainer, flipped


def _accuracy(outputs: Tensor, labels: Tensor) -> float:
    return (outputs.reshape(-1).sign() == labels.sign()).double().mean().item()


def _legends(figure: Figure) -> Figure:
    for axis in figure.axes:
        if axis.get_legend_handles_labels()[0]:
            axis.grid(alpha=0.25)
            axis.legend(frameon=False, fontsize=9)
    return figure


def page(results: dict[str, Any]) -> str:
    """OUTPUT_SPACE.md: the template, filled with the numbers of the results file."""
    kinds = {
        "descent": (
            {
                "width": ("width", "d"),
                "train_loss": ("training loss", ".2g"),
                "test_loss": ("test loss", ".3g"),
                "channel": ("channel of W", "d"),
                "noise_in_reservoir": ("noise in the reservoir", ".0%"),
                "noise_seen_from_reservoir": ("seen of it from there", ".0%"),
                "noise_seen_at_test": ("noise seen at test", ".2f"),
            },
            results["descent"]["widths"],
        ),
        "grokking": (
            {
                "steps": ("step", "d"),
                "train_accuracy": ("training accuracy", ".2f"),
                "test_accuracy": ("test accuracy", ".2f"),
                "kernel_test_accuracy": ("kernel regression", ".2f"),
                "kernel_channel": ("channel of the kernel", "d"),
                "signal_in_kernel_channel": ("signal in it", ".0%"),
                "signal_in_reservoir": ("signal in the reservoir of W", ".0%"),
            },
            _columns(results["grokking"]),
        ),
        "dpo": (
            {
                "arm": ("", "s"),
                "test_accuracy": ("held-out accuracy", ".3f"),
                "clean_fitted": ("clean fitted", ".0%"),
                "flipped_fitted": ("flipped fitted", ".0%"),
                "clean_margin": ("clean margin", ".3f"),
                "flipped_margin": ("flipped margin", ".3f"),
                "clean_share_in_leading": ("clean, leading tenth", ".0%"),
                "flipped_share_in_leading": ("flipped, leading tenth", ".0%"),
                "channel": ("channel of W", "d"),
                "flips_in_reservoir": ("flips in the reservoir", ".0%"),
                "flips_seen_from_reservoir": ("seen of them from there", ".0%"),
                "transfer_error": ("error of the prediction", ".0%"),
            },
            [
                {"arm": title, **results["dpo"][arm]}
                for arm, title in (("adamw", "AdamW"), ("gated", "hard gate"))
            ],
        ),
    }
    rows_of = _columns(results["grokking"])
    moments = {
        "fitted": next(row for row in rows_of if row["train_accuracy"] == 1),
        "inside": next(row for row in rows_of if row["signal_in_kernel_channel"] > 0.9),
        "empty": next(row for row in rows_of if row["signal_in_reservoir"] < 0.01),
        "last": rows_of[-1],
    }
    tables = {f"{kind}_table": _table(*content) for kind, content in kinds.items()}
    return TEMPLATE.read_text(encoding="utf-8").format(**results, **tables, **moments)


def _columns(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Lists of one length, as rows."""
    lists = {name: values for name, values in row.items() if isinstance(values, list)}
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _table(columns: dict[str, tuple[str, str]], entries: list[dict[str, Any]]) -> str:
    """Markdown; name → title and format."""
    head = [title for title, _ in columns.values()]
    body = [[format(entry[name], form) for name, (_, form) in columns.items()] for entry in entries]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


KINDS: tuple[Callable[[], tuple[dict[str, Any], Figure]], ...] = (benign, descent, bias, grokking, dpo)


def main(argv: Sequence[str]) -> None:
    known = {kind.__name__: kind for kind in KINDS}
    wrong = [name for name in argv if name not in (*known, "page")]
    if wrong or "page" in argv and len(argv) > 1:
        raise common.RecipeError(
            f"unknown: {' '.join(wrong or argv)}; give some of {', '.join(known)}, or page, or nothing."
        )
    if argv == ["page"]:
        print(page(json.loads(RESULTS.read_text())), end="")
        return
    chosen = list(argv) or list(known)
    if "dpo" in chosen:
        common.require_path("outputs/tiny/model", "the model")
    transformers.utils.logging.set_verbosity_error()
    for name in chosen:
        print(f"{name}: {known[name].__doc__}", flush=True)
        row, figure = known[name]()
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        common.write_json(RESULTS, {**results, name: _rounded(row)})
        figure.savefig(RESULTS.with_name(f"output_space_{name}.png"), dpi=80)
        print(json.dumps(_rounded(row), indent=2))


def _rounded(value: Any) -> Any:
    """Six digits, so that the file does not depend on the last bits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


if __name__ == "__main__":
    common.run(lambda: main(sys.argv[1:]))
