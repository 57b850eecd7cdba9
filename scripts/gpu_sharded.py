"""The gate under FSDP2 on the GPUs of one machine: is it exact over NCCL, and what does it cost?

    python scripts/gpu_sharded.py                 # 1 to 8 GPUs, a model of 1.1 billion parameters; minutes
    python scripts/gpu_sharded.py --device cpu    # over gloo and tiny: a rehearsal, whose times mean nothing

First G, Q and the gate of a small model, sharded in several ways, against a loop of single examples on one
device: the largest error of a parameter's sums, and the elements outside of ties that are decided otherwise.
Then a step of a large model, bfloat16 with float32 sums: plain AdamW under FSDP2, the gate, and the gate
without the reduction of its squares (which is wrong). What the last two differ by is the part of the traffic
that no computation hides. The exit code is 1 if anything is not exact.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_poprisk import PopRiskAdamW
from hf_poprisk.gate import openness
from hf_poprisk.per_example import BatchedGradients, Rows, sharded

SMALL = {"width": 64, "layers": 2, "vocabulary": 256, "tokens": 16}
LARGE = {"width": 2048, "layers": 16, "vocabulary": 32000, "tokens": 1024}
EXAMPLES = 4  # of a rank


class Way(NamedTuple):
    """How a step is taken."""

    name: str
    micro: int  # examples in a backward
    held: bool = False  # gradients are reduced once, at the step's end
    computed: torch.dtype = torch.bfloat16
    replicas: int = 1


EXACT = [
    Way("an example per backward", 1, computed=torch.float32),
    Way("an example per backward, bfloat16", 1),
    Way("two per backward, reduced each time", 2, computed=torch.float32),
    Way("two per backward, held", 2, True, torch.float32),
    Way("two per backward, held, two replicas", 2, True, torch.float32, 2),
]
TIMED = [
    Way("the share in one backward", EXAMPLES),
    Way("an example per backward, reduced each time", 1),
    Way("an example per backward, held", 1, True),
]
ARMS = ("AdamW", "gate", "gate, squares stay")


def build(sizes: dict[str, int], device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    width = sizes["width"]
    config = LlamaConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=sizes["layers"],
        num_attention_heads=max(width // 64, 2),
        tie_word_embeddings=False,
    )
    with device:
        return LlamaForCausalLM(config)


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """The sum over examples; ids: [rows, tokens]."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / (
        ids.shape[1] - 1
    )


