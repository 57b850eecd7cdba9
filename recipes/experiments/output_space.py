"""What the theory says of five kinds of training, looked at in output space.

    python recipes/experiments/output_space.py                  # all of them, some minutes on one core
    python recipes/experiments/output_space.py benign dpo       # some
    python recipes/experiments/page.py                          # write their tables to the guide

Every run goes through a stock ``Trainer`` (``dpo``: ours) with an ``OutputSpaceCallback`` and leaves its
recording in ``outputs/output_space/NAME``, for ``hf-poprisk output-space``. The numbers go to
``results/output_space_NAME.csv`` beside this file, with three plots. ``dpo`` needs ``outputs/tiny``, which
``python scripts/prepare_tiny.py`` makes.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parents[1]))  # recipes

import common
import pandas as pd
import torch
import transformers
from matplotlib.figure import Figure
from run import rounded, write
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from tables import markdown
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_poprisk.output_space import (
    DPOMargin,
    OutputSpaceCallback,
    Recording,
    Split,
    SquaredError,
    load_recording,
    split,
)
from hf_poprisk.output_space.analysis import Analysis, analyse

OUTPUTS, RESULTS = Path("outputs/output_space"), Path(__file__).with_name("results")
Rows = list[dict[str, Tensor]]
Found = tuple[list[dict[str, Any]], Figure | None]  # rows of results, and a plot

FORMATS = {  # of the results of each kind, in their order
    "benign": ".0e .3f .3f .0f .0f .0% .0% .2% .0f .0% .0f .6f .2f .2f .0e",
    "descent": ".0f .2g .3g .0f .0% .0% .2f",
    "bias": ".2f .0f .3f .0f .0f .0f .3f .0f .0f .3f .0f .0f .0% .0% .1% .3f",
    "grokking": ".0f .2f .2f .2f .0f .0% .0%",
    "dpo": "s .3f .0% .0% .3f .3f .0% .0% .0% .0f .1f .0% .0% .0f .0% .0% .0%",
}
QUIET = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "use_cpu": True}
QUIET |= {"disable_tqdm": True}


def results_of(kind: str) -> Path:
    return RESULTS / f"output_space_{kind}.csv"


def table(kind: str) -> str:
    """Markdown: a row a line; of one or two rows a result a line."""
    rows = pd.read_csv(results_of(kind), engine="python")  # which reads numbers exactly
    formats = FORMATS[kind].split()
    lines = [
        [format(value, form) for value, form in zip(row, formats, strict=True)]
        for row in rows.itertuples(index=False)
    ]
    if len(lines) > 2:
        return markdown(list(rows), lines)
    return markdown([""] * (1 + len(lines)), zip(rows, *lines, strict=True))


class Regressor(nn.Module):
    """Any network, with the loss of transformers' regression heads."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body.double()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.body(x)
        return {"loss": F.mse_loss(logits, labels.reshape(logits.shape)), "logits": logits}


