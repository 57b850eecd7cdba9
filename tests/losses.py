"""Models and losses of many kinds, tiny; imported by the tests and by the processes they launch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from models import tiny_model
from peft import AdaLoraConfig, IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    DebertaConfig,
    DebertaForTokenClassification,
    DebertaV2Config,
    DebertaV2Model,
    HubertConfig,
    HubertForCTC,
    MixtralConfig,
    MixtralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments

VOCABULARY = 50


def _ids(seed: int, length: int, high: int = VOCABULARY) -> Tensor:
    return torch.randint(3, high, (length,), generator=torch.Generator().manual_seed(seed))


def _labels(seed: int, labelled: int, length: int, high: int = VOCABULARY) -> Tensor:
    return torch.cat([_ids(seed, labelled, high), torch.full((length - labelled,), -100)])


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class OwnLoss(PopRiskTrainer):
    """A loss of the user's, a mean over the micro-batch."""

    loss_is_scaled_for_ga = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = self.own_loss(model, inputs)
        return (loss, outputs) if return_outputs else loss

    def own_loss(self, model: Any, inputs: Any) -> tuple[Tensor, Any]:
        raise NotImplementedError


class ClassWeights(OwnLoss):
    def own_loss(self, model: Any, inputs: Any) -> tuple[Tensor, Any]:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        return F.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 5.0, 0.2])), outputs


class Ridge(OwnLoss):
    """A term of the weights, of no example."""

    def own_loss(self, model: Any, inputs: Any) -> tuple[Tensor, Any]:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        squares = sum(p.square().sum() for p in self.model.parameters() if p.requires_grad)
        return F.cross_entropy(outputs.logits, labels) + 0.1 * squares, outputs


class BatchEntropy(OwnLoss):
    """A term of the mean prediction of the micro-batch."""

    def own_loss(self, model: Any, inputs: Any) -> tuple[Tensor, Any]:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        mean = outputs.logits.softmax(-1).mean(0)
        return F.cross_entropy(outputs.logits, labels) + (mean * mean.log()).sum(), outputs


class InBatchNegatives(OwnLoss):
    """Two calls of the model; every example is a negative of the others."""

    def own_loss(self, model: Any, inputs: Any) -> tuple[Tensor, Any]:
        a, b = (model(input_ids=inputs[name]).last_hidden_state.mean(1) for name in ("a", "b"))
        scores = F.normalize(a) @ F.normalize(b).T * 10
        return F.cross_entropy(scores, torch.arange(len(a))), None


class CallsParts(OwnLoss):
    """The head's weight is used by hand, differently for each example."""

    def own_loss(self, model: Any, inputs: Any) -> tuple[Tensor, Any]:
        model = self.accelerator.unwrap_model(model)
        pooled = model.bert(inputs["input_ids"]).pooler_output
        return F.cross_entropy(pooled @ model.classifier.weight.T, inputs["labels"]), None


def focal(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    log_p = outputs.logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    losses = -((1 - log_p.exp()) ** 2) * log_p
    return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch


@dataclass
class Kind:
    """A model, eight examples and how they are trained on."""

    model: Callable[[], nn.Module]
    data: list[dict[str, Any]]
    trainer: type[PopRiskTrainer] = PopRiskTrainer
    options: dict[str, Any] = field(default_factory=dict)  # of the arguments
    more: dict[str, Any] = field(default_factory=dict)  # of the trainer


_SEQ2SEQ = {
    **{
        f"{side}_{name}": n
        for side in ("encoder", "decoder")
        for name, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    },
    **{"d_model": 16, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
    **{"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "decoder_start_token_id": 1,
}
_BERT = {
    **{"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "max_position_embeddings": 40, "hidden_dropout_prob": 0},
    "attention_probs_dropout_prob": 0,
}


def mt5(dropout: float = 0.0) -> nn.Module:
    return MT5ForConditionalGeneration(
        MT5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2,
            decoder_start_token_id=0, pad_token_id=0, dropout_rate=dropout,
        )
    )  # fmt: skip


def _whisper() -> nn.Module:
    sizes = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20}
    tokens = {"suppress_tokens": None, "begin_suppress_tokens": None}
    return WhisperForConditionalGeneration(WhisperConfig(**_SEQ2SEQ, **sizes, **tokens))


def _hubert(reduction: str) -> nn.Module:
    config = HubertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0, hidden_dropout=0,
        attention_dropout=0, activation_dropout=0, feat_proj_dropout=0, layerdrop=0, final_dropout=0,
        pad_token_id=0, ctc_loss_reduction=reduction,
    )  # fmt: skip
    return HubertForCTC(config)


def _qwen2_vl() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    text = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": rope}  # fmt: skip
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
    tokens = {"image_token_id": 0, "video_token_id": 1, "vision_start_token_id": 2, "vision_end_token_id": 2}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **tokens))


def _vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8,
            patch_size=4, num_labels=3, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
        )
    )  # fmt: skip


def _mixtral() -> nn.Module:
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, pad_token_id=0,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def adapted(config: Any) -> Callable[[], nn.Module]:
    """A tiny Llama with an adapter whose parameters have moved."""

    def make() -> nn.Module:
        model = get_peft_model(tiny_model(), config)
        torch.manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
        return model

    return make


