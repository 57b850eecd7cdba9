"""A whole training step with exact per-example sums, against plain AdamW on the same batch.

    python scripts/benchmark_step.py --tokens 64 256 --adapter full lora
    python scripts/benchmark_step.py --adapter full --batch 2 8 32 --tokens 32 64 128 256 512 1024 \
        --width 128 256 512 1024 --rounds 5 --at_most 50 --plot cost.png
    pip install opacus backpack-for-pytorch     # optional: two more arms

Every round takes each arm twice and times the second, in one process, on one thread; a ratio is the median
over the rounds of process CPU time against plain AdamW (``fused=True``) in the same round. Peak memory is the
growth of the resident set over the imports, in a process per arm (Linux). ``error of Q`` is the norm-wise
distance from the sums of a loop of single-example backwards; an arm without all parameters says how many are
missing. With ``--plot`` only the batched gate and plain AdamW are timed, and what the gate adds is fitted.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hf_poprisk import PopRiskAdamW
from hf_poprisk.per_example import BatchedGradients, Rows, kernels_cpu

VOCABULARY = 4096
Step = Callable[[], None]
Squares = Callable[[], dict[str, Tensor]]
Made = tuple[Step, Squares | None, torch.optim.Optimizer | None]  # backward, sums; fused AdamW if None


def build(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """A model of about 7 M parameters and a batch of token ids, [batch, tokens]."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    torch.manual_seed(0)
    config: Any
    if args.model == "llama":
        sizes = {"hidden_size": args.width, "intermediate_size": 8 * args.width // 3 // 16 * 16}
        sizes |= {"num_hidden_layers": 6, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=VOCABULARY, **sizes, tie_word_embeddings=False)
    else:
        sizes = {"n_embd": args.width, "n_layer": 6, "n_head": 4, "n_positions": 4096}
        config = GPT2Config(vocab_size=VOCABULARY, **sizes, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if args.adapter == "lora":
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "v_proj"] if args.model == "llama" else ["c_attn"]
        lora = LoraConfig(r=8, target_modules=targets, fan_in_fan_out=args.model == "gpt2")
        model = get_peft_model(model, lora)
    return model, torch.randint(0, VOCABULARY, (args.batch, args.tokens))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean over the rows of the batch, the same for every arm."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))


def plain(model: nn.Module, ids: Tensor, single: bool = False) -> Made:
    def backward() -> None:
        for rows in ids.split(1 if single else len(ids)):
            (loss_of(model, rows) * len(rows) / len(ids)).backward()

    return backward, None, None


def gated(model: nn.Module, ids: Tensor, single: bool = False, optimizer: PopRiskAdamW | None = None) -> Made:
    optimizer = optimizer or PopRiskAdamW(trainable(model).values())
    layers = None if single else BatchedGradients(model, optimizer.gated_parameters)

    def backward() -> None:
        for rows in ids.split(1 if single else len(ids)):
            with optimizer.example() if single else optimizer.batch(layers, Rows(len(ids), len(ids))):
                (loss_of(model, rows) * len(rows) / len(ids)).backward()

    def closed() -> None:
        backward()
        optimizer.close_window()

    def squares() -> dict[str, Tensor]:
        backward()
        _, sums = optimizer._open_window().reduce()
        found = {name: sums[p].clone() for name, p in trainable(model).items() if p in sums}
        optimizer.zero_grad()
        return found

    return closed, squares, optimizer


def eigen(model: nn.Module, ids: Tensor, gate: str = "none") -> Made:
    """In random bases, which cost what measured ones do; the side of the tokens is not rotated."""
    optimizer = PopRiskAdamW(trainable(model).values(), gate=gate, basis="eigen")
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]

    def orthogonal(n: int) -> Tensor | None:
        return None if n == VOCABULARY else torch.linalg.qr(torch.randn(n, n))[0]

    optimizer.set_bases({w: tuple(map(orthogonal, w.shape)) for w in weights})
    made = plain(model, ids) if gate == "none" else gated(model, ids, optimizer=optimizer)
    return made[0], None, optimizer


def vmap(model: nn.Module, ids: Tensor) -> Made:
    """``torch.func``: all gradients side by side, then their sums, then fused AdamW."""
    params = trainable(model)
    frozen = {n: t for n, t in [*model.named_parameters(), *model.named_buffers()] if n not in params}

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        inputs = {"input_ids": row[None], "use_cache": False}
        logits = torch.func.functional_call(model, {**weights, **frozen}, kwargs=inputs).logits[0, :-1]
        return nn.functional.cross_entropy(logits, row[1:]) / len(ids)

    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")

    def squares() -> dict[str, Tensor]:
        grads = per_example({n: p.detach() for n, p in params.items()}, ids)
        for name, p in params.items():
            p.grad = grads[name].sum(0)
        return {name: h.square().sum(0) for name, h in grads.items()}

    return squares, squares, None


