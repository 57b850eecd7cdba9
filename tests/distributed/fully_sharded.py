"""What each rank of ``test_sharded.py`` does: one window of many layouts under FSDP2, beside the textbook.

Imported once, before the ranks are forked from it. Not a test module.
"""

import os
import re
import signal
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.distributed as dist
from models import adapted, tiny_model, token_examples
from per_example.test_layers import batch, checkpointed, example_losses, trainable
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hf_poprisk import PopRiskAdamW
from hf_poprisk.per_example import BatchedGradients, Rows
from hf_poprisk.per_example.sharded import local

B = 12
BF16, F32 = torch.bfloat16, torch.float32


@dataclass
class Layout:
    """How a window is run."""

    adapter: str = "full"  # of models.adapted
    tied: bool = False
    micro: int = 1  # examples in a backward
    sync: str = "each"  # backward that is reduced: each, last; replicas: all-reduced at the last
    checkpointing: bool = False
    dtype: torch.dtype = F32
    computed: torch.dtype | None = None  # of the policy
    options: dict[str, Any] = field(default_factory=dict)  # of fully_shard
    replicas: int = 1
    ungated: bool = False  # some of the parameters
    ends: bool = False  # are groups of their own, as accelerate makes them


WORDS: dict[str, dict[str, Any]] = {
    **{"one": {}, "two": {"micro": 2}, "three": {"micro": 3}, "four": {"micro": 4}, "all": {"micro": 6}},
    **{"held": {"sync": "last"}, "partly": {"sync": "replicas"}},
    **{"tied": {"tied": True}, "lora": {"adapter": "lora"}, "checkpointing": {"checkpointing": True}},
    **{"bf16": {"dtype": BF16}, "computed": {"computed": BF16}, "ungated": {"ungated": True}},
    **{"kept": {"options": {"reshard_after_forward": False}}, "ends": {"ends": True}},
    **{"replicas": {"replicas": 2}, "copies": {"replicas": 4}},
}
NAMES = {  # by the number of ranks; an adapter of rank two leaves one of three without a part
    2: "one held kept; three; three held; all; tied; tied three held; lora held; checkpointing; "
    "lora three checkpointing; computed held; bf16 held; ungated; ends held; ends three",
    3: "one; two held; lora; tied four",
    4: "replicas; replicas two held; replicas two partly; replicas lora; copies; three",
}
LAYOUTS = {
    world: {name: Layout(**dict(ChainMap(*map(WORDS.get, name.split())))) for name in names.split("; ")}
    for world, names in NAMES.items()
}


def build(layout: Layout) -> nn.Module:
    model = adapted(tiny_model("llama", layout.tied, layout.dtype), layout.adapter)
    with torch.no_grad():  # at this size rounding would be amplified
        for name, p in model.named_parameters():
            p.mul_(0.25 if "lora_" in name else 0.5 if p.dim() == 2 else 1.0)
    if layout.checkpointing:
        checkpointed(model)
    return model


