"""The memorised share next to the losses, and what the losses before and after every step say it is.

    python recipes/experiments/memorised.py

A small network on 512 examples of ten classes, 30 % of the labels drawn at random, by AdamW and with the hard
gate, in float64. Measured: 1 − gain on 4,096 other examples / gain on the step's own batch, summed over an
epoch's steps. Writes ``results/memorised.csv`` and ``.png``, one row per epoch; less than a minute.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from hf_poprisk import PopRiskAdamW
from hf_poprisk.risk import SHARE, RiskMeter

RESULTS = Path(__file__).with_name("results") / "memorised.csv"
EXAMPLES, OTHERS, BATCH, EPOCHS, NOISE = 512, 4096, 16, 12, 0.3
GATES = {"none": "AdamW", "hard": "hard gate"}


def draw(count: int, centers: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points about one center per class, some with a label drawn at random."""
    y = torch.randint(len(centers), (count,), generator=generator)
    x = centers[y] + torch.randn(count, centers.shape[1], generator=generator, dtype=torch.float64)
    drawn = torch.rand(count, generator=generator) < NOISE
    return x, torch.where(drawn, torch.randint(len(centers), (count,), generator=generator), y)


def train(gate: str, epochs: int = EPOCHS) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    centers = torch.randn(10, 20, generator=generator, dtype=torch.float64)
    data, others = (draw(count, centers, generator) for count in (EXAMPLES, OTHERS))
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10)).double()
    optimizer = PopRiskAdamW(model.parameters(), lr=1e-3, weight_decay=0.0, gate=gate)
    optimizer.keep_written = True
    meter, rows, history = RiskMeter(), list[dict[str, Any]](), list[dict[str, float]]()

    def loss(x: Tensor, y: Tensor) -> float:
        with torch.no_grad():
            return nn.functional.cross_entropy(model(x), y).item()

    for epoch in range(1, epochs + 1):
        other, own = 0.0, 0.0
        for batch in torch.randperm(EXAMPLES, generator=generator).split(BATCH):
            x, y = data[0][batch], data[1][batch]
            optimizer.zero_grad()
            for row in range(BATCH):
                with optimizer.example():
                    (nn.functional.cross_entropy(model(x[row]), y[row]) / BATCH).backward()
            optimizer.close_window()
            meter.observe(optimizer)
            other, own = other + loss(*others), own + loss(x, y)
            optimizer.step()
            other, own = other - loss(*others), own - loss(x, y)
        history.append(meter.pop(history))
        found = {"logged": history[-1].get(SHARE), "measured": 1 - other / own}
        losses = {"training_loss": loss(*data), "test_loss": loss(*others)}
        rows.append({"gate": gate, "epoch": epoch, **losses, **found})
    return rows


def plot(rows: pd.DataFrame, path: Path) -> None:
    figure = Figure((9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, (gate, name) in zip(("tab:blue", "tab:orange"), GATES.items(), strict=True):
        part = rows[rows["gate"] == gate]
        left.plot(part["epoch"], part["test_loss"], color=color, label=name)
        left.plot(part["epoch"], part["training_loss"], ":", color=color)
        right.plot(part["epoch"], part["logged"], color=color, label=f"{name}, logged")
        right.plot(part["epoch"], part["measured"], "--", color=color, label=f"{name}, measured")
    left.set(title="loss on other examples, and in training (dotted)", xlabel="epoch")
    right.set(title="memorised share", xlabel="epoch")
    right.axhline(1, color="gray", linewidth=0.8)
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=80)


def main() -> None:
    torch.set_num_threads(1)
    rows = pd.DataFrame([row for gate in GATES for row in train(gate)])
    rows.to_csv(RESULTS, index=False, float_format="%.4g")
    plot(rows, RESULTS.with_suffix(".png"))
    print(rows.to_string(index=False))


if __name__ == "__main__":
    main()
