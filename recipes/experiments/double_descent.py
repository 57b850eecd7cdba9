"""Double descent: the test error of networks of growing width on handwritten digits with noisy labels."""

from typing import Any

import torch
from experiment import Experiment, Report
from sklearn.datasets import load_digits
from torch import nn
from training import GATES, Classifier, Rows, fit


class Network(Classifier):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def run(cell: dict[str, Any]) -> dict[str, Any]:
    """Error on clean validation and test labels at the end, and on the training labels as they are.

    ``early`` keeps 10 % of the (noisy) labels apart and reports the step at which their loss is lowest.
    """
    draw = torch.Generator().manual_seed(cell["seed"])
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    order, n = torch.randperm(len(y), generator=draw), cell["num_train"]
    x, y = (x[order] / 8 - 1).float(), y[order]
    mislabeled = torch.randperm(n, generator=draw)[: round(cell["noise"] * n)]
    labels = y[:n].clone()
    labels[mislabeled] = (labels[mislabeled] + torch.randint(1, 10, (len(mislabeled),), generator=draw)) % 10
    kept = n - n // 10 if cell.get("early") else n
    sets = {
        "train": (x[:kept], labels[:kept]),
        "validation": (x[n : n + 400], y[n : n + 400]),
        "test": (x[n + 400 :], y[n + 400 :]),
    }
    torch.manual_seed(cell["seed"])
    model = Network(cell["width"])

    @torch.no_grad()
    def measure(step: int) -> dict[str, float]:
        held = {"held": model(x[kept:n], labels[kept:])["loss"].item()} if kept < n else {}
        return held | {
            f"{name}_error": (model.layers(part).argmax(1) != truth).float().mean().item()
            for name, (part, truth) in sets.items()
        }

    curves = fit(model, Rows(x=x[:kept], labels=labels[:kept]), cell, measure)
    return {f"{name}_error": curves[f"{name}_error"][-1] for name in sets}


EXPERIMENT = Experiment(
    title="Double descent: width sweep on digits, 20 % mislabeled",
    verdict="supported only at equal learning rate, and a mask does slightly better",
    run=run,
    # one learning rate, at which AdamW fits every label once the network is wide enough; the choice of a
    # smaller one would hide the peak, so that is an arm of its own
    settings={"learning_rate": 0.003, "num_train": 400, "noise": 0.2}
    | {"examples_per_step": 50, "steps": 1200, "every": 20},
    arms={
        "adamw": GATES["adamw"],
        "adamw-early": GATES["adamw-early"],
        "adamw-lr/3": {"poprisk_gate": "none", "learning_rate": 0.001},
        **{name: GATES[name] for name in ("hard", "soft", "random-mask", "random-mask-soft")},
    },
    facets={"width": [4, 8, 16, 32, 64, 128, 512]},
    reports=[Report("validation_error", "test_error", "lower")],
)
