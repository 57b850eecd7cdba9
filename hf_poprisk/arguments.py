"""The flags: ``--optim poprisk_adamw``, the ``poprisk_`` fields, and what they refuse."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from hf_poprisk import refusals
from hf_poprisk.options import check_options
from hf_poprisk.refusals import Rule, refuse

OPTIM = "poprisk_adamw"
_PREFIX = "poprisk_"


@dataclass
class PopRiskArgumentsMixin:
    """The gate's fields and checks; stands before the stock config class in the bases of a dataclass."""

    # Of classes for certain trainers: what their losses add.
    _example_rules: ClassVar[tuple[Rule, ...]] = refusals.EXAMPLES
    _label_rules: ClassVar[tuple[Rule, ...]] = refusals.LABELS
    _weight_rules: ClassVar[tuple[Rule, ...]] = refusals.WEIGHTS
    _basis_rules: ClassVar[tuple[Rule, ...]] = ()

    # Redeclared as a string: the stock field is an Enum, which a command line could not extend.
    optim: str = field(
        default=OPTIM,
        metadata={
            "help": f"The optimizer to use: {OPTIM}, or any that transformers knows (with a gate if "
            "poprisk_gate is given)."
        },
    )
    poprisk_gate: Literal["hard", "soft", "none"] | None = field(
        default=None,
        metadata={
            "help": "hard: write a parameter only if G² > Q. soft: shrink the write. none: no gate. Default: "
            f"hard with {OPTIM}, none with another optim."
        },
    )
    poprisk_estimator: Literal["example", "group", "ema"] = field(
        default="example",
        metadata={
            "help": "The leave-one-out unit. example: exact. group: a micro-batch, coarser. ema: the "
            "authors' streaming form, which needs no per-example gradients."
        },
    )
    poprisk_exclude: list[str] | None = field(
        default=None,
        metadata={"help": "Regular expressions: parameters whose name matches one stay ungated."},
    )
    poprisk_ema_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Threshold of the ema estimator; default (1-beta1)/(1+beta1). 1 is as published and "
            "closes almost everything."
        },
    )
    poprisk_basis: Literal["coordinate", "eigen"] = field(
        default="coordinate",
        metadata={
            "help": "Where AdamW's moments and the gate live. eigen: in the eigenbasis of each linear "
            "layer's per-example gradients, measured once, before the first step."
        },
    )
    poprisk_kahan: bool = field(
        default=False,
        metadata={
            "help": "For weights of bfloat16: remember what their rounding loses, in one more "
            "buffer, and add it to the next write. Without it a write below a weight's resolution is lost."
        },
    )
    poprisk_risk: bool = field(
        default=False,
        metadata={
            "help": "Log how much of each step the next batch confirms; works with the stock Adam "
            "optimizers too."
        },
    )
    poprisk_label_noise: Literal["off", "audit", "weight"] = field(
        default="off",
        metadata={
            "help": "Judge every label, before the first step, by what the other examples say about it. "
            "audit: judge only. weight: weight an example by how likely its label is correct."
        },
    )
    poprisk_judge_after_epochs: int = field(
        default=0,
        metadata={
            "help": "Judge the labels by the model that so many ordinary epochs have trained, and weight "
            "from there on; 0: before the first step."
        },
    )
    poprisk_leap: float = field(
        default=0.0,
        metadata={
            "help": "Preference pairs with poprisk_label_noise=weight: before the first step, move the "
            "weights to where the judge's regression is, by so many nats of the mean margin. 0: do not. "
            "It may take the place of training (num_train_epochs=0)."
        },
    )
    poprisk_weight_column: str | None = field(
        default=None,
        metadata={
            "help": "A column of the training set with a number of zero or more per example, by which its "
            "loss is multiplied, with any optimizer; what a step is divided by stays as it is."
        },
    )
    poprisk_allow_change: bool = field(
        default=False,
        metadata={"help": "Resume under other gate settings, or another number of examples per step."},
    )
    poprisk_hub_access: Literal["auto", "manual"] | None = field(
        default=None,
        metadata={
            "help": "auto or manual: who downloads the pushed model must ask for access. A new repository "
            "stays private until it is gated and filled."
        },
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ours = (f for f in fields(PopRiskArgumentsMixin) if f.name.startswith(_PREFIX))
        lines = (f"    {f.name} (default {f.default!r}): {f.metadata['help']}" for f in ours)
        doc = cls.__doc__ or f"{cls.__name__}, with the gate's fields."
        cls.__doc__ = "\n".join([doc, "", "Args:", *lines, ""])

    def __post_init__(self) -> None:
        refuse(refusals.NUMBERS, self)  # of which the stock class forms others
        name = str(getattr(self.optim, "value", self.optim))
        known = [OPTIM, *(member.value for member in OptimizerNames)]
        if name not in known:
            raise ValueError(f"{name} is not a valid OptimizerNames, please select one of {known}")
        # The stock class turns `optim` into its Enum, which does not hold our name.
        self.optim = "adamw_torch" if name == OPTIM else name
        super().__post_init__()  # type: ignore[misc]
        if name == OPTIM:
            self.optim = OPTIM
        self._check_options()

    def _check_options(self) -> None:
        exclude = self.poprisk_exclude or None
        self.poprisk_exclude = [exclude] if isinstance(exclude, str) else exclude
        if self.poprisk_label_noise is False:  # how YAML reads off
            self.poprisk_label_noise = "off"
        others = {
            name: getattr(self, _PREFIX + name)
            for name in "exclude label_noise judge_after_epochs leap weight_column hub_access".split()
        }
        check_options(_PREFIX, **self.gate_options(), **others)
        if self.optim == OPTIM:
            if self.optim_args:  # type: ignore[has-type]
                raise ValueError(
                    f"optim_args has no effect with optim={OPTIM}: set the fields, such as poprisk_gate=soft."
                )
            return
        any_optimizer = {"gate", "hub_access", "risk", "weight_column"}
        if self.poprisk_weight_column is not None or self.gated:
            any_optimizer.add("allow_change")
        if self.gated:
            any_optimizer |= {"exclude"} if self.poprisk_estimator == "ema" else {"exclude", "estimator"}
        for spec in fields(self):
            option = spec.name.removeprefix(_PREFIX)
            if option in (spec.name, *any_optimizer) or getattr(self, spec.name) == spec.default:
                continue
            raise ValueError(
                f"{spec.name}={getattr(self, spec.name)!r} has no effect with optim="
                f"{getattr(self.optim, 'value', self.optim)}: remove it or set optim={OPTIM}."
            )

    def gate_options(self) -> dict[str, Any]:
        """The keyword arguments of ``PopRiskAdamW`` that the fields set, the exclusions aside."""
        return {
            "gate": self.poprisk_gate or ("hard" if self.optim == OPTIM else "none"),
            "estimator": self.poprisk_estimator,
            "ema_alpha": self.poprisk_ema_alpha,
            "basis": self.poprisk_basis,
            "kahan": self.poprisk_kahan,
        }

    @property
    def gated(self) -> bool:
        """Whether a gate is on, around whichever optimizer."""
        return self.gate_options()["gate"] != "none"

    @property
    def gated_by(self) -> str:
        """What asks for the gate, for messages."""
        return f"optim={OPTIM}" if self.optim == OPTIM else f"poprisk_gate={self.poprisk_gate}"

    def set_optimizer(self, name: str | OptimizerNames = OPTIM, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, and it takes our name too."""
        ours = name == OPTIM
        super().set_optimizer("adamw_torch" if ours else name, *args, **kwargs)  # type: ignore[misc]
        if ours:
            self.optim = OPTIM
        self._check_options()
        return self

    @property
    def plain_options(self) -> str:
        """What makes the optimizer plain AdamW, for messages."""
        others = {"label_noise": "off", "basis": "coordinate"}
        changed = {n: off for n, off in others.items() if getattr(self, _PREFIX + n) != off}
        return ", ".join(f"{_PREFIX}{n}={off}" for n, off in {"gate": "none", **changed}.items())

    @property
    def units_per_step(self) -> int:
        """Examples (or groups) per optimizer step over all ranks: the gate's b, a short last step aside."""
        args: Any = self
        backwards = args.gradient_accumulation_steps * args.world_size
        return backwards * (1 if self.poprisk_estimator == "group" else args.per_device_train_batch_size)

    def check_training(self) -> None:
        """Refuse what the gate cannot serve, by name, before a model or a data set is touched.

        Raises:
            ValueError: one sentence that names the setting and the way out.
        """
        refuse((*refusals.LAUNCH, *refusals.NUMBERS), self)
        self._check_output_dir()
        whole = refusals.WHOLE_PARAMETERS
        if self.poprisk_risk:
            refuse(whole, self, of="poprisk_risk=true", without="poprisk_risk=false")
        if self.poprisk_weight_column is not None:
            refuse(self._weight_rules, self)
            refuse(whole, self, of="poprisk_weight_column", without="no poprisk_weight_column")
        ours, of, without = self.optim == OPTIM, self.gated_by, self.plain_options
        if not ours and not self.gated:
            return
        refuse(refusals.OPTIMIZER, self)
        refuse(refusals.JUDGING if ours else refusals.AROUND, self)
        if not ours or (self.poprisk_label_noise, self.poprisk_basis) != ("off", "coordinate"):
            refuse(whole, self, of=of, without=without)
        elif self.gated:
            refuse(refusals.SHARDED, self, of=of, without=without)
        if self.poprisk_label_noise != "off":
            refuse(self._label_rules, self)
        if self.poprisk_basis == "eigen":
            refuse(self._basis_rules, self)
        if self.gated:
            refuse(refusals.GATE if ours else (), self)
            if self.poprisk_estimator != "ema":
                refuse(self._example_rules, self)

    def _check_output_dir(self) -> None:
        """Makes no folder: a later check may refuse the run."""
        args: Any = self
        if not args.should_save:
            return
        folder = Path(args.output_dir).absolute()
        try:
            if folder.is_dir():
                with tempfile.NamedTemporaryFile(dir=folder, prefix="_"):
                    pass
            else:
                above = next(p for p in (folder, *folder.parents) if p.exists())
                os.rmdir(tempfile.mkdtemp(prefix=".", dir=above))
        except OSError as error:
            raise ValueError(
                f"output_dir={args.output_dir} cannot be written to ({error.strerror}): choose another one."
            ) from error


@dataclass
class PopRiskTrainingArguments(PopRiskArgumentsMixin, TrainingArguments):
    """``transformers.TrainingArguments`` with the gate's fields; for ``PopRiskTrainer``."""
