"""Tiny models with random weights, in pairs: stock attention, and the same weights with "pat"."""

import copy
import functools

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

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


def _heads(query: int, kv: int) -> dict:
    return {"num_attention_heads": query, "num_key_value_heads": kv, "hidden_size": 16 * query}


CONFIGS = {
    "llama": LlamaConfig(**_SMALL),
    "qwen3": Qwen3Config(**_SMALL),
    "qwen2-7": Qwen2Config(**_SMALL | _heads(7, 1)),
    "qwen2-3": Qwen2Config(**_SMALL | _heads(6, 2)),
    "mistral-window": MistralConfig(**_SMALL, sliding_window=19),
    "gemma2": Gemma2Config(
        **_SMALL, sliding_window=19, attn_logit_softcapping=5.0, query_pre_attn_scalar=16
    ),
    "gpt2": GPT2Config(
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
}


@functools.cache
def pair(name: str, dtype: torch.dtype = torch.float32):
    """The stock model and the same weights under "pat"."""
    # sdpa drops Gemma 2's soft-cap without a word.
    stock_attention = "eager" if name == "gemma2" else "sdpa"
    models = []
    for attention in (stock_attention, "pat"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(CONFIGS[name]), attn_implementation=attention, dtype=dtype
        )
        models.append(model.eval())
    models[1].load_state_dict(models[0].state_dict())
    return models


def batch(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, with their mask."""
    longest = max(map(len, prompts))
    ids = [[PAD] * (longest - len(p)) + list(p) for p in prompts]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