SEQ2SEQ_DATA = [{"input_ids": _ids(i, 7), "labels": _labels(i, [2, 12, 5][i % 3], 12)} for i in range(8)]
_SPEECH = [{"input_values": _random(i, 800), "labels": _labels(i, [3, 10][i % 2], 10, 12)} for i in range(8)]
_MELS = [{"input_features": _random(i, 8, 20), "labels": _labels(i, [2, 12][i % 2], 12)} for i in range(8)]
_TOKENS = [{"input_ids": _ids(i, 10), "labels": _labels(i, i, 10, 5)} for i in range(8)]
_SPANS = [
    {"input_ids": _ids(i, 10), "start_positions": i % 5, "end_positions": 3 + i if i else 99}
    for i in range(8)
]
_CAUSAL = [{"input_ids": _ids(i, 9), "labels": _labels(i, 2 + i, 9)} for i in range(7)] * 2
TEXTS = [{"input_ids": _ids(i, 10), "labels": i % 3} for i in range(8)]
_IMAGES = [{"pixel_values": _random(i, 3, 8, 8), "labels": i % 3} for i in range(8)]
_TWO = [{"a": _ids(i, 7), "b": _ids(100 + i, 7)} for i in range(8)]
_BOTH = {"remove_unused_columns": False}


def bert(**more: Any) -> nn.Module:
    return BertForSequenceClassification(BertConfig(**_BERT, num_labels=3, **more))


def _deberta_tokens() -> nn.Module:
    kinds = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "num_labels": 5}
    return DebertaForTokenClassification(DebertaConfig(**_BERT, **kinds))


def _deberta_v2() -> nn.Module:
    kinds = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    return DebertaV2Model(DebertaV2Config(**_BERT, **kinds))


_LM = {"task_type": "CAUSAL_LM"}
KINDS: dict[str, Kind] = {
    "token mean: bart": Kind(lambda: BartForConditionalGeneration(BartConfig(**_SEQ2SEQ)), SEQ2SEQ_DATA),
    "token mean: mt5": Kind(mt5, SEQ2SEQ_DATA),
    "token mean: whisper": Kind(_whisper, _MELS),
    "token mean: deberta": Kind(_deberta_tokens, _TOKENS),
    "two means: bert": Kind(lambda: BertForQuestionAnswering(BertConfig(**_BERT)), _SPANS),
    "no loss kwargs: qwen2-vl": Kind(_qwen2_vl, _CAUSAL[:8]),
    "ctc sum: hubert": Kind(lambda: _hubert("sum"), _SPEECH),
    "ctc mean: hubert": Kind(lambda: _hubert("mean"), _SPEECH),
    "experts: mixtral": Kind(_mixtral, _CAUSAL[:8]),
    "class weights: vit": Kind(_vit, _IMAGES, ClassWeights),
    "class weights: bert": Kind(bert, TEXTS, ClassWeights),
    "penalty: vit": Kind(_vit, _IMAGES, Ridge),
    "penalty: bert": Kind(bert, TEXTS, Ridge),
    "batch term: vit": Kind(_vit, _IMAGES, BatchEntropy),
    "batch term: bert": Kind(bert, TEXTS, BatchEntropy),
    "loss function: vit": Kind(_vit, _IMAGES, more={"compute_loss_func": focal}),
    "loss function: bert": Kind(bert, TEXTS, more={"compute_loss_func": focal}),
    "smoothing: vit": Kind(_vit, _IMAGES, options={"label_smoothing_factor": 0.1}),
    "contrastive: bert": Kind(
        lambda: BertModel(BertConfig(**_BERT), add_pooling_layer=False), _TWO, InBatchNegatives, _BOTH
    ),
    "contrastive: deberta": Kind(_deberta_v2, _TWO, InBatchNegatives, _BOTH),
    "adapter: ia3": Kind(
        adapted(IA3Config(**_LM, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
        _CAUSAL[:8],
    ),
    "adapter: prompt": Kind(adapted(PromptTuningConfig(**_LM, num_virtual_tokens=3)), _CAUSAL[:8]),
    "adapter: prefix": Kind(adapted(PrefixTuningConfig(**_LM, num_virtual_tokens=3)), _CAUSAL[:8]),
    "adapter: adalora": Kind(
        adapted(AdaLoraConfig(**_LM, target_modules=["q_proj"], total_step=10, tinit=1, tfinal=1, init_r=4)),
        _CAUSAL[:8],
    ),
    "adapter: tokens": Kind(
        adapted(LoraConfig(**_LM, r=4, target_modules=["q_proj"], trainable_token_indices=[3, 4])),
        _CAUSAL[:8],
    ),
    "adapter: lora on deberta": Kind(
        lambda: get_peft_model(
            _deberta_tokens(), LoraConfig(task_type="TOKEN_CLS", r=4, target_modules=["in_proj", "dense"])
        ),
        _TOKENS,
    ),
}


class FirstGradient(TrainerCallback):
    """The gradient of the first step, as the optimizer is about to take it."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == 0:
            self.gradient = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def gap(ours: dict[str, Tensor], stock: dict[str, Tensor]) -> float:
    """The largest difference of a parameter's gradient, in units of its norm."""
    assert ours.keys() == stock.keys()
    total = sum(g.norm() for g in stock.values())  # rounding is all there is to some of them
    return max(float((ours[n] - g).norm() / (g.norm() + 1e-3 * total)) for n, g in stock.items())


def first_step(
    kind: Kind, folder: Path, size: int, steps: int, optim: str = "poprisk_adamw"
) -> tuple[dict[str, Tensor], Any]:
    """The gradient of the first step of a run, and its trainer."""
    torch.manual_seed(0)
    grab = FirstGradient()
    options: dict[str, Any] = {
        **{"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True},
        **{"logging_steps": 1, "max_steps": 1, "max_grad_norm": 0.0, "optim": optim},
        "train_sampling_strategy": "sequential",
    }
    options |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, **kind.options}
    args = PopRiskTrainingArguments(str(folder), **options)
    trainer = kind.trainer(kind.model(), args=args, train_dataset=kind.data, callbacks=[grab], **kind.more)
    trainer.train()
    return grab.gradient, trainer
