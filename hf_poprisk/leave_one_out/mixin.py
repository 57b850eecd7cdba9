"""The judge's place in a trainer: labels are judged once, and saved with the checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import TrainerCallback

from hf_poprisk.leave_one_out.chunks import Chunks
from hf_poprisk.leave_one_out.features import ClassLogits, label_features, num_features, spread
from hf_poprisk.leave_one_out.index import IndexCollator, IndexMixin, Sample
from hf_poprisk.leave_one_out.judgement import Judgement, judge_classes, judge_pairs
from hf_poprisk.leave_one_out.leap import Leap, leap, trained_layers
from hf_poprisk.leave_one_out.table import TABLE_NAME, ExampleTable
from hf_poprisk.leave_one_out.weights import LabelNoise
from hf_poprisk.per_example.basis import LayerBasis
from hf_poprisk.refusals import AFTER_EPOCHS, judges_too_late

logger = logging.getLogger(__name__)


class LabelNoiseMixin(IndexMixin):
    """``poprisk_label_noise`` for a trainer; part of ``PopRiskMixin``."""

    # Where an example is a preference pair: (model, inputs) → the log-odds of the pairs' labels but for a
    # constant of each, [N], with their graph.
    label_log_odds: Callable[[torch.nn.Module, Any], Tensor] | None = None
    _label_noise: LabelNoise | None = None
    _passes: Passes | None = None  # of the last judgement, until it is followed
    _chunks: Chunks | None = None  # of one process, for a judgement that may be killed

    def _start_label_noise(self, ids: np.ndarray, sample: Sample) -> None:
        """After the trainer is built; ids as ``with_index`` gave them."""
        if self.args.poprisk_leap:
            if self.label_log_odds is None:
                raise ValueError("poprisk_leap is for preference pairs, and these are classes: set it to 0.")
            trained_layers(self.accelerator.unwrap_model(self.model))  # asked before labels are judged
        self._index_for, mode = "poprisk_label_noise", self.args.poprisk_label_noise
        table = ExampleTable(ids, self.accelerator.device)
        self._label_noise = LabelNoise(mode, self.label_log_odds is not None, table, sample)
        if mode == "weight":
            self._weights = table
        self.add_callback(_Judging(self))

    def judge_labels(self) -> Judgement:
        """Judge the labels of the training set, each rank its share; they all come to the same result.

        Raises:
            ValueError: fewer than 50 examples, gradients that tell nothing, or a loss of something else.
        """
        self._passes = passes = Passes(self)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        classifier, k = self.label_log_odds is None, num_features(len(self.train_dataset))
        parts, passes.bases, labels = label_features(
            model,
            passes.batches,
            passes.log_odds,
            self.rows_per_example,
            k,
            classifier=classifier,
            labels=(lambda: passes.labels) if classifier else None,
            chunks=self._chunks,
        )
        every = (passes.index, *([labels] if classifier else []), *parts)
        ids, *columns = (self._of_all_ranks(x).numpy() for x in every)
        ids, rows = np.unique(ids, return_index=True)
        columns = [x[rows] for x in columns]
        if classifier:
            known = columns[0] >= 0  # a negative one is no label
            ids, observed, *columns = (x[known] for x in (ids, *columns))
            found = judge_classes(columns, observed)
        else:
            found = judge_pairs(columns)
        self._label_noise.take(ids, found, self.state.global_step)
        passes.ids = ids
        return found

    def _judge_and_leap(self) -> None:
        judge, found = self._label_noise, self.judge_labels()
        passes, self._passes = self._passes, None
        doubt = "" if judge.doubt is None else f". This means little: {judge.doubt}"
        below = int((found.p_correct < 0.5).sum())
        share = f"{below} of {len(found.p_correct)} labels are right with a probability below .5"
        self._say(f"{judge.found()}; {share}{doubt}.")
        margin = self.args.poprisk_leap
        if not margin:
            if self.state.global_step >= self.state.max_steps:  # no step is left to log
                self.log(judge.logs())
            return
        if not judge.weighted:
            judge.leap = Leap(0.0, 0.0)
            self._say("poprisk_leap: no leap, for the labels are predicted too badly to follow them.")
            return
        rows = np.searchsorted(passes.ids, passes.index.cpu().numpy())
        alpha, weights = (torch.from_numpy(x[rows]).float() for x in (found.dual, found.p_correct))
        weights, alpha = weights * passes.first, alpha * passes.first[:, None]
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        judge.leap = leap(
            model,
            lambda: passes.batches(None),
            passes.log_odds,
            self.rows_per_example,
            passes.bases,
            alpha,
            weights,
            margin,
        )
        self.log(judge.logs())  # there may be no step to log
        if judge.leap.reached:
            self._say(
                f"poprisk_leap={margin:g}: the mean margin grew by {judge.leap.reached:.3g} nats where "
                f"{judge.leap.predicted:.3g} were predicted."
            )
        else:
            low = {str(x.weight.dtype) for x in trained_layers(model).values()} - {"torch.float32"}
            way_out = f"load it in float32, for {low.pop()} hardly holds small steps" if low else "train it"
            self._say(
                f"poprisk_leap={margin:g}: the model does not follow its linearisation, and its weights are "
                f"as they were: {way_out}, or try a shorter leap."
            )

    def _say(self, text: str) -> None:
        if self.is_world_process_zero():
            logger.warning(text)

    def _class_logits(self, model: torch.nn.Module, inputs: Any, num_examples: int) -> tuple[Tensor, Tensor]:
        """The logits of N examples, [N, K] with their graph, and their labels, [N]."""
        with ClassLogits() as logits:
            self.compute_loss(model, inputs)
        if wrong := logits.wrong(num_examples):
            raise ValueError(
                f"poprisk_label_noise={self.args.poprisk_label_noise} needs a loss that is the mean "
                f"cross-entropy of class labels, and this one is not ({wrong}): set poprisk_label_noise=off."
            )
        return logits.found

    def _of_all_ranks(self, x: Any) -> Tensor:
        x = torch.as_tensor(x)
        if self.accelerator.num_processes == 1:
            return x
        return self.accelerator.gather(x.to(self.args.device)).cpu()

    # -- checkpoints ------------------------------------------------------------------------------------

    def _write_label_noise(self, folder: str | Path) -> None:
        """With the record, by the process that writes it; the scores of another model do not stay."""
        if self._label_noise is not None:
            self._label_noise.save(folder)
        else:
            Path(folder, TABLE_NAME).unlink(missing_ok=True)

    def _load_label_noise(self, checkpoint: str | None) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: a checkpoint of a run that did not score its examples, or of other data.
        """
        if self._label_noise is None or checkpoint is None:
            return
        self._label_noise.forget()
        if Path(checkpoint, TABLE_NAME).is_file():
            self._label_noise.load(checkpoint)
        elif not self.args.poprisk_allow_change:
            raise ValueError(
                f"{checkpoint} holds no {TABLE_NAME}: its examples were trained on without being judged, so "
                "nothing is left out any more; set poprisk_label_noise=off, start over, or set "
                "poprisk_allow_change=true."
            )


