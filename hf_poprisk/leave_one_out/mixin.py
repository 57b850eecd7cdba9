"""The judge's place in a trainer: when labels are judged, which examples a batch holds, what is saved."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import TrainerCallback

from hf_poprisk.leave_one_out.features import label_features, num_features, spread
from hf_poprisk.leave_one_out.index import IndexCollator, IndexMixin, Sample
from hf_poprisk.leave_one_out.judge import ClassNoise, LabelNoise, PairNoise
from hf_poprisk.leave_one_out.judgement import Judgement
from hf_poprisk.leave_one_out.log_odds import ClassLogits, LogOddsError, LogOddsTap
from hf_poprisk.leave_one_out.table import TABLE_NAME, ExampleTable, is_judged

logger = logging.getLogger(__name__)


class LabelNoiseMixin(IndexMixin):
    """``poprisk_label_noise`` for a trainer; part of ``PopRiskMixin``."""

    _preferences = False  # an example is a preference pair
    _label_noise: LabelNoise | None = None

    def _start_label_noise(self, ids: np.ndarray, sample: Sample) -> None:
        """After the trainer is built; ids as ``with_index`` gave them."""
        self._index_for = "poprisk_label_noise"
        self._label_noise = self._new_judge(ids, sample)
        self.add_callback(_Steps(self))

    def _new_judge(self, ids: np.ndarray, sample: Sample) -> LabelNoise:
        table = ExampleTable(ids, self.accelerator.device)
        kind = PairNoise if self._preferences else ClassNoise
        return kind(self.args.poprisk_label_noise, table, sample)

    # -- before the first step --------------------------------------------------------------------------

    def label_log_odds(self, model: torch.nn.Module, inputs: Any) -> Tensor:
        """The log-odds of the pairs' labels but for a constant of each, [N], with their graph."""
        raise NotImplementedError

    def class_logits(self, model: torch.nn.Module, inputs: Any, num_examples: int) -> tuple[Tensor, Tensor]:
        """The logits of N examples, [N, K] with their graph, and their labels, [N].

        Raises:
            ValueError: the loss is not the cross-entropy of one label per example.
        """
        found = ClassLogits()
        with self._of_one_label():
            with found:
                self.compute_loss(model, inputs)
            if found.logits is None:
                raise LogOddsError("it computes none")
            if len(found.logits) != num_examples:
                raise LogOddsError(f"it has {len(found.logits)} terms for {num_examples} examples")
        return found.logits, found.labels

    def _judge_labels(self) -> None:
        found, judge = self.judge_labels(), self._label_noise
        if self.is_world_process_zero():
            doubt = "" if judge.doubt is None else f". This means little: {judge.doubt}"
            below = int((found.p_correct < 0.5).sum())
            logger.warning(f"{judge.found()}; {below} of {len(found.p_correct)} labels are below .5{doubt}.")

    def judge_labels(self) -> Judgement:
        """Judge the labels of the training set, each rank its share; they all come to the same result.

        Raises:
            ValueError: fewer than 50 examples, gradients that tell nothing, or a loss of something else.
        """
        judge, accelerator = self._label_noise, self.accelerator
        data, collator = self._used_columns(self.train_dataset, IndexCollator(self.data_collator))
        model = accelerator.unwrap_model(self.model, keep_torch_compile=False)
        # as many on each rank, the first ones twice if need be
        each = -(-len(data) // accelerator.num_processes)
        mine = [
            i % len(data)
            for i in range(accelerator.process_index * each, (accelerator.process_index + 1) * each)
        ]
        size = self.args.per_device_train_batch_size
        index: list[Tensor] = []
        labels: list[Tensor] = []
        size_of_batch = 0

        def batches(count: int | None) -> Iterator[Any]:
            nonlocal size_of_batch
            part = mine if count is None else spread(mine, -(-count // accelerator.num_processes))
            # rows of one length need no padding; the longest first, which may not fit
            part = sorted(part, key=lambda i: _length(data[i]), reverse=True)
            loader = DataLoader(
                Subset(data, part),
                size,
                collate_fn=collator,
                generator=torch.Generator(),  # that of the training order is left alone
            )
            quiet = self.args.disable_tqdm or not self.is_local_process_zero()
            for batch in tqdm(
                loader, "Judging labels" if count is None else "Measuring gradients", disable=quiet
            ):
                batch, rows = self._separate_index(batch)
                size_of_batch = len(rows)
                if count is None:
                    index.append(rows)
                yield self._prepare_inputs(batch)

        def log_odds(model: torch.nn.Module, inputs: Any) -> Tensor:
            with self.compute_loss_context_manager():  # autocast is for the forward alone
                if self._preferences:
                    return self.label_log_odds(model, inputs)
                logits, of_batch = self.class_logits(model, inputs, size_of_batch)
            if len(labels) < len(index):
                labels.append(of_batch.cpu())
            return logits.float() @ _combination(logits.shape[1]).to(logits.device)

        parts = label_features(
            model,
            batches,
            log_odds,
            self.rows_per_example,
            num_features(len(data)),
            classifier=not self._preferences,
        )
        found = (torch.cat(index), *([torch.cat(labels)] if labels else []), *parts)
        ids, *columns = (self._of_all_ranks(x).numpy() for x in found)
        ids, first = np.unique(ids, return_index=True)
        columns = [x[first] for x in columns]
        if self._preferences:
            return judge.judge_all(ids, columns)
        return judge.judge_all(ids, columns[1:], columns[0])

    def _of_all_ranks(self, x: Any) -> Tensor:
        x = torch.as_tensor(x)
        if self.accelerator.num_processes == 1:
            return x
        return self.accelerator.gather(x.to(self.args.device)).cpu()

    # -- a micro-step -----------------------------------------------------------------------------------

    @contextmanager
    def _judging(self, index: Tensor | None) -> Iterator[None]:
        """The visit of some examples, by their index, [N]: forward and backward go inside this block."""
        if self._label_noise is None or index is None or self._label_noise.weightless:
            yield
            return
        tap = self._label_noise.visit(self._label_noise.table.rows(index))
        tap.asleep = self._runs_an_example_alone
        try:
            with self._around_loss(partial(self._tapped, tap)):
                yield
        except BaseException:
            self._label_noise.abandon()
            raise

    def _runs_an_example_alone(self) -> bool:
        return False

    def _tapped(self, tap: LogOddsTap, loss: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._of_one_label():
            with tap:
                result = loss(*args, **kwargs)
            if tap.log_odds is None:
                raise LogOddsError("it computes none")
        return result

    @contextmanager
    def _of_one_label(self) -> Iterator[None]:
        """The loss is found inside, or refused."""
        what = "logsigmoid of reward margins" if self._preferences else "cross-entropy of class labels"
        try:
            yield
        except LogOddsError as error:
            raise ValueError(
                f"poprisk_label_noise={self.args.poprisk_label_noise} needs a loss that is the mean {what}, "
                f"and this one is not ({error}): set poprisk_label_noise=off."
            ) from error

    def _book_visits(self) -> None:
        """At the end of a step's last backward."""
        if self._label_noise is not None and not self._label_noise.weightless:
            self._label_noise.finish_step(self._gather)

    def _gather(self, rows: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return rows
        padded = self.accelerator.pad_across_processes(rows, pad_index=-1)
        every = self.accelerator.gather(padded)
        return every[every[:, 0] >= 0]

    # -- checkpoints ------------------------------------------------------------------------------------

    def _write_label_noise(self, folder: str | Path) -> None:
        """With the record, by the process that writes it; the scores of another model do not stay."""
        if self._label_noise is not None:
            self._label_noise.save(folder)
            return
        Path(folder, TABLE_NAME).unlink(missing_ok=True)

    def _load_label_noise(self, checkpoint: str | None) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: a checkpoint of a run that did not score its examples, or of other data.
        """
        if self._label_noise is None or checkpoint is None:
            return
        self._start_over()
        if is_judged(checkpoint):
            self._label_noise.load(checkpoint)
        elif not self.args.poprisk_allow_change:
            raise ValueError(
                f"{checkpoint} holds no {TABLE_NAME}: its examples were trained on without being judged, so "
                "nothing is left out any more; set poprisk_label_noise=off, start over, or set "
                "poprisk_allow_change=true."
            )

    def _start_over(self) -> None:
        judge = self._label_noise
        self._label_noise = self._new_judge(judge.table.ids.numpy(), judge.sample)


def _length(example: Any) -> int:
    """Of an example, in tokens; 0 where it cannot be told."""
    values = list(example.values()) if isinstance(example, Mapping) else []
    return sum(x.numel() if isinstance(x, Tensor) else len(x) for x in values if isinstance(x, list | Tensor))


class _Steps(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        if not state.global_step:
            if trainer.model_init is not None:  # this is another model, which has seen nothing yet
                trainer._start_over()
            trainer._label_noise.forget_step()
        if trainer._label_noise.fit is None:  # a second call of train() keeps what was found
            trainer._judge_labels()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        judge = self._trainer._label_noise
        if args.should_save:  # with or without save_model(), the scores are worth keeping
            judge.save(args.output_dir)
            if state.is_world_process_zero:
                logger.warning(f"{judge.found()}; `hf-poprisk audit {args.output_dir}` shows the examples.")


def _combination(classes: int) -> Tensor:
    """A direction among the logits, [K], that knows no label: one backward in place of K."""
    drawn = torch.randn(classes, generator=torch.Generator().manual_seed(classes))
    return (drawn - drawn.mean()) / (drawn - drawn.mean()).norm()
