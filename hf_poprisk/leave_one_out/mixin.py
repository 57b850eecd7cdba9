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

from hf_poprisk.adam_metric import AdamMetric
from hf_poprisk.leave_one_out.before import PairNoise
from hf_poprisk.leave_one_out.during import ClassNoise
from hf_poprisk.leave_one_out.features import label_features, num_features, spread
from hf_poprisk.leave_one_out.index import IndexCollator, IndexMixin, Sample
from hf_poprisk.leave_one_out.judge import LabelNoise
from hf_poprisk.leave_one_out.judgement import Judgement
from hf_poprisk.leave_one_out.log_odds import LogOddsError, LogOddsTap
from hf_poprisk.leave_one_out.table import TABLE_NAME, ExampleTable, is_judged
from hf_poprisk.per_example import SelfInfluence

logger = logging.getLogger(__name__)


class LabelNoiseMixin(IndexMixin):
    """``poprisk_label_noise`` for a trainer; part of ``PopRiskMixin``."""

    _preferences = False  # an example is a preference pair
    _label_noise: LabelNoise | None = None
    _pass_ended = False  # with the batches that were taken last

    def _start_label_noise(self, ids: np.ndarray | None, sample: Sample) -> None:
        """After the trainer is built; ids as ``with_index`` gave them."""
        self._index_for = "poprisk_label_noise"
        self._label_noise = self._new_judge(ids, sample)
        self.add_callback(_Steps(self))

    def _new_judge(self, ids: np.ndarray | None, sample: Sample) -> LabelNoise:
        table = ExampleTable(ids, self.accelerator.device)
        kind = PairNoise if self._preferences else ClassNoise
        return kind(self.args.poprisk_label_noise, table, sample)

    # -- before the first step --------------------------------------------------------------------------

    def label_log_odds(self, model: torch.nn.Module, inputs: Any) -> Tensor:
        """The log-odds of the pairs' labels but for a constant of each, [N], with their graph."""
        raise NotImplementedError

    def _judge_pairs(self) -> None:
        found, judge = self.judge_labels(), self._label_noise
        if self.is_world_process_zero():
            doubt = "" if judge.doubt is None else f". This means little: {judge.doubt}"
            below = int((found.p_correct < 0.5).sum())
            logger.warning(f"{judge.found(0)}; {below} of {len(found.p_correct)} labels are below .5{doubt}.")

    def judge_labels(self) -> Judgement:
        """Judge the pairs of the training set, each rank its share; they all come to the same result.

        Raises:
            ValueError: fewer than 50 pairs, or gradients that tell nothing.
        """
        judge, data, accelerator = self._label_noise, self.train_dataset, self.accelerator
        model = accelerator.unwrap_model(self.model, keep_torch_compile=False)
        # as many on each rank, the first ones twice if need be
        each = -(-len(data) // accelerator.num_processes)
        mine = [
            i % len(data)
            for i in range(accelerator.process_index * each, (accelerator.process_index + 1) * each)
        ]
        collator, size = IndexCollator(self.data_collator), self.args.per_device_train_batch_size
        index: list[Tensor] = []

        def batches(count: int | None) -> Iterator[Any]:
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
                if count is None:
                    index.append(rows)
                yield self._prepare_inputs(batch)

        def log_odds(model: torch.nn.Module, inputs: Any) -> Tensor:
            with self.compute_loss_context_manager():  # autocast is for the forward alone
                return self.label_log_odds(model, inputs)

        parts = label_features(model, batches, log_odds, self.rows_per_example, num_features(len(data)))
        ids, *parts = (self._of_all_ranks(x).numpy() for x in (torch.cat(index), *parts))
        ids, first = np.unique(ids, return_index=True)
        return judge.judge_all(ids, [x[first] for x in parts])

    def _of_all_ranks(self, x: Any) -> Tensor:
        x = torch.as_tensor(x)
        if self.accelerator.num_processes == 1:
            return x
        return self.accelerator.gather(x.to(self.args.device)).cpu()

    # -- data -------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, *args: Any) -> Any:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, *args)  # type: ignore[misc]
        # a stream says only now how long it is, and training may end within a pass
        self._pass_ended = len(batches) < num_batches or self.accelerator.gradient_state.end_of_dataloader
        return batches, items

    # -- a micro-step -----------------------------------------------------------------------------------

    @contextmanager
    def _judging(self, index: Tensor | None, optimizer: Any) -> Iterator[SelfInfluence | None]:
        """The visit of some examples, by their index, [N]: forward and backward go inside this block."""
        if self._label_noise is None or index is None or self._label_noise.weightless:
            yield None
            return
        rows, influence = self._label_noise.table.rows(index), None
        if not self._preferences:
            scaler = self.accelerator.scaler
            scale = self._label_noise.clip_coefficient / self.accelerator.num_processes
            scale = scale / (1.0 if scaler is None else scaler.get_scale())
            influence = SelfInfluence(AdamMetric(optimizer, scale), len(rows))
        tap = self._label_noise.visit(rows, influence)
        tap.asleep = self._runs_an_example_alone
        try:
            with self._around_loss(partial(self._tapped, tap)):
                yield influence
        except BaseException:
            self._label_noise.abandon()
            raise

    def _runs_an_example_alone(self) -> bool:
        return False

    def _tapped(self, tap: LogOddsTap, loss: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        what = "logsigmoid of reward margins" if self._preferences else "cross-entropy of class labels"
        try:
            with tap:
                result = loss(*args, **kwargs)
            if tap.log_odds is None:
                raise LogOddsError("it computes none")
        except LogOddsError as error:
            raise ValueError(
                f"poprisk_label_noise={self.args.poprisk_label_noise} needs a loss that is the mean {what}, "
                f"and this one is not ({error}): set poprisk_label_noise=off."
            ) from error
        return result

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)  # type: ignore[misc]
        if self._label_noise is not None:
            norm_ = torch.as_tensor(norm)
            coefficient = (self.args.max_grad_norm / (norm_ + 1e-6)).clamp(max=1.0)  # as torch clips
            before = torch.as_tensor(self._label_noise.clip_coefficient, device=norm_.device)
            self._label_noise.clip_coefficient = torch.where(norm_.isfinite(), coefficient, before)
        return norm

    def _book_visits(self, open_share: Tensor | float) -> None:
        """At the end of a step's last backward, when the gate has decided."""
        if self._label_noise is not None and not self._label_noise.weightless:
            self._label_noise.finish_step(self._gather, open_share)

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
            ValueError: a checkpoint of a run that did not score its examples, or of other data, or of a
                stream after its first pass.
        """
        if self._label_noise is None or checkpoint is None:
            return
        self._start_over()
        if is_judged(checkpoint):
            self._label_noise.load(checkpoint)
            if self._label_noise.table.streamed and self._label_noise.fits:
                raise ValueError(
                    f"poprisk_label_noise cannot resume from {checkpoint}, because a stream that has been "
                    "passed once is not resumed where it was: take an earlier checkpoint, start over, or "
                    "train on a data set that is no stream."
                )
        elif not self.args.poprisk_allow_change:
            raise ValueError(
                f"{checkpoint} holds no {TABLE_NAME}: its examples were trained on without being judged, so "
                "nothing is left out any more; set poprisk_label_noise=off, start over, or set "
                "poprisk_allow_change=true."
            )

    def _start_over(self) -> None:
        judge = self._label_noise
        ids = None if judge.table.streamed else judge.table.ids.numpy()
        self._label_noise = self._new_judge(ids, judge.sample)


def _length(example: Any) -> int:
    """Tokens of an example."""
    values = example.values() if isinstance(example, Mapping) else ()
    return sum(len(value) for value in values if isinstance(value, list | Tensor))


class _Steps(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        if not state.global_step:
            if trainer.model_init is not None:  # this is another model, which has seen nothing yet
                trainer._start_over()
            # a second call of train() counts its epochs anew, and keeps the scores
            trainer._label_noise.restart_epochs()
        if trainer._preferences and not trainer._label_noise.fits:
            trainer._judge_pairs()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._trainer._label_noise.table.streamed:
            self._fit(state, state.epoch)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        judge = self._trainer._label_noise
        if judge.table.streamed and self._trainer._pass_ended:
            self._fit(state, len(judge.fits) + 1)

    def _fit(self, state: Any, epoch: float) -> None:
        if not self._trainer._preferences:
            self._trainer._label_noise.maybe_fit(epoch, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:  # with or without save_model(), the scores are worth keeping
            self._trainer._label_noise.save(args.output_dir)
        if state.is_world_process_zero:
            judge = self._trainer._label_noise
            if judge.fits and args.should_save:
                logger.warning(
                    f"{judge.found(state.global_step)}; `hf-poprisk audit {args.output_dir}` shows "
                    "the examples."
                )
            if not self._trainer._preferences:
                judge.warn_at_end(state.global_step)
