"""Linear models in output space: benign overfitting and double descent."""

from typing import Any

import torch
from matplotlib.figure import Figure
from output_space_training import Regressor, gone, rows, seen_at_test, stable_rate, train, with_legends
from torch import nn

from hf_poprisk.output_space import load_recording
from hf_poprisk.output_space.analysis import analyse


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
    return row, with_legends(figure)


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
    return {"examples": n, "steps": steps, "widths": found}, with_legends(figure)
