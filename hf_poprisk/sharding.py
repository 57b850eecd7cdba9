"""Trainers on FSDP2: what they refuse of it, and how the optimizer is told of the shards."""

from __future__ import annotations

import copy
import os
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from hf_poprisk.optimizer import PopRiskAdamW
from hf_poprisk.per_example.fsdp2 import is_sharded, reducing
from hf_poprisk.refusals import SHARDED, WHOLE_PARAMETERS, refuse


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
        refuse(WHOLE_PARAMETERS, self._launched(), of=what, without=without)

    def _check_sharding(self, what: str, without: str) -> None:
        """The same for the gate, which serves FSDP2. Sums of gradients over the ranks are made float32."""
        refuse(SHARDED, self._launched(), of=what, without=without)
        asked = self.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")
        if asked and not self.is_fsdp_enabled:
            raise ValueError(
                f"fsdp was asked for, and accelerate set up {self.accelerator.distributed_type.value} "
                "instead, as it does on a CPU: train on GPUs, or leave fsdp out."
            )
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        policy = plugin.mixed_precision_policy
        if policy is not None:  # accelerate's own sums bfloat16, whose rounding would decide gates
            plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32)
        elif any(p.requires_grad and p.dtype.itemsize < 4 for p in self.model.parameters()):
            plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)

    def _launched(self) -> Any:
        """The arguments, as the launcher and the model have them."""
        launched, accelerator = copy.copy(self.args), self.accelerator
        launched.fsdp = self.is_fsdp_enabled or is_sharded(self.model)
        launched.deepspeed = self.is_deepspeed_enabled
        launched.parallelism_config = getattr(accelerator, "parallelism_config", None)
        if self.is_fsdp_enabled:
            plugin = accelerator.state.fsdp_plugin
            offloads = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
            launched.fsdp_config = {"version": plugin.fsdp_version, "cpu_offload": offloads}
        return launched

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, which writes no weights where the checkpoints are sharded: they are gathered.

        A checkpoint, which has them in parts, is left as it is.
        """
        of_checkpoint = _internal_call and output_dir is not None
        if self.is_fsdp_enabled and is_sharded(self.model) and not of_checkpoint:
            kind = str(self.accelerator.state.fsdp_plugin.state_dict_type)
            if "FULL_STATE_DICT" not in kind:
                options = StateDictOptions(full_state_dict=True, cpu_offload=True)
                self._save(output_dir, get_model_state_dict(self.model, options=options))
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]
        self._follow_shards()
        return prepared

    def _unsynced(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Gradients stay on their rank inside this block."""
        return reducing(model, False) if self._sharded else self.accelerator.no_sync(model)
