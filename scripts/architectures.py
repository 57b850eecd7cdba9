"""Which model families of transformers form their per-example gradients in one backward.

    python scripts/architectures.py            # a row per family
    python scripts/architectures.py --page     # writes the table of the guide to per-example gradients

Of every family the smallest model is built, with random weights and without a download. What has no
uncovered parameter is run, in float64: G and Q of three examples from one backward, against a loop of
single examples. The error is the largest over the parameters, relative to each one's largest element.
"""

import argparse
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, logging
from transformers.models.auto import modeling_auto as auto

from hf_poprisk.per_example import BatchedGradients, Rows
from hf_poprisk.per_example.window import ExampleWindow

PAGE = Path(__file__).parents[1] / "hf_poprisk" / "per_example" / "README.md"
MARKED = re.compile(
    r"(<!-- generated: [^>]*?, architectures -->)\n.*?(<!-- end of the generated part -->)", re.S
)
FAMILIES = """
llama mistral ministral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 gpt2 gpt_neo gpt_neox gptj gpt_bigcode
bloom falcon opt mpt olmo olmo2 olmo3 cohere cohere2 stablelm starcoder2 granite glm glm4 smollm3 nemotron
exaone4 helium persimmon codegen ctrl xglm biogpt diffllama seed_oss apertus arcee ernie4_5 hunyuan_v1_dense
mixtral qwen2_moe qwen3_moe deepseek_v2 deepseek_v3 gpt_oss olmoe granitemoe phimoe jetmoe dbrx llama4_text
mamba mamba2 falcon_mamba jamba bamba zamba2 recurrent_gemma rwkv lfm2 qwen3_next granitemoehybrid falcon_h1
bert roberta distilbert albert electra deberta deberta-v2 modernbert xlm-roberta mpnet camembert funnel fnet
squeezebert roformer big_bird longformer convbert mobilebert nystromformer esm xlnet xlm t5 mt5 umt5 bart
mbart pegasus marian blenderbot led longt5 m2m_100 prophetnet fsmt switch_transformers whisper
speech_to_text wav2vec2 hubert wavlm unispeech sew data2vec-audio wav2vec2-bert
audio-spectrogram-transformer vit deit beit swin swinv2 convnext convnextv2 resnet regnet mobilenet_v2
mobilevit dinov2 dinov2_with_registers clip siglip segformer poolformer efficientnet levit pvt vit_msn
videomae vivit timesformer hiera llava qwen2_vl qwen2_5_vl qwen3_vl idefics3 smolvlm paligemma gemma3
internvl
""".split()
TASKS = "SPEECH_SEQ_2_SEQ SEQ_TO_SEQ_CAUSAL_LM IMAGE_TEXT_TO_TEXT MASKED_LM CAUSAL_LM IMAGE_CLASSIFICATION"
TASKS = [*TASKS.split(), "VIDEO_CLASSIFICATION", "CTC", "AUDIO_CLASSIFICATION"]
SIZES = {  # field → its value in the smallest model; the entries of lists too
    1: "depths num_sparse_encoder_layers num_sparse_decoder_layers encoder_sparse_step decoder_sparse_step",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "depth num_decoder_layers num_attention_heads num_key_value_heads num_kv_heads num_heads n_head "
    "n_heads encoder_attention_heads decoder_attention_heads num_encoder_attention_heads "
    "attention_heads num_decoder_attention_heads num_experts_per_tok topk_group n_group n_groups "
    "mamba_n_heads linear_num_key_heads linear_num_value_heads num_query_groups",
    4: "num_local_experts num_experts n_routed_experts moe_num_experts num_random_blocks",
    8: "rotary_dim qk_rope_head_dim qk_nope_head_dim mamba_d_state state_size groups_width "
    "num_conv_pos_embedding_groups expert_capacity",
    16: "head_dim d_head d_kv v_head_dim kv_channels attention_head_dim linear_key_head_dim "
    "linear_value_head_dim num_conv_pos_embeddings num_codevectors_per_group kv_lora_rank q_lora_rank "
    "adapter_rank query_pre_attn_scalar",
    32: "hidden_size d_model n_embd embed_dim dim emb_dim embedding_size word_embed_proj_dim hidden_sizes "
    "conv_dim output_hidden_size out_hidden_size moe_intermediate_size shared_expert_intermediate_size "
    "projection_dim attention_hidden_size lru_width mamba_d_head classifier_proj_size "
    "pooler_hidden_size decoder_hidden_size true_hidden_size intra_bottleneck_size codevector_dim "
    "conv_channels feature_projection_input_dim",
    64: "intermediate_size d_inner ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner hidden_dim d_ff dff "
    "mamba_d_ssm ffn_hidden_size intermediate_size_mlp shared_intermediate_size n_positions "
    "max_position_embeddings n_ctx",
    99: "vocab_size decoder_vocab_size src_vocab_size tgt_vocab_size",
}
SMALL = {name: value for value, names in SIZES.items() for name in names.split()}
HIDDEN = "cannot be formed"
KINDS = {
    "BatchNorm": "batch norm",
    "Expert|Router|MoE|MoA": "stacked experts",
    "Mamba|Mixer|Rglru|Rwkv|DeltaNet|RMSNormGated": "state space and linear attention",
    "Attention|RelativePositionBias|XLNet": "parameters of the attention itself",
    "Model$|ParametrizationList": "weight norm, a mask of training",
}
OTHER: dict[str, dict[str, Any]] = {  # where the sizes alone do not make a model
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v3": {"qk_rope_head_dim": 8, "head_dim": 8, "first_k_dense_replace": 0},
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "esm": {"pad_token_id": 1, "mask_token_id": 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "speech_to_text": {"max_source_positions": 64},
    "whisper": {"max_source_positions": 64},
    "wav2vec2-bert": {"vocab_size": 99},
    "xglm": {"attention_heads": 2},
}


def config_of(family: str) -> PreTrainedConfig:
    kind = CONFIG_MAPPING[family]
    return kind(**(small(kind()) | OTHER.get(family, {})))


def small(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a configuration that are to be smaller."""
    fields: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if isinstance(getattr(config, name, None), PreTrainedConfig):
            fields[name] = small(getattr(config, name))
        elif name in SMALL and value is not None:
            fields[name] = [SMALL[name]] * len(value) if isinstance(value, list | tuple) else SMALL[name]
        elif name.endswith(("token_id", "token_index")) and value is not None:
            fields[name] = 3
    return fields


def build(family: str) -> PreTrainedModel:
    """The smallest model, for the first of the tasks that the family has."""
    torch.manual_seed(0)
    config = config_of(family)
    for task in TASKS:
        if family in getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES"):
            name = getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES")[family]
            kind = getattr(transformers, name if isinstance(name, str) else name[-1])
            # the grouped products of experts know no float64
            eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
            return kind._from_config(config, **eager).double().eval()
    raise ValueError("it has no model for any of the tasks")


def inputs_for(model: PreTrainedModel) -> dict[str, Tensor]:
    """Three examples."""
    generator, config = torch.Generator().manual_seed(0), model.config
    name = model.main_input_name
    if name == "input_ids":
        ids = torch.randint(5, 99, (3, 8), generator=generator)
        return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :5]} if config.is_encoder_decoder else {})
    vision = getattr(config, "vision_config", config)
    side = getattr(vision, "image_size", 64)
    shape: tuple[int, ...] = (3, *2 * (side if isinstance(side, int) else side[0],))
    if "Video" in type(model).__name__:
        shape = (config.num_frames, *shape)
    elif name == "input_features":  # Whisper's, Speech2Text's
        shape = (config.num_mel_bins, 128) if hasattr(config, "num_mel_bins") else (64, 80)
    elif name == "input_values":  # of a spectrogram, or a wave
        shape = (config.max_length, config.num_mel_bins) if hasattr(config, "num_mel_bins") else (4000,)
    inputs = {name: torch.randn(3, *shape, generator=generator, dtype=torch.float64)}
    return inputs | ({"decoder_input_ids": torch.full((3, 5), 7)} if config.is_encoder_decoder else {})


def losses(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """[examples]"""
    logits = model(**inputs).logits
    weights = torch.linspace(-1, 1, logits[0].numel(), dtype=logits.dtype).view_as(logits[0])
    return (logits.log_softmax(-1) * weights.sin()).flatten(1).sum(1)


def largest_error(model: PreTrainedModel) -> float:
    """Of G and of Q from one backward, against single examples."""
    params = [p for p in model.parameters() if p.requires_grad]
    inputs = inputs_for(model)
    singles = []
    for i in range(3):
        loss = losses(model, {k: v[i : i + 1] for k, v in inputs.items()}).sum()
        singles.append(torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True))
    window = ExampleWindow(params)
    with window.batch(BatchedGradients(model, params), Rows(3, 3)):
        losses(model, inputs).sum().backward()
    squares, worst = window.squares.so_far(), 0.0
    top = max(h.abs().max() for single in singles for h in single)
    for p, *h in zip(params, *singles, strict=True):
        expected = sum(h), sum(x.square() for x in h)
        if expected[0].abs().max() < 1e-9 * top:  # zero but for rounding
            continue
        for ours, theirs in zip((p.grad, squares[p]), expected, strict=True):
            worst = max(worst, ((ours - theirs).abs().max() / theirs.abs().max()).item())
    return worst


def row(family: str) -> tuple[str, str, str]:
    """Family, what stops it, and the error or why there is none."""
    try:
        model = build(family)
    except Exception as error:  # whatever a family's own code finds wrong with the small sizes
        return family, "not built", short(error)
    layers = BatchedGradients(model, model.parameters())
    if layers.uncovered:
        stops = dict.fromkeys(why.removeprefix("a parameter of ") for why in layers.uncovered.values())
        return family, ", ".join(stops), ""
    try:
        error = largest_error(model)
        assert error < 1e-12, f"the error is {error}"
        of_text = hasattr(model.config, "vision_config") and model.main_input_name == "input_ids"
        return family, "one backward", f"{'text alone: ' * of_text}{error:.0e}"
    except Exception as error:
        return family, "one backward", f"not run: {short(error)}"


def short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def table(rows: list[tuple[str, str, str]]) -> str:
    """The families together that the same thing stops."""
    groups: dict[str, list[str]] = {}
    for family, stop, error in rows:
        if stop == "one backward" and error.startswith("not run"):
            stop = "a use that hides the examples, when run" if HIDDEN in error else "another error, when run"
        elif stop == "one backward":
            stop = "nothing with text alone (images: not tried)" if "text" in error else "**nothing**"
        elif stop != "not built":  # the layers of transformers by their kind, those of torch by name
            kinds = [next((k for e, k in KINDS.items() if re.search(e, s)), s) for s in stop.split(", ")]
            stop = ", ".join(sorted(set(kinds)))
        groups.setdefault(stop, []).append(family)
    lines = [f"| {stop} | {len(names)} | {', '.join(names)} |" for stop, names in sorted(groups.items())]
    return "\n".join(["| what stops it | families | |", "| --- | --- | --- |", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", action="store_true", help="write the table of the guide")
    parser.add_argument("families", nargs="*", help="of CONFIG_MAPPING (default: all of the list)")
    args = parser.parse_args()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = []
    print("| family | in one backward, or what stops it | largest error |\n| --- | --- | --- |")
    for family in args.families or FAMILIES:
        rows.append(row(family))
        print("|", " | ".join(rows[-1]), "|", flush=True)
    if args.page:
        PAGE.write_text(MARKED.sub(lambda m: f"{m[1]}\n\n{table(rows)}\n\n{m[2]}", PAGE.read_text()))


if __name__ == "__main__":
    main()
