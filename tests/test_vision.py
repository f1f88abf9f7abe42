"""Vision-language models: text is shared, images are exact or refused by name."""

import copy
import functools

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    LlavaConfig,
    PaliGemmaConfig,
    Qwen2VLConfig,
)

import pat_hf

from .models import MODELS, batch
from .rerun import Rerun, as_on_a_gpu
from .test_generate import text

IMAGE, START, END = 96, 95, 94
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TOWER |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}
ROTARY = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
CONFIGS = {
    "LLaVA": LlavaConfig(
        text_config=MODELS["Llama"],
        vision_config=CLIPVisionConfig(**TOWER, projection_dim=32),
        image_token_index=IMAGE,
        image_seq_length=16,
    ),
    "Qwen2-VL": Qwen2VLConfig(
        text_config=MODELS["Qwen2, 7 heads on 1"].to_dict()
        | {"model_type": "qwen2_vl_text", "rope_parameters": ROTARY},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 112, "num_heads": 2}
        | {"patch_size": 4, "mlp_ratio": 2},
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        video_token_id=93,
    ),
    "Gemma 3": Gemma3Config(
        text_config=MODELS["Gemma 3"],
        vision_config=TOWER,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
    ),
    "PaliGemma": PaliGemmaConfig(
        text_config=copy.deepcopy(MODELS["Gemma"]),
        vision_config=TOWER | {"vision_use_head": False},
        projection_dim=64,
        image_token_id=IMAGE,
    ),
}
TOKENS = {"LLaVA": 16, "Qwen2-VL": 4, "Gemma 3": 4, "PaliGemma": 16}  # of an image
SYSTEM = [1 + t % 90 for t in text(30, 61)]
KWARGS = {"max_new_tokens": 12, "do_sample": False}


@functools.cache
def pair(name):
    torch.manual_seed(0)
    models = [
        AutoModelForImageTextToText.from_config(
            copy.deepcopy(CONFIGS[name]), attn_implementation=attention
        ).eval()
        for attention in ("sdpa", "pat")
    ]
    models[1].load_state_dict(models[0].state_dict())
    return models


def inputs_of(name, image: bool):
    """Four questions about one image, or about none, as a processor gives them."""
    picture = [START] + [IMAGE] * TOKENS[name] + [END] if image else []
    ends = [[1 + t % 90 for t in text(n, 62 + n)] for n in (3, 8, 1, 5)]
    inputs = batch([SYSTEM + picture + SYSTEM[:6] + end for end in ends])
    kinds = (inputs["input_ids"] == IMAGE).long()
    torch.manual_seed(1)
    if name == "Qwen2-VL":
        inputs["mm_token_type_ids"] = kinds
        if image:
            inputs["pixel_values"] = torch.randn(16, 3 * 2 * 4 * 4).repeat(4, 1)
            inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 4)
    elif image:
        inputs["pixel_values"] = torch.randn(1, 3, 16, 16).repeat(4, 1, 1, 1)
        if name == "Gemma 3":
            inputs["token_type_ids"] = kinds
    elif name == "Gemma 3":
        inputs["token_type_ids"] = kinds
    if name == "PaliGemma" and image:
        inputs["token_type_ids"] = torch.zeros_like(kinds)
    return inputs


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", CONFIGS)
def test_text_is_shared(name, kwargs):
    stock, pat = pair(name)
    inputs = inputs_of(name, image=False)
    cache = pat_hf.PATCache(pat)
    expected = stock.generate(**inputs, **KWARGS, **kwargs)
    for _ in range(2):
        ours = pat.generate(**inputs, past_key_values=cache, **KWARGS, **kwargs)
        assert torch.equal(ours, expected)
    if name == "PaliGemma":  # it counts from 1, but only in generate()
        assert "numbers of its own" in cache.fallback
    else:
        assert cache.fallback is None and cache.prefilled == 36 + 3 + 8 + 1 + 5


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", ["LLaVA", "Qwen2-VL"])
def test_images_are_exact_and_not_shared(name, kwargs):
    stock, pat = pair(name)
    inputs = inputs_of(name, image=True)
    cache = pat_hf.PATCache(pat)
    expected = stock.generate(**inputs, **KWARGS, **kwargs)
    other = dict(inputs, pixel_values=inputs["pixel_values"].flip(-1))
    another = stock.generate(**other, **KWARGS, **kwargs)
    assert not torch.equal(another, expected)
    for given, out in ((inputs, expected), (other, another)):
        ours = pat.generate(**given, past_key_values=cache, **KWARGS, **kwargs)
        assert torch.equal(ours, out)
        # Later versions of Transformers encode images before the prefill.
        assert "pixel_values" in cache.fallback or "mm_encoder_outputs" in cache.fallback


