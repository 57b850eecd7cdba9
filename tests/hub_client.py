"""What test_hub.py lets other processes do, because huggingface_hub reads its environment on import."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import torch
import transformers
from models import preferences, tiny_model, tiny_tokenizer, token_examples
from transformers import AutoModelForCausalLM, TrainerCallback

import hf_poprisk

OPTIONS: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "push_to_hub": True,
    "hub_always_push": True,
}
_trainers: dict[Path, Any] = {}


def start() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    # between the client's tries
    huggingface_hub.utils._http.time = SimpleNamespace(sleep=lambda seconds: None)


class OnePushAtATime(TrainerCallback):
    """Makes the files of each commit those of its step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer.push_in_progress is not None:
            self.trainer.push_in_progress.wait_until_done()


def construct(folder: Path, kind: str = "causal", base: str | None = None, **options: Any) -> None:
    """Keep a trainer of that output folder; an adapter is one of the base, by name or folder."""
    options = {**OPTIONS, "hub_model_id": f"alice/{folder.name}", **options}
    if kind == "causal":
        data = [{k: v[0] for k, v in example.items()} for example in token_examples(8)]
        trainer: Any = hf_poprisk.PopRiskTrainer(
            tiny_model(),
            args=hf_poprisk.PopRiskTrainingArguments(str(folder), **options),
            train_dataset=data,
            eval_dataset=data[:2],
            processing_class=tiny_tokenizer(),
        )
    else:
        from peft import LoraConfig

        trainer = hf_poprisk.PopRiskDPOTrainer(
            base,
            args=hf_poprisk.PopRiskDPOConfig(str(folder), bf16=False, **options),
            train_dataset=preferences(8),
            eval_dataset=preferences(2),
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        )
    trainer.add_callback(OnePushAtATime(trainer))
    _trainers[folder] = trainer


def train(folder: Path, kind: str = "causal", **options: Any) -> dict[str, Any]:
    """Construct and train; what came of it."""
    construct(folder, kind, **options)
    trainer = _trainers[folder]
    with warnings() as messages:
        trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "warnings": messages,
        "evaluation": evaluations[-1] if evaluations else {},
        "logits": logits(trainer.model),
    }


def push(folder: Path, without_network: bool = False) -> list[str]:
    """Its warnings."""
    with warnings() as messages, offline() if without_network else nullcontext():
        _trainers[folder].push_to_hub()
    return messages


def load_record_offline(name: str) -> Any:
    with offline():
        return hf_poprisk.load_record(name)


@contextmanager
def offline() -> Iterator[None]:
    """HF_HUB_OFFLINE=1, which is read on import."""
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    huggingface_hub.utils._http.close_session()
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = False
        huggingface_hub.utils._http.close_session()


@contextmanager
def warnings() -> Iterator[list[str]]:
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hf_poprisk.hub")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def create_repo(name: str, private: bool, token: str | None = None) -> None:
    huggingface_hub.HfApi(token=token).create_repo(name, private=private)


def upload(name: str, folder: Path) -> None:
    huggingface_hub.HfApi().create_repo(name)
    huggingface_hub.HfApi().upload_folder(repo_id=name, folder_path=folder)


def load(name: str | Path, base: str | Path | None = None, subfolder: str = "") -> np.ndarray:
    """The logits of a model, or of an adapter on its base; by name or folder."""
    if base is None:
        return logits(AutoModelForCausalLM.from_pretrained(name, subfolder=subfolder))
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base)
    return logits(PeftModel.from_pretrained(model, name, subfolder=subfolder))


def logits(model: Any) -> np.ndarray:
    model.set_attn_implementation("eager")  # a loaded model would have another one
    batch = token_examples(1)[0]
    with torch.no_grad():
        return model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.numpy()


def snapshot(name: str) -> Path:
    return Path(huggingface_hub.snapshot_download(name))


def record(name: str, **options: Any) -> hf_poprisk.record.Record:
    return hf_poprisk.load_record(name, **options)
