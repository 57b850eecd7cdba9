"""Training on population risk: AdamW whose update is gated by leave-one-out evidence."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from hf_poprisk.any_optimizer import PopRiskGate
from hf_poprisk.arguments import PopRiskArgumentsMixin, PopRiskTrainingArguments
from hf_poprisk.optimizer import PopRiskAdamW
from hf_poprisk.record import load_record
from hf_poprisk.risk import PopRiskEarlyStoppingCallback
from hf_poprisk.trainer import PopRiskMixin, PopRiskTrainer

if TYPE_CHECKING:
    from hf_poprisk.trl import (
        PopRiskDPOConfig,
        PopRiskDPOTrainer,
        PopRiskKTOConfig,
        PopRiskKTOTrainer,
        PopRiskRewardConfig,
        PopRiskRewardTrainer,
        PopRiskSFTConfig,
        PopRiskSFTTrainer,
    )
    from hf_poprisk.trl_experimental import (
        PopRiskCPOConfig,
        PopRiskCPOTrainer,
        PopRiskORPOConfig,
        PopRiskORPOTrainer,
        PopRiskTPOConfig,
        PopRiskTPOTrainer,
    )
    from hf_poprisk.trl_online import (
        PopRiskGRPOConfig,
        PopRiskGRPOTrainer,
        PopRiskRLOOConfig,
        PopRiskRLOOTrainer,
    )

__all__ = [
    "PopRiskAdamW",
    "PopRiskArgumentsMixin",
    "PopRiskCPOConfig",
    "PopRiskCPOTrainer",
    "PopRiskDPOConfig",
    "PopRiskDPOTrainer",
    "PopRiskEarlyStoppingCallback",
    "PopRiskGRPOConfig",
    "PopRiskGRPOTrainer",
    "PopRiskGate",
    "PopRiskKTOConfig",
    "PopRiskKTOTrainer",
    "PopRiskMixin",
    "PopRiskORPOConfig",
    "PopRiskORPOTrainer",
    "PopRiskRLOOConfig",
    "PopRiskRLOOTrainer",
    "PopRiskRewardConfig",
    "PopRiskRewardTrainer",
    "PopRiskSFTConfig",
    "PopRiskSFTTrainer",
    "PopRiskTPOConfig",
    "PopRiskTPOTrainer",
    "PopRiskTrainer",
    "PopRiskTrainingArguments",
    "load_record",
]
# TRL is an optional dependency and slow to import: only the names that need it pay for it.
_LAZY = {
    "trl": ("DPO", "KTO", "Reward", "SFT"),
    "trl_experimental": ("CPO", "ORPO", "TPO"),
    "trl_online": ("GRPO", "RLOO"),
}

try:
    __version__ = version("hf_poprisk")
except PackageNotFoundError:  # a copy that is not installed
    __version__ = "unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    for module, kinds in _LAZY.items():
        if name in __all__ and any(name in (f"PopRisk{k}Config", f"PopRisk{k}Trainer") for k in kinds):
            return getattr(import_module(f"hf_poprisk.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
