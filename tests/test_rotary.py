"""Rotary embeddings whose frequencies follow the longest sequence: as in stock's forwards."""

import pytest
import torch

import pat_hf
from pat_hf import graphs

from .models import batch, config, pair_of
from .test_generate import text
from .test_graphs import Rerun, rerun  # noqa: F401


def longrope(**more):
    return more | {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0 + i for i in range(8)],
        "original_max_position_embeddings": 64,
        "factor": 8.0,
    }


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
SCALED = {
    "Llama, longrope": config("Llama", rope_parameters=longrope()),
    "Phi-3, longrope": config(
        "Phi3", rope_parameters=longrope(), original_max_position_embeddings=64
    ),
    "Phi-MoE, longrope": config(
        "Phimoe",
        num_local_experts=4,
        rope_parameters=longrope(short_mscale=1.1, long_mscale=1.3),
        original_max_position_embeddings=64,
    ),
    "Llama, dynamic": config("Llama", rope_parameters=DYNAMIC, max_position_embeddings=64),
    "Gemma 3, dynamic in some layers": config(
        "Gemma3Text",
        sliding_window=19,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=16,
        rope_parameters={"sliding_attention": PLAIN, "full_attention": DYNAMIC},
        max_position_embeddings=64,
    ),
}
each = pytest.mark.parametrize("name", SCALED)


def pair(name):
    """Stock and "pat": both afresh, for a rotary embedding remembers the lengths it has seen."""
    return pair_of(SCALED[name])


SHARED = text(40, 0)
SHORT = batch([SHARED + text(5, 1), SHARED + text(9, 2)])
LONG = batch([SHARED + text(60, 3), SHARED + text(50, 4)])
MIXED = batch([SHARED + text(60, 3), SHARED + text(5, 1)])


def generate(model, inputs, cache=None, **kwargs):
    kwargs = {"max_new_tokens": 10, "do_sample": False} | kwargs
    return model.generate(**inputs, past_key_values=cache, **kwargs)


def same(stock, pat, inputs, cache, **kwargs):
    theirs = generate(stock, inputs, **kwargs)
    ours = generate(pat, inputs, cache, **kwargs)
    assert torch.equal(ours, theirs)
    return theirs


@each
def test_frequencies_matter_here(name):
    """The same tokens beside a longer request are continued otherwise."""
    stock, _ = pair(name)
    alone = {key: x[1:, -45:] for key, x in MIXED.items()}
    assert alone["attention_mask"].all()
    logits = [stock(**x).logits[-1, -1] for x in (alone, MIXED)]
    assert (logits[0] - logits[1]).abs().max() > 1e-2


@each
@pytest.mark.parametrize("chunk", [30, 8192])
def test_batches_of_different_lengths_share_no_other_keys(name, chunk):
    stock, pat = pair(name)
    cache = pat_hf.PATCache(pat, keep_bytes=1 << 30, page_size=16, prefill_tokens=chunk)
    for inputs in (SHORT, LONG, SHORT, MIXED, LONG):
        same(stock, pat, inputs, cache)
    if "dynamic" not in name:  # its frequencies are new at almost every step
        before = cache.report().prefilled_tokens
        same(stock, pat, LONG, cache)
        assert cache.report().prefilled_tokens == before


@each
@pytest.mark.parametrize("steps", [15, 40])
def test_answers_that_grow_beyond_the_length_are_not_kept(name, steps):
    stock, pat = pair(name)
    cache = pat_hf.PATCache(pat, keep_bytes=1 << 30, page_size=16)
    answers = same(stock, pat, SHORT, cache, max_new_tokens=steps)
    for stop in range(50, answers.shape[1], 4):
        inputs = {"input_ids": answers[:1, :stop], "attention_mask": torch.ones(1, stop).long()}
        inputs["attention_mask"][0, :4] = 0
        same(stock, pat, inputs, cache, max_new_tokens=3)


@each
@pytest.mark.parametrize("inputs", [SHORT, LONG])
def test_prompt_lookup(name, inputs):
    stock, pat = pair(name)
    inputs = {key: x[:1] for key, x in inputs.items()}
    cache = pat_hf.PATCache(pat, keep_bytes=1 << 30, page_size=16)
    for _ in range(2):
        same(stock, pat, inputs, cache, prompt_lookup_num_tokens=3, max_new_tokens=25)


