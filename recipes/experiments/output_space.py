"""What the theory says of five kinds of training, looked at in output space.

    python recipes/experiments/output_space.py                  # all of them, some minutes on one core
    python recipes/experiments/output_space.py benign dpo       # some
    python recipes/experiments/page.py                          # write their tables to the guide

Every run goes through a stock ``Trainer`` (``dpo``: ours) with an ``OutputSpaceCallback`` and leaves its
recording in ``outputs/output_space/NAME``, for ``hf-poprisk output-space``. The numbers go to
``results/output_space_NAME.csv`` beside this file, ``benign`` with a plot. ``dpo`` needs ``outputs/tiny``,
which ``python scripts/prepare_tiny.py`` makes.
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
from output_space_runs import gone, seen_at_test, stable_rate, train, train_pairs
from run import rounded, write
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from tables import markdown
from torch import Tensor, nn
from torch.nn import functional as F

from hf_poprisk.output_space import Split, split
from hf_poprisk.output_space.analysis import Analysis

Results = list[dict[str, Any]]

FORMATS = {  # of the results of each kind, in their order
    "benign": ".0e .3f .3f .0f .0f .0% .0% .2% .0f .0% .0f .6f .2f .2f .0e",
    "descent": ".0f .2g .3g .0f .0% .0% .2f",
    "bias": ".2f .0f .3f .0f .0f .0f .3f .0f .0f .3f .0f .0f .0% .0% .1% .3f",
    "grokking": ".0f .2f .2f .2f .0f .0% .0%",
    "dpo": "s .3f .0% .0% .3f .3f .0% .0% .0% .0f .1f .0% .0% .0f .0% .0% .0%",
}


def results_of(kind: str) -> Path:
    return Path(__file__).with_name("results") / f"output_space_{kind}.csv"


def table(kind: str) -> str:
    """Markdown: a row a line; of one or two rows a result a line."""
    rows, formats = pd.read_csv(results_of(kind), engine="python"), FORMATS[kind].split()  # exact numbers
    lines = [list(map(format, row, formats)) for row in rows.itertuples(index=False)]
    if len(lines) > 2:
        return markdown(list(rows), lines)
    return markdown([""] * (1 + len(lines)), zip(rows, *lines, strict=True))


def benign() -> Results:
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
    curves = {
        "training loss (noisy labels)": found.losses[1:],
        "test loss (clean labels)": found.test_losses[1:],
        "label noise in the reservoir of W": found.reservoir["label noise"][1:],
        "signal in the reservoir of W": found.reservoir["signal"][1:],
        "noise that is fitted (of its square)": noise_gone[1:],
        "noise seen at test, signal = 1": visible,
    }
    lines, figure = pd.DataFrame(curves, found.steps[1:].tolist()), Figure((11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = {"logx": True, "xlabel": "step", "grid": True}
    lines.iloc[:, :2].plot(ax=left, logy=True, title="Benign overfitting", **shown)
    shown |= {"style": ["-", "-", ":", "--"], "ylim": (-0.03, 1.6)}
    lines.iloc[:, 2:].plot(ax=right, title="Where the noise is", **shown)
    figure.savefig(results_of("benign").with_suffix(".png"), dpi=80)
    return [row]


def descent() -> Results:
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
        row = {
            "width": width,
            "training loss": found.losses[-1].item(),
            "test loss": found.test_losses[-1].item(),
            "channel of W": found.splits[-1].channel,
            "noise in the reservoir": found.reservoir["label noise"][-1].item(),
            "seen of it from there": found.visible["label noise"][-1].item(),
        }
        rows.append(row | {"noise seen at test": seen_at_test(found, noise, signal)[-1]})
    return rows


def bias() -> Results:
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
    first, predicted = (_moments(left < 0.5, found.steps) for left in (left_of, by_w))
    last = _moments((left_of < 0.5).flip(0).cumprod(0).flip(0).bool(), found.steps)  # and stay there
    right = recording.series["test_outputs"][-1].reshape(-1).sign() == y[n:]
    row = {
        "change of the kernel, of its own norm": found.kernel_change[-1].item(),
        "modes below half of their squared error": len(first),
        "their order, Spearman": _order(first),
        "the first by step": first[0].item(),
        "the tenth by step": first[9].item(),
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
    return [row]


def _moments(reached: Tensor, steps: Tensor) -> Tensor:
    """Of each mode that gets there, in their order, the step of the first record with ``reached`` [R, N]."""
    return steps[reached.int().argmax(0)][reached.any(0)]


def _order(moments: Tensor) -> float:
    """How far the moments are in the order of the modes, Spearman."""
    return float(spearmanr(range(len(moments)), moments).statistic)


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square()


def grokking() -> Results:
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
    # one layer of squares can add two one-hot numbers modulo p exactly
    network = nn.Sequential(nn.Linear(2 * p, 64, bias=False), Square(), nn.Linear(64, p, bias=False))
    recording, found = train("grokking", network, data, test, {"signal": signal}, 0.01, 1000, **settings)
    series, rows = recording.series, []
    for i, cut in enumerate(map(split, series["kernel"])):
        guess = _kernel_regression(cut, series["cross_kernel"][i], signal)
        row = {
            "step": found.steps[i].item(),
            "training accuracy": _hits(series["outputs"][i], y[:n]),
            "test accuracy": _hits(series["test_outputs"][i], y[n:]),
            "kernel regression": _hits(guess, y[n:]),
            "channel of the kernel": cut.channel,
            "signal in it": 1 - cut.reservoir_share(signal),
        }
        rows.append(row | {"signal in the reservoir of W": found.reservoir["signal"][i].item()})
    print(f"error of the prediction at the end: {found.transfer_error[-1]:.0%}")
    return rows


def _kernel_regression(kernel: Split, cross_kernel: Tensor, targets: Tensor) -> Tensor:
    """What ridge regression with the kernel of the moment says of the test examples, [m, k]."""
    ridge = 1e-3 * kernel.eigenvalues.mean()
    parts = kernel.vectors.T @ targets.reshape(-1) / (kernel.eigenvalues + ridge)
    return (cross_kernel @ kernel.vectors @ parts).reshape(-1, targets.shape[1])


def _hits(outputs: Tensor, labels: Tensor) -> float:
    return (outputs.argmax(1) == labels.argmax(1)).double().mean().item()


def dpo() -> Results:
    """The embedded model on preference pairs with flipped labels, AdamW and the hard gate."""
    return [_margins(arm, gate) for arm, gate in (("AdamW", "none"), ("hard gate", "hard"))]


def _margins(arm: str, gate: str) -> dict[str, Any]:
    recording, flipped = train_pairs(gate)
    found = Analysis(recording)
    cut, noise = found.splits[-1], found.reservoir["label noise"]
    u = torch.stack(recording.series["outputs"]).double().squeeze(-1)
    end, moved = u[-1], u[-1] - u[0]
    modes, groups = cut.vectors * (cut.vectors.T @ moved), {"clean": ~flipped, "flipped": flipped}
    tenth = modes[:, : len(moved) // 10].sum(1)  # of each pair, in the leading modes
    leading = {k: float(tenth[part].sum() / moved[part].sum()) for k, part in groups.items()}
    return {
        "arm": arm,
        "held-out accuracy": float((recording.series["test_outputs"][-1] > 0).double().mean()),
        **{f"{k} fitted": float((end[part] > 0).double().mean()) for k, part in groups.items()},
        **{f"{k} margin": float(end[part].mean()) for k, part in groups.items()},
        **{f"{k} margin in the leading tenth": share for k, share in leading.items()},
        "all margins in the mode with the smallest eigenvalue": float(modes[:, -1].mean() / moved.mean()),
        "channel of W": cut.channel,
        "largest eigenvalue of W over the smallest": float(cut.eigenvalues[0] / cut.eigenvalues[-1]),
        "flips in the reservoir": float(noise[-1]),
        "seen of them from there": float(found.visible["label noise"][-1]),
        "channel of W after the first step": found.splits[1].channel,
        "flips in the reservoir after the first step": float(noise[1]),
        "fall of the loss that is explained": float(found.predicted.sum() / found.measured.sum()),
        "error of the prediction at the end": float(found.transfer_error[-1]),
    }


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
        rows = [{column: rounded(value) for column, value in row.items()} for row in KINDS[name]()]
        write(pd.DataFrame(rows), results_of(name))
        print(table(name), end="\n\n")


if __name__ == "__main__":
    common.run(lambda: main(sys.argv[1:]))