def opacus(model: nn.Module, ids: Tensor) -> Made:
    from opacus.grad_sample import GradSampleModule

    sampled = GradSampleModule(model, loss_reduction="mean", strict=False)

    def squares() -> dict[str, Tensor]:
        loss_of(sampled, ids).backward()
        found = {n: vars(p).pop("grad_sample", None) for n, p in trainable(model).items()}
        return {n: (h / len(ids)).square().sum(0) for n, h in found.items() if isinstance(h, Tensor)}

    return squares, squares, None


def backpack(model: nn.Module, ids: Tensor) -> Made:
    from backpack import backpack as context
    from backpack import extend
    from backpack.extensions import SumGradSquared

    extended = extend(model)

    def squares() -> dict[str, Tensor]:
        with context(SumGradSquared()):
            loss_of(extended, ids).backward()
        found = {n: vars(p).pop("sum_grad_squared", None) for n, p in trainable(model).items()}
        return {n: sums for n, sums in found.items() if sums is not None}

    return squares, squares, None


PEERS: dict[str, Callable[..., Made]] = {"torch.func vmap": vmap, "Opacus": opacus, "BackPACK": backpack}
ARMS: dict[str, Callable[..., Made]] = {
    "plain AdamW": plain,
    "plain, single examples": partial(plain, single=True),
    "gate, single examples": partial(gated, single=True),
    "gate, batched": gated,
    "eigenbasis, no gate": eigen,
    "eigenbasis, gate, batched": partial(eigen, gate="hard"),
    **PEERS,
}


def make(arm: str, args: argparse.Namespace) -> tuple[Step, Squares | None]:
    """A whole step of an arm, and what forms its sums of squares."""
    model, ids = build(args)
    backward, squares, optimizer = ARMS[arm](model, ids)
    optimizer = optimizer or torch.optim.AdamW(trainable(model).values(), fused=True)

    def step() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, squares


def error_of(squares: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    missing = len(expected.keys() - squares.keys())
    shared = [name for name in expected if name in squares]
    gap = sum((squares[n].view_as(expected[n]) - expected[n]).square().sum() for n in shared)
    relative = (gap / sum(expected[n].square().sum() for n in shared)).sqrt().item()
    return f"{relative:.0e}" + (f", {missing} of {len(expected)} missing" if missing else "")


def memory_of(arm: str, args: argparse.Namespace) -> int:
    """Kilobytes of three steps, over what the imports take; to be run in a process of its own."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    build(args)  # imports what it needs
    kernels_cpu.usable(torch.empty(0))  # and numba, where it is installed
    before = peak_resident()
    step, _ = make(arm, args)
    for _ in range(3):
        step()
    return peak_resident() - before


def peak_resident() -> int:
    """Kilobytes; Linux. (``ru_maxrss`` starts at what the parent process had.)"""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def alone(work: Callable[..., Any], *args: Any) -> Any:
    """What ``work`` returns in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """CPU time of each arm against plain AdamW, round by round."""
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds):
        taken = {}
        for name in list(steps) if round_ % 2 else reversed(list(steps)):
            steps[name]()  # the arm before it has left its own memory in the caches
            start = time.process_time()
            steps[name]()
            taken[name] = time.process_time() - start
        for name, seconds in taken.items():
            ratios[name].append(seconds / taken["plain AdamW"])
    return ratios


def measure(args: argparse.Namespace) -> None:
    """Print the table of one cell."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import reference

    arms = [name for name in ARMS if not (args.ours and name in PEERS)]
    model, ids = build(args)
    gradients = reference.per_example_gradients(
        trainable(model), lambda row: loss_of(model, row) / len(ids), ids.split(1)
    )
    expected = {n: reference.grad_and_square_sums(gradients, n)[1].float() for n in trainable(model)}
    del gradients
    steps, errors = {}, {}
    for name in arms:
        try:
            step, squares = make(name, args)
            errors[name] = error_of(squares(), expected) if squares else ""
            step()
            steps[name] = step
        except Exception as error:  # a peer that is not installed, or refuses the model
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
    ratios = interleaved(steps, args.rounds)
    base = alone(memory_of, "plain AdamW", args)
    title = f"{args.model}, {args.adapter}, batch {args.batch} × {args.tokens} tokens, width {args.width}"
    table = Table("arm", "step", "spread (quartiles)", "peak memory", "error of Q", title=title)
    for name in arms:
        if name not in steps:
            table.add_row(name, "–", "", "", errors[name])
            continue
        low, middle, high = statistics.quantiles(ratios[name], n=4)
        try:
            memory = f"{alone(memory_of, name, args) / base:.2f}"
        except Exception:  # a peer's, or the process was killed
            memory = "–"
        table.add_row(name, f"{middle:.2f}", f"{low:.2f}–{high:.2f}", memory, errors[name])
    Console(width=110).print(table)


def gflop(cell: argparse.Namespace) -> float:
    """Forward and backward of the weights that are multiplied with; attention's products aside."""
    return 6e-9 * (72 * cell.width**2 + VOCABULARY * cell.width) * cell.batch * cell.tokens


