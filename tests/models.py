"""Tiny models with random weights, in pairs: stock attention, and the same weights with "pat"."""

import copy
import functools

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

VOCABULARY = 97
PAD = 0

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": PAD,
    "initializer_range": 0.2,  # large enough for attention to matter
}
_MOE = {"num_experts_per_tok": 2}
_WINDOW = {"sliding_window": 19}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
}
_SOME = _WINDOW | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def config(name: str, **changes: object) -> PretrainedConfig:
    return getattr(transformers, name + "Config")(**_SMALL | changes)


def _group(query: int, kv: int) -> dict:
    return {"num_attention_heads": query, "num_key_value_heads": kv, "hidden_size": 16 * query}


CORE = {
    "Llama": config("Llama"),
    "Qwen3": config("Qwen3"),
    "Qwen2, 7 heads on 1": config("Qwen2", **_group(7, 1)),
    "Qwen2, 6 heads on 2": config("Qwen2", **_group(6, 2)),
    "Mistral": config("Mistral", **_WINDOW),
    "Gemma 2": config("Gemma2", **_SOME, attn_logit_softcapping=5.0, query_pre_attn_scalar=16),
    "GPT-2": transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=512,
        n_embd=64,
        n_layer=3,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=PAD,
    ),
    "DeepSeek-V3": config("DeepseekV3", **_LATENT, **_MOE),
}
MODELS = CORE | {
    "Mixtral": config("Mixtral", **_MOE, num_local_experts=4),
    "Qwen2, some windows": config("Qwen2", **_WINDOW, use_sliding_window=True, max_window_layers=2),
    "Qwen3-MoE": config("Qwen3Moe", **_MOE, num_experts=4, moe_intermediate_size=32),
    "Qwen2-MoE, some windows": config(
        "Qwen2Moe",
        **_MOE,
        **_WINDOW,
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        use_sliding_window=True,
        max_window_layers=2,
    ),
    "Qwen2-MoE": config(
        "Qwen2Moe",
        **_MOE,
        num_experts=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    "Phi-MoE": config("Phimoe", **_MOE, **_WINDOW, num_local_experts=4),
    "Gemma": config("Gemma"),
    "Gemma 3": config("Gemma3Text", **_SOME, query_pre_attn_scalar=16),
    "Phi": config("Phi"),
    "Phi-3": config("Phi3"),
    "GPT-OSS": config("GptOss", **_MOE, **_SOME, num_local_experts=4),
    "SmolLM3": config("SmolLM3"),
    "OLMo": config("Olmo", clip_qkv=0.3),
    "OLMo 2": config("Olmo2"),
    "Granite": config("Granite"),
    "StarCoder2": config("Starcoder2", **_WINDOW),
    "Cohere": config("Cohere"),
    "Cohere 2": config("Cohere2", **_SOME),
    "GPT-NeoX": config("GPTNeoX", num_key_value_heads=4),
    "GLM-4": config("Glm4"),
    "GLM-4.5": config(
        "Glm4Moe",
        **_MOE,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    ),
    "EXAONE 4": config("Exaone4", **_SOME),
    "Nemotron": config("Nemotron"),
    "DeepSeek-V2": config("DeepseekV2", **_LATENT, **_MOE),
    "Gemma 3n": config(
        "Gemma3nText",
        **_SOME,
        num_kv_shared_layers=1,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
    ),
    "OPT": config("OPT", ffn_dim=96, word_embed_proj_dim=64, num_key_value_heads=None),
}
# By what the refusal says.
REFUSED = {
    "it is an encoder-decoder model": {
        "T5": config("T5", d_model=32, d_kv=16, num_heads=2),
        "BART": config("Bart", d_model=32, encoder_layers=1, decoder_layers=1),
    },
    "it computes attention in code of its own": {
        "Bloom": config("Bloom", n_head=4),
        "MPT": config("Mpt", d_model=64, n_heads=4, n_layers=2),
        "Falcon": transformers.FalconConfig(
            hidden_size=64, num_attention_heads=4, num_hidden_layers=2
        ),
        "GPT-J": config("GPTJ", n_embd=64, n_head=4, n_layer=2, rotary_dim=8),
        "CodeGen": config("CodeGen", n_embd=64, n_head=4, n_layer=2, rotary_dim=8),
        "GPT-Neo": config("GPTNeo", attention_types=[[["global"], 3]]),
        "StableLM": config("StableLm"),
        "XGLM": config("XGLM", d_model=64, attention_heads=4, num_layers=2),
    },
    "it has layers of other kinds than full and sliding attention": {
        "RWKV": config("Rwkv"),
        "RecurrentGemma": config("RecurrentGemma", lru_width=64),
        "Mamba": config("Mamba"),
        "Mamba 2": config("Mamba2", num_heads=8, head_dim=16),
        "Jamba": config("Jamba", num_experts=2),
        "Bamba": config("Bamba", mamba_n_heads=4, mamba_d_head=32),
        "Granite 4": config("GraniteMoeHybrid", mamba_n_heads=4, mamba_d_head=32),
        "Nemotron-H": config("NemotronH", layers_block_type=["mamba", "attention", "mamba"]),
        "Qwen3-Next": config("Qwen3Next", num_experts=2),
        "Qwen3.5": config("Qwen3_5Text"),
        "OLMo Hybrid": config("OlmoHybrid"),
        "MiniMax": config("MiniMax", num_local_experts=2),
        "Falcon-H1": config("FalconH1", mamba_d_ssm=128, mamba_n_heads=4, mamba_d_head=32),
        "Zamba 2": config("Zamba2", layers_block_type=["mamba", "hybrid", "mamba"]),
        "LFM2": config("Lfm2", layer_types=["conv", "full_attention", "conv"]),
        "Llama 4": config("Llama4Text", num_local_experts=2, intermediate_size_mlp=64),
        "DeepSeek-V3.2": config("DeepseekV32", **_LATENT),
        "GLM-5": config("GlmMoeDsa", **_LATENT),
        "DeepSeek-V4": config("DeepseekV4"),
    },
    "it has cross-attention": {
        "Llama 3.2 Vision": transformers.MllamaConfig(
            text_config=_SMALL | {"cross_attention_layers": [1]}
        ),
        "BERT with an encoder": config("Bert", is_decoder=True, add_cross_attention=True),
    },
    "its layers have heads of different numbers or dims": {
        "Gemma 4": config("Gemma4Text", layer_types=["sliding_attention"] * 2 + ["full_attention"]),
        "MiMo-V2-Flash": config("MiMoV2Flash", **_SOME, n_routed_experts=8),
    },
    "its mask follows from the values": {"Doge": config("Doge")},
}
# sdpa drops the soft-cap without a word, and has no sinks.
EAGER = {"Gemma 2", "GPT-OSS"}


@functools.cache
def pair(name: str, dtype: torch.dtype = torch.float32):
    """The stock model, and the same weights under "pat"."""
    return pair_of(MODELS[name], dtype, "eager" if name in EAGER else "sdpa")


def pair_of(config, dtype: torch.dtype = torch.float32, stock: str = "sdpa"):
    """Both of any config, afresh."""
    models = []
    for attention in (stock, "pat"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation=attention, dtype=dtype
        )
        models.append(model.eval())
    with torch.no_grad():
        for parameter in models[0].parameters():
            if not parameter.any():  # nobody would miss a bias of zeros
                parameter.normal_(0, 0.2)
    models[1].load_state_dict(models[0].state_dict())
    return models


def batch(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, with their mask."""
    longest = max(map(len, prompts))
    ids = [[PAD] * (longest - len(p)) + list(p) for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
