"""What weights of 16 bits lose in training, and what ``kahan`` keeps of it: losses of two small problems.

The first is a linear regression whose weights begin .1 away from those that made the data; the second a tiny
random Llama on one batch of random tokens. On a CPU, a few minutes; ``--steps`` for fewer.
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from hf_poprisk import PopRiskAdamW

KINDS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "bfloat16, kahan": (torch.bfloat16, True),
}


def regression(dtype: torch.dtype, kahan: bool, steps: int, beta2: float) -> tuple[float, float]:
    """The mean squared error at the start and at the end, of float32 data."""
    g = torch.Generator().manual_seed(0)
    x, truth = torch.randn(512, 16, generator=g), torch.randn(16, generator=g)
    y = x @ truth + 0.1 * torch.randn(512, generator=g)
    away = torch.where(torch.rand(16, generator=g) > 0.5, 0.1, -0.1)
    w = torch.nn.Parameter((truth + away).to(dtype))
    options = {"lr": 1e-4, "betas": (0.9, beta2), "weight_decay": 0.0}
    optimizer = PopRiskAdamW([w], gate="hard", kahan=kahan, **options)
    losses = [float((x @ w.detach().float() - y).square().mean())]
    draws = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for i in torch.randint(512, (4,), generator=draws).tolist():
            with optimizer.example():
                (((x[i].to(dtype) * w).sum() - y[i].to(dtype)).square() / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses[0], float((x @ w.detach().float() - y).square().mean())


def language_model(dtype: torch.dtype, kahan: bool, steps: int, lr: float) -> tuple[float, float]:
    """The mean loss of 16 rows of random tokens at the start and at the end, of two seeds."""
    start = end = 0.0
    for seed in (0, 1):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, **sizes)).to(dtype)
        rows = torch.randint(256, (16, 16))
        optimizer = PopRiskAdamW(model.parameters(), lr=lr, gate="hard", kahan=kahan, weight_decay=0.0)
        start += evaluate(model, rows) / 2
        for step in range(steps):
            for row in rows.roll(-4 * step, 0)[:4]:
                with optimizer.example():
                    (model(input_ids=row[None], labels=row[None]).loss / 4).backward()
            optimizer.step()
            optimizer.zero_grad()
        end += evaluate(model, rows) / 2
    return start, end


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    return float(model(input_ids=rows, labels=rows).loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs=2, default=(1500, 200), help="of the two problems")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = Table("", "at the start", *KINDS)
    for beta2 in (0.999, 0.99):
        found = [regression(*kind, args.steps[0], beta2) for kind in KINDS.values()]
        out.add_row(
            f"regression, β₂ = {beta2:g}", *(f"{x:.3f}" for x in (found[0][0], *(f[1] for f in found)))
        )
    for lr in (3e-4, 3e-5):
        found = [language_model(*kind, args.steps[1], lr) for kind in KINDS.values()]
        out.add_row(f"tiny Llama, {lr:g}", *(f"{x:.3f}" for x in (found[0][0], *(f[1] for f in found))))
    Console(width=110).print(out)


if __name__ == "__main__":
    main()
