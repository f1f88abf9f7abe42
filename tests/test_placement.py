"""Models whose weights accelerate places: the tokens are those of sdpa.

Several GPUs and offloading to the CPU's memory: `python tests/gpu/placement.py`.
"""

import math

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM

import pat_hf
from pat_hf.cache.memory import aligned_page

from .models import batch, pair
from .test_generate import BATCHES

pytestmark = pytest.mark.skipif(
    torch.get_default_device().type != "cpu", reason="places weights on the CPU"
)
INPUTS = batch(BATCHES["two-levels"])
# Embeddings, then the layers, the norm and the head; "disk" is loaded for each forward.
MAPS = {
    "one device": {"": "cpu"},
    "layers on disk": {"model.layers.1": "disk", "model.layers.2": "disk"},
    "ends on disk": {"model.embed_tokens": "disk", "lm_head": "disk", "model.layers.0": "disk"},
    "all on disk": {"": "disk"},
}
PARTS = ["embed_tokens", "rotary_emb", "layers.0", "layers.1", "layers.2", "norm"]


def full(changes: dict[str, str]) -> dict[str, str]:
    if "" in changes:
        return changes
    return {f"model.{part}": "cpu" for part in PARTS} | {"lm_head": "cpu"} | changes


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_same_tokens(tmp_path, name, kwargs):
    stock, pat = pair("Llama")
    pat.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        attn_implementation="pat",
        device_map=full(MAPS[name]),
        offload_folder=tmp_path / "offload",
    )
    assert any(p.is_meta for p in model.parameters()) == ("disk" in MAPS[name].values())
    kwargs = kwargs | {"max_new_tokens": 20, "do_sample": False}
    cache = pat_hf.PATCache(model)
    expected = stock.generate(**INPUTS, **kwargs)
    for _ in range(2):
        assert torch.equal(model.generate(**INPUTS, past_key_values=cache, **kwargs), expected)
    assert cache.fallback is None and cache.prefilled < cache.prompted / 2
    scores = pat_hf.loglikelihoods(model, *[BATCHES["two-levels"]] * 2).logprobs
    again = pat_hf.loglikelihoods(pat, *[BATCHES["two-levels"]] * 2).logprobs
    torch.testing.assert_close(scores, again)


def test_a_model_that_is_dispatched_after_its_cache_was_made():
    stock, pat = pair("Llama")
    model = AutoModelForCausalLM.from_config(pat.config, attn_implementation="pat").eval()
    model.load_state_dict(pat.state_dict())
    cache = pat_hf.PATCache(model)
    kwargs = {"max_new_tokens": 9, "do_sample": False}
    expected = stock.generate(**INPUTS, **kwargs)
    for change in (
        lambda: accelerate.cpu_offload(model, execution_device="cpu"),
        lambda: accelerate.hooks.remove_hook_from_module(model, recurse=True),
        lambda: accelerate.dispatch_model(model, full(MAPS["one device"]), force_hooks=True),
    ):
        assert torch.equal(model.generate(**INPUTS, past_key_values=cache, **kwargs), expected)
        change()
    assert torch.equal(model.generate(**INPUTS, past_key_values=cache, **kwargs), expected)


@pytest.mark.parametrize("dims", [(128, 128), (128, 64), (96, 64), (24, 20)])
def test_pages_are_whole_rows_of_keys_and_of_values(dims):
    page = aligned_page([(3, 16, dim) for dim in dims])
    least = 3 * 16 * sum(dims)
    assert not any(page % dim for dim in dims) and least <= page < least + math.lcm(*dims)
