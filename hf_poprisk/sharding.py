"""Trainers on FSDP2: what they refuse of it, and how the optimizer is told of the shards."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from hf_poprisk.optimizer import PopRiskAdamW
from hf_poprisk.per_example.fsdp2 import is_sharded, reducing


class ShardingMixin:
    """Part of ``PopRiskMixin``. The model is sharded by accelerate (``fsdp=true``), or when it is loaded
    (``DistributedConfig``)."""

    # of the optimizer, while accelerate replaces its parameters: their names, and which are not gated
    _before_sharding: tuple[list[str | None], list[bool]] | None = None

    @property
    def _sharded(self) -> bool:
        return self.accelerator.is_fsdp2 or is_sharded(self.accelerator.unwrap_model(self.model))

    def _check_launch(self, what: str, without: str) -> None:
        """Sharding that the launcher, or the model, brings along: for what cannot serve any."""
        sharding = {
            "FSDP": self.is_fsdp_enabled or is_sharded(self.model),
            "DeepSpeed": self.is_deepspeed_enabled,
        }
        for name, on in sharding.items():
            if on:
                raise ValueError(f"{name} is not supported by {what}: launch with DDP, or set {without}.")

    def _check_sharding(self, what: str, without: str) -> None:
        """The same for the gate, which serves FSDP2. Sums of gradients over the ranks are made float32."""
        if self.is_deepspeed_enabled:
            raise ValueError(
                f"DeepSpeed is not supported by {what}: shard with FSDP2 (fsdp=true; for ZeRO-2 "
                f"reshard_after_forward=false), or set {without}."
            )
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and (parallel.tp_enabled or parallel.cp_enabled or parallel.sp_enabled):
            raise ValueError(
                f"tensor, context and sequence parallelism are not supported by {what}: shard with FSDP2 "
                f"alone (dp_shard_size, dp_replicate_size), or set {without}."
            )
        asked = self.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")
        if asked and not self.is_fsdp_enabled:
            raise ValueError(
                f"fsdp was asked for, and accelerate set up {self.accelerator.distributed_type.value} "
                "instead, as it does on a CPU: train on GPUs, or leave fsdp out."
            )
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError(
                f"FSDP1 is not supported by {what}: set fsdp_version=2 (version: 2 in fsdp_config), or set "
                f"{without}."
            )
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            raise ValueError(
                f"FSDP2 with cpu_offload is not supported by {what}: leave it out and shard over more GPUs, "
                f"or set {without}."
            )
        if self.args.poprisk_estimator == "ema":
            raise ValueError(
                "poprisk_estimator=ema does not run on sharded parameters: set poprisk_estimator=example, "
                f"launch with DDP, or set {without}."
            )
        policy = plugin.mixed_precision_policy
        if policy is not None:  # accelerate's own sums bfloat16, whose rounding would decide gates
            plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32)
        elif any(p.requires_grad and p.dtype.itemsize < 4 for p in self.model.parameters()):
            plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)

    def _let_go(self, optimizer: PopRiskAdamW) -> None:
        """accelerate will replace the parameters, and wants nobody to hold the old ones."""
        names, every = optimizer.names, list(optimizer._all_parameters())
        self._before_sharding = [names.get(p) for p in every], [p in optimizer._ungated for p in every]
        optimizer._ungated = set()
        optimizer.name_parameters(())

    def _follow_shards(self) -> None:
        """After the model was prepared, on every rank; a second call finds nothing left to do."""
        optimizer = self._poprisk_optimizer()
        if optimizer is None:
            return
        if self._before_sharding is not None:
            (names, ungated), self._before_sharding = self._before_sharding, None
            every = list(optimizer._all_parameters())
            optimizer._ungated = {p for p, left_out in zip(every, ungated, strict=True) if left_out}
            optimizer.name_parameters(
                (name, p) for p, name in zip(every, names, strict=True) if name is not None
            )
            self._prepare_layers(optimizer)
        if optimizer.needs_examples and optimizer._sharded is None and is_sharded(self.model):
            optimizer.follow(self.model)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]
        self._follow_shards()
        return prepared

    def _unsynced(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Gradients stay on their rank inside this block."""
        return reducing(model, False) if self._sharded else self.accelerator.no_sync(model)
