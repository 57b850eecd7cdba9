"""Models and losses of many kinds, tiny; imported by the tests and by the processes they launch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from models import tiny_model, trainer_of
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback

from hf_poprisk import PopRiskTrainer, PopRiskTrainingArguments

VOCABULARY = 50


def _ids(seed: int, length: int, high: int = VOCABULARY) -> Tensor:
    return torch.randint(3, high, (length,), generator=torch.Generator().manual_seed(seed))


def _labels(seed: int, labelled: int, length: int, high: int = VOCABULARY) -> Tensor:
    return torch.cat([_ids(seed, labelled, high), torch.full((length - labelled,), -100)])


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Losses


class OwnLoss(PopRiskTrainer):
    """A loss of the user's, a mean over the micro-batch."""

    loss_is_scaled_for_ga = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = self.own_loss(model, inputs)
        return (loss, outputs) if return_outputs else loss

    def own_loss(self, model: Any, inputs: Any) -> tuple[Tensor, Any]:
        """The cross entropy of a classifier, and whatever ``term`` adds."""
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        return F.cross_entropy(outputs.logits, labels) + self.term(outputs.logits), outputs

    def term(self, logits: Tensor) -> Any:
        return 0.0


class ClassWeights(OwnLoss):
    def own_loss(self, model: Any, inputs: Any) -> tuple[Tensor, Any]:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        return F.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 5.0, 0.2])), outputs


class Ridge(OwnLoss):
    """A term of the weights, of no example."""

    def term(self, logits: Tensor) -> Any:
        return 0.1 * sum(p.square().sum() for p in self.model.parameters() if p.requires_grad)


class BatchEntropy(OwnLoss):
    """A term of the mean prediction of the micro-batch."""

    def term(self, logits: Tensor) -> Any:
        mean = logits.softmax(-1).mean(0)
        return (mean * mean.log()).sum()


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


# Models: transformers' classes by name, with one layer of width 16


def _model(name: str, **options: Any) -> nn.Module:
    cls = getattr(transformers, name)
    return cls(cls.config_class(**options))


