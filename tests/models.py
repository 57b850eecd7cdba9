"""Tiny models and data, built on the spot; imported by the tests and by the processes they launch."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

import hf_poprisk
from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments

# Reports to nobody and saves nothing.
SILENT: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",
}
# And takes its examples in their order, one at a time.
QUIET: dict[str, Any] = {
    **SILENT,
    "learning_rate": 1e-3,
    "train_sampling_strategy": "sequential",
    "per_device_train_batch_size": 1,
}
WORDS = (
    "the gate opens where the batch agrees and stays closed where it does not because noise has no "
    "sign that holds from one example to the next while a signal keeps pointing the same way"
).split()


def text(index: int, length: int) -> str:
    """A deterministic sentence; different indices share words, in another order."""
    return " ".join(WORDS[(7 * index + 3 * k + k * k) % len(WORDS)] for k in range(length))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [text(i, 30) for i in range(20)],
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<|pad|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.model_max_length = 128
    return fast


def orthogonal(size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0].to(dtype)


def some_bases(model: nn.Module) -> dict[torch.Tensor, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Of the weights of linear layers; a vocabulary is not rotated."""
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    return {w: tuple(orthogonal(n) if n < 200 else None for n in w.shape) for w in linear}


def tiny_model(
    kind: str = "llama", tied: bool = False, dtype: torch.dtype = torch.float32, attention: str = "eager"
) -> nn.Module:
    """Two layers, hidden size 16; dropout off, so that every run of an example is the same."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": tied,
    }
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    if kind == "gpt2":
        config = GPT2Config(
            n_embd=16, n_layer=2, n_head=2, n_positions=128, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, **ids
        )
    elif kind == "bert":
        del ids["tie_word_embeddings"]
        config = BertConfig(
            **sizes, **ids, num_labels=3, hidden_dropout_prob=0, attention_probs_dropout_prob=0
        )
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
        return model.to(dtype)
    else:
        configs = {
            "llama": LlamaConfig,
            "qwen2": Qwen2Config,
            "qwen3": Qwen3Config,
            "mistral": MistralConfig,
            "gemma3": Gemma3TextConfig,
        }
        config = configs[kind](**sizes, num_key_value_heads=2, head_dim=4, **ids)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)


def adapted(model: nn.Module, adapter: str) -> nn.Module:
    """``model`` with adapters on every linear layer; ``full``: as it is."""
    if adapter == "full":
        return model
    config = LoraConfig(
        r=2,
        target_modules="all-linear",
        use_dora=adapter == "dora",
        use_rslora=adapter == "rslora",
        modules_to_save=["lm_head"] if adapter == "modules_to_save" else None,
        init_lora_weights=False,  # B = 0 would leave A without a gradient
    )
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def save_tiny_model(folder: Path, kind: str, tied: bool = False) -> Path:
    """Write model and tokenizer, as DPO reloads its reference from disk."""
    tiny_model(kind, tied).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def preferences(count: int, start: int = 0) -> Dataset:
    rows = range(start, start + count)
    return Dataset.from_dict(
        {
            "prompt": [text(i, 3 + i % 4) for i in rows],
            "chosen": [" " + text(i + 5, 2 + i % 5) for i in rows],
            "rejected": [" " + text(3 * i + 1, 3 + i % 3) for i in rows],
        }
    )


def sequences(count: int) -> Dataset:
    return Dataset.from_dict({"text": [text(i, 4 + 3 * (i % 4)) for i in range(count)]})


def completions(count: int) -> Dataset:
    """Good and bad ones, in no order."""
    pairs, good = preferences(count), [(i * i + i // 2) % 3 > 0 for i in range(count)]
    texts = [row["chosen" if label else "rejected"] for row, label in zip(pairs, good, strict=True)]
    return Dataset.from_dict({"prompt": pairs["prompt"], "completion": texts, "label": good})


def triples(count: int) -> Dataset:
    return preferences(count).add_column("reference", [" " + text(5 * i + 2, 4) for i in range(count)])


def prompts(count: int) -> Dataset:
    return preferences(count).select_columns("prompt")


# What the kinds of TRL trainers are trained on; the others on preference pairs.
DATA = {"SFT": sequences, "KTO": completions, "TPO": triples, "GRPO": prompts, "RLOO": prompts}


def reward(completions: list[str], **_: Any) -> list[float]:
    """A reward for online trainers: the share of the letter e."""
    return [text.count("e") / max(len(text), 1) for text in completions]


def token_examples(count: int, pad_to: int = 24) -> list[dict[str, torch.Tensor]]:
    """Single-row padded causal-LM inputs, [1, pad_to] each; padding is masked and ignored in the loss."""
    tokenizer = tiny_tokenizer()
    examples = []
    for i in range(count):
        row = tokenizer(
            text(i, 4 + 2 * (i % 4)),
            return_tensors="pt",
            padding="max_length",
            max_length=pad_to,
            truncation=True,
        )
        labels = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
        examples.append(
            {"input_ids": row["input_ids"], "attention_mask": row["attention_mask"], "labels": labels}
        )
    return examples


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """The same as a data set."""
    return [{k: v[0] for k, v in example.items()} for example in token_examples(count)]


def layout(size: int, examples: int = 8) -> dict[str, int]:
    """The options that take the examples of a step so many at a time."""
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": examples // size}


def trainer_of(
    folder: Path | str,
    data: Any = None,
    model: Any = None,
    kinds: tuple[Any, Any] = (PopRiskTrainer, PopRiskTrainingArguments),
    **options: Any,
) -> Any:
    """A trainer, of a tiny Llama on eight rows unless told otherwise; options of its config and its own."""
    trainer, config = kinds
    names = "eval_dataset data_collator processing_class callbacks peft_config compute_loss_func".split()
    names += ["ref_model", "reward_funcs"]
    own = {name: options.pop(name) for name in names if name in options}
    args = config(str(folder), **{**QUIET, **options})
    data = rows(8) if data is None else data
    return trainer(tiny_model() if model is None else model, args=args, train_dataset=data, **own)


def trl_trainer_of(kind: str, model: Any, folder: Path | str, data: Any = None, **options: Any) -> Any:
    """One of the TRL trainers, on eight rows of its kind of data unless told otherwise."""
    if data is None:
        data = DATA.get(kind, preferences)(8)
    if kind in ("GRPO", "RLOO"):
        options.setdefault("reward_funcs", reward)
    kinds = tuple(getattr(hf_poprisk, f"PopRisk{kind}{what}") for what in ("Trainer", "Config"))
    return trainer_of(folder, data, model, kinds, **{"bf16": False, **options})
