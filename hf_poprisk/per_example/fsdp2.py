"""A model that FSDP2 shards, looked into: its groups, and the whole parameters that autograd sees."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def local(x: Any) -> Any:
    """This rank's part of a sharded tensor; anything else as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def groups_of(model: nn.Module) -> list[tuple[FSDPModule, Any]]:
    """The groups of parameters that FSDP2 gathers together, each with a module of it; none if it does not."""
    modules: dict[Any, FSDPModule] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            modules.setdefault(module._get_fsdp_state(), module)
    found: list[tuple[FSDPModule, Any]] = []
    for state, member in modules.items():
        if len(state._fsdp_param_groups) > 1:
            raise NotImplementedError(
                "the gate cannot follow a module whose parameters FSDP2 shards over several meshes: shard "
                "all of them over one."
            )
        found += [(member, group) for group in state._fsdp_param_groups]
    return found


def whole_parameters(model: nn.Module) -> dict[Tensor, Tensor]:
    """Sharded parameter → the leaf that autograd sees in its place, for life. Empty without FSDP2.

    Every rank must call it: what FSDP2 never gathered is gathered once.
    """
    whole: dict[Tensor, Tensor] = {}
    for module, group in groups_of(model):
        if not all(hasattr(f, "_unsharded_param") for f in group.fsdp_params):
            module.unshard()
            module.reshard()
        whole |= {f.sharded_param: f.unsharded_param for f in group.fsdp_params}
    return whole


def gathered_modules(model: nn.Module) -> Iterator[nn.Module]:
    """``model.modules()``; those with parameters come group by group, while FSDP2 has them gathered."""
    groups = groups_of(model)
    for module, group in groups:
        module.unshard()
        yield from dict.fromkeys(
            owner
            for f in group.fsdp_params
            for owner in (f._module_info.module, *f._module_info.shared_modules)
        )
        module.reshard()
    if not groups:
        yield from model.modules()


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy to try things on, of the class that the module had before ``fully_shard``."""
    if not isinstance(module, FSDPModule):
        return copy.deepcopy(module)
    kind: Any = type(module).__mro__[2]
    plain = kind.__new__(kind)
    vars(plain).update(vars(module), _parameters={**module._parameters}, _buffers={**module._buffers})
    return plain


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards the model, or a part of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def reducing(model: nn.Module, on: bool) -> Iterator[None]:
    """Let FSDP2 reduce gradients inside this block, or hold them back; afterwards as before."""
    groups = [group for _, group in groups_of(model)]
    before = [(group.reduce_grads, group.all_reduce_grads) for group in groups]
    for group in groups:
        group.reduce_grads = group.all_reduce_grads = on
    try:
        yield
    finally:
        for group, (reduced, all_reduced) in zip(groups, before, strict=True):
            group.reduce_grads, group.all_reduce_grads = reduced, all_reduced


@contextmanager
def kept_gathered(model: nn.Module) -> Iterator[None]:
    """Keep some parameters gathered inside this block, once a forward has done it.

    For calls of the model's forward past the hooks of FSDP2, which would free them before their backward: its
    own, and those of groups of several modules, of which TRL uses the head's weight without calling it.
    """
    groups = [group for module, group in groups_of(model) if module is model or len(group.modules) > 1]
    before = [(group.reshard_after_backward, group.post_forward_mesh_info) for group in groups]
    for group in groups:
        group.reshard_after_backward, group.post_forward_mesh_info = False, None
    try:
        yield
    finally:
        for group, (after_backward, after_forward) in zip(groups, before, strict=True):
            group.reshard_after_backward, group.post_forward_mesh_info = after_backward, after_forward
            group.reshard()