def train(
    name: str,
    body: nn.Module,
    data: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    directions: dict[str, Tensor],
    rate: float,
    steps: int,
    records: int = 25,
    **settings: Any,
) -> tuple[Recording, Analysis]:
    """Full-batch training on inputs and labels, recorded at steps that are evenly spaced in log time."""
    rows, others = (
        [{"x": x, "labels": y} for x, y in zip(*(part.double() for part in pair), strict=True)]
        for pair in (data, test)
    )
    # one batch of all: such small networks spend their time between operations
    probe, held_out = ([torch.utils.data.default_collate(part)] for part in (rows, others))
    when = {0, *(round(steps ** (i / (records - 1))) for i in range(records - 1))}
    args = TrainingArguments(
        output_dir=str(OUTPUTS / name),
        learning_rate=rate,
        max_steps=steps,
        per_device_train_batch_size=len(rows),
        lr_scheduler_type="constant",
        **{"optim": "sgd", "max_grad_norm": 0.0, **QUIET, **settings},
    )
    callback = OutputSpaceCallback(SquaredError(), probe, held_out, when, 256, directions)
    trainer = Trainer(Regressor(body), args, train_dataset=rows, callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    recording = load_recording(OUTPUTS / name)
    return recording, analyse(recording)


def seen_at_test(found: Analysis, direction: Tensor, than: Tensor) -> list[float]:
    """How much a unit of one direction moves test outputs, against a unit of another, from record two on."""
    moved = [
        [float((whole.transfer @ v.double()).norm() / v.norm()) for v in (direction, than)]
        for whole in found.evolutions[1:]
    ]
    return [one / other for one, other in moved]


def gone(found: Analysis, direction: Tensor) -> list[float]:
    """At each record, the share of the squared error along a direction that training has dissipated.

    Of a squared loss of one output, whose curvature is 2/n: vᵀWv / (n/4) for a unit v.
    """
    v = direction.double() / direction.double().norm()
    return [float(v @ whole.gramian @ v) * 4 / len(v) for whole in found.evolutions]


def stable_rate(x: Tensor) -> float:
    """Nine tenths of the largest stable learning rate of least squares on x [n, d]: its curvature is 2λ/n."""
    return 0.9 * len(x) / float(torch.linalg.matrix_norm(x.double(), 2)) ** 2


def plot(*panels: dict[str, Any]) -> Figure:
    """Two panels: ``x``, ``lines`` as label → values and style, and settings of the axis."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axis, panel in zip(figure.subplots(1, 2), panels, strict=True):
        x = panel.pop("x")
        for label, (y, style) in panel.pop("lines").items():
            axis.plot(x, y, style, label=label)
        axis.set(xscale="log", **panel)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=9)
    return figure


def benign() -> Found:
    """Least squares with 5 strong and 2400 weak features, noisy labels, trained until it interpolates."""
    torch.manual_seed(0)
    n, strong, weak = 60, 5, 2400
    scale = torch.cat([torch.ones(strong), torch.full((weak,), 0.02)]).double()
    x = torch.randn(n + 400, strong + weak).double() * scale
    clean = x[:, :strong].sum(1) / strong**0.5
    noise, signal = 0.5 * torch.randn(n).double(), clean[:n]
    body = nn.Linear(strong + weak, 1, bias=False)
    nn.init.zeros_(body.weight)
    data, test = (x[:n], signal + noise), (x[n:], clean[n:])
    directions = {"label noise": noise, "signal": signal}
    _, found = train("benign", body, data, test, directions, stable_rate(x[:n]) / 2, 800)
    visible, noise_gone = seen_at_test(found, noise, signal), gone(found, noise)
    best, last = int(found.test_losses.argmin()), found.splits[-1]
    full = next(i for i, cut in enumerate(found.splits) if cut.channel == n)
    row = {
        "training loss at the end": found.losses[-1].item(),
        "test loss at the end": found.test_losses[-1].item(),
        "lowest test loss": found.test_losses[best].item(),
        "its step": found.steps[best].item(),
        "channel of W there": found.splits[best].channel,
        "noise in the reservoir there": found.reservoir["label noise"][best].item(),
        "seen of it from there": found.visible["label noise"][best].item(),
        "signal in the reservoir there": found.reservoir["signal"][best].item(),
        "step where the cut jumps": found.steps[full].item(),
        "noise fitted there (of its square)": noise_gone[full],
        "channel of W at the end": last.channel,
        "largest eigenvalue of W over the smallest": float(last.eigenvalues[0] / last.eigenvalues[-1]),
        "noise seen at test after the first step": visible[0],
        "noise seen at test at the end": visible[-1],
        "largest error of the prediction": found.transfer_error.max().item(),
    }
    losses = {
        "training loss (noisy labels)": (found.losses[1:], "-"),
        "test loss (clean labels)": (found.test_losses[1:], "-"),
    }
    shares = {f"{name} in the reservoir of W": (found.reservoir[name][1:], "-") for name in directions}
    shares["noise that is fitted (of its square)"] = (noise_gone[1:], ":")
    shares["noise seen at test, signal = 1"] = (visible, "--")
    steps = {"x": found.steps[1:], "xlabel": "step"}
    return [row], plot(
        {**steps, "lines": losses, "yscale": "log", "title": "Benign overfitting"},
        {**steps, "lines": shares, "ylim": (-0.03, 1.03), "title": "Where the noise is"},
    )


def descent() -> Found:
    """Random tanh features of growing width under a trained head, the same data and noise."""
    torch.manual_seed(0)
    n, inputs, rows = 60, 12, []
    x = torch.randn(n + 400, inputs).double()
    clean = x @ torch.ones(inputs).double() / inputs**0.5
    noise, signal = 0.5 * torch.randn(n).double(), clean[:n]
    data, test = (x[:n], signal + noise), (x[n:], clean[n:])
    for width in (6, 20, 40, 60, 90, 240, 960):
        torch.manual_seed(width)
        body = nn.Sequential(nn.Linear(inputs, width, bias=False), nn.Tanh(), nn.Linear(width, 1, bias=False))
        body = body.double().requires_grad_(False)
        nn.init.normal_(body[0].weight)
        nn.init.zeros_(body[2].weight.requires_grad_())
        rate, directions = stable_rate(body[:2](x[:n])), {"label noise": noise}
        _, found = train(f"descent-{width}", body, data, test, directions, rate, 1500)
        rows.append(
            {
                "width": width,
                "training loss": found.losses[-1].item(),
                "test loss": found.test_losses[-1].item(),
                "channel of W": found.splits[-1].channel,
                "noise in the reservoir": found.reservoir["label noise"][-1].item(),
                "seen of it from there": found.visible["label noise"][-1].item(),
                "noise seen at test": seen_at_test(found, noise, signal)[-1],
            }
        )
    of = pd.DataFrame(rows)
    losses = {
        "training loss": (of["training loss"], "o-"),
        "test loss (clean labels)": (of["test loss"], "o-"),
    }
    shares = {
        "label noise in the reservoir of W": (of["noise in the reservoir"], "o-"),
        "noise seen at test, signal = 1": (of["noise seen at test"], "o--"),
    }
    widths = {"x": of["width"], "xlabel": "width"}
    figure = plot(
        {**widths, "lines": losses, "yscale": "log", "title": f"Double descent, {n} examples"},
        {**widths, "lines": shares, "title": "Where the noise is"},
    )
    for axis in figure.axes:
        axis.axvline(n, color="gray", linestyle=":", linewidth=1)
    return rows, figure


def bias() -> Found:
    """A two-layer network on digits, below five against the rest: which modes the channel takes in first."""
    torch.manual_seed(0)
    n = 120
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    picked = torch.randperm(len(images))[: n + 200]
    x, y = (images[picked] - 8) / 8, (labels[picked] >= 5).double() * 2 - 1
    body = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 1))
    directions = {"labels": y[:n]}
    recording, found = train("bias", body, (x[:n], y[:n]), (x[n:], y[n:]), directions, 0.005, 2500)
    vectors = torch.linalg.eigh(recording.series["kernel"][0]).eigenvectors.flip(1)
    g = found.gradients @ vectors
    left_of = (g / g[0]).square()  # [record, mode] of the squared error
    # W has the eigenvalue n/4 for what is gone of a squared loss of curvature 2/n
    by_w = 1 - torch.tensor([gone(found, v) for v in vectors.T]).T
    (first, last), (predicted, _) = (_halved(left, found.steps.tolist()) for left in (left_of, by_w))
    right = recording.series["test_outputs"][-1].reshape(-1).sign() == y[n:]
    row = {
        "change of the kernel, of its own norm": found.kernel_change[-1].item(),
        "modes below half of their squared error": len(first),
        "their order, Spearman": _order(first),
        "the first by step": first[0],
        "the tenth by step": first[9],
        "modes that stay there": len(last),
        "order of these, Spearman": _order(last),
        "modes with a larger error at the end": int((left_of[-1] > 1).sum()),
        "modes halved by W alone": len(predicted),
        "order of those, Spearman": _order(predicted),
        "channel of W after the first step": found.splits[1].channel,
        "channel of W at the end": found.splits[-1].channel,
        "labels in the reservoir after the first step": found.reservoir["labels"][1].item(),
        "labels in the reservoir at the end": found.reservoir["labels"][-1].item(),
        "largest error of the prediction": found.transfer_error.max().item(),
        "test accuracy": right.double().mean().item(),
    }
    return [row], None


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


def grokking() -> Found:
    """Addition modulo 11 from 70 % of the table, AdamW with weight decay: memorised, then understood."""
    torch.manual_seed(0)
    p = 11
    a, b = torch.cartesian_prod(torch.arange(p), torch.arange(p)).T
    x = torch.cat([F.one_hot(a, p), F.one_hot(b, p)], 1).double()
    y = F.one_hot((a + b) % p, p).double()
    order = torch.randperm(p * p)
    x, y, n = x[order], y[order], round(0.7 * p * p)
    signal, data, test = y[:n] - 1 / p, (x[:n], y[:n]), (x[n:], y[n:])
    settings = {"records": 17, "optim": "adamw_torch", "weight_decay": 1.0}
    network = SumNetwork(p, 64)
    recording, found = train("grokking", network, data, test, {"signal": signal}, 0.01, 1000, **settings)
    cuts = [split(kernel) for kernel in recording.series["kernel"]]
    guesses = [
        _kernel_regression(*pair, signal) for pair in zip(cuts, recording.series["cross_kernel"], strict=True)
    ]
    columns = {
        "step": found.steps.tolist(),
        "training accuracy": [_hits(u, y[:n]) for u in recording.series["outputs"]],
        "test accuracy": [_hits(u, y[n:]) for u in recording.series["test_outputs"]],
        "kernel regression": [_hits(guess, y[n:]) for guess in guesses],
        "channel of the kernel": [cut.channel for cut in cuts],
        "signal in it": [1 - cut.reservoir_share(signal) for cut in cuts],
        "signal in the reservoir of W": found.reservoir["signal"].tolist(),
    }
    lines = {name: values[1:] for name, values in columns.items()}
    accuracies = {
        "training": (lines["training accuracy"], "-"),
        "test": (lines["test accuracy"], "-"),
        "test, regression with the kernel": (lines["kernel regression"], "--"),
    }
    shares = {
        "signal in the channel of the kernel of the moment": (lines["signal in it"], "-"),
        "signal in the reservoir of W": (lines["signal in the reservoir of W"], "-"),
    }
    steps = {"x": lines["step"], "xlabel": "step"}
    figure = plot(
        {**steps, "lines": accuracies, "ylabel": "accuracy", "title": "Grokking, addition modulo 11"},
        {**steps, "lines": shares, "ylim": (-0.03, 1.03), "title": "Where the signal is"},
    )
    print(f"error of the prediction at the end: {found.transfer_error[-1]:.0%}")
    return pd.DataFrame(columns).to_dict("records"), figure


def _kernel_regression(kernel: Split, cross_kernel: Tensor, targets: Tensor) -> Tensor:
    """What ridge regression with the kernel of the moment says of the test examples, [m, k]."""
    ridge = 1e-3 * kernel.eigenvalues.mean()
    parts = kernel.vectors.T @ targets.reshape(-1) / (kernel.eigenvalues + ridge)
    return (cross_kernel @ kernel.vectors @ parts).reshape(-1, targets.shape[1])


def _hits(outputs: Tensor, labels: Tensor) -> float:
    return (outputs.argmax(1) == labels.argmax(1)).double().mean().item()


def dpo() -> Found:
    """The embedded model on preference pairs with flipped labels, AdamW and the hard gate."""
    rows = []
    for arm, gate in (("AdamW", "none"), ("hard gate", "hard")):
        recording, flipped = _train_pairs(gate)
        run = analyse(recording)
        cut, noise = run.splits[-1], run.reservoir["label noise"]
        u = torch.stack(recording.series["outputs"]).double().squeeze(-1)
        moved = u[-1] - u[0]
        parts, tenth = cut.vectors * (cut.vectors.T @ moved), len(moved) // 10  # [pair, mode]
        groups = {"clean": ~flipped, "flipped": flipped}
        rows.append(
            {
                "arm": arm,
                "held-out accuracy": (recording.series["test_outputs"][-1] > 0).double().mean().item(),
                **{f"{k} fitted": (u[-1][part] > 0).double().mean().item() for k, part in groups.items()},
                **{f"{k} margin": u[-1][part].mean().item() for k, part in groups.items()},
                **{
                    f"{k} margin in the leading tenth": float(parts[part, :tenth].sum() / moved[part].sum())
                    for k, part in groups.items()
                },
                "all margins in the mode with the smallest eigenvalue": float(
                    parts[:, -1].mean() / moved.mean()
                ),
                "channel of W": cut.channel,
                "largest eigenvalue of W over the smallest": float(cut.eigenvalues[0] / cut.eigenvalues[-1]),
                "flips in the reservoir": noise[-1].item(),
                "seen of them from there": run.visible["label noise"][-1].item(),
                "channel of W after the first step": run.splits[1].channel,
                "flips in the reservoir after the first step": noise[1].item(),
                "fall of the loss that is explained": float(run.predicted.sum() / run.measured.sum()),
                "error of the prediction at the end": run.transfer_error[-1].item(),
            }
        )
    return rows, None


def _train_pairs(gate: str) -> tuple[Recording, Tensor]:
    """12 steps of all of 96 training pairs; the recording, and which of them are flipped, [n] bool."""
    from hf_poprisk import PopRiskDPOConfig, PopRiskDPOTrainer  # here, because TRL is slow to import

    data = common.load_splits("outputs/tiny/preferences", None, False)
    pairs = common.flip_preferences(data["train"].select(range(96)), 0.3, 0)
    flipped = torch.tensor(pairs["is_flipped"])
    args = PopRiskDPOConfig(
        output_dir=str(OUTPUTS / f"dpo-{gate}"),
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
        **QUIET,
    )
    held_out = data["test"].select(range(48))
    trainer = PopRiskDPOTrainer("outputs/tiny/model", args=args, train_dataset=pairs, eval_dataset=held_out)
    trainer.remove_callback(PrinterCallback)
    parts = trainer.train_dataset, trainer.eval_dataset
    probe, test = ([trainer.data_collator([row]) for row in part] for part in parts)
    noise = -flipped.float()  # softplus(−u) was to be softplus(u): its gradient is off by −1
    steps = [1, 2, 4, 6, 9]  # often at first, where Adam's preconditioner changes fastest
    callback = OutputSpaceCallback(DPOMargin(args.beta), probe, test, steps, 96, {"label noise": noise})
    trainer.add_callback(callback)
    trainer.train()
    return load_recording(args.output_dir), flipped


KINDS = {kind.__name__: kind for kind in (benign, descent, bias, grokking, dpo)}


def main(argv: Sequence[str]) -> None:
    wrong = [name for name in argv if name not in KINDS]
    if wrong:
        raise common.RecipeError(f"unknown: {' '.join(wrong)}; give some of {', '.join(KINDS)}, or nothing.")
    chosen = list(argv) or list(KINDS)
    if "dpo" in chosen:
        common.require_path("outputs/tiny/model", "the model")
    transformers.utils.logging.set_verbosity_error()
    for name in chosen:
        print(f"{name}: {KINDS[name].__doc__}", flush=True)
        rows, figure = KINDS[name]()
        rows = [{column: rounded(value) for column, value in row.items()} for row in rows]
        write(pd.DataFrame(rows), results_of(name))
        if figure is not None:
            figure.savefig(results_of(name).with_suffix(".png"), dpi=80)
        print(table(name), end="\n\n")


if __name__ == "__main__":
    common.run(lambda: main(sys.argv[1:]))
