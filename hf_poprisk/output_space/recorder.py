"""A callback that records a run in output space, for any trainer."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_poprisk.output_space.kernel import evaluate, kernels, output_pull
from hf_poprisk.output_space.preconditioner import GATED, NONE, bare, kind, left_out, pace, scales
from hf_poprisk.output_space.recording import (
    FILE_NAME,
    FLOW,
    GRADIENT_DESCENT,
    Recording,
    RecordingError,
    load_recording,
)
from hf_poprisk.output_space.tasks import Batch, DPOMargin, Task, loss_terms

logger = logging.getLogger(__name__)

_LIMIT = 8e9  # bytes of a recording, which is held in memory and written whole


class OutputSpaceCallback(TrainerCallback):
    """Records kernel, outputs and output gradients into ``output_dir/output_space.safetensors``.

    Before an optimizer step is taken, its kernel is that of the step itself: K_P with Adam's (and the gate's)
    preconditioner of this very step. The end of training is recorded too, with the last step's
    preconditioner. What is not finite is left out, with a warning. The layout is in
    ``hf_poprisk.output_space.recording``. The file is written whenever a checkpoint is, and a run that is
    resumed from one goes on with it. On several processes each computes and the first writes.

    The theory's gradient is that of the loss on the probe: let the probe be the training set. A part of it
    stands for the rest, but there each example's effect on itself counts for too much, as if it were trained
    on more often. Weight decay and clipping are no part of the theory, nor of a prediction.

    Args:
        task: outputs and losses, as ``ClassLogits()``, ``SquaredError()``, ``SequenceLogProb()``,
            ``DPOMargin(beta)``.
        probe: training examples as collated batches; one example each is fastest.
        test: held-out examples, likewise.
        steps: record every so many optimizer steps, or at these.
        chunk: outputs whose gradients are held at a time; see ``empirical_ntk``.
        directions: name → [n, k] or [n], directions in output space to be followed, ``label noise`` for
            instance: the output gradient of the labels given, minus that of the right labels.

    Raises (on construction):
        ValueError: steps, directions or a probe that cannot be.
    Raises (in ``train``):
        ValueError: a recording of more than 8 GB, an optimizer, a DPO loss, a precision or sharded
            parameters that it cannot read,
            directions of another shape than the outputs, or an example whose loss is not finite.
        RecordingError: a run resumed without the recording of its beginning, or with other examples or
            directions.
    """

    def __init__(
        self,
        task: Task,
        probe: Sequence[Batch],
        test: Sequence[Batch],
        steps: int | Collection[int] = 10,
        chunk: int = 64,
        directions: Mapping[str, Tensor] | None = None,
    ) -> None:
        wanted = [steps] if isinstance(steps, int) else list(steps)
        if any(not isinstance(s, int) or s < 0 for s in wanted) or steps == 0:
            raise ValueError(
                f"steps must be a number ≥ 1 of optimizer steps, or a list of steps; got {steps!r}."
            )
        if not probe or not test:
            raise ValueError("probe and test need at least one batch each.")
        if chunk < 1:
            raise ValueError(f"chunk must be a number of outputs ≥ 1; got {chunk}.")
        self.task, self.probe, self.test, self.chunk = task, list(probe), list(test), chunk
        self._every = steps if isinstance(steps, int) else None
        self._steps = set(wanted) if self._every is None else set()
        self._directions = dict(directions or {})
        self._scales: dict[str, Tensor] | None = None
        self._recording: Recording | None = None
        self._said_not_finite = False
        self._saved = (0, 0)  # how much of it is in the file

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], bare(kwargs["optimizer"])
        running = AcceleratorState()  # accelerate launch sets what args do not show
        for name in (running.distributed_type.value.lower(), running.mixed_precision):
            if name in ("fsdp", "deepspeed", "megatron_lm", "fp16", "fp8"):
                raise ValueError(
                    f"OutputSpaceCallback does not support {name}: leave it off, or the callback."
                )
        self._check_loss(args)
        found = kind(optimizer)
        device = next(model.parameters()).device
        self._batches = [
            [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches]
            for batches in (self.probe, self.test)
        ]
        outputs, others = (terms[0] for terms in self._finite_terms(model))
        n, k = outputs.shape
        self._check_size(state.max_steps, outputs, others)
        exact = found == NONE and self._descends(args, optimizer, n, kwargs.get("train_dataloader"))
        self._recording = Recording(
            GRADIENT_DESCENT if exact else FLOW,
            _describe(optimizer, args),
            found,
            _digest(self.probe, self.test),
            self._shaped(n, k, outputs.dtype),
        )
        self._saved = (0, 0)
        if state.global_step > 0:
            self._resume(Path(args.output_dir), state.global_step)

    def _check_loss(self, args: Any) -> None:
        """Raise ``ValueError`` for a DPO whose loss is not the task's."""
        if not isinstance(self.task, DPOMargin) or not hasattr(args, "beta"):
            return
        if args.beta != self.task.beta:
            raise ValueError(f"DPOMargin has beta {self.task.beta}, the trainer {args.beta}: give both one.")
        if args.loss_type not in ("sigmoid", ["sigmoid"]):
            raise ValueError(
                f"DPOMargin does not know the loss_type {args.loss_type}: set loss_type to sigmoid, or give "
                "OutputSpaceCallback a task of your own."
            )

    def _check_size(self, max_steps: int, outputs: Tensor, test_outputs: Tensor) -> None:
        """Say how large the recording will be; raise ``ValueError`` if that is too much."""
        due = range(0, max_steps, self._every) if self._every else {0, *self._steps}
        records, n, m = sum(step < max_steps for step in due) + 1, outputs.numel(), test_outputs.numel()
        size = records * n * (n + m) * (8 if outputs.dtype == torch.float64 else 4)
        what = f"{records} records of {n} × {n + m} numbers are {size / 1e9:.2g} GB in memory and on disk"
        if size > _LIMIT:
            raise ValueError(
                f"{what}, more than {_LIMIT / 1e9:.2g}: set steps= to fewer records, or give a smaller probe."
            )
        logger.info("%s at the end.", what)

    def _finite_terms(self, model: nn.Module) -> list[tuple[Tensor, ...]]:
        """``_terms`` of probe and test; no example may have one that is not finite."""
        found = [self._terms(model, batches) for batches in self._batches]
        for name, terms in zip(("probe", "test"), found, strict=True):
            finite = torch.stack([x.flatten(1).isfinite().all(1) for x in (terms[0], *terms[2:])]).all(0)
            wrong = (~(finite & terms[1].isfinite())).nonzero().flatten().tolist()
            if wrong:
                raise ValueError(
                    f"example {wrong[0]} of {name} has outputs or a loss that are not finite: leave it out "
                    f"of {name} (a sequence needs a label other than -100)."
                )
        return found

    def _terms(self, model: nn.Module, batches: Sequence[Batch]) -> tuple[Tensor, ...]:
        """Of each example: outputs [b, k], loss [b], its gradient [b, k] and curvature [b, k, k] in them."""
        found = zip(evaluate(model, batches, self.task.outputs), batches, strict=True)
        parts = [(u, *loss_terms(self.task, u, batch)) for u, batch in found]
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    def _shaped(self, n: int, k: int, dtype: torch.dtype) -> dict[str, Tensor]:
        shaped = {}
        for name, value in self._directions.items():
            if value.numel() != n * k:
                raise ValueError(
                    f"the direction {name!r} has shape {tuple(value.shape)}; the probe's outputs {(n, k)}."
                )
            shaped[name] = value.detach().cpu().to(dtype).reshape(n, k)
        return shaped

    @staticmethod
    def _descends(args: Any, optimizer: torch.optim.Optimizer, n: int, loader: Any) -> bool:
        """Whether every step may be full-batch gradient descent on a probe that is the training set."""
        together = args.train_batch_size * args.world_size
        try:
            size = len(loader.dataset)
        except (AttributeError, TypeError):  # a stream
            return False
        plain = not any(group["momentum"] or group["weight_decay"] for group in optimizer.param_groups)
        whole = together * args.gradient_accumulation_steps >= size == n
        even = (
            size % args.world_size == 0 and size % min(size, together) == 0
        )  # else examples weigh differently
        return plain and whole and even and not args.max_grad_norm

    def _check_descent(self, model: nn.Module, step: int) -> None:
        """Followed as gradient descent only while the step's gradient is Jᵀg, that of the loss on the probe.

        It is not with dropout, label smoothing, weights, another loss or other examples. The difference is
        relative to the gradient at the first record, as both sink to rounding at the end.
        """
        series = self._recording.series
        sizes = [len(u) for u in evaluate(model, self._batches[0], self.task.outputs)]
        g = series["gradients"][-1].split(sizes)
        expected = output_pull(model, self._batches[0], g, self.task.outputs)
        params = [p for p in model.parameters() if p.requires_grad]
        real = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        first = series["gradients"][0].reshape(-1)
        whole = max(float(first @ series["kernel"][0] @ first), 0.0) ** 0.5 or 1.0
        gap = float((torch.cat([x.reshape(-1) for x in real]).to(expected) - expected).norm())
        rounding = max(torch.finfo(x.dtype).eps for x in (params[0], g[0]))
        if gap > rounding**0.5 * whole:
            self._recording.rule = FLOW
            off = (
                f"the gradient of step {step} is not that of the loss on the probe: off by {gap / whole:.2g}"
            )
            self._recording.optimizer += f" ({off})"
            logger.warning("%s: the run is followed by its limit of small steps.", off)

    def _resume(self, folder: Path, step: int) -> None:
        before, fresh = load_recording(folder), self._recording
        same = all(getattr(before, x) == getattr(fresh, x) for x in ("preconditioner", "examples"))
        same = same and (before.rule == fresh.rule or fresh.rule == GRADIENT_DESCENT)  # it fell to flow later
        same = same and before.directions.keys() == fresh.directions.keys()
        same = same and all(torch.equal(v, before.directions[k]) for k, v in fresh.directions.items())
        if not same:
            raise RecordingError(
                f"{folder / FILE_NAME} was recorded with another optimizer, batch size, probe, test or "
                "directions: resume with those of its beginning, or leave OutputSpaceCallback out."
            )
        if len(before.learning_rates) < step:
            raise RecordingError(
                f"{folder / FILE_NAME} does not hold the {step} steps before this checkpoint: resume from an "
                "earlier one, or leave OutputSpaceCallback out."
            )
        before.until(step)
        self._recording = before

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer, step = kwargs["model"], bare(kwargs["optimizer"]), state.global_step
        due = step % self._every == 0 if self._every is not None else step in self._steps
        due = due or not self._recording.steps
        out = left_out(optimizer)
        if (
            due or self._recording.preconditioner == GATED and not out
        ):  # its last q is gone when training ends
            self._scales = scales(optimizer, model)
        if due:
            self._record(model, step)
            if self._recording.rule == GRADIENT_DESCENT and step in self._recording.steps[-1:]:
                self._check_descent(model, step)
        if self._recording.preconditioner != GATED:
            self._scales = None  # as large as the parameters
        rate = 0.0 if out else float(optimizer.param_groups[0]["lr"]) * pace(optimizer)
        self._recording.learning_rates.append(rate)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:  # before the checkpoint, so that none is without its recording
            self._save(args, state)

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._save(args, state)  # checkpoints that an evaluation asked for

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gated, steps = self._recording.preconditioner == GATED, self._recording.steps
        known = self._scales is not None or not gated  # a gated run may be resumed at its end
        if known and self._recording.learning_rates and steps[-1:] < [state.global_step]:
            if not gated:
                self._scales = scales(bare(kwargs["optimizer"]), kwargs["model"], taken=True)
            self._record(kwargs["model"], state.global_step)
        self._save(args, state)

    def _record(self, model: nn.Module, step: int) -> None:
        u, losses, g, b = self._terms(model, self._batches[0])
        u_test, test_losses, *_ = self._terms(model, self._batches[1])
        dtype, n = u.dtype if u.dtype == torch.float64 else torch.float32, len(u)
        kernel, cross = kernels(
            model, self._batches[0], self._batches[1], self.task.outputs, self.chunk, self._scales
        )
        values = {
            "kernel": kernel,
            "cross_kernel": cross,
            "outputs": u,
            "test_outputs": u_test,
            "gradients": g / n,
            "curvatures": b / n,
            "losses": losses.mean(),
            "test_losses": test_losses.mean(),
        }
        if not all(bool(value.isfinite().all()) for value in values.values()):
            if not self._said_not_finite:
                logger.warning("step %d is not recorded, as it is not finite; this is said once.", step)
            self._said_not_finite = True
            return
        self._recording.add(step, {name: value.to(dtype) for name, value in values.items()})

    def _save(self, args: Any, state: Any) -> None:
        now = len(self._recording.steps), len(self._recording.learning_rates)
        if state.is_world_process_zero and self._recording.steps and now != self._saved:
            self._recording.save(Path(args.output_dir))
        self._saved = now


def _digest(*parts: Sequence[Batch]) -> str:
    """A hash of the examples; without a reference's log-probabilities, whose last bits may differ."""
    found = hashlib.sha256()
    for batches in parts:
        found.update(b"part")
        for batch in batches:
            for name, value in sorted(batch.items()):
                if isinstance(value, Tensor) and not name.startswith("ref_"):
                    found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                    found.update(
                        value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                    )
    return found.hexdigest()


def _describe(optimizer: torch.optim.Optimizer, args: Any) -> str:
    """In words, for the report."""
    group = optimizer.param_groups[0]
    parts = [type(optimizer).__name__]
    if kind(optimizer) == NONE:
        parts += [f"momentum {group['momentum']}"] if group["momentum"] else []
    else:
        parts.append(f"betas {group['betas'][0]}, {group['betas'][1]}")
    parts += [f"weight decay {group['weight_decay']}"] if group["weight_decay"] else []
    parts += [f"gate {optimizer.gate}"] if hasattr(optimizer, "gate") else []
    parts += [f"clipping at {args.max_grad_norm}"] if args.max_grad_norm else []
    return ", ".join(parts)