def shard(model: nn.Module, way: Way) -> nn.Module:
    world, policy = dist.get_world_size(), MixedPrecisionPolicy(way.computed, torch.float32)
    shape, names = (world,), ("shard",)
    if way.replicas > 1:
        shape, names = (way.replicas, world // way.replicas), ("replicate", "shard")
    mesh = init_device_mesh(model.device.type, shape, mesh_dim_names=names)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


def backwards(model: nn.Module, optimizer: PopRiskAdamW, layers: Any, ids: Tensor, way: Way) -> None:
    """Of this rank's share of a step, [EXAMPLES, tokens]."""
    for start in range(0, EXAMPLES, way.micro):
        model.set_requires_gradient_sync(not way.held or start + way.micro == EXAMPLES)
        part = ids[start : start + way.micro]
        several = optimizer.needs_examples and way.micro > 1
        block = optimizer.batch(layers, Rows(len(part), len(part))) if several else optimizer.example()
        with block:
            (losses(model, part) / EXAMPLES).backward()


def textbook(sizes: dict[str, int], device: torch.device, ids: Tensor, way: Way) -> dict[str, Any]:
    """G and Q of a loop over single examples, in float64."""
    model = build(sizes, device)
    for p in model.parameters():
        p.data = p.data.to(way.computed)
    params = dict(model.named_parameters())
    sums = {name: torch.zeros(2, *p.shape, dtype=torch.float64, device=device) for name, p in params.items()}
    for i in range(len(ids)):
        grads = torch.autograd.grad(losses(model, ids[i : i + 1]) / len(ids), list(params.values()))
        for name, h in zip(params, grads, strict=True):
            sums[name] += torch.stack([h.double(), h.double().square()])
    return sums


def exactness(way: Way, device: torch.device) -> tuple[float, float, int]:
    """The error of G and of Q, in units of a parameter's largest, and the wrong decisions; on rank 0."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    shape = (world * EXAMPLES, SMALL["tokens"])
    ids = torch.randint(SMALL["vocabulary"], shape, generator=generator).to(device)
    model = shard(build(SMALL, device), way)
    optimizer = PopRiskAdamW(model.named_parameters())
    optimizer.follow(model)
    layers = BatchedGradients(model, optimizer.gated_parameters)
    backwards(model, optimizer, layers, ids[rank * EXAMPLES : (rank + 1) * EXAMPLES], way)
    b, squares = optimizer._open_window().reduce()
    expected = textbook(SMALL, device, ids, way) if rank == 0 else {}
    worst, flips = [0.0, 0.0], 0
    for name, p in model.named_parameters():
        whole = {"shape": p.shape, "stride": p.stride(), "run_check": False}
        q = DTensor.from_local(squares[p], p.device_mesh, p.placements, **whole).full_tensor()
        found = p.grad.full_tensor(), q
        if rank == 0:
            for k, (ours, theirs) in enumerate(zip(found, expected[name], strict=True)):
                error = float((ours.double() - theirs).abs().max() / theirs.abs().max())
                worst[k] = max(worst[k], error)
            grad, sq_sum = expected[name]
            far = (grad.square() - sq_sum).abs() > 1e-4 * sq_sum
            flips += int((openness(*found, b) != openness(grad, sq_sum, b).float())[far].sum())
    return worst[0], worst[1], flips


def seconds(way: Way, sizes: dict[str, int], rounds: int, device: torch.device) -> list[tuple[float, float]]:
    """The median of a step and the peak of memory in GB, of each arm."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    ids = torch.randint(sizes["vocabulary"], (EXAMPLES, sizes["tokens"]), device=device)
    quiet, measured = SimpleNamespace(**vars(dist)), []

    def keep(received: Tensor, sent: Tensor, group: dist.ProcessGroup) -> None:
        received.copy_(sent.view(group.size(), -1)[group.rank()])

    quiet.reduce_scatter_single = keep
    for arm in ARMS:
        model = shard(build(sizes, device), way)
        optimizer = PopRiskAdamW(model.named_parameters(), gate="none" if arm == "AdamW" else "hard")
        layers = None
        if arm != "AdamW":
            optimizer.follow(model)
            layers = BatchedGradients(model, optimizer.gated_parameters)
        sharded.dist = quiet if arm == ARMS[-1] else dist  # type: ignore[assignment]
        times = []
        for step in range(rounds + 2):
            if step == 1 and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            dist.barrier()
            sync()
            start = time.perf_counter()
            backwards(model, optimizer, layers, ids, way)
            optimizer.close_window()
            optimizer.step()
            optimizer.zero_grad()
            sync()
            times.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
        measured.append((statistics.median(times[2:]), peak))
        del model, optimizer, layers
    return measured


def main(rank: int, world: int, port: int, args: argparse.Namespace) -> None:
    """In a process of its own."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    device = torch.device(args.device, rank) if args.device == "cuda" else torch.device("cpu")
    if args.device == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo", rank=rank, world_size=world)
    console = Console(record=True, quiet=rank > 0, width=120)
    good = True
    shown = Table("exact?", "error of G", "error of Q", "wrong decisions", box=None)
    for way in EXACT:
        if world % way.replicas or world <= way.replicas > 1:
            continue
        of_g, of_q, flips = exactness(way, device)
        # in bfloat16 a device may sum in another order before it rounds
        limit, share = (1e-5, 0) if way.computed == torch.float32 or device.type == "cpu" else (5e-2, 1e-2)
        few = flips <= share * sum(p.numel() for p in build(SMALL, torch.device("meta")).parameters())
        good &= max(of_g, of_q) < limit and few
        shown.add_row(way.name, f"{of_g:.1e}", f"{of_q:.1e}", str(flips))
    console.print(f"{world} × {torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU, gloo'}")
    console.print(shown)
    sizes = {"width": args.width, "layers": args.layers, "tokens": args.tokens}
    sizes["vocabulary"] = (LARGE if args.device == "cuda" else SMALL)["vocabulary"]
    shown = Table("a step", *(f"{arm}: ms, GB" for arm in ARMS), "gate / AdamW", "not hidden, ms", box=None)
    for way in TIMED:
        measured = seconds(way, sizes, args.rounds, device)
        plain, gated, quiet = (t for t, _ in measured)
        cells = [f"{1e3 * t:.1f}, {peak:.1f}" for t, peak in measured]
        shown.add_row(way.name, *cells, f"{gated / plain:.2f}", f"{1e3 * (gated - quiet):.1f}")
    console.print(shown)
    if args.out and rank == 0:
        args.out.write_text(console.export_text())
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(not good if rank == 0 else 0)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, help="default: the GPUs there are; 2 on a CPU")
    for name in ("width", "layers", "tokens"):
        parser.add_argument(f"--{name}", type=int, help=f"of the large model; default: {LARGE[name]}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a file for the tables, too")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here: --device cpu rehearses without one.")
    for name in ("width", "layers", "tokens"):
        if getattr(args, name) is None:
            setattr(args, name, (LARGE if args.device == "cuda" else SMALL)[name])
    args.ranks = args.ranks or (torch.cuda.device_count() if args.device == "cuda" else 2)
    return args


if __name__ == "__main__":
    options = parse()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=main, args=(r, options.ranks, port, options)) for r in range(options.ranks)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))
