"""What is refused before anything is loaded: when, and the sentence with the way out."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """Settings that cannot be served.

    Attributes:
        found: arguments → the offending value, or something false if there is none.
        sentence: a format of ``a``, the arguments, ``found``, and what ``refuse`` is given.
    """

    found: Callable[[Any], Any]
    sentence: str


def refuse(rules: Iterable[Rule], args: Any, **words: str) -> None:
    """Raise ``ValueError`` for the first rule that finds something."""
    for rule in rules:
        if found := rule.found(args):
            raise ValueError(rule.sentence.format(a=args, found=found, **words))


def hiding(what: str, *flags: str) -> tuple[Rule, ...]:
    """Flags that hide single examples from ``what`` must see them."""
    return tuple(
        Rule(lambda a, flag=flag: getattr(a, flag), f"{what}, which {flag}=True hides: set {flag}=False.")
        for flag in flags
    )


def judges_too_late(args: Any, epochs: float) -> bool:
    """Whether so many epochs end before labels are judged, or before a step is made with their weights."""
    after = args.poprisk_judge_after_epochs
    return after > epochs or after == epochs > 0 and args.poprisk_label_noise == "weight"


AFTER_EPOCHS = (
    "poprisk_judge_after_epochs={a.poprisk_judge_after_epochs} has an effect: train for more epochs (or for "
    "as many with poprisk_label_noise=audit), or judge earlier."
)


def always(args: Any) -> bool:
    """Of a rule that a trainer has for an option which it never takes."""
    return True


def _not_finite(args: Any) -> str | None:
    # ours have sentences of their own
    numbers = ((n, v) for n, v in vars(args).items() if isinstance(v, float) and not n.startswith("poprisk_"))
    return next((f"{name}={value}" for name, value in numbers if not math.isfinite(value)), None)


def _out_of_range(args: Any) -> str | None:
    for names, fits, allowed in _RANGES:
        for name in names.split():
            value = getattr(args, name, None)
            if isinstance(value, int | float) and not fits(value):
                return f"{name} must be {allowed}; got {value}"
    if getattr(args, "beta", 1) == 0 and not hasattr(args, "num_generations"):
        return "beta must be above 0, where the loss would be constant; got 0"
    return None


_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps num_generations "
     "max_completion_length", lambda v: v >= 1, "1 or more"),
    ("adam_epsilon temperature", lambda v: v > 0, "above 0"),
    ("adam_beta1 adam_beta2", lambda v: 0 <= v < 1, "from 0 to below 1"),
    ("learning_rate weight_decay max_grad_norm num_train_epochs beta label_smoothing_factor",
     lambda v: v >= 0, "0 or more"),
)  # fmt: skip

# For every run.
NUMBERS = (
    Rule(_not_finite, "{found} is not a finite number: give one."),
    Rule(_out_of_range, "{found}."),
)
LAUNCH = (
    Rule(
        lambda a: (n := os.environ.get("WORLD_SIZE", "1")) != str(a.world_size) and n,
        "launched as {found} processes that do not see each other: add --use_cpu true if they are meant to "
        "train together on CPU.",
    ),
)

# Whatever splits parameters or takes the layout of a step out of our hands. ``of`` is what cannot serve it.
PROCESSES = (
    Rule(
        lambda a: a.auto_find_batch_size,
        "auto_find_batch_size is not supported by {of}: set the batch size yourself, or set {without}.",
    ),
    Rule(
        lambda a: a.n_gpu > 1,
        "nn.DataParallel is not supported by {of}: start one process per GPU with accelerate launch, or set "
        "CUDA_VISIBLE_DEVICES, or set {without}.",
    ),
)
WHOLE_PARAMETERS = (
    Rule(lambda a: a.fsdp, "fsdp is not supported by {of}: train with DDP, or set {without}."),
    Rule(lambda a: a.deepspeed, "deepspeed is not supported by {of}: train with DDP, or set {without}."),
    Rule(
        lambda a: a.parallelism_config is not None,
        "parallelism_config is not supported by {of}: train with DDP, or set {without}.",
    ),
    *PROCESSES,
)

# The same for the gate, which serves FSDP2. Asked of the arguments, and of what the launcher made of them.
SHARDED = (
    *PROCESSES,
    Rule(
        lambda a: a.deepspeed,
        "deepspeed is not supported by {of}: shard with FSDP2 (fsdp=true; for ZeRO-2 "
        "reshard_after_forward=false), or set {without}.",
    ),
    Rule(
        lambda a: (c := a.parallelism_config) is not None and (c.tp_enabled or c.cp_enabled or c.sp_enabled),
        "tensor, context and sequence parallelism are not supported by {of}: shard with FSDP2 alone "
        "(dp_shard_size, dp_replicate_size), or set {without}.",
    ),
    Rule(
        lambda a: a.fsdp and int((a.fsdp_config or {}).get("version", 2)) != 2,
        "FSDP1 is not supported by {of}: set fsdp_version=2 (version: 2 in fsdp_config), or set {without}.",
    ),
    Rule(
        lambda a: a.fsdp and (a.fsdp_config or {}).get("cpu_offload"),
        "FSDP2 with cpu_offload is not supported by {of}: leave it out and shard over more GPUs, or set "
        "{without}.",
    ),
    Rule(
        lambda a: a.fsdp and a.poprisk_estimator == "ema",
        "poprisk_estimator=ema does not run on sharded parameters: set poprisk_estimator=example, leave fsdp "
        "out, or set {without}.",
    ),
)

_OTHER_WEIGHTS = ("lomo", "adalomo", "schedule_free")

# Stock settings that would do nothing, with our optimizer, and with the gate on.
OPTIMIZER = (
    Rule(
        lambda a: a.fp16 and a.device.type == "cpu",
        "fp16=True has no effect on a CPU: set bf16=True, or neither.",
    ),
)
GATE = (
    Rule(
        lambda a: a.optim_target_modules is not None,
        "optim_target_modules has no effect with optim=poprisk_adamw: remove it; poprisk_exclude leaves "
        "parameters ungated.",
    ),
)

# A gate around a stock optimizer.
AROUND = (
    Rule(
        lambda a: (
            (name := a.optim.value).startswith(_OTHER_WEIGHTS)
            and name
            or name.endswith("_layerwise")
            and name
        ),
        "optim={found} takes its steps during the backward, or evaluates averages of its weights, and the "
        "gate can do neither: use another optim, or set poprisk_gate=none.",
    ),
    Rule(
        lambda a: a.poprisk_risk,
        "poprisk_risk=true reads the write of poprisk_adamw or of an ungated Adam: set optim=poprisk_adamw, "
        "or poprisk_gate=none, or poprisk_risk=false.",
    ),
)

# Settings of the judging that would do nothing.
JUDGING = (
    Rule(
        lambda a: a.poprisk_label_noise == "off" and a.poprisk_judge_after_epochs,
        "poprisk_judge_after_epochs={found} has no effect with poprisk_label_noise=off: set "
        "poprisk_label_noise=weight or audit, or poprisk_judge_after_epochs=0.",
    ),
    Rule(
        lambda a: (
            a.poprisk_label_noise != "off" and a.max_steps <= 0 and judges_too_late(a, a.num_train_epochs)
        ),
        "num_train_epochs={a.num_train_epochs:g} ends before " + AFTER_EPOCHS,
    ),
    Rule(
        lambda a: a.poprisk_leap and a.poprisk_judge_after_epochs,
        "poprisk_leap={a.poprisk_leap} is made before the first step, where labels are judged with "
        "poprisk_judge_after_epochs=0 alone: set that, or poprisk_leap=0.",
    ),
    Rule(
        lambda a: a.poprisk_leap and a.poprisk_label_noise != "weight",
        "poprisk_leap={a.poprisk_leap} goes to where judged labels lead: set poprisk_label_noise=weight, or "
        "poprisk_leap=0.",
    ),
)

# What per-example gradients need of the layout of a step.
STATIC_GRAPH = Rule(
    lambda a: a.ddp_static_graph and a.gradient_accumulation_steps > 1,
    "ddp_static_graph=True fails in PyTorch when the first backward is not synchronised: set "
    "ddp_static_graph=False.",
)
EXAMPLES = (
    Rule(
        lambda a: a.units_per_step < 2 and not getattr(a, "packing", False),  # a row holds several examples
        "a step of one {a.poprisk_estimator} leaves nothing to hold out: raise gradient_accumulation_steps "
        "or, for examples, per_device_train_batch_size.",
    ),
    STATIC_GRAPH,
    Rule(
        lambda a: a.world_size > 1 and not a.average_tokens_across_devices,
        "average_tokens_across_devices=False makes an example's weight depend on its rank: set "
        "average_tokens_across_devices=True.",
    ),
)

# What judging labels needs of the loss and the layout.
LABEL_MODE = "poprisk_label_noise={a.poprisk_label_noise}"
_JUDGES = f"{LABEL_MODE} judges single examples by the log-odds in the loss"
LABELS = (
    *hiding(_JUDGES, "torch_compile", "use_liger_kernel"),
    Rule(
        lambda a: a.label_smoothing_factor,
        f"{_JUDGES}, which label_smoothing_factor hides: set label_smoothing_factor=0.",
    ),
    STATIC_GRAPH,
)

# Weights of the examples must see single ones in the model's outputs.
WEIGHS = "poprisk_weight_column={a.poprisk_weight_column} weights the model's outputs for an example"
WEIGHTS = (
    Rule(
        lambda a: a.poprisk_label_noise != "off",
        "poprisk_weight_column={a.poprisk_weight_column} gives the weights that "
        "poprisk_label_noise={a.poprisk_label_noise} is to find: set poprisk_label_noise=off, or remove "
        "poprisk_weight_column.",
    ),
    *hiding(WEIGHS, "torch_compile", "use_liger_kernel"),
)
