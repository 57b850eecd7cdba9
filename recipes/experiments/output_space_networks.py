"""Networks in output space: implicit bias and grokking."""

from typing import Any

import torch
from matplotlib.figure import Figure
from output_space_training import Regressor, rows, train, with_legends
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from hf_poprisk.output_space import Split, cumulative, load_recording, split
from hf_poprisk.output_space.analysis import analyse


def bias() -> tuple[dict[str, Any], None]:
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
    return row, None


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


def _accuracy(outputs: Tensor, labels: Tensor) -> float:
    return (outputs.reshape(-1).sign() == labels.sign()).double().mean().item()


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
    return row, with_legends(figure)


def _kernel_regression(kernel: Split, cross_kernel: Tensor, targets: Tensor) -> Tensor:
    """What ridge regression with the kernel of the moment says of the test examples, [m, k]."""
    ridge = 1e-3 * kernel.eigenvalues.mean()
    parts = kernel.vectors.T @ targets.reshape(-1) / (kernel.eigenvalues + ridge)
    return (cross_kernel @ kernel.vectors @ parts).reshape(-1, targets.shape[1])


def _hits(outputs: Tensor, labels: Tensor) -> float:
    return (outputs.argmax(1) == labels.argmax(1)).double().mean().item()