class _Judging(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, judge = self._trainer, self._trainer._label_noise
        if trainer.model_init is not None and not state.global_step:
            judge.forget()  # this is another model
        if judge.fit is None and args.max_steps > 0:
            steps = -(-len(kwargs["train_dataloader"]) // args.gradient_accumulation_steps)  # of an epoch
            if judges_too_late(args, args.max_steps / steps):
                raise ValueError(f"max_steps={args.max_steps} ends before {AFTER_EPOCHS.format(a=args)}")
        self._judge_if_due(args, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._judge_if_due(args, state)  # before a checkpoint of this step is written

    def _judge_if_due(self, args: Any, state: Any) -> None:
        judge = self._trainer._label_noise
        leap_is_left = args.poprisk_leap and judge.leap is None  # a first call was interrupted
        if judge.fit is not None and not leap_is_left:  # a second call keeps what was found
            return
        if (state.epoch or 0) >= args.poprisk_judge_after_epochs:
            self._trainer._judge_and_leap()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        judge = self._trainer._label_noise
        if args.should_save:  # with or without save_model(), the scores are worth keeping
            judge.save(args.output_dir)
            if state.is_world_process_zero and judge.fit is None:  # another callback ended it
                logger.warning("no label was judged: training ended before poprisk_judge_after_epochs.")
            elif state.is_world_process_zero:
                found = judge.found(self._trainer._record()["weights_step"])
                logger.warning(f"{found}; `hf-poprisk audit {args.output_dir}` shows the examples.")


class Passes:
    """Passes over this rank's share of the training set, and the log-odds of its labels.

    Attributes:
        index: of the examples in the order of a pass, [n], if they have one.
        first: 1 for an example, 0 for its copy on another rank, [n] float32.
        num_examples: of the last micro-batch.
        labels: of classes, of the last micro-batch.
        ids: the index of the examples of all ranks that were judged, ascending.
        bases: of the layers of each part, once they are measured.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        collator = trainer.data_collator
        if trainer._index_for is not None:
            collator = IndexCollator(collator)
        self._data, self._collator = trainer._used_columns(trainer.train_dataset, collator)
        # as many on each rank, the first ones twice if need be
        count, rank = len(self._data), trainer.accelerator.process_index
        each = -(-count // trainer.accelerator.num_processes)
        self._mine = self._sorted([i % count for i in range(rank * each, (rank + 1) * each)])
        self.first = torch.tensor([float(i // each == rank) for i in self._mine])
        self.labels: Tensor
        self.ids: np.ndarray
        self.bases: list[dict[str, LayerBasis]]
        self._seen: list[Tensor] = []
        self.num_examples = 0

    @property
    def index(self) -> Tensor:
        return torch.cat(self._seen)

    def _sorted(self, part: list[int]) -> list[int]:
        """Rows of one length need no padding; the longest first, which may not fit."""
        return sorted(part, key=lambda i: _length(self._data[i]), reverse=True)

    def batches(self, count: int | None) -> Iterator[Any]:
        """Of all examples, or of ``count`` over all ranks, evenly spread."""
        trainer, part, what = self._trainer, self._mine, "Judging labels"
        if count is None:
            self._seen = []
        else:
            share = -(-count // trainer.accelerator.num_processes)
            part, what = self._sorted(spread(sorted(part), share)), "Measuring gradients"
        size = trainer.args.per_device_train_batch_size
        loader = DataLoader(
            Subset(self._data, part),
            size,
            collate_fn=self._collator,
            generator=torch.Generator(),  # that of the training order is left alone
        )
        quiet = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
        for k, batch in enumerate(tqdm(loader, what, disable=quiet)):
            batch, rows = trainer._take_index(batch)
            self.num_examples = min(size, len(part) - k * size)
            if count is None:
                self._seen.append(rows)
            yield trainer._prepare_inputs(batch)

    def log_odds(self, model: torch.nn.Module, inputs: Any) -> Tensor:
        """z of a micro-batch, [N]; of classes, a combination of the logits."""
        trainer = self._trainer
        with _in_its_own_dtype(model):
            if trainer.label_log_odds is not None:
                return trainer.label_log_odds(model, inputs)
            logits, labels = trainer._class_logits(model, inputs, self.num_examples)
        self.labels = labels.cpu()
        return logits.float() @ _combination(logits.shape[1]).to(logits.device)


@contextmanager
def _in_its_own_dtype(model: torch.nn.Module) -> Iterator[None]:
    """Without the autocast that accelerate wraps around the forward of a model that is trained.

    So the labels are judged alike before training, in it and with ``hf-poprisk judge``, whatever bf16 is.
    """
    wrapped, plain = vars(model).get("forward"), vars(model).get("_original_forward")
    if plain is not None:
        model.forward = plain
    try:
        yield
    finally:
        if plain is not None:
            model.forward = wrapped


def _length(example: Any) -> int:
    """Of an example, in tokens; 0 where it cannot be told."""
    values = list(example.values()) if isinstance(example, Mapping) else []
    return sum(x.numel() if isinstance(x, Tensor) else len(x) for x in values if isinstance(x, list | Tensor))


def _combination(classes: int) -> Tensor:
    """A direction among the logits, [K], that knows no label: one backward in place of K."""
    drawn = torch.randn(classes, generator=torch.Generator().manual_seed(classes))
    return (drawn - drawn.mean()) / (drawn - drawn.mean()).norm()