def growth(cell: argparse.Namespace) -> float:
    """The median ratio of the batched gate."""
    steps = {name: make(name, cell)[0] for name in ("plain AdamW", "gate, batched")}
    for step in steps.values():
        step()
    ratio = statistics.median(interleaved(steps, cell.rounds)["gate, batched"])
    place = f"{cell.model} {cell.adapter} | {cell.width} | {cell.batch} | {cell.tokens}"
    print(f"| {place} | {ratio:.2f} |", flush=True)
    return ratio


def report_growth(cells: list[tuple[argparse.Namespace, float]], path: str) -> None:
    """Fit the extra cost and plot it. It is a share of a step, whose arithmetic is weights · batch · tokens:

    * per weight and example an h_i is written and read: ``/ tokens``;
    * per weight and step Q is decided on and multiplies the write: ``/ (tokens · batch)``;
    * per step there is Python around every layer: ``/ GFLOP`` of the step.
    """
    from matplotlib.figure import Figure

    extra = torch.tensor([ratio - 1 for _, ratio in cells], dtype=torch.float64)
    terms = extra.new_tensor([[1 / c.tokens, 1 / (c.tokens * c.batch), 1 / gflop(c)] for c, _ in cells])
    factors = torch.linalg.lstsq(terms, extra[:, None], driver="gelsd").solution[:, 0]
    fitted = terms @ factors
    print(
        "\nextra cost of the batched gate ≈ "
        "{:.1f} / tokens + {:.1f} / (tokens · batch) + {:.2f} / GFLOP".format(*factors.tolist())
        + f"; median distance from that {(extra - fitted).abs().median().item():.3f}"
    )
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for (cell, ratio), fit in zip(cells, fitted.tolist(), strict=True):
        name = f"{cell.model}, {cell.adapter}, width {cell.width}, batch {cell.batch}"
        lines.setdefault(name, []).append((cell.tokens, ratio, 1 + fit))
    axis = Figure().subplots()
    for i, (name, points) in enumerate(lines.items()):
        tokens, measured, expected = zip(*sorted(points), strict=True)
        axis.plot(tokens, measured, marker="o", label=name, color=f"C{i % 10}")
        axis.plot(tokens, expected, "--", color=f"C{i % 10}", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="tokens per example", ylabel="CPU time of a step, plain AdamW = 1 (dashed: fit)")
    axis.legend(fontsize=7)
    axis.figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = {"model": ("llama", "gpt2"), "adapter": ("full", "lora")}
    axes = {"model": ["llama"], "adapter": ["full", "lora"], "width": [256], "batch": [8]}
    axes["tokens"] = [64, 256]
    for axis, default in axes.items():
        kind = type(default[0])
        parser.add_argument(f"--{axis}", nargs="+", type=kind, choices=kinds.get(axis), default=default)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ours", action="store_true", help="leave the other libraries out")
    parser.add_argument("--at_most", type=float, metavar="GFLOP", help="leave out larger steps")
    parser.add_argument("--plot", help="where to write a plot of how the cost grows")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.rounds < 3:
        parser.error(f"--rounds must be at least 3; got {args.rounds}.")
    torch.set_num_threads(1)
    grid = itertools.product(*(getattr(args, axis) for axis in axes))
    cells = [argparse.Namespace(**vars(args) | dict(zip(axes, point, strict=True))) for point in grid]
    cells = [cell for cell in cells if args.at_most is None or gflop(cell) <= args.at_most]
    if args.plot:
        print("| model | width | batch | tokens | step |\n|---|---|---|---|---|")
        report_growth([(cell, growth(cell)) for cell in cells], args.plot)
    else:
        for cell in cells:
            measure(cell)


if __name__ == "__main__":
    main()