def sharded(layout: Layout) -> nn.Module:
    model, world = build(layout), dist.get_world_size()
    shape, names = (world,), ("shard",)
    if layout.replicas > 1:
        shape, names = (layout.replicas, world // layout.replicas), ("replicate", "shard")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    parts: list[Any] = [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]
    if layout.ends:
        parts += [model.model.embed_tokens, [model.model.norm, model.lm_head]]
    for module in [*parts, model]:
        policy = MixedPrecisionPolicy(layout.computed, F32, output_dtype=F32 if module is model else None)
        fully_shard(module, mesh=mesh, mp_policy=policy, **layout.options)
    return model


@cache
def textbook(
    adapter: str, tied: bool, dtype: torch.dtype, computed: torch.dtype | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """G and Q in one process, from single examples, of mean losses."""
    layout = Layout(adapter, tied, dtype=dtype, computed=computed)
    model, inputs = build(layout), batch(B)
    if layout.computed is not None:
        for p in model.parameters():  # as FSDP2, which leaves the buffers
            p.data = p.data.to(layout.computed)
    model.register_forward_hook(in_float32)
    gradients = reference.per_example_gradients(
        trainable(model),
        lambda i: example_losses(model, {k: v[i : i + 1] for k, v in inputs.items()}, False).sum() / B,
        range(B),
    )
    return {name: reference.grad_and_square_sums(gradients, name) for name in trainable(model)}


def in_float32(module: nn.Module, args: Any, output: Any) -> Any:
    output.logits = output.logits.float()
    return output


@contextmanager
def traffic() -> Iterator[dict[str, list[int]]]:
    """Collective → the bytes that it is given inside this block."""
    sent: dict[str, list[int]] = {}

    def counted(call: Any, name: str, at: int, *args: Any, **named: Any) -> Any:
        sent.setdefault(name, []).append((args[at] if len(args) > at else named["input"]).nbytes)
        return call(*args, **named)

    with pytest.MonkeyPatch.context() as patch:
        for name, at in (("reduce_scatter_single", 1), ("all_gather_single", 1), ("all_reduce", 0)):
            patch.setattr(dist, name, partial(counted, getattr(dist, name), name, at))
        yield sent


def window(model: nn.Module, optimizer: PopRiskAdamW, layout: Layout, whole: list[int]) -> None:
    """This rank's share of the examples; the bytes of whole squares after each backward."""
    rank, world, inputs = dist.get_rank(), dist.get_world_size(), batch(B)
    mine = list(range(rank * B // world, (rank + 1) * B // world))
    several = layout.micro > 1
    layers = BatchedGradients(model, optimizer.gated_parameters) if several else None
    parts = [mine[i : i + layout.micro] for i in range(0, len(mine), layout.micro)]
    for k, part in enumerate(parts):
        last = k == len(parts) - 1
        model.set_requires_gradient_sync(layout.sync != "last" or last)
        if layout.sync == "replicas":
            model.set_requires_all_reduce(last)
        rows = {name: x[part] for name, x in inputs.items()}
        with optimizer.batch(layers, Rows(len(part), len(part))) if several else optimizer.example():
            (example_losses(model, rows, False).sum() * (world / B)).backward()
        if optimizer._window is not None:
            whole.append(sum(q.nbytes for q in optimizer._window.squares._sums.values()))


def run(layout: Layout) -> dict[str, Any]:
    """G, Q and q, whole, of two windows, the second of which takes a step."""
    model, expected = sharded(layout), None
    if dist.get_rank() == 0:
        expected = textbook(layout.adapter, layout.tied, layout.dtype, layout.computed)
    named = dict(trainable(model))
    ungated = [p for name, p in named.items() if layout.ungated and "mlp" in name]
    optimizer = PopRiskAdamW(named.items(), lr=1e-3, weight_decay=0.0, ungated=ungated)
    optimizer.follow(model)
    found: dict[str, Any] = {"expected": expected, "windows": [], "whole": []}
    reduce, sums = optimizer._open_window().reduce, {}

    def kept() -> Any:
        b, sq_sums = reduce()
        sums.update({"b": b, "squares": {p: q.clone() for p, q in sq_sums.items()}})
        return b, sq_sums

    optimizer._window.reduce = kept
    for step in range(2):
        with traffic() as found["traffic"]:
            window(model, optimizer, layout, found["whole"])
            optimizer.close_window()
        squares, q = sums["squares"], optimizer._openness
        found["held"] = sum(x.nbytes for x in squares.values())
        found["held_numel"] = sum(local(p).numel() for p in squares)
        entry = {"b": sums["b"]}
        for name, p in named.items():
            entry[name] = [p.grad.full_tensor(), *(whole(x[p], p) for x in (squares, q) if p in x)]
        found["windows"].append(entry)
        if step == 0:
            optimizer.zero_grad()
    before = {name: p.full_tensor().clone() for name, p in named.items()}
    found["norm"] = torch.nn.utils.clip_grad_norm_(named.values(), 1e9).full_tensor()
    optimizer.step()
    found["steps"] = {name: (before[name], p.full_tensor()) for name, p in named.items()}
    found["statistics"] = optimizer.statistics.pop("examples")
    return found


def whole(shard: Tensor, p: Tensor) -> Tensor:
    sizes = {"shape": p.shape, "stride": p.stride()}
    return DTensor.from_local(shard, p.device_mesh, p.placements, run_check=False, **sizes).full_tensor()


def guide() -> dict[str, float]:
    """The loop of the guide, as it is printed: its logs."""
    page = Path(__file__).parents[2] / "hf_poprisk/README.md"
    text = re.search(r"<!-- test: sharded -->\n```python\n(.*?)```", page.read_text(), re.S)
    examples = token_examples(8)[dist.get_rank() :: dist.get_world_size()]
    names = {"model": tiny_model(), "batches": [examples]}
    exec(text[1], names)
    return names["optimizer"].statistics.pop("examples")


def nan_on_one_shard() -> dict[str, Any]:
    """A NaN that only rank 1 can see, in the second step: what each rank does."""
    layout = Layout(ungated=True)
    model = sharded(layout)
    named = trainable(model)
    ungated = [p for name, p in named.items() if "mlp" in name]
    optimizer = PopRiskAdamW(named.items(), lr=1e-3, ungated=ungated)
    optimizer.follow(model)
    for step in range(2):
        window(model, optimizer, layout, [])
        ungated[0].grad = ungated[0].grad.clone()  # a group's gradients are parts of one tensor
        if step == 1 and dist.get_rank() == 1:
            local(ungated[0].grad)[0] = float("nan")
        before = [local(p).clone() for p in named.values()]
        optimizer.step()
        optimizer.zero_grad()
    everywhere: list[Any] = [None] * dist.get_world_size()
    kept = all(torch.equal(x, local(p)) for x, p in zip(before, named.values(), strict=True))
    dist.all_gather_object(everywhere, kept)
    return {"kept": everywhere, "logs": optimizer.statistics.pop("examples")}


def refusals() -> list[str]:
    """What is said of models that the gate cannot follow."""
    ways: list[dict[str, Any]] = [{"mp_policy": MixedPrecisionPolicy(BF16)}]
    ways += [{"offload_policy": CPUOffloadPolicy(pin_memory=False)}, {}]
    found = []
    for way in ways:
        model = build(Layout())
        fully_shard(model if way else model.model, **way)
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            PopRiskAdamW(model.named_parameters()).follow(model)
        found.append(str(caught.value))
    return found


def plain_traffic(layout: Layout) -> dict[str, list[int]]:
    """Of the same window without the gate."""
    model = sharded(layout)
    optimizer = PopRiskAdamW(trainable(model).values(), gate="none")
    window(model, optimizer, layout, [])
    optimizer.zero_grad()
    with traffic() as sent:
        window(model, optimizer, layout, [])
        optimizer.close_window()
    return sent


def join(rank: int, world: int, port: int) -> None:
    """Join the others."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)


def at_call(number: int, owner: Any, method: str, act: Callable[[], Any]) -> None:
    """Act before a method is called for the so-manieth time."""
    original, calls = getattr(owner, method), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == number:
            act()
        return original(*args, **kwargs)

    setattr(owner, method, counted)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(rank: int, world: int, port: int, folder: Path) -> None:
    """In a process of its own."""
    join(rank, world, port)
    found: dict[str, Any] = {}
    for name, layout in LAYOUTS[world].items():
        found[name] = run(layout)
        if world == 2 and name in ("three", "three held"):
            found[name]["plain"] = plain_traffic(layout)
    if world == 2:
        found["guide"], found["nan"], found["refused"] = guide(), nan_on_one_shard(), refusals()
    torch.save(found, folder / f"{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
