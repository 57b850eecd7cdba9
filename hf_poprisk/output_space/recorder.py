"""A callback that records a run in output space, for any trainer."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from transformers import TrainerCallback

from hf_poprisk.optimizer import PopRiskAdamW
from hf_poprisk.output_space.kernel import kernels
from hf_poprisk.output_space.preconditioner import NONE, kind, scales
from hf_poprisk.output_space.recording import FLOW, GRADIENT_DESCENT, Recording
from hf_poprisk.output_space.tasks import Batch, DPOMargin, Task, loss_terms
from hf_poprisk.per_example.undisturbed import mode

logger = logging.getLogger(__name__)

_LIMIT = 2e9  # numbers in the kernels of a recording, which is held in memory: 8 GB in float32


class OutputSpaceCallback(TrainerCallback):
    """Records kernel, outputs and output gradients into ``output_dir/output_space.safetensors``.

    Before an optimizer step is taken, its kernel is that of the step itself: K_P with Adam's (and the gate's)
    preconditioner of this very step. The end of training is recorded with the last step's; then the file is
    written, as ``hf_poprisk.output_space.recording`` says. What is not finite is left out, with a warning. On
    several processes each computes and the first writes.

    Args:
        task: outputs and losses, as ``ClassLogits()``, ``DPOMargin(beta)``, or a ``Task`` of your own.
        probe: training examples as collated batches, all of them where you can; one example each is fastest.
        test: held-out examples, likewise.
        steps: record every so many optimizer steps, or at these.
        chunk: outputs whose gradients are held at a time; see ``kernels``.
        directions: name → [n, k] or [n], directions in output space to be followed, ``label noise`` for
            instance: the output gradient of the labels given, minus that of the right labels.

    Raises (on construction, and in ``train``):
        ValueError: steps that cannot be, no probe or test; a resumed run, a recording of more than 2·10⁹
            numbers, an optimizer, a DPO loss, a precision or sharded parameters that it cannot read,
            directions of another shape than the outputs, or an example whose loss is not finite.
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
        if steps == 0 or any(not isinstance(s, int) or s < 0 for s in wanted):
            raise ValueError(f"steps must be a number ≥ 1, or a list of optimizer steps; got {steps!r}.")
        if not probe or not test:
            raise ValueError("probe and test need at least one batch each.")
        self.task, self.probe, self.test, self.chunk = task, list(probe), list(test), chunk
        self._steps = steps if isinstance(steps, int) else {0, *wanted}
        self._directions = dict(directions or {})
        self._scales: dict[str, Tensor] | None = None  # P of the last step that was taken
        self._recording: Recording | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], _bare(kwargs["optimizer"])
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
        preconditioner, device = kind(optimizer), next(model.parameters()).device
        self._batches = [
            [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches]
            for batches in (self.probe, self.test)
        ]
        u, u_test = self._finite_outputs(model, 0), self._finite_outputs(model, 1)
        records, n, m = sum(map(self._due, range(state.max_steps))) + 1, u.numel(), u_test.numel()
        if records * n * (n + m) > _LIMIT:
            raise ValueError(
                f"{records} records of {n} × {n + m} numbers are more than {_LIMIT:.2g}: set steps= to fewer "
                "records, or give a smaller probe."
            )
        for name, value in self._directions.items():
            if value.numel() != n:
                raise ValueError(
                    f"the direction {name!r} has shape {tuple(value.shape)}; the probe's outputs "
                    f"{tuple(u.shape)}."
                )
        directions = {
            name: v.detach().to("cpu", u.dtype).reshape(u.shape) for name, v in self._directions.items()
        }
        descends = preconditioner == NONE and _may_descend(
            args, optimizer, len(u), kwargs["train_dataloader"]
        )
        rule = GRADIENT_DESCENT if descends else FLOW
        self._recording = Recording(rule, _describe(optimizer, args), preconditioner, directions)

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

    def _finite_outputs(self, model: nn.Module, which: int) -> Tensor:
        """[n, k], of probe (0) or test (1); every example must have outputs and a loss that are finite."""
        terms, name = self._terms(model, self._batches[which]), ("probe", "test")[which]
        finite = torch.stack([x.reshape(len(x), -1).isfinite().all(1) for x in terms]).all(0)
        if not finite.all():
            raise ValueError(
                f"example {int(finite.int().argmin())} of {name} has outputs or a loss that are not finite: "
                f"leave it out of {name} (a sequence needs a label other than -100)."
            )
        return terms[0]

    def _terms(self, model: nn.Module, batches: Sequence[Batch]) -> tuple[Tensor, ...]:
        """Of each example: outputs [b, k], loss [b], its gradient [b, k] and curvature [b, k, k] in them."""
        parts = []
        for batch in batches:
            with mode(model, False), torch.no_grad():
                u = self.task.outputs(model, batch)
            parts.append((u, *loss_terms(self.task, u, batch)))
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer, step = kwargs["model"], _bare(kwargs["optimizer"]), state.global_step
        skipped = isinstance(optimizer, PopRiskAdamW) and optimizer._skip_step  # a gradient is not finite
        due = self._due(step) or not self._recording.steps
        if due or not skipped:
            self._scales = scales(optimizer, model)
        if due and self._record(model, step) and self._recording.rule == GRADIENT_DESCENT:
            self._check_descent(model, step)
        group = optimizer.param_groups[0]
        momentum = group.get("momentum", 0.0)  # of SGD, whose steps add up
        pace = (1 - group["dampening"]) / (1 - momentum) if momentum else 1.0
        self._recording.learning_rates.append(0.0 if skipped else float(group["lr"]) * pace)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._recording.learning_rates:
            self._record(kwargs["model"], state.global_step)
        if state.is_world_process_zero and self._recording.steps:
            self._recording.save(Path(args.output_dir))

    def _record(self, model: nn.Module, step: int) -> bool:
        """Whether everything was finite, and is recorded."""
        probe, test = self._batches
        u, losses, g, b = self._terms(model, probe)
        u_test, test_losses, *_ = self._terms(model, test)
        kernel, cross = kernels(model, probe, test, self.task.outputs, self.chunk, self._scales)
        values = {"kernel": kernel, "cross_kernel": cross, "outputs": u, "test_outputs": u_test}
        values |= {"gradients": g / len(u), "curvatures": b / len(u)}
        values |= {"losses": losses.mean(), "test_losses": test_losses.mean()}
        finite = all(bool(value.isfinite().all()) for value in values.values())
        if finite:
            dtype = torch.promote_types(u.dtype, torch.float32)
            self._recording.add(step, {name: value.to(dtype) for name, value in values.items()})
        else:
            logger.warning("step %d is not recorded, as it is not finite.", step)
        return finite

    def _check_descent(self, model: nn.Module, step: int) -> None:
        """Gradient descent is followed as such while its gradient is that of the task's loss on the probe.

        It is not with dropout, label smoothing, weights, another loss or other examples. The difference is
        relative to the gradient at the first record, as both sink to rounding at the end.
        """
        series = self._recording.series
        params = [p for p in model.parameters() if p.requires_grad]
        expected = torch.zeros_like(parameters_to_vector(params))
        with mode(model, False):
            for batch in self._batches[0]:
                loss = self.task.losses(self.task.outputs(model, batch), batch).sum()
                expected += parameters_to_vector(torch.autograd.grad(loss, params, materialize_grads=True))
        expected /= len(series["outputs"][0])
        real = parameters_to_vector([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
        g = series["gradients"][0].reshape(-1)
        gap = float((real - expected).norm()) / (max(float(g @ series["kernel"][0] @ g), 0.0) ** 0.5 or 1.0)
        if gap > max(torch.finfo(x.dtype).eps for x in (expected, g)) ** 0.5:
            self._recording.rule = FLOW
            off = f"the gradient of step {step} is not that of the loss on the probe: off by {gap:.2g}"
            self._recording.optimizer += f" ({off})"
            logger.warning("%s: the run is followed by its limit of small steps.", off)


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _may_descend(args: Any, optimizer: torch.optim.Optimizer, n: int, loader: Any) -> bool:
    """Whether SGD's every step may be full-batch gradient descent on a probe that is the training set."""
    try:
        size = len(loader.dataset)
    except (AttributeError, TypeError):  # a stream
        return False
    step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    plain = not any(group["momentum"] or group["weight_decay"] for group in optimizer.param_groups)
    return plain and step >= size == n and not args.max_grad_norm


def _describe(optimizer: torch.optim.Optimizer, args: Any) -> str:
    """In words, for the report."""
    group = optimizer.param_groups[0]
    parts = [type(optimizer).__name__]
    parts += ["betas {}, {}".format(*group["betas"])] if "betas" in group else []
    parts += [f"momentum {group['momentum']}"] if group.get("momentum") else []
    parts += [f"weight decay {group['weight_decay']}"] if group["weight_decay"] else []
    parts += [f"gate {optimizer.gate}"] if hasattr(optimizer, "gate") else []
    parts += [f"clipping at {args.max_grad_norm}"] if args.max_grad_norm else []
    return ", ".join(parts)
