"""Training on population risk: AdamW whose update is gated by leave-one-out evidence."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from hf_poprisk.arguments import PopRiskArgumentsMixin, PopRiskTrainingArguments
from hf_poprisk.optimizer import PopRiskAdamW
from hf_poprisk.record import load_record
from hf_poprisk.risk import PopRiskEarlyStoppingCallback
from hf_poprisk.trainer import PopRiskMixin, PopRiskTrainer

if TYPE_CHECKING:
    from hf_poprisk.trl import (
        PopRiskDPOConfig,
        PopRiskDPOTrainer,
        PopRiskRewardConfig,
        PopRiskRewardTrainer,
        PopRiskSFTConfig,
        PopRiskSFTTrainer,
    )

__all__ = [
    "PopRiskAdamW",
    "PopRiskArgumentsMixin",
    "PopRiskDPOConfig",
    "PopRiskDPOTrainer",
    "PopRiskEarlyStoppingCallback",
    "PopRiskMixin",
    "PopRiskRewardConfig",
    "PopRiskRewardTrainer",
    "PopRiskSFTConfig",
    "PopRiskSFTTrainer",
    "PopRiskTrainer",
    "PopRiskTrainingArguments",
    "load_record",
]

try:
    __version__ = version("hf_poprisk")
except PackageNotFoundError:  # a copy that is not installed
    __version__ = "unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # TRL is an optional dependency and slow to import: only the names that need it pay for it.
    if name in __all__:
        from hf_poprisk import trl

        return getattr(trl, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