_SEQ2SEQ: dict[str, Any] = {
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")},
    **{"d_model": 16, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
    **{"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "decoder_start_token_id": 1,
}
_WHISPER = {
    **{"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20},
    **{"suppress_tokens": None, "begin_suppress_tokens": None},
}
_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_NO_DROPOUT = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
_BERT = {"vocab_size": VOCABULARY, "max_position_embeddings": 40, **_SIZES, **_NO_DROPOUT}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}


def mt5(dropout: float = 0.0) -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0}
    return _model("MT5ForConditionalGeneration", **sizes, **tokens, dropout_rate=dropout)


def bert(**more: Any) -> nn.Module:
    return _model("BertForSequenceClassification", **_BERT, num_labels=3, **more)


def _hubert(reduction: str) -> nn.Module:
    dropouts = "hidden_dropout attention_dropout activation_dropout feat_proj_dropout final_dropout".split()
    convolutions = {
        **{"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2},
        **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
    }
    options = {"vocab_size": 12, "pad_token_id": 0, "mask_time_prob": 0, "layerdrop": 0}
    options |= {**_SIZES, **convolutions, **dict.fromkeys(dropouts, 0)}
    return _model("HubertForCTC", **options, ctc_loss_reduction=reduction)


def _qwen2_vl() -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    text = {**_SIZES, "vocab_size": VOCABULARY, "num_key_value_heads": 1, "rope_parameters": rope}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
    tokens = {"image_token_id": 0, "video_token_id": 1, "vision_start_token_id": 2, "vision_end_token_id": 2}
    return _model("Qwen2VLForConditionalGeneration", text_config=text, vision_config=vision, **tokens)


def _vit() -> nn.Module:
    image = {"image_size": 8, "patch_size": 4, "num_labels": 3}
    return _model("ViTForImageClassification", **_SIZES, **_NO_DROPOUT, **image)


def _mixtral() -> nn.Module:
    experts = {"num_key_value_heads": 1, "num_local_experts": 4, "pad_token_id": 0}
    sizes = {**_SIZES, "intermediate_size": 16, "vocab_size": VOCABULARY}
    return _model("MixtralForCausalLM", **sizes, **experts)


def _deberta_tokens() -> nn.Module:
    return _model("DebertaForTokenClassification", **_BERT, **_RELATIVE, num_labels=5)


def _adapted(method: str, **options: Any) -> Callable[[], nn.Module]:
    """A tiny Llama with an adapter whose parameters have moved."""

    def make() -> nn.Module:
        model = peft.get_peft_model(tiny_model(), getattr(peft, f"{method}Config")(**_LM, **options))
        torch.manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn_like(p))
        return model

    return make


def _lora_on_deberta() -> nn.Module:
    config = peft.LoraConfig(task_type="TOKEN_CLS", r=4, target_modules=["in_proj", "dense"])
    return peft.get_peft_model(_deberta_tokens(), config)


_LM = {"task_type": "CAUSAL_LM"}

SEQ2SEQ_DATA = [{"input_ids": _ids(i, 7), "labels": _labels(i, [2, 12, 5][i % 3], 12)} for i in range(8)]
_SPEECH = [{"input_values": _random(i, 800), "labels": _labels(i, [3, 10][i % 2], 10, 12)} for i in range(8)]
_MELS = [{"input_features": _random(i, 8, 20), "labels": _labels(i, [2, 12][i % 2], 12)} for i in range(8)]
_TOKENS = [{"input_ids": _ids(i, 10), "labels": _labels(i, i, 10, 5)} for i in range(8)]
_SPANS = [
    {"input_ids": _ids(i, 10), "start_positions": i % 5, "end_positions": 3 + i if i else 99}
    for i in range(8)
]
_CAUSAL = [{"input_ids": _ids(i, 9), "labels": _labels(i, 2 + i, 9)} for i in (*range(7), 0)]
TEXTS = [{"input_ids": _ids(i, 10), "labels": i % 3} for i in range(8)]
_IMAGES = [{"pixel_values": _random(i, 3, 8, 8), "labels": i % 3} for i in range(8)]
_TWO = [{"a": _ids(i, 7), "b": _ids(100 + i, 7)} for i in range(8)]


@dataclass
class Kind:
    """A model, eight examples and how they are trained on."""

    model: Callable[[], nn.Module]
    data: list[dict[str, Any]]
    trainer: type[PopRiskTrainer] = PopRiskTrainer
    options: dict[str, Any] = field(default_factory=dict)  # of the arguments
    more: dict[str, Any] = field(default_factory=dict)  # of the trainer


_BOTH = {"remove_unused_columns": False}
KINDS: dict[str, Kind] = {
    "token mean: bart": Kind(lambda: _model("BartForConditionalGeneration", **_SEQ2SEQ), SEQ2SEQ_DATA),
    "token mean: mt5": Kind(mt5, SEQ2SEQ_DATA),
    "token mean: whisper": Kind(
        lambda: _model("WhisperForConditionalGeneration", **_SEQ2SEQ, **_WHISPER), _MELS
    ),
    "token mean: deberta": Kind(_deberta_tokens, _TOKENS),
    "two means: bert": Kind(lambda: _model("BertForQuestionAnswering", **_BERT), _SPANS),
    "no loss kwargs: qwen2-vl": Kind(_qwen2_vl, _CAUSAL),
    "ctc sum: hubert": Kind(lambda: _hubert("sum"), _SPEECH),
    "ctc mean: hubert": Kind(lambda: _hubert("mean"), _SPEECH),
    "experts: mixtral": Kind(_mixtral, _CAUSAL),
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
        lambda: transformers.BertModel(transformers.BertConfig(**_BERT), add_pooling_layer=False),
        _TWO,
        InBatchNegatives,
        _BOTH,
    ),
    "contrastive: deberta": Kind(
        lambda: _model("DebertaV2Model", **_BERT, **_RELATIVE, position_buckets=8),
        _TWO,
        InBatchNegatives,
        _BOTH,
    ),
    "adapter: ia3": Kind(
        _adapted("IA3", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), _CAUSAL
    ),
    "adapter: prompt": Kind(_adapted("PromptTuning", num_virtual_tokens=3), _CAUSAL),
    "adapter: prefix": Kind(_adapted("PrefixTuning", num_virtual_tokens=3), _CAUSAL),
    "adapter: adalora": Kind(
        _adapted("AdaLora", target_modules=["q_proj"], total_step=10, tinit=1, tfinal=1, init_r=4), _CAUSAL
    ),
    "adapter: tokens": Kind(
        _adapted("Lora", r=4, target_modules=["q_proj"], trainable_token_indices=[3, 4]), _CAUSAL
    ),
    "adapter: lora on deberta": Kind(_lora_on_deberta, _TOKENS),
}


# The first gradient of a run


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
    options = {**kind.options, **kind.more, "callbacks": [grab], "optim": optim}
    options |= {"max_steps": 1, "max_grad_norm": 0.0}
    options |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    trainer = trainer_of(folder, kind.data, kind.model(), (kind.trainer, PopRiskTrainingArguments), **options)
    trainer.train()
    return grab.gradient, trainer
