"""An implicit neural representation: a network from coordinates to grey values, fitted to a noisy picture.

The picture is a crop of one that scikit-learn ships. Every pixel is an example; the network sees the noisy
values of all of them, and is compared with the clean ones.
"""

from math import pi
from typing import Any

import numpy as np
import torch
from experiment import Experiment, Report
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from training import GATES, Rows, fit


class Network(nn.Module):
    """Random Fourier features of the position, two hidden layers."""

    def __init__(self, width: int, features: int, frequency: float) -> None:
        super().__init__()
        self.register_buffer("directions", 2 * pi * frequency * torch.randn(2, features // 2))
        self.layers = nn.Sequential(
            nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )

    def forward(self, points: Tensor, labels: Tensor) -> dict[str, Tensor]:
        phase = points @ self.directions
        values = self.layers(torch.cat([phase.sin(), phase.cos()], 1)).squeeze(1)
        return {"loss": nn.functional.mse_loss(values, labels), "logits": values}


def picture(size: int) -> np.ndarray:
    """Grey values [size, size] in [0, 1]: blocks of pixels of the middle of the picture, averaged."""
    grey = load_sample_image("china.jpg").mean(2) / 255
    block = min(grey.shape) // size
    top, left = ((side - size * block) // 2 for side in grey.shape)
    middle = grey[top : top + size * block, left : left + size * block]
    return middle.reshape(size, block, size, block).mean((1, 3))


def run(cell: dict[str, Any]) -> dict[str, Any]:
    """PSNR in dB against the clean picture, on two halves of the pixels.

    ``early`` keeps 10 % of the noisy pixels apart and reports the step at which the error on them is lowest.
    """
    draw = torch.Generator().manual_seed(cell["seed"])
    clean = torch.from_numpy(picture(cell["size"])).float().flatten()
    axis = (torch.arange(cell["size"]) + 0.5) / cell["size"]
    points = torch.cartesian_prod(axis, axis)
    noisy = clean + cell["noise"] * torch.randn(len(clean), generator=draw)
    order = torch.randperm(len(clean), generator=draw)
    sets = {"validation": order[::2], "test": order[1::2]}
    held = torch.randperm(len(clean), generator=draw)[: len(clean) // 10 if cell.get("early") else 0]
    kept = torch.ones(len(clean), dtype=torch.bool)
    kept[held] = False
    torch.manual_seed(cell["seed"])
    model = Network(cell["width"], cell["features"], cell["frequency"])

    @torch.no_grad()
    def measure(step: int) -> dict[str, float]:
        values = model(points, clean)["logits"].clamp(0, 1)
        found = {f"{name}_psnr": psnr(values[rows], clean[rows]) for name, rows in sets.items()}
        return found | {"held": (values[held] - noisy[held]).square().mean().item()}

    curves = fit(model, Rows(points=points[kept], labels=noisy[kept]), cell, measure)
    return {
        **{f"{name}_psnr": curves[f"{name}_psnr"][-1] for name in sets},
        "test_highest": max(curves["test_psnr"]),
        "noisy_psnr": psnr(noisy.clamp(0, 1), clean),
    }


def psnr(values: Tensor, truth: Tensor) -> float:
    """In dB, of values in [0, 1]."""
    return -10 * (values - truth).square().mean().log10().item()


EXPERIMENT = Experiment(
    title="Implicit neural representation of a noisy picture",
    verdict="supported for the soft gate, by 0.2 dB; for more, only at equal learning rate, "
    "and a mask does more",
    run=run,
    settings={"size": 48, "noise": 0.2, "width": 96, "features": 64, "frequency": 3.0}
    | {"examples_per_step": 256, "steps": 1500, "every": 50},
    arms=GATES,
    grid={"learning_rate": [0.00005, 0.0001, 0.0002, 0.0003, 0.001, 0.003]},
    reports=[Report("validation_psnr", "test_psnr", "higher")],
    equal={"learning_rate": 0.003},
    columns={"test_highest": "best step on test"},
)
