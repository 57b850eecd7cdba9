"""What is refused before anything is loaded: setting, when it is refused, why, and the way out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """A setting that cannot be served. The texts are formats: ``a`` is the arguments, ``found`` the value.

    Attributes:
        setting: as its user writes it.
        found: arguments → the offending value, or something false if there is none.
        why: the middle of the sentence.
        way_out: its end.
    """

    setting: str
    found: Callable[[Any], Any]
    why: str
    way_out: str

    def error(self, args: Any, **words: str) -> ValueError:
        text = f"{self.setting} {self.why}: {self.way_out}."
        return ValueError(text.format(a=args, found=self.found(args), **words))


def refuse(rules: Iterable[Rule], args: Any, **words: str) -> None:
    """Raise ``ValueError`` for the first rule that finds something."""
    for rule in rules:
        if rule.found(args):
            raise rule.error(args, **words)


# For every run.
LAUNCH = (
    Rule(
        "launched as {found} processes",
        lambda a: (n := os.environ.get("WORLD_SIZE", "1")) != str(a.world_size) and n,
        "that do not see each other",
        "add --use_cpu true if they are meant to train together on CPU",
    ),
)

# Whatever splits parameters or takes the layout of a step out of our hands. ``of`` is what cannot serve it.
DEEPSPEED = Rule(
    "deepspeed", lambda a: bool(a.deepspeed), "is not supported by {of}", "train with DDP, or set {without}"
)
WHOLE_PARAMETERS = (
    DEEPSPEED._replace(setting="fsdp", found=lambda a: bool(a.fsdp)),
    DEEPSPEED,
    DEEPSPEED._replace(setting="parallelism_config", found=lambda a: a.parallelism_config is not None),
    Rule(
        "auto_find_batch_size",
        lambda a: a.auto_find_batch_size,
        "is not supported by {of}",
        "set the batch size yourself, or set {without}",
    ),
    Rule(
        "nn.DataParallel",
        lambda a: a.n_gpu > 1,
        "is not supported by {of}",
        "start one process per GPU with accelerate launch, or set CUDA_VISIBLE_DEVICES, or set {without}",
    ),
)

# Stock settings that would do nothing, with our optimizer, and with the gate on.
OPTIMIZER = (
    Rule(
        "fp16=True",
        lambda a: a.fp16 and a.device.type == "cpu",
        "has no effect on a CPU",
        "set bf16=True, or neither",
    ),
)
GATE = (
    Rule(
        "optim_target_modules",
        lambda a: a.optim_target_modules is not None,
        "has no effect with optim=poprisk_adamw",
        "remove it; poprisk_exclude leaves parameters ungated",
    ),
)

# What per-example gradients need of the layout of a step.
STATIC_GRAPH = Rule(
    "ddp_static_graph=True",
    lambda a: a.ddp_static_graph and a.gradient_accumulation_steps > 1,
    "fails in PyTorch when the first backward is not synchronised",
    "set ddp_static_graph=False",
)
EXAMPLES = (
    Rule(
        "a step of one {a.poprisk_estimator}",
        lambda a: a.units_per_step < 2 and not getattr(a, "packing", False),  # a row holds several examples
        "leaves nothing to hold out",
        "raise gradient_accumulation_steps or, for examples, per_device_train_batch_size",
    ),
    STATIC_GRAPH,
    Rule(
        "average_tokens_across_devices=False",
        lambda a: a.world_size > 1 and not a.average_tokens_across_devices,
        "makes an example's weight depend on its rank",
        "set average_tokens_across_devices=True",
    ),
)

# What judging labels needs of the loss and the layout.
LABEL_MODE = "poprisk_label_noise={a.poprisk_label_noise}"


def _hidden_by(setting: str, found: Callable[[Any], Any], way_out: str) -> Rule:
    why = f"judges single examples by the log-odds in the loss, which {setting} hides"
    return Rule(LABEL_MODE, found, why, way_out)


LABELS = (
    _hidden_by(
        "poprisk_estimator=group",
        lambda a: a.poprisk_estimator == "group",
        "set poprisk_estimator=example",
    ),
    _hidden_by("torch_compile=True", lambda a: a.torch_compile, "set torch_compile=False"),
    _hidden_by("use_liger_kernel=True", lambda a: a.use_liger_kernel, "set use_liger_kernel=False"),
    _hidden_by("label_smoothing_factor", lambda a: a.label_smoothing_factor, "set label_smoothing_factor=0"),
    STATIC_GRAPH,
)

# What weights of the examples need: to see single ones in the model's outputs.
WEIGHT_COLUMN = "poprisk_weight_column={a.poprisk_weight_column}"


def joins(setting: str, found: Callable[[Any], Any], way_out: str) -> Rule:
    """A setting that leaves no outputs to be weighted example by example."""
    return Rule(
        WEIGHT_COLUMN, found, f"weights the model's outputs for an example, which {setting} hides", way_out
    )


WEIGHTS = (
    Rule(
        WEIGHT_COLUMN,
        lambda a: a.poprisk_label_noise != "off",
        "gives the weights that poprisk_label_noise={a.poprisk_label_noise} is to find",
        "set poprisk_label_noise=off, or remove poprisk_weight_column",
    ),
    joins("torch_compile=True", lambda a: a.torch_compile, "set torch_compile=False"),
    joins("use_liger_kernel=True", lambda a: a.use_liger_kernel, "set use_liger_kernel=False"),
)
