"""Every mode of generate() on every model: the tokens of stock Transformers, or a refusal by name.

The README's table is made from what is tested here: `python -m tests.test_matrix` prints it.
"""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, WatermarkingConfig

import pat_hf

from .models import MODELS, batch, pair
from .models import REFUSED as REFUSED_MODELS
from .test_generate import text

ROOT = Path(__file__).parent.parent
SYSTEM, DOCUMENT = text(40, 11), text(20, 12)
PROMPTS = [
    SYSTEM + DOCUMENT + text(3, 13),
    SYSTEM + DOCUMENT + text(9, 14),
    SYSTEM + text(2, 15),
    SYSTEM[:15] + text(6, 16),
]
NEW = 10
LENGTH = max(map(len, PROMPTS))

BATCHED = {
    "greedy": {"do_sample": False},
    "sampling, all warpers": {
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 30,
        "top_p": 0.9,
        "min_p": 0.01,
        "typical_p": 0.95,
        "epsilon_cutoff": 1e-4,
        "eta_cutoff": 1e-4,
    },
    "n samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.7},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "processors": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "encoder_repetition_penalty": 1.1,
        "bad_words_ids": [[5]],
        "encoder_no_repeat_ngram_size": 4,
        "sequence_bias": [[[7], 2.0], [[5, 6], 9.0]],
        "suppress_tokens": [11],
        "begin_suppress_tokens": [32],
        "forced_eos_token_id": 6,
        "exponential_decay_length_penalty": (3, 1.1),
        "eos_token_id": [17],
        "renormalize_logits": True,
        "min_new_tokens": 5,
        "watermarking_config": WatermarkingConfig(),
    },
    "guidance": {"guidance_scale": 1.5},
    "EOS": {"eos_token_id": list(range(2, 97, 3))},
    "one token": {"max_new_tokens": None, "max_length": LENGTH + 1},
    "prefill chunks": {"prefill_chunk_size": 16},
    "hidden states": {"output_hidden_states": True, "return_dict_in_generate": True},
}
SINGLE = {
    "assisted": {"assistant": True},
    "assisted sampling": {"assistant": True, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "stop strings": {"stop_strings": ["a", "e"]},
}
REFUSED = {
    "attention weights": ({"output_attentions": True, "return_dict_in_generate": True}, "eager"),
    "no cache": ({"use_cache": False}, "use_cache"),
}


def assistant_of(model):
    """A model whose guesses are right now and then.

    Not one with windows: a stock cache with windows can't be cropped once they are full.
    """
    windows = getattr(model.config, "sliding_window", None)
    assistant = copy.deepcopy(pair("Llama")[1] if windows else model)
    assistant.set_attn_implementation("pat")  # without a cache of ours
    assistant.generation_config = GenerationConfig(num_assistant_tokens=4)
    head = assistant.get_output_embeddings().weight
    torch.manual_seed(1)
    with torch.no_grad():
        head += 0.05 * torch.randn_like(head)
    return assistant


def generate(model, mode, cache):
    kwargs = dict((BATCHED | SINGLE)[mode])
    prompts = PROMPTS[:1] if mode in SINGLE else PROMPTS
    if kwargs.pop("assistant", False):
        kwargs["assistant_model"] = assistant_of(model)
    if "stop_strings" in kwargs:
        kwargs["tokenizer"] = AutoTokenizer.from_pretrained(ROOT / "examples" / "facts-llama")
    torch.manual_seed(0)
    out = model.generate(
        **batch(prompts),
        past_key_values=cache,
        pad_token_id=0,
        **{"max_new_tokens": NEW, "do_sample": False} | kwargs,
    )
    return out if isinstance(out, torch.Tensor) else out.sequences


@pytest.mark.parametrize("mode", [*BATCHED, *SINGLE])
@pytest.mark.parametrize("name", MODELS)
def test_same_tokens(name, mode):
    stock, pat = pair(name)
    cache = pat_hf.PATCache(pat, page_size=16)
    assert torch.equal(generate(pat, mode, cache), generate(stock, mode, None))


@pytest.mark.parametrize("mode", REFUSED)
@pytest.mark.parametrize("name", MODELS)
def test_refused_by_name(name, mode):
    _, pat = pair(name)
    cache = pat_hf.PATCache(pat)
    kwargs, words = REFUSED[mode]
    with pytest.raises(ValueError, match=words):
        pat.generate(**batch(PROMPTS), past_key_values=cache, max_new_tokens=2, **kwargs)
    assert len(cache.prefixes) == 0


def table() -> str:
    """The README's tables: a row for each model, the modes above it, refused models below."""
    modes = ", ".join([*BATCHED, *SINGLE])
    refused = ", ".join(f"{mode} (`{next(iter(k))}`)" for mode, (k, _) in REFUSED.items())
    lines = [
        "The same tokens as stock Transformers in float32, for each of "
        f"{len(BATCHED | SINGLE)} modes: {modes}. Refused by name: {refused}.",
        "",
        "| model | query/KV heads | windows | soft-cap | sinks |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, config in MODELS.items():
        kinds = set(getattr(config, "layer_types", None) or [])
        windows = "sliding_attention" in kinds or (
            not kinds and getattr(config, "sliding_window", None)
        )
        mixed = "some layers" if len(kinds) > 1 else "all layers"
        kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        softcap = getattr(config, "attn_logit_softcapping", None)
        cells = [
            name,
            f"{config.num_attention_heads}/{kv}",
            mixed if windows else "",
            "yes" if softcap else "",
            "yes" if config.model_type == "gpt_oss" else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Refused by name:", "", "| model | because |", "| --- | --- |"]
    lines += [f"| {', '.join(models)} | {words} |" for words, models in REFUSED_MODELS.items()]
    return "\n".join(lines) + "\n"


def test_the_readme_says_what_is_tested():
    assert table() in (ROOT / "README.md").read_text()


if __name__ == "__main__":
    print(table(), end="")
