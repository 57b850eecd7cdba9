"""TRL's trainers on sampled completions with the gate, and their configs; one example is a prompt.

The completions of a prompt answer the same question. As examples of their own they would confirm each other,
where the gate asks whether other *prompts* confirm a step: all completions of a prompt are one example. TRL
shuffles the completions of a generation over its micro-batches. Here whole prompts are shuffled, so that one
backward holds all of an example; which completions a generation has stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer import grpo_trainer, rloo_trainer

from hf_poprisk.arguments import PopRiskArgumentsMixin
from hf_poprisk.optimizer import PopRiskAdamW
from hf_poprisk.per_example.layout import Layout, Rows
from hf_poprisk.refusals import EXAMPLES, LABEL_MODE, Rule, always
from hf_poprisk.trainer import takes_what
from hf_poprisk.trl import TAG, FusedHeadMixin

_SHUFFLE = "shuffle_sequence_dict"  # TRL's, in the modules of the trainers


class _PromptArguments(PopRiskArgumentsMixin):
    """What sampled completions cannot serve, and how many prompts a step has."""

    _example_rules = (
        Rule(
            lambda a: a.per_device_train_batch_size % a.num_generations,
            "the {a.num_generations} completions of a prompt (num_generations) are one example, and "
            "per_device_train_batch_size={a.per_device_train_batch_size} does not hold whole ones: make it a "
            "multiple of num_generations.",
        ),
        Rule(
            lambda a: (
                a.poprisk_estimator != "ema"
                and a.num_iterations > 1
                and a.steps_per_generation < a.gradient_accumulation_steps
            ),
            "num_iterations={a.num_iterations} with steps_per_generation={a.steps_per_generation} below "
            "gradient_accumulation_steps={a.gradient_accumulation_steps} puts the same prompts into a step "
            "several times, and copies confirm each other: raise steps_per_generation.",
        ),
        *EXAMPLES,
    )
    _weight_rules = (
        Rule(
            always,
            "poprisk_weight_column={a.poprisk_weight_column} weights examples of a training set, and "
            "completions are sampled: weight their rewards, and remove poprisk_weight_column.",
        ),
    )
    _label_rules = (
        Rule(
            always,
            f"{LABEL_MODE} judges labels, and a sampled completion has none: set poprisk_label_noise=off.",
        ),
    )
    _basis_rules = (
        Rule(
            always,
            "poprisk_basis=eigen is measured on training examples, and completions are sampled during "
            "training: set poprisk_basis=coordinate.",
        ),
    )

    @property
    def units_per_step(self) -> int:
        """Prompts per optimizer step over all ranks; micro-batches with ``poprisk_estimator=group``."""
        units = super().units_per_step
        return units if self.poprisk_estimator == "group" else units // self.num_generations


@dataclass
class PopRiskGRPOConfig(_PromptArguments, GRPOConfig):
    """``trl.GRPOConfig`` with the gate's fields; one example is one prompt with all of its completions."""


@dataclass
class PopRiskRLOOConfig(_PromptArguments, RLOOConfig):
    """``trl.RLOOConfig`` with the gate's fields; one example is one prompt with all of its completions."""


