"""The flags: ``--optim poprisk_adamw``, the ``poprisk_`` fields, and what they refuse."""

from __future__ import annotations

import os
import tempfile
import warnings
from dataclasses import dataclass, field, fields
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

    # Redeclared as a string: the stock field is an Enum, which a command line could not extend.
    optim: str = field(
        default=OPTIM,
        metadata={"help": f"The optimizer to use: {OPTIM}, or any that transformers knows (no gate then)."},
    )
    poprisk_gate: Literal["hard", "soft", "none"] = field(
        default="hard",
        metadata={"help": "hard: write a parameter only if G² > Q. soft: shrink the write. none: AdamW."},
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
    poprisk_warmup_steps: int = field(
        default=0, metadata={"help": "Ungated optimizer steps at the start of training."}
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
    poprisk_hub_gated: Literal["auto", "manual"] | None = field(
        default=None, metadata={"help": "The old name of poprisk_hub_access, which replaces it."}
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ours = (f for f in fields(PopRiskArgumentsMixin) if f.name.startswith(_PREFIX))
        lines = (f"    {f.name} (default {f.default!r}): {f.metadata['help']}" for f in ours)
        doc = cls.__doc__ or f"{cls.__name__}, with the gate's fields."
        cls.__doc__ = "\n".join([doc, "", "Args:", *lines, ""])

    def __post_init__(self) -> None:
        self._read_old_name()
        name = str(getattr(self.optim, "value", self.optim))
        known = [OPTIM, *(member.value for member in OptimizerNames)]
        if name not in known:
            raise ValueError(f"{name} is not a valid OptimizerNames, please select one of {known}")
        if name == OPTIM:
            self._read_optim_args()
        # The stock class turns `optim` into its Enum, which does not hold our name.
        self.optim = "adamw_torch" if name == OPTIM else name
        super().__post_init__()  # type: ignore[misc]
        if name == OPTIM:
            self.optim = OPTIM
        self._check_options()

    def _read_old_name(self) -> None:
        """Let ``poprisk_hub_gated`` set ``poprisk_hub_access``; dropped then, as optim_args is."""
        old, self.poprisk_hub_gated = self.poprisk_hub_gated, None
        if old is None:
            return
        if self.poprisk_hub_access not in (None, old):
            raise ValueError(
                f"poprisk_hub_gated={old} is the old name of poprisk_hub_access, which is "
                f"{self.poprisk_hub_access}: remove poprisk_hub_gated."
            )
        warnings.warn(
            f"poprisk_hub_gated is called poprisk_hub_access now: set poprisk_hub_access={old}.",
            FutureWarning,
            stacklevel=4,  # the call of the config class
        )
        self.poprisk_hub_access = old

    def _read_optim_args(self, override: bool = False) -> None:
        """Let ``--optim_args "gate=soft,warmup_steps=3"`` set the fields of the same names.

        The fields carry the values from here on, so the text is dropped: a copy of the arguments that
        changes a field would otherwise find it contradicted.
        """
        text, self.optim_args = self.optim_args, None  # type: ignore[has-type]
        keys, seen = (*self.gate_options(), "exclude"), set()
        for item in text.split(",") if text else ():
            key, _, value = (part.strip() for part in item.partition("="))
            if key not in keys or not value or key in seen:
                raise ValueError(
                    f"optim_args has {item.strip()!r}; with optim={OPTIM} it is a comma-separated list of "
                    f"key=value, each key once, with the keys {', '.join(keys)}."
                )
            seen.add(key)
            name, parsed = _PREFIX + key, _parse(key, value)
            current, default = getattr(self, name), self.__dataclass_fields__[name].default
            if not override and current not in (default, parsed):
                raise ValueError(
                    f"optim_args sets {key}={value} and {name} is {current!r}: set one of them only."
                )
            setattr(self, name, parsed)

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
            return
        any_optimizer = {"hub_access", "risk", "weight_column"}
        if self.poprisk_weight_column is not None:
            any_optimizer.add("allow_change")
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
            "gate": self.poprisk_gate,
            "estimator": self.poprisk_estimator,
            "warmup_steps": self.poprisk_warmup_steps,
            "ema_alpha": self.poprisk_ema_alpha,
            "basis": self.poprisk_basis,
        }

    def set_optimizer(self, name: str | OptimizerNames = OPTIM, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, and it takes our name too."""
        ours = name == OPTIM
        super().set_optimizer("adamw_torch" if ours else name, *args, **kwargs)  # type: ignore[misc]
        if ours:
            self.optim = OPTIM
            self._read_optim_args(override=True)
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
        refuse(refusals.LAUNCH, self)
        self._check_output_dir()
        whole = refusals.WHOLE_PARAMETERS
        if self.poprisk_risk:
            refuse(whole, self, of="poprisk_risk=true", without="poprisk_risk=false")
        if self.poprisk_weight_column is not None:
            refuse(self._weight_rules, self)
            refuse(whole, self, of="poprisk_weight_column", without="no poprisk_weight_column")
        if self.optim != OPTIM:
            return
        refuse(refusals.OPTIMIZER, self)
        refuse(refusals.JUDGING, self)
        if (self.poprisk_label_noise, self.poprisk_basis) != ("off", "coordinate"):
            refuse(whole, self, of=f"optim={OPTIM}", without=self.plain_options)
        elif self.poprisk_gate != "none":
            refuse(refusals.SHARDED, self, of=f"optim={OPTIM}", without=self.plain_options)
        if self.poprisk_label_noise != "off":
            refuse(self._label_rules, self)
        if self.poprisk_gate != "none":
            refuse(refusals.GATE, self)
            if self.poprisk_estimator != "ema":
                refuse(self._example_rules, self)

    def _check_output_dir(self) -> None:
        args: Any = self
        if not args.should_save:
            return
        try:
            os.makedirs(args.output_dir, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=args.output_dir, prefix="_"):
                pass
        except OSError as error:
            raise ValueError(
                f"output_dir={args.output_dir} cannot be written to ({error.strerror}): choose another one."
            ) from error


def _parse(key: str, value: str) -> Any:
    """An ``optim_args`` string in the type of its field; the field's own check names a bad one."""
    if key == "exclude":
        return [value]  # one expression; alternatives are written a|b
    try:
        return {"warmup_steps": int, "ema_alpha": float}.get(key, str)(value)
    except ValueError:
        return value


@dataclass
class PopRiskTrainingArguments(PopRiskArgumentsMixin, TrainingArguments):
    """``transformers.TrainingArguments`` with the gate's fields; for ``PopRiskTrainer``."""
