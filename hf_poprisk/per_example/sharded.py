"""The window of a model that FSDP2 shards: its Q goes wherever its gradients go.

FSDP2 gathers the parameters of a group before they are used. The hooks of a window see these whole
parameters, so the squares are formed as on one device. When a backward is through with the group, FSDP2 sums
its gradients over the ranks with one reduce-scatter, which leaves each rank its shard of G. Right after it,
on the same ranks and the same stream, follows one of the group's squares, in float32. While FSDP2 holds
gradients back, whole, the squares are held beside them. So a rank keeps 4 bytes of Q per element of its
shards, and the whole squares of a group only as long as FSDP2 keeps its whole gradients. With replicas
(HSDP), their shards of Q are added when the window ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.nn import functional as F

from hf_poprisk.per_example.capture import Capture
from hf_poprisk.per_example.fsdp2 import groups_of, local, whole_parameters
from hf_poprisk.per_example.layers import BatchedGradients
from hf_poprisk.per_example.layout import Layout, wide
from hf_poprisk.per_example.ranks import add_over_ranks, divide_squares
from hf_poprisk.per_example.window import ExampleWindow


class _Group:
    """Reduces the gradients of a group for FSDP2, as before, and then the squares.

    Args:
        module: of the group.
        group: FSDP2's own.
    """

    def __init__(self, module: FSDPModule, group: Any) -> None:
        self.group = group
        self.follow: Callable[[_Group, dist.ProcessGroup], None] | None = None  # within a window's backward
        self._reduce = group._reduce_scatter_comm
        self.allocate = self._reduce.allocate
        module.set_custom_reduce_scatter(self)  # type: ignore[arg-type]

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, *args: Any, **kwargs: Any
    ) -> Any:
        work = self._reduce(output_tensor, input_tensor, group, *args, **kwargs)
        if self.follow is not None:
            self.follow(self, group)
        return work

    def held(self) -> Iterator[Tensor | None]:
        """Gradients that FSDP2 has not put into ``.grad`` yet."""
        for f in self.group.fsdp_params:
            yield f.unsharded_param.grad
            yield f.unsharded_accumulated_grad
        yield self.group._partial_reduce_output


class ShardedModel:
    """A model that FSDP2 shards, with its reductions in our hands.

    Args:
        model: after ``fully_shard``.
        params: of it, whose squares will be asked for.
        describe: names a parameter in messages.

    Raises:
        NotImplementedError: parameters that are sharded in another way, or not.
        ValueError: gradients that would not be summed in float32.
    """

    def __init__(self, model: nn.Module, params: Iterable[Tensor], describe: Callable[[Tensor], str]) -> None:
        params, found = dict.fromkeys(params), groups_of(model)
        for _, group in found:
            group.lazy_init()  # weights that were loaded after fully_shard are other objects
        sharded = {f.sharded_param for _, group in found for f in group.fsdp_params}
        if others := [p for p in params if p not in sharded]:
            raise NotImplementedError(
                f"{describe(others[0])} is not sharded by FSDP2 in this model, and the gate takes all "
                "parameters or none so: call fully_shard on the model, without ignored_params, before the "
                "optimizer is made (an adapter on a model that is sharded as it is loaded: set fsdp=true "
                "instead of DistributedConfig)."
            )
        for _, group in found:
            for f in group.fsdp_params:
                if f.sharded_param in params:
                    _check(f, group, describe)
        meshes = {group.mesh_info.mesh for _, group in found}
        if len(meshes) > 1 or meshes.pop().size() != dist.get_world_size():
            raise NotImplementedError(
                "the gate follows FSDP2 over one mesh of all processes: pass the same one to every "
                "fully_shard."
            )
        self.whole = whole_parameters(model)
        mesh = found[0][1].mesh_info
        self.shards: dist.ProcessGroup = mesh.shard_process_group
        self.replicas: dist.ProcessGroup | None = getattr(mesh, "replicate_process_group", None)
        self.divisor = {
            f.sharded_param: group.gradient_divide_factor or dist.get_world_size()
            for _, group in found
            for f in group.fsdp_params
        }
        self.groups = [_Group(*both) for both in found]

    @contextmanager
    def followed(self, follow: Callable[[_Group, dist.ProcessGroup], None]) -> Iterator[None]:
        """Call ``follow(group, ranks)`` inside this block whenever a group's gradients have been reduced."""
        for group in self.groups:
            group.follow = follow
        try:
            yield
        finally:
            for group in self.groups:
                group.follow = None


def _check(f: Any, group: Any, describe: Callable[[Tensor], str]) -> None:
    name = describe(f.sharded_param)
    if f.is_dtensor or not hasattr(group.mesh_info, "shard_process_group"):
        raise NotImplementedError(
            f"the gate cannot serve {name}, which tensor parallelism or replicate() splits: shard the model "
            "with FSDP2 (fully_shard) alone."
        )
    if isinstance(group.offload_policy, CPUOffloadPolicy):
        raise NotImplementedError(
            f"the gate cannot serve {name}, which FSDP2 keeps in the memory of the CPU: leave "
            "offload_policy out."
        )
    policy = group.mp_policy
    reduced = policy.reduce_dtype or policy.param_dtype or f.sharded_param.dtype
    if wide(reduced) != reduced:
        raise ValueError(
            f"the gradient of {name} would be summed over the ranks in {reduced}, whose rounding decides "
            "gates: set reduce_dtype=torch.float32 in FSDP2's MixedPrecisionPolicy (of a DistributedConfig: "
            "fsdp_mixed_precision=True)."
        )