class _PromptsMixin(FusedHeadMixin):
    """Shows the optimizer prompts; rows i, i + N, … of a micro-batch are the completions of its prompt i."""

    _module: ModuleType  # of the stock trainer
    _way_out = (
        "set per_device_train_batch_size=num_generations and raise gradient_accumulation_steps, or "
        "poprisk_estimator=group"
    )

    def _gated_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> Tensor:
        if self._gates():
            model.train()  # as the stock step does before it asks for completions
            inputs = self._prepare_inputs(inputs)
            if self.state.global_step == 0:
                self._check_prompts(inputs["prompt_ids"])
        return super()._gated_step(model, inputs, num_items_in_batch)

    def _check_sharding(self, what: str, without: str) -> None:
        super()._check_sharding(what, without)
        if self._sharded:
            raise ValueError(
                f"FSDP2 is not supported by {what} for sampled completions: use DDP, or set {without}."
            )

    def _gates(self) -> bool:
        optimizer = self._poprisk_optimizer()
        return optimizer is not None and optimizer.needs_examples

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """As in TRL: completions for the prompts, or those of an earlier call."""
        if isinstance(generation_batch, Mapping):
            return generation_batch  # they are completions already
        if not self._gates():
            return super()._prepare_inputs(generation_batch)
        with _whole_prompts(self._module, self.num_generations, self.args.steps_per_generation):
            return super()._prepare_inputs(generation_batch)

    def _check_prompts(self, prompts: Tensor) -> None:
        """prompts: ids, [rows, tokens]."""
        first = prompts[: len(prompts) // self.num_generations]
        if not torch.equal(prompts, first.repeat(self.num_generations, 1)):
            raise RuntimeError(
                "the completions of a prompt are not together in a micro-batch, so this TRL lays them out in "
                "another way: install the version of scripts/constraints.txt, or set poprisk_gate=none."
            )

    def _layout(self, optimizer: PopRiskAdamW, inputs: Any) -> Layout | None:
        if not self._takes_examples(optimizer):
            return None
        rows = len(inputs["completion_ids"])
        layout = Rows(rows // self.num_generations, rows)
        if layout.num_examples > 1 and any(name.startswith("pixel_") for name in inputs):
            raise ValueError(
                "the images of several prompts in a micro-batch cannot be told apart: set "
                f"per_device_train_batch_size={self.num_generations} and raise gradient_accumulation_steps."
            )
        return layout

    @property
    def _announces_several(self) -> bool:
        return self.args.per_device_train_batch_size > self.num_generations

    def _check_copies(self) -> None:
        """The sampler leaves out prompts that do not fill a generation: there are no copies."""


def shuffle_prompts(batch: Mapping[str, Any], generations: int, micro_batches: int) -> dict[str, Any]:
    """The rows of a generation in another order, with whole prompts in every micro-batch.

    Args:
        batch: tensors and lists with an entry per completion, those of a prompt one after the other; what has
            no axis, or is None, stays as it is.
        generations: completions of a prompt, n.
        micro_batches: that the rows will be cut into, one after the other.

    Returns:
        In each micro-batch of N prompts, rows i, i + N, … are the n completions of one of them.
    """
    prompts = torch.randperm(len(batch["prompt_ids"]) // generations).view(micro_batches, -1, 1)
    order = (prompts * generations + torch.arange(generations)).transpose(1, 2).flatten()

    def ordered(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[order.to(value.device)] if value.dim() else value
        return value if value is None else [value[i] for i in order.tolist()]

    return {name: ordered(value) for name, value in batch.items()}


@contextmanager
def _whole_prompts(module: ModuleType, generations: int, micro_batches: int) -> Iterator[None]:
    """Inside this block TRL's shuffle keeps prompts whole.

    Raises:
        RuntimeError: a TRL whose trainer has another one.
    """
    if not hasattr(module, _SHUFFLE):
        raise RuntimeError(
            f"{module.__name__} has no {_SHUFFLE}: this TRL shuffles completions in another way; install the "
            "version of scripts/constraints.txt."
        )
    stock = getattr(module, _SHUFFLE)
    setattr(module, _SHUFFLE, partial(shuffle_prompts, generations=generations, micro_batches=micro_batches))
    try:
        yield
    finally:
        setattr(module, _SHUFFLE, stock)


class PopRiskGRPOTrainer(_PromptsMixin, GRPOTrainer):
    """``trl.GRPOTrainer`` with the gate."""

    _module = grpo_trainer
    _config_class = PopRiskGRPOConfig
    _tag_names = [*GRPOTrainer._tag_names, TAG]
    __init__ = takes_what(GRPOTrainer.__init__)


class PopRiskRLOOTrainer(_PromptsMixin, RLOOTrainer):
    """``trl.RLOOTrainer`` with the gate."""

    _module = rloo_trainer
    _config_class = PopRiskRLOOConfig
    _tag_names = [*RLOOTrainer._tag_names, TAG]
    __init__ = takes_what(RLOOTrainer.__init__)
