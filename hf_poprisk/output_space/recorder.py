"""A callback that records a run in output space, for any trainer."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_poprisk.output_space.kernel import evaluating, kernels, output_pull
from hf_poprisk.output_space.preconditioner import GATED, NONE, bare, kind, left_out, pace, scales
from hf_poprisk.output_space.recording import FLOW, GRADIENT_DESCENT, Recording
from hf_poprisk.output_space.tasks import Batch, DPOMargin, Task, loss_terms

logger = logging.getLogger(__name__)

_LIMIT = 8e9  # bytes of a recording, which is held in memory and written whole


class OutputSpaceCallback(TrainerCallback):
    """Records kernel, outputs and output gradients into ``output_dir/output_space.safetensors``.

    Before an optimizer step is taken, its kernel is that of the step itself: K_P with Adam's (and the gate's)
    preconditioner of this very step. The end of training is recorded too, with the last step's
    preconditioner, and then the file is written; its layout is in ``hf_poprisk.output_space.recording``. What
    is not finite is left out, with a warning. On several processes each computes and the first writes.

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
        ValueError: steps or a probe that cannot be.
    Raises (in ``train``):
        ValueError: a resumed run, a recording of more than 8 GB, an optimizer, a DPO loss, a precision or
            sharded parameters that it cannot read, directions of another shape than the outputs, or an
            example whose loss is not finite.
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
        self._steps = steps if isinstance(steps, int) else {0, *wanted}
        self._directions = dict(directions or {})
        self._scales: dict[str, Tensor] | None = None
        self._recording: Recording | None = None
        self._said_not_finite = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], bare(kwargs["optimizer"])
        if state.global_step > 0:
            raise ValueError(
                "OutputSpaceCallback does not go on with a resumed run: train from its beginning, or leave "
                "the callback out."
            )
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
        self._check_size(state.max_steps, outputs, others)
        exact = found == NONE and self._descends(
            args, optimizer, len(outputs), kwargs.get("train_dataloader")
        )
        self._recording = Recording(
            GRADIENT_DESCENT if exact else FLOW, _describe(optimizer, args), found, self._shaped(outputs)
        )

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

    def _due(self, step: int) -> bool:
        return step % self._steps == 0 if isinstance(self._steps, int) else step in self._steps

    def _check_size(self, max_steps: int, outputs: Tensor, test_outputs: Tensor) -> None:
        """Raise ``ValueError`` for a recording that is too large."""
        records, n, m = sum(map(self._due, range(max_steps))) + 1, outputs.numel(), test_outputs.numel()
        size = records * n * (n + m) * (8 if outputs.dtype == torch.float64 else 4)
        if size > _LIMIT:
            raise ValueError(
                f"{records} records of {n} × {n + m} numbers are {size / 1e9:.2g} GB in memory and on disk, "
                f"more than {_LIMIT / 1e9:.2g}: set steps= to fewer records, or give a smaller probe."
            )

    def _finite_terms(self, model: nn.Module) -> list[tuple[Tensor, ...]]:
        """``_terms`` of probe and test; no example may have one that is not finite."""
        found = [self._terms(model, batches) for batches in self._batches]
        for name, terms in zip(("probe", "test"), found, strict=True):
            finite = torch.stack([x.reshape(len(x), -1).isfinite().all(1) for x in terms]).all(0)
            if not finite.all():
                raise ValueError(
                    f"example {int(finite.int().argmin())} of {name} has outputs or a loss that are not "
                    f"finite: leave it out of {name} (a sequence needs a label other than -100)."
                )
        return found

    def _terms(self, model: nn.Module, batches: Sequence[Batch]) -> tuple[Tensor, ...]:
        """Of each example: outputs [b, k], loss [b], its gradient [b, k] and curvature [b, k, k] in them."""
        parts = []
        for batch in batches:
            with evaluating(model), torch.no_grad():
                u = self.task.outputs(model, batch)
            parts.append((u, *loss_terms(self.task, u, batch)))
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    def _shaped(self, outputs: Tensor) -> dict[str, Tensor]:
        """The directions in the shape of the outputs [n, k]."""
        for name, value in self._directions.items():
            if value.numel() != outputs.numel():
                raise ValueError(
                    f"the direction {name!r} has shape {tuple(value.shape)}; the probe's outputs "
                    f"{tuple(outputs.shape)}."
                )
        return {
            name: value.detach().cpu().to(outputs.dtype).reshape(outputs.shape)
            for name, value in self._directions.items()
        }

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
        # else examples weigh differently
        even = size % args.world_size == 0 and size % min(size, together) == 0
        return plain and whole and even and not args.max_grad_norm

    def _check_descent(self, model: nn.Module, step: int) -> None:
        """Followed as gradient descent only while the step's gradient is Jᵀg, that of the loss on the probe.

        It is not with dropout, label smoothing, weights, another loss or other examples. The difference is
        relative to the gradient at the first record, as both sink to rounding at the end.
        """
        series = self._recording.series
        expected = output_pull(model, self._batches[0], series["gradients"][-1], self.task.outputs)
        params = [p for p in model.parameters() if p.requires_grad]
        real = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in params])
        first = series["gradients"][0].reshape(-1)
        whole = max(float(first @ series["kernel"][0] @ first), 0.0) ** 0.5 or 1.0
        gap = float((real.to(expected) - expected).norm())
        rounding = max(torch.finfo(x.dtype).eps for x in (params[0], first))
        if gap > rounding**0.5 * whole:
            self._recording.rule = FLOW
            off = (
                f"the gradient of step {step} is not that of the loss on the probe: off by {gap / whole:.2g}"
            )
            self._recording.optimizer += f" ({off})"
            logger.warning("%s: the run is followed by its limit of small steps.", off)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer, step = kwargs["model"], bare(kwargs["optimizer"]), state.global_step
        gated, out = self._recording.preconditioner == GATED, left_out(optimizer)
        due = self._due(step) or not self._recording.steps
        if due or gated and not out:  # its last q is gone when training ends
            self._scales = scales(optimizer, model)
        if due:
            self._record(model, step)
            if self._recording.rule == GRADIENT_DESCENT and step in self._recording.steps[-1:]:
                self._check_descent(model, step)
        if not gated:
            self._scales = None  # as large as the parameters
        rate = 0.0 if out else float(optimizer.param_groups[0]["lr"]) * pace(optimizer)
        self._recording.learning_rates.append(rate)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._recording.learning_rates:
            if self._recording.preconditioner != GATED:
                self._scales = scales(bare(kwargs["optimizer"]), kwargs["model"], taken=True)
            self._record(kwargs["model"], state.global_step)
        if state.is_world_process_zero and self._recording.steps:
            self._recording.save(Path(args.output_dir))

    def _record(self, model: nn.Module, step: int) -> None:
        probe, test = self._batches
        u, losses, g, b = self._terms(model, probe)
        u_test, test_losses, *_ = self._terms(model, test)
        dtype, n = u.dtype if u.dtype == torch.float64 else torch.float32, len(u)
        kernel, cross = kernels(model, probe, test, self.task.outputs, self.chunk, self._scales)
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
        if all(bool(value.isfinite().all()) for value in values.values()):
            self._recording.add(step, {name: value.to(dtype) for name, value in values.items()})
        elif not self._said_not_finite:
            logger.warning("step %d is not recorded, as it is not finite; this is said once.", step)
            self._said_not_finite = True


def _describe(optimizer: torch.optim.Optimizer, args: Any) -> str:
    """In words, for the report."""
    group = optimizer.param_groups[0]
    parts = [type(optimizer).__name__]
    if "betas" in group:
        parts.append(f"betas {group['betas'][0]}, {group['betas'][1]}")
    parts += [f"momentum {group['momentum']}"] if group.get("momentum") else []
    parts += [f"weight decay {group['weight_decay']}"] if group["weight_decay"] else []
    parts += [f"gate {optimizer.gate}"] if hasattr(optimizer, "gate") else []
    parts += [f"clipping at {args.max_grad_norm}"] if args.max_grad_norm else []
    return ", ".join(parts)