class ShardedWindow(ExampleWindow):
    """``ExampleWindow`` over sharded parameters.

    Args:
        params: the parameters whose squares are summed; DTensors.
        model: their model.
        names, others: as for ``ExampleWindow``.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        model: ShardedModel,
        names: Mapping[Tensor, str],
        others: Iterable[Tensor] = (),
    ) -> None:
        self._model, sharded = model, list(params)
        whole = model.whole
        super().__init__(
            [whole[p] for p in sharded],
            {**names, **{whole[p]: name for p, name in names.items() if p in whole}},
            [whole[p] for p in others],
        )
        self.params = sharded
        self._shards: dict[Tensor, Tensor] = {}  # sharded parameter → this rank's part of Q, on all ranks

    @contextmanager
    def batch(self, layers: BatchedGradients, layout: Layout) -> Iterator[Capture]:
        self._unfreeze()  # before the forward, and not only for the backward
        with super().batch(layers, layout) as capture:
            yield capture

    def _unfreeze(self) -> None:
        """PEFT freezes adapters for a reference pass, which FSDP2 passes on to what it gathers in it.

        Left so, the next backward would find nothing to hook.
        """
        for p, leaf in self._model.whole.items():
            leaf.requires_grad_(p.requires_grad)

    @contextmanager
    def _backward(self, hook: Callable[[Tensor, Tensor], None], params: list[Tensor]) -> Iterator[None]:
        self._unfreeze()
        with self._model.followed(self._send), super()._backward(hook, params):
            yield

    @contextmanager
    def no_example(self, allowed: Iterable[Tensor]) -> Iterator[set[Tensor]]:
        allowed = list(allowed)
        with super().no_example(self._model.whole[p] for p in allowed) as met:
            yield met
        seen = [p for p in allowed if self.leaf(p) in met]
        met.clear()
        met.update(seen)
        self.shared = set(allowed)

    @torch.no_grad()
    def _send(self, group: _Group, ranks: dist.ProcessGroup) -> None:
        """Sum the squares of a group, all that are held, over the ranks that shard it; keep this rank's."""
        held, everyone = self.squares.so_far(), group.group.reduce_scatter_unused_params
        mine = set(self._params)
        fs = [
            f
            for f in group.group.fsdp_params
            if f.unsharded_param in held
            or everyone
            and f.unsharded_param in mine
            and f.sharded_param.requires_grad
        ]
        if not fs:
            return
        n, whole = ranks.size(), self.squares.take([f.unsharded_param for f in fs])
        parts = [_split(q, n, f.fsdp_placement.dim) for q, f in zip(whole, fs, strict=True)]
        sent = torch.cat(parts, 1)
        if sent.is_cuda:  # formed on the stream of the backward, read on this one
            for q in whole:
                q.record_stream(torch.cuda.current_stream())
        received = sent.new_empty(sent.shape[1])
        dist.reduce_scatter_single(received, sent.view(-1), group=ranks)
        for f, part in zip(fs, received.split([part.shape[1] for part in parts]), strict=True):
            shape = f.sharded_size
            q = part[: shape.numel()].view(shape)
            p = f.sharded_param
            self._shards[p] = self._shards[p].add_(q) if p in self._shards else q

    def _reduce_squares(self, params: list[Tensor]) -> dict[Tensor, Tensor]:
        if any(g is not None for group in self._model.groups for g in group.held()):
            raise RuntimeError(
                "FSDP2 still holds gradients back at the end of a step: call "
                "model.set_requires_gradient_sync(True) before the step's last backward."
            )
        if self._model.shards.size() == 1:  # where FSDP2 has nothing to scatter
            for group in self._model.groups:
                self._send(group, self._model.shards)
        for p in params:
            if p not in self._shards:
                self._shards[p] = torch.zeros_like(local(p), dtype=wide(p.dtype))
        return self._averaged({p: self._shards[p] for p in params})

    def _averaged(self, sums: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        if self._model.replicas is not None:
            add_over_ranks(list(sums.values()), self._model.replicas)
        for p, q in sums.items():
            divide_squares({p: q}, self._model.divisor[p])
        return sums

    def so_far(self) -> dict[Tensor, Tensor]:
        return self._averaged({p: self._shards[p].clone() for p in self.params if p in self._shards})

    def leaf(self, param: Tensor) -> Tensor:
        return self._model.whole[param]

    def add_over_shards(self, sums: Tensor) -> Tensor:
        dist.all_reduce(sums, group=self._model.shards)
        return sums

    def reset(self) -> None:
        self.squares.take(list(self.squares.so_far()))  # whole squares are not kept from window to window
        self._shards = {}
        super().reset()

    def _gradients(self) -> Iterator[Tensor | None]:
        for p in self.params:
            yield local(p.grad)
        for group in self._model.groups:
            yield from group.held()


def _split(q: Tensor, n: int, dim: int) -> Tensor:
    """A whole tensor as [n, elements of a shard], with zeros at the end as FSDP2 pads it."""
    size = -(-q.shape[dim] // n)
    if missing := size * n - q.shape[dim]:
        q = F.pad(q, [0, 0] * (q.dim() - 1 - dim) + [0, missing])
    return q.unflatten(dim, (n, size)).movedim(dim, 0).reshape(n, -1)