@each
def test_each_pair_is_scored_as_alone(name):
    stock, pat = pair(name)
    contexts = [SHARED, *[SHARED + text(60, 3)] * 3]
    continuations = [text(n, 20 + n) for n in (6, 3, 5, 8)]
    cache = pat_hf.PATCache(pat, page_size=16, prefill_tokens=64)
    scores = pat_hf.loglikelihoods(pat, contexts, continuations, cache)
    for row, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        logits = stock(torch.tensor([context + continuation[:-1]])).logits[0].float()
        logits = logits[len(context) - 1 :].log_softmax(-1)
        wanted = logits[torch.arange(len(continuation)), torch.tensor(continuation)].sum()
        assert torch.allclose(scores.logprobs[row], wanted, atol=1e-4)


@pytest.mark.parametrize("name", sorted(SCALED.keys() - {"Phi-MoE, longrope"}))
def test_one_graph_serves_all_lengths(rerun, name):  # noqa: F811
    stock, pat = pair(name)
    cache = pat_hf.PATCache(pat, page_size=16, decode="captured")
    same(stock, pat, LONG, cache, max_new_tokens=15)  # pages move until there are enough
    made = Rerun.made
    for inputs in (LONG, SHORT, MIXED):
        same(stock, pat, inputs, cache, max_new_tokens=15)
    if "Phi-3" not in name:  # which begins anew in stock when it crosses its length
        same(stock, pat, SHORT, cache, max_new_tokens=30)
    assert Rerun.made == made


@pytest.mark.parametrize("name", sorted(SCALED.keys() - {"Phi-MoE, longrope"}))
def test_compiled_layers_are_for_all_lengths(rerun, name):  # noqa: F811
    stock, pat = pair(name)
    for inputs in (LONG, SHORT, MIXED):
        cache = pat_hf.PATCache(pat, page_size=16, decode="compiled")
        same(stock, pat, inputs, cache, max_new_tokens=15)
        assert cache.decoding.startswith("compiled"), cache.decoding
        del cache


def test_replays_look_at_the_positions_once_a_call(rerun):  # noqa: F811
    stock, pat = pair("Llama, longrope")
    cache = pat_hf.PATCache(pat, page_size=16, decode="captured")
    same(stock, pat, LONG, cache, max_new_tokens=15)
    calls = []
    pat.model.rotary_emb.register_forward_pre_hook(lambda *args: calls.append(args))
    same(stock, pat, LONG, cache, max_new_tokens=15)
    steps = 14
    assert len(calls) == 1 + steps  # the prefill's, and those of the graph that is run again


def test_a_scale_that_is_chosen_on_the_host_is_not_captured():
    _, pat = pair("Phi-MoE, longrope")

    class OnGpu:
        device, hf_device_map, config = torch.device("cuda"), {}, pat.config
        named_modules = pat.named_modules
        _modules, _forward_hooks, _forward_pre_hooks = pat._modules, {}, {}

    assert "on the host" in graphs._obstacle(OnGpu)


@each
def test_a_request_that_ended_lengthens_the_batch_all_the_same(name):
    stock, _ = pair(name)
    for seed in range(20):
        inputs = batch([text(36, seed), text(8, 50 + seed)])
        plain = generate(stock, inputs, max_new_tokens=40)
        # The first ends long before it has 64 tokens, the second doesn't end.
        if stops := set(plain[0, 36:42].tolist()) - set(plain[1].tolist()):
            stop = min(stops)
            break
    stock, pat = pair(name)
    cache = pat_hf.PATCache(pat, keep_bytes=1 << 30, page_size=16)
    kwargs = {"eos_token_id": stop, "pad_token_id": 0, "max_new_tokens": 40}
    answers = same(stock, pat, inputs, cache, **kwargs)
    for end in range(60, 76, 4):
        same(stock, pat, batch([answers[1, 28:end].tolist()]), cache, max_new_tokens=20)


def test_what_a_loop_stores_on_a_fresh_cache():
    def loop(model, input_ids, **kwargs):
        model(input_ids=input_ids, past_key_values=kwargs["past_key_values"])
        return input_ids

    stock, pat = pair("Llama, longrope")
    cache = pat_hf.PATCache(pat, keep_bytes=1 << 30, page_size=16)
    prompt = SHARED + text(60, 3)
    kwargs = {"custom_generate": loop, "max_new_tokens": 5}
    pat.generate(torch.tensor([prompt]), past_key_values=cache, **kwargs)
    same(stock, pat, batch([prompt[:45]]), cache)


def test_drop_at_all_frequencies():
    _, pat = pair("Llama, longrope")
    cache = pat_hf.PATCache(pat, keep_bytes=1 << 30, page_size=16)
    prompt = SHARED + text(60, 3)
    generate(pat, batch([prompt]), cache)
    with pytest.raises(ValueError, match="in use"):
        cache.drop(prompt)
    cache.clear()
    kept = cache.report().kept_tokens
    assert cache.drop(prompt) == kept > 100
    assert cache.report().kept_tokens == 0
