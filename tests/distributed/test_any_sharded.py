"""PopRiskGate on a model that FSDP2 shards over two processes: the step of one process."""

from pathlib import Path

import torch
import torch.distributed as dist
from models import tiny_model, token_examples
from test_sharded import launch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_poprisk import PopRiskGate

COUNT = 8  # examples of a step, over all processes


def trained(model: nn.Module, rank: int, world: int) -> list[torch.Tensor]:
    """The weights after two steps of this process's share of the examples."""
    optimizer = PopRiskGate(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    if world > 1:
        optimizer.follow(model)
    for _ in range(2):
        for example in token_examples(COUNT)[rank::world]:
            with optimizer.example():
                (model(**example).loss * world / COUNT).backward()
        optimizer.close_window()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.statistics.pop("examples")["poprisk/examples"] == COUNT
    return [p.full_tensor() if world > 1 else p.detach() for p in model.parameters()]


def main(rank: int, world: int, port: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    model, mesh = tiny_model(), init_device_mesh("cpu", (world,))
    for part in [*model.model.layers, model]:
        fully_shard(part, mesh=mesh)
    weights = trained(model, rank, world)
    if rank == 0:
        torch.save(weights, folder / "weights.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_the_step_is_that_of_one_process(tmp_path: Path) -> None:
    launch(main, 2, tmp_path)
    expected, before = trained(tiny_model(), 0, 1), list(tiny_model().parameters())
    different = moved = 0
    for ours, theirs, start in zip(torch.load(tmp_path / "weights.pt"), expected, before, strict=True):
        different += int(((ours - theirs).abs() > 1e-5).sum())
        moved += int((theirs != start).sum())
    assert moved > 3000 and different <= 3  # ties that rounding decides
