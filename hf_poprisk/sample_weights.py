"""Sample weights: of a column of the training set or of the judged labels, and their place in a trainer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from hf_poprisk.leave_one_out.index import IndexMixin
from hf_poprisk.leave_one_out.table import ExampleTable
from hf_poprisk.microbatch import check_batch_norm, is_compiled_in_place
from hf_poprisk.per_example.examples import NotSeparable, copied
from hf_poprisk.per_example.layout import Layout, Packed
from hf_poprisk.per_example.self_check import some_examples
from hf_poprisk.per_example.undisturbed import mode, undisturbed
from hf_poprisk.per_example.weighted import NotASum, OutputWeights

logger = logging.getLogger(__name__)
_ONE_BY_ONE = "set per_device_train_batch_size=1 and raise gradient_accumulation_steps"
_A_SUM = "let the loss be a sum over examples of what the model returns for each"


def take_weights(data: Any, column: str) -> tuple[Any, np.ndarray]:
    """The training set without the column of weights, and the weights, [n] float32.

    Raises:
        ValueError: a stream or no data set of the datasets package; no such column, or one that does not hold
            finite numbers that are not negative and not all zero.
    """
    option = f"poprisk_weight_column={column}"
    names = getattr(data, "column_names", None)
    if isinstance(data, IterableDataset):
        raise ValueError(f"{option} needs every weight beforehand: train on a data set that is no stream.")
    if not isinstance(names, list):
        raise ValueError(
            f"{option} needs a data set with columns, and {type(data).__name__} has none: make one with "
            "datasets.Dataset.from_list."
        )
    if column not in names:
        raise ValueError(f"{option} is no column of the training set: take one of {', '.join(names)}.")
    values = np.asarray(data.with_format(None)[column])
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.number):
        raise ValueError(
            f"{option} holds {values.dtype} and not one number per example: convert it, and fill what is "
            "missing."
        )
    with np.errstate(over="ignore"):  # of what float32 does not hold, which is no weight
        weights = values.astype(np.float32)
    wrong = np.flatnonzero(~np.isfinite(weights) | (weights < 0))
    if len(wrong):
        raise ValueError(
            f"{option} holds {values[wrong[0]]} in row {wrong[0]}, which is no weight: give finite numbers "
            "of zero or more."
        )
    if not weights.any():
        raise ValueError(
            f"{option} is zero in every row: nothing would be trained, so give positive weights."
        )
    return data.remove_columns(column), weights


class SampleWeightMixin(IndexMixin):
    """Weights the examples of a trainer; part of ``PopRiskMixin``."""

    _weights: ExampleTable | None = None  # its column ``weight``
    _output_weights: OutputWeights | None = None

    def _start_weights(self, ids: np.ndarray, weights: np.ndarray) -> None:
        """After the trainer is built; ids as ``with_index`` gave them."""
        self._index_for = "poprisk_weight_column"
        self._weights = ExampleTable(ids, self.accelerator.device)
        self._weights.weight = torch.from_numpy(weights).to(self.accelerator.device)

    @property
    def _weights_by(self) -> tuple[str, str]:
        """The option that asks for weights, and how to do without."""
        column = self.args.poprisk_weight_column
        if column is not None:
            return f"poprisk_weight_column={column}", "remove poprisk_weight_column"
        return "poprisk_label_noise=weight", "set poprisk_label_noise=off"

    def _check_weights(self) -> None:
        """What is asked of the built trainer, before it trains; says what the weights of a column are.

        Raises:
            ValueError: there is no training set, or something that the weights could not serve.
        """
        column, (option, without) = self.args.poprisk_weight_column, self._weights_by
        if self._weights is None:
            if column is None:
                return
            raise ValueError(
                f"{option} was set without a training set: give train_dataset when the trainer is built."
            )
        self._output_weights = None  # a second training may be of another model
        model = self.accelerator.unwrap_model(self.model)
        if is_compiled_in_place(model):
            raise ValueError(
                f"{option} weights the model's outputs for an example, which model.compile() hides: leave it "
                f"uncompiled, or {without}."
            )
        if self._balances_experts(model):
            raise ValueError(
                "router_aux_loss_coef adds a term to the loss that is of no example, where "
                f"{option} has no place: set it to 0, or {without}."
            )
        if column is None:
            return
        self._check_launch(option, "no poprisk_weight_column")
        if self.args.per_device_train_batch_size > 1:
            check_batch_norm(model, f"{_ONE_BY_ONE}, or {without}")
        if self.is_world_process_zero():
            weights = self._weights.weight.double()
            logger.warning(
                f"{option}: {len(weights):,} weights from {weights.min():.3g} to {weights.max():.3g}, "
                f"{weights.mean():.3g} on average; what a step is divided by stays as it is."
            )

    def _weighting(
        self, model: nn.Module, inputs: Any, index: Tensor | None, num_items_in_batch: Any
    ) -> AbstractContextManager[None]:
        """Block around a forward and backward whose examples, by their index, are to be weighted."""
        if self._weights is None or index is None:
            return nullcontext()
        if self._output_weights is None:
            unwrapped = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            self._output_weights = OutputWeights(unwrapped, self.rows_per_example)
        if len(index) > 1:
            with self._refusing():
                layout = self._layout_of(inputs, len(index))
                if not self._output_weights.learned:
                    self._learn_outputs(model, inputs, layout, num_items_in_batch)
        return self._weighted(self._weights.rows(index))

    def _weights_of(self, rows: Tensor) -> Tensor:
        """The weights of some rows of the table, [N], asked for between their forward and their backward."""
        return self._weights.weight[rows]

    @contextmanager
    def _weighted(self, rows: Tensor) -> Iterator[None]:
        """Let the loss that is computed inside weight its examples in its backward."""
        before, loss = vars(self).get("compute_loss"), self.compute_loss  # a subclass may have its own
        called = False

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            nonlocal called
            called = True
            with self._output_weights.recorded() as outputs:
                result = loss(*args, **kwargs)
            with self._refusing():
                value = result[0] if isinstance(result, tuple) else result
                self._output_weights.weigh(outputs, value, self._weights_of(rows))
            return result

        self.compute_loss = compute_loss
        try:
            yield
        finally:
            if before is None:
                del self.compute_loss
            else:
                self.compute_loss = before
        if not called:
            option, without = self._weights_by
            raise ValueError(
                f"{option} weights the loss of compute_loss, which the training_step of "
                f"{type(self).__name__} does not call: let it, or {without}."
            )

    def _layout_of(self, inputs: Any, count: int) -> Layout:
        layout = self._rows_of(inputs)
        if isinstance(layout, Packed) or layout.num_examples != count:
            raise NotSeparable(f"{layout} for {count} examples")
        return layout

    def _learn_outputs(self, model: nn.Module, inputs: Any, layout: Layout, num_items_in_batch: Any) -> None:
        """Ask two neighbours of the micro-batch, the first ones with a finite loss, where examples are."""
        unwrapped, outputs = self._output_weights.model, self._output_weights

        def loss(examples: list[int]) -> Tensor:
            batch, _ = some_examples(inputs, layout, examples, unwrapped)
            with self.compute_loss_context_manager():
                batch = self._prepare_inputs(copied(batch))
                return self.compute_loss(unwrapped, batch, num_items_in_batch=num_items_in_batch)

        low = self._has_low_precision(unwrapped)
        with (
            self._trying_out(model),
            undisturbed(unwrapped, unwrapped.parameters()),
            mode(unwrapped, training=False),
        ):
            for i in range(layout.num_examples - 1):
                outputs.learn(partial(loss, [i, i + 1]), partial(loss, [i]), 0.1 if low else 1e-3)
                if outputs.learned:
                    return
        raise NotSeparable("the loss of no example is finite")

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except NotSeparable as error:
            option, without = self._weights_by
            way_out = _A_SUM if isinstance(error, NotASum) else _ONE_BY_ONE
            raise ValueError(
                f"{option} cannot weight the examples of this loss ({error}): {way_out}, or {without}."
            ) from error