@pytest.mark.parametrize("kwargs", [{}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "lookup"])
def test_prompts_that_images_number_may_follow_any_others(kwargs):
    stock, pat = pair("Qwen2-VL")
    cache = pat_hf.PATCache(pat, keep_bytes=1 << 30)
    for image in (True, True, False, True, False, False):
        inputs = inputs_of("Qwen2-VL", image=image)
        if kwargs:  # takes one prompt
            padding = int((inputs["attention_mask"][0] == 0).sum())
            inputs = {
                name: x[: len(x) // 4] if name == "pixel_values" else x[:1]
                for name, x in inputs.items()
            }
            for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
                inputs[name] = inputs[name][:, padding:]
        expected = stock.generate(**inputs, **KWARGS, **kwargs)
        ours = pat.generate(**inputs, past_key_values=cache, **KWARGS, **kwargs)
        assert torch.equal(ours, expected)


def test_a_loop_of_ones_own_numbers_such_prompts_itself():
    stock, pat = pair("Qwen2-VL")
    cache, inputs = pat_hf.PATCache(pat), inputs_of("Qwen2-VL", image=True)
    kwargs = KWARGS | {"custom_generate": lambda model, ids, **given: model._sample(ids, **given)}
    expected = stock.generate(**inputs, **KWARGS)
    assert torch.equal(pat.generate(**inputs, past_key_values=cache, **kwargs), expected)
    with pytest.raises(ValueError, match="by the images before them.*clear"):
        pat.generate(**inputs, past_key_values=cache, **kwargs)
    cache.clear()
    assert torch.equal(pat.generate(**inputs, past_key_values=cache, **kwargs), expected)


@pytest.mark.parametrize("name", ["Qwen2-VL", "Gemma 3"])
@pytest.mark.parametrize(
    "kwargs", [{"output_hidden_states": True}, {"prompt_lookup_num_tokens": 3}]
)
def test_text_as_a_processor_gives_it_goes_through_all_modes(name, kwargs):
    stock, pat = pair(name)
    inputs = {key: x[1:2] for key, x in inputs_of(name, image=False).items()}  # without padding
    ours = pat.generate(**inputs, past_key_values=pat_hf.PATCache(pat), **KWARGS, **kwargs)
    assert torch.equal(ours, stock.generate(**inputs, **KWARGS, **kwargs))


@pytest.mark.parametrize("image, made", [(False, 1), (True, 0)])
def test_steps_that_are_captured(image, made, monkeypatch):
    as_on_a_gpu(monkeypatch)
    stock, pat = pair("Qwen2-VL")
    inputs = inputs_of("Qwen2-VL", image=image)
    cache = pat_hf.PATCache(pat, decode="captured")
    ours = pat.generate(**inputs, past_key_values=cache, **KWARGS)
    assert torch.equal(ours, stock.generate(**inputs, **KWARGS))
    assert Rerun.made == made
    assert cache.decoding.startswith("CUDA graph" if made else "eager (steps are given mm_token")


def test_batches_of_text_of_any_size_may_follow_each_other():
    stock, pat = pair("Qwen2-VL")
    cache = pat_hf.PATCache(pat, keep_bytes=1 << 30)
    prompts = [SYSTEM + [1 + t % 90 for t in text(4, 70 + n)] for n in range(3)]
    for size in (3, 2, 1, 3):
        inputs = batch(prompts[:size])
        expected = stock.generate(**inputs, **KWARGS)
        assert torch.equal(pat.generate(**inputs, past_key_values=cache, **KWARGS), expected)
    assert cache.prefilled == len({tuple(x[:n]) for x in prompts for n in range(1, 35)})


@pytest.mark.parametrize("name", ["Gemma 3", "PaliGemma"])
def test_prompts_that_see_both_ways_are_refused(name):
    stock, pat = pair(name)
    cache = pat_hf.PATCache(pat)
    with pytest.raises(ValueError, match="changes the causal mask.*DynamicCache"):
        pat.generate(**inputs_of(name, image=True), past_key_values=cache, **KWARGS)
    assert cache.get_seq_length() == 0
    plain = inputs_of(name, image=False)
    ours = pat.generate(**plain, past_key_values=cache, **KWARGS)
    assert torch.equal(ours, stock.generate(**plain, **KWARGS))
