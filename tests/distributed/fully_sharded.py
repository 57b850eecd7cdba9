"""What each rank of ``test_sharded.py`` does: one window of many layouts under FSDP2, beside the textbook.

Imported once, before the ranks are forked from it. Not a test module.
"""

import os
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import reference
import torch
import torch.distributed as dist
from models import adapted, tiny_model, token_examples
from per_example.test_layers import batch, checkpointed, example_losses, trainable
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

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


LAYOUTS = {
    2: {
        "single, each": Layout(),
        "single, held": Layout(sync="last", options={"reshard_after_forward": False}),
        "several, each": Layout(micro=3),
        "several, held": Layout(micro=3, sync="last"),
        "one backward": Layout(micro=6),
        "tied, single": Layout(tied=True),
        "tied, several": Layout(tied=True, micro=3, sync="last"),
        "lora, single": Layout("lora", sync="last"),
        "lora, several": Layout("lora", micro=3),
        "checkpointing, single": Layout(checkpointing=True),
        "checkpointing, several": Layout("lora", micro=3, checkpointing=True),
        "bf16 computed, each": Layout(computed=BF16),
        "bf16 computed, held": Layout(computed=BF16, sync="last"),
        "bf16 parameters": Layout(dtype=BF16, sync="last"),
        "ungated": Layout(ungated=True),
        "ends, single": Layout(ends=True, sync="last"),
        "ends, several": Layout(ends=True, micro=3),
    },
    3: {
        "single, each": Layout(),
        "several, held": Layout(micro=2, sync="last"),
        "lora, single": Layout("lora"),  # rank 2 on three ranks: one of them has nothing
        "tied, several": Layout(tied=True, micro=4),
    },
    4: {
        "single, each": Layout(replicas=2),
        "several, held": Layout(replicas=2, micro=2, sync="last"),
        "several, replicas": Layout(replicas=2, micro=2, sync="replicas"),
        "lora, single": Layout("lora", replicas=2),
        "unsharded": Layout(replicas=4),
        "no replicas": Layout(micro=3),
    },
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


class Traffic:
    """Counts the bytes that are given to the collectives."""

    def __init__(self) -> None:
        self.sent: dict[str, list[int]] = {}
        self._before = {}

    def __enter__(self) -> "Traffic":
        for name, at in (("reduce_scatter_single", 1), ("all_gather_single", 1), ("all_reduce", 0)):
            original = self._before[name] = getattr(dist, name)
            self.sent[name] = []

            def counted(
                *args: Any, _name: str = name, _at: int = at, _call: Any = original, **kwargs: Any
            ) -> Any:
                given = args[_at] if len(args) > _at else kwargs["input"]
                self.sent[_name].append(given.numel() * given.element_size())
                return _call(*args, **kwargs)

            setattr(dist, name, counted)
        return self

    def __exit__(self, *_: Any) -> None:
        for name, original in self._before.items():
            setattr(dist, name, original)


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
    optimizer._open_window()
    stock = torch.optim.AdamW(
        [nn.Parameter(p.full_tensor()) for p in named.values()], lr=1e-3, weight_decay=0.0, fused=True
    )
    found: dict[str, Any] = {"expected": expected, "windows": [], "whole": []}
    for step in range(2):
        with Traffic() as traffic:
            window(model, optimizer, layout, found["whole"])
            reduce = optimizer._window.reduce
            sums = {}

            def kept(reduce: Any = reduce, sums: Any = sums) -> Any:
                b, sq_sums = reduce()
                sums |= {"b": b, "squares": {p: q.clone() for p, q in sq_sums.items()}}
                return b, sq_sums

            optimizer._window.reduce = kept
            optimizer.close_window()
            del optimizer._window.reduce
        found["traffic"] = traffic.sent
        squares, q = sums["squares"], optimizer._openness
        found["held"] = sum(x.nbytes for x in squares.values())
        found["held_numel"] = sum(local(p).numel() for p in squares)
        entry = {"b": sums["b"]}
        for name, p in named.items():
            entry[name] = [p.grad.full_tensor()]
            entry[name] += [whole(x[p], p) for x in (squares, q) if p in x]
        found["windows"].append(entry)
        if step == 0:
            optimizer.zero_grad()
    before = {name: p.full_tensor() for name, p in named.items()}
    for theirs, p in zip(stock.param_groups[0]["params"], named.values(), strict=True):
        theirs.grad = p.grad.full_tensor()
    norm = torch.nn.utils.clip_grad_norm_(named.values(), 1e9).full_tensor()
    found["norm"] = norm, torch.nn.utils.get_total_norm([p.grad for p in stock.param_groups[0]["params"]])
    optimizer.step()
    stock.step()
    found["steps"] = {
        name: (before[name], p.full_tensor(), theirs.detach())
        for (name, p), theirs in zip(named.items(), stock.param_groups[0]["params"], strict=True)
    }
    found["statistics"] = optimizer.statistics.pop("examples")
    return found


def whole(shard: Tensor, p: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    ).full_tensor()


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
        kept = all(torch.equal(x, local(p)) for x, p in zip(before, named.values(), strict=True))
        optimizer.zero_grad()
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, kept)
    return {"kept": everywhere, "logs": optimizer.statistics.pop("examples")}


def refusals() -> list[str]:
    """What is said of models that the gate cannot follow."""
    said = []
    for options in (
        {"policy": MixedPrecisionPolicy(BF16)},
        {"offload": CPUOffloadPolicy(pin_memory=False)},
        {"part": True},
    ):
        model = build(Layout())
        policy = options.get("policy") or MixedPrecisionPolicy()
        offload = {"offload_policy": options["offload"]} if "offload" in options else {}
        fully_shard(model.model if "part" in options else model, mp_policy=policy, **offload)
        try:
            PopRiskAdamW(model.named_parameters()).follow(model)
        except (ValueError, NotImplementedError) as error:
            said.append(str(error))
    return said


def plain_traffic(layout: Layout) -> dict[str, list[int]]:
    """Of the same window without the gate."""
    model = sharded(layout)
    optimizer = PopRiskAdamW(trainable(model).values(), gate="none")
    window(model, optimizer, layout, [])
    optimizer.zero_grad()
    with Traffic() as traffic:
        window(model, optimizer, layout, [])
        optimizer.close_window()
    return traffic.sent


def join(rank: int, world: int, port: int) -> None:
    """Join the others."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)


def main(rank: int, world: int, port: int, folder: Path) -> None:
    """In a process of its own."""
    join(rank, world, port)
    found: dict[str, Any] = {}
    for name, layout in LAYOUTS[world].items():
        found[name] = run(layout)
        if world == 2 and layout.micro == 3 and layout.adapter == "full" and not layout.tied:
            found[name]["plain"] = plain_traffic(layout)
    if world == 2:
        found["guide"], found["nan"], found["refused"] = guide(), nan_on_one_shard(), refusals()
    torch.save(found, folder / f"{world}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
