"""How a trainer takes a micro-batch: in one backward, or its examples one by one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import has_length

from hf_poprisk.optimizer import PopRiskAdamW
from hf_poprisk.per_example import BatchedGradients, Capture, Layout, Packed, Rows
from hf_poprisk.per_example.examples import NotSeparable, copied, find_layout
from hf_poprisk.per_example.fsdp2 import reducing
from hf_poprisk.per_example.one_by_one import OneByOne
from hf_poprisk.per_example.ranks import gathered
from hf_poprisk.per_example.self_check import SelfCheck, Verdict, some_examples
from hf_poprisk.per_example.undisturbed import mode

logger = logging.getLogger(__name__)


class MicrobatchMixin:
    """Shows the optimizer every example of a micro-batch; part of ``PopRiskMixin``.

    ``rows_per_example`` is for trainers whose examples are several rows of what the model is called on: rows
    i, i + N, … of a micro-batch of N examples are one of them. The collator gives them, unless
    ``collated_rows`` says how many it gives, of which the loss makes the others.
    """

    rows_per_example = 1
    collated_rows: int | None = None
    _way_out = (
        "set per_device_train_batch_size=1 and raise gradient_accumulation_steps, or poprisk_estimator=group"
    )
    _layers: BatchedGradients | None = None  # of the model, where a micro-batch is taken in one backward
    _not_together: str | None = None  # why it is not
    _one_by_one: OneByOne | None = None  # where it is not
    _shared: set[torch.Tensor] = set()  # parameters with a term in the loss that belongs to no example
    _paths_checked = False

    def _gated_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        optimizer = self._poprisk_optimizer()
        inputs, index = self._take_index(inputs)
        weighting = self._weighting(model, inputs, index, num_items_in_batch)
        if optimizer is None:
            with weighting:
                return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        asks = self._takes_examples(optimizer) and not self._paths_checked
        if asks and self._announces_several:
            layout = self._check_paths(optimizer, model, inputs, num_items_in_batch)
        else:
            layout = self._layout(optimizer, inputs)
            if asks and layout.num_examples > 1:  # packed rows that nothing announced
                self._check_paths(optimizer, model, inputs, num_items_in_batch)
        step = partial(super().training_step, model, inputs, num_items_in_batch)  # type: ignore[misc]
        with weighting:
            if layout is None or layout.num_examples == 1 or not self._paths_checked:
                # several that were not checked have no gradient, or none that is finite
                with optimizer.example(1 if layout is None else layout.num_examples):
                    loss = step()
            elif self._layers is not None:
                with optimizer.batch(self._layers, layout) as capture, self._fused_operations(capture):
                    loss = step()
            else:
                loss = self._one_by_one_step(optimizer, step, model, layout)
        if self.accelerator.sync_gradients:
            optimizer.close_window()
        return loss

    @property
    def _announces_several(self) -> bool:
        return self.args.per_device_train_batch_size > 1 or getattr(self.args, "packing", False)

    def _takes_examples(self, optimizer: PopRiskAdamW) -> bool:
        """Whether anything asks for the examples of a micro-batch; a group is a whole one."""
        return optimizer.needs_examples and self.args.poprisk_estimator != "group"

    def _layout(self, optimizer: PopRiskAdamW, inputs: Any) -> Layout | None:
        """Where the examples are; None where none are asked for."""
        if not self._takes_examples(optimizer):
            return None
        size = self.args.per_device_train_batch_size
        try:
            layout = self._rows_of(inputs)
        except NotSeparable as error:
            if size == 1:
                return Rows(1, 1)
            raise ValueError(f"{error}: {self._way_out}.") from error
        if isinstance(layout, Packed):
            if not self._announces_several and self.accelerator.num_processes > 1:
                raise ValueError(
                    "a row holds several sequences, which nothing announced to the other processes: set "
                    "per_device_train_batch_size above 1, or train on one process."
                )
            return layout
        if size == 1:
            return Rows(1, layout.num_rows)
        self._check_count(layout.num_examples)
        return layout

    def _rows_of(self, inputs: Any) -> Layout:
        main_input = getattr(self.accelerator.unwrap_model(self.model), "main_input_name", "input_ids")
        return find_layout(inputs, self.rows_per_example, main_input, self.collated_rows)

    def _one_by_one_step(
        self,
        optimizer: PopRiskAdamW,
        step: Callable[[], torch.Tensor],
        model: nn.Module,
        layout: Layout,
    ) -> torch.Tensor:
        """The stock step on the examples' outputs, and then each example's share of its gradient."""
        one_by_one = self._one_by_one
        assert one_by_one is not None  # since the self-check
        with self._uncompiled():
            try:
                with (
                    self._unsynced(model),
                    one_by_one.cached(layout),
                    optimizer.no_example(self._shared),
                ):
                    loss = step()
                one_by_one.check()
                for i in range(layout.num_examples):
                    # only the last one is synchronised: the gradients would be averaged over and over
                    last = i == layout.num_examples - 1 and self.accelerator.sync_gradients
                    by_ddp = self.accelerator.num_processes > 1 and not self._sharded
                    with (
                        nullcontext() if last else self._unsynced(model),
                        self.compute_loss_context_manager(),
                        optimizer.example(),
                    ):
                        one_by_one.backward(i, model if last and by_ddp else None)
            except NotSeparable as error:
                raise RuntimeError(f"{error}, which it did not at the start: {self._way_out}.") from error
            finally:
                one_by_one.release()
        return loss

    def _uncompiled(self) -> AbstractContextManager[Any]:
        """Examples alone are not what a compiled model was compiled for."""
        return torch.compiler.set_stance("force_eager") if self._compiled_by() else nullcontext()

    def _compiled_by(self) -> str | None:
        if self.args.torch_compile:
            return "torch_compile=True"
        compiled = is_compiled_in_place(self.accelerator.unwrap_model(self.model))
        return "model.compile()" if compiled else None

    def _check_paths(
        self, optimizer: PopRiskAdamW, model: nn.Module, inputs: Any, num_items_in_batch: Any
    ) -> Layout:
        """The self-check, once per run: choose a path on which the gradient is the stock one, or refuse.

        If no rank's micro-batch has a gradient, nothing can be compared: the next ones will be. Returns the
        layout of this one.

        Raises:
            ValueError: what a rank refuses, on all of them.
        """
        if self._layers is None and self._not_together is None:
            self._find_layers(optimizer)
        unwrapped = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self._one_by_one, low = OneByOne(unwrapped), self._has_low_precision(unwrapped)
        refused, parts = None, list[tuple[Any, Layout]]()
        try:
            layout = self._layout(optimizer, inputs)
            # in eval mode nothing is recomputed, and all may not fit; all ranks must take as many
            few = any(getattr(m, "gradient_checkpointing", False) for m in unwrapped.modules())
            parts = [(inputs, layout)]
            if (n := layout.num_examples) == 1 or n > 2 and (few or self._sharded):
                pairs = ([i, (i + 1) % n] for i in range(0, n, 2))
                parts = [some_examples(inputs, layout, pair, unwrapped) for pair in pairs]
        except ValueError as error:
            refused = f"{error}: {self._way_out}." if isinstance(error, NotSeparable) else str(error)
        said = gathered((refused, len(parts)))
        if refused := next((sentence for sentence, _ in said if sentence), None):
            raise ValueError(refused)

        def backward(batch: Any) -> float:
            with self.compute_loss_context_manager():
                batch = self._prepare_inputs(copied(batch))
                loss = self.compute_loss(model, batch, num_items_in_batch=num_items_in_batch)
            loss.backward()
            return float(loss.detach())

        with self._trying_out(model):
            for i in range(max(count for _, count in said) if self._sharded else len(parts)):
                check = SelfCheck(unwrapped, *parts[i % len(parts)], optimizer.new_window, backward, low)
                try:
                    verdict = check.run(
                        self._layers, self._fused_operations, self._one_by_one, self._not_together
                    )
                except NotSeparable as error:
                    raise self._not_stock(str(error)) from error
                if verdict.finite and not verdict.no_gradient:
                    break
        self._take(verdict, dict(unwrapped.named_parameters()))
        return layout

    def _take(self, verdict: Verdict, named: Mapping[str, nn.Parameter]) -> None:
        """Take the path on which all ranks agree."""
        common = Verdict.of(gathered(verdict))
        if common is None:
            return
        self._paths_checked, self._shared = True, {named[name] for name in common.shared}
        if common.not_together is None:
            return
        if common.unreached and not self._sharded and self.accelerator.num_processes > 1:
            name = min(common.unreached)
            common.not_one_by_one = common.not_one_by_one or (
                f"no example reaches {name}, whose gradient DDP would not reduce"
            )
        if common.not_one_by_one is not None:
            raise self._not_stock(*dict.fromkeys((common.not_together, common.not_one_by_one)))
        self._layers = None
        if self._not_together is None:
            self._say_one_by_one(common.not_together)

    def _not_stock(self, *reasons: str) -> ValueError:
        return ValueError(
            "the gradient of the examples of a micro-batch would not be the stock trainer's ("
            f"{'; '.join(reasons)}): {self._way_out}."
        )

    def _has_low_precision(self, model: nn.Module) -> bool:
        low = self.accelerator.mixed_precision != "no" or any(
            p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()
        )
        if self.accelerator.device.type == "cuda":  # TF32, in either of the places where it is switched on
            backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
            low |= any(getattr(b, "fp32_precision", "ieee") != "ieee" for b in backends)
        return low

    @contextmanager
    def _trying_out(self, model: nn.Module) -> Iterator[None]:
        """Losses inside this block are not logged, wait for no rank, and leave the trainer as it was."""
        before, metrics = dict(vars(self)), copy.deepcopy(getattr(self, "_metrics", None))
        with ExitStack() as stack:
            # what FSDP2 held back would not fit
            stack.enter_context(reducing(model, True) if self._sharded else self.accelerator.no_sync(model))
            stack.enter_context(self._uncompiled())
            for name in ("gather", "gather_for_metrics", "reduce"):
                setattr(self.accelerator, name, lambda tensor, *_, **__: tensor)
                stack.callback(delattr, self.accelerator, name)
            try:
                yield
            finally:
                vars(self).clear()
                vars(self).update(before)
                if metrics is not None:
                    self._metrics = metrics

    def _check_count(self, count: int) -> None:
        """The collator must leave as many examples as it was given; only the last of an epoch may be few."""
        size, data = self.args.per_device_train_batch_size, self.train_dataset
        if self.accelerator.split_batches:
            size //= self.args.world_size
        full = has_length(data) and len(data) >= size * self.args.world_size
        first = not self._paths_checked and self.state.global_step == 0
        if count > size or count < size and full and first:
            rows = count // size
            several = f" or, if an example has {rows} rows, rows_per_example = {rows} in the class"
            raise ValueError(
                f"the data collator made {count} examples of {size}: if it joins them, as padding-free ones "
                f"do, use another{several * (count % size == 0)}; set per_device_train_batch_size=1, or "
                "poprisk_estimator=group."
            )

    def _fused_operations(self, capture: Capture) -> AbstractContextManager[Any]:
        """Block around a forward and backward: for trainers that use a parameter outside of its layer."""
        return nullcontext()

    def _balances_experts(self, model: nn.Module) -> bool:
        """Whether the loss holds a term over the experts' loads, asked for by the trainer or the model."""
        asked = getattr(self, "aux_loss_enabled", None)
        if asked is not None:  # of TRL: its coefficient is in the arguments
            return bool(asked) and getattr(self, "router_aux_loss_coef", 1) != 0
        config = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return any(
            bool(getattr(c, "output_router_logits", False) and getattr(c, "router_aux_loss_coef", 0))
            for c in (config, text)
        )

    def _prepare_layers(self, optimizer: PopRiskAdamW) -> None:
        """Decide how micro-batches of several examples are taken, and say so."""
        self._layers = self._not_together = None
        self._paths_checked = False
        if not self._takes_examples(optimizer) or not self._announces_several:
            return
        model = self.accelerator.unwrap_model(self.model)
        if self._balances_experts(model):
            raise ValueError(
                "router_aux_loss_coef balances the experts over the examples of a micro-batch: set it to 0, "
                f"or {self._way_out}."
            )
        check_batch_norm(model, self._way_out)
        self._find_layers(optimizer)

    def _find_layers(self, optimizer: PopRiskAdamW) -> None:
        """The layers for one backward, or why there is none."""
        if what := self._compiled_by():
            return self._say_one_by_one(f"{what}, and not compiled")
        if getattr(self.args, "use_liger_kernel", False):
            return self._say_one_by_one("use_liger_kernel=True")
        layers = BatchedGradients(self.accelerator.unwrap_model(self.model), optimizer.gated_parameters)
        if layers.uncovered:
            some = [f"{name} ({why})" for name, why in list(layers.uncovered.items())[:3]]
            more = f" and {len(layers.uncovered) - 3} more" if len(layers.uncovered) > 3 else ""
            return self._say_one_by_one(", ".join(some) + more)
        self._layers = layers

    def _say_one_by_one(self, reason: str) -> None:
        if self._sharded:  # where their squares were seen to differ from those in one backward
            raise ValueError(
                f"the examples of a micro-batch would be taken one by one, because of: {reason}, which FSDP2 "
                f"does not allow: {self._way_out}."
            )
        self._not_together = reason
        if self.args.ddp_static_graph:
            raise ValueError(
                "ddp_static_graph=True fails in PyTorch when the examples of a micro-batch are taken one by "
                f"one, because of: {reason}; set ddp_static_graph=False."
            )
        logger.warning(
            f"population-risk gate: the examples of a micro-batch are taken one by one, because of: {reason}."
        )


def is_compiled_in_place(model: nn.Module) -> bool:
    """Whether ``model.compile()`` was called, of the model or of a part."""
    return any(module._compiled_call_impl is not None for module in model.modules())


def check_batch_norm(model: nn.Module, way_out: str) -> None:
    """Refuse what makes an example depend on the others in its micro-batch, and not in eval mode."""
    with mode(model, training=True):  # a model may keep its norms in eval mode
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise ValueError(f"{name} normalises over the examples of a micro-batch: {way_out}.")
