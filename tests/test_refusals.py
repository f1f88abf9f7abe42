"""Bad input: each is refused with a message that says what was given and what to do."""

import copy
import gc

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    MoshiConfig,
    MoshiForCausalLM,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

import pat_hf
from pat_hf.attention import pat_attention
from pat_hf.cache import page_pool, pat_cache
from pat_hf.cache.memory import Memory
from pat_hf.prefill import prefill

from .models import CORE, REFUSED, batch, pair

PROMPTS = [[3, 4, 5, 6], [3, 4, 7]]


def refused(inputs, words, cache=None, error=ValueError, **kwargs):
    _, pat = pair("Llama")
    cache = cache or pat_hf.PATCache(pat)
    with pytest.raises(error, match=words):
        pat.generate(**inputs, past_key_values=cache, max_new_tokens=3, **kwargs)
    return cache


def inputs_of(ids, mask):
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def test_right_padding():
    refused(inputs_of([[3, 4], [3, 0]], [[1, 1], [1, 0]]), 'Prompts \\[1\\].*padding_side = "left"')


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mistral", "Gemma 2"])
def test_padding_in_the_middle(name):
    """Exact, but for windows: stock Transformers counts columns there, not tokens."""
    stock, pat = pair(name)
    rows = [[3, 4, 5, 6, 7], [0, 3, 0, 0, 5], [3, 0, 4, 5, 6]]
    inputs = inputs_of(rows, [[int(i > 0) for i in row] for row in rows])
    kwargs = {"max_new_tokens": 30, "do_sample": False}
    cache = pat_hf.PATCache(pat, page_size=16)
    if name in ("Mistral", "Gemma 2"):
        with pytest.raises(ValueError, match="column 2, between.*windows.*padded on the left"):
            pat.generate(**inputs, past_key_values=cache, **kwargs)
        pat(
            torch.tensor(rows),
            past_key_values=cache,
            attention_mask=inputs["attention_mask"] * 0 + 1,
        )
        mask = torch.ones(3, 7, dtype=torch.long)
        mask[1, 5] = 0
        with pytest.raises(ValueError, match="column 5, between.*windows"):
            pat(torch.tensor([[3, 4]] * 3), past_key_values=cache, attention_mask=mask)
        assert cache.get_seq_length() == 5
        return
    for _ in range(2):
        ours = pat.generate(**inputs, past_key_values=cache, **kwargs)
        assert torch.equal(ours, stock.generate(**inputs, **kwargs))
    assert cache.report().found_tokens


def test_empty_prompt():
    refused(inputs_of([[3, 4], [0, 0]], [[1, 1], [0, 0]]), "Prompts \\[1\\] are empty")


def test_no_prompts():
    none = torch.zeros((0, 3), dtype=torch.int64)
    refused({"input_ids": none, "attention_mask": none}, "\\(0, 3\\): no prompts")


def test_mask_of_another_shape():
    # Asked directly: newer versions of generate() mend the mask before it gets here.
    _, pat = pair("Llama")
    with pytest.raises(ValueError, match="\\(1, 2\\) and input_ids \\(1, 3\\)"):
        prefill(pat, pat_hf.PATCache(pat), **inputs_of([[3, 4, 5]], [[1, 1]]))


def test_mask_of_other_values():
    refused(inputs_of([[3, 4, 5]], [[0, 2, 1]]), "only 1 .token. and 0 .padding.")


def test_four_dimensional_masks():
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    refused({"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": mask}, "2D")
    _, pat = pair("Llama")
    with pytest.raises(RuntimeError, match="2-D attention_mask"):
        pat(torch.tensor([[3, 4, 5]]), attention_mask=mask, past_key_values=pat_hf.PATCache(pat))


def test_batch_size_changing_under_a_cache():
    _, pat = pair("Llama")
    cache = pat_hf.PATCache(pat)
    pat.generate(**batch(PROMPTS), past_key_values=cache, max_new_tokens=3)
    with pytest.raises(ValueError, match="batch of 3 and the cache holds 2 requests"):
        pat(torch.full((3, 1), 5), past_key_values=cache)


def test_cache_of_another_model():
    _, other = pair("Qwen3")
    refused(batch(PROMPTS), "made for another model", pat_hf.PATCache(other))


def test_cache_of_another_dtype():
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(CORE["Llama"]), attn_implementation="pat"
    )
    cache = pat_hf.PATCache(model)
    inputs = batch(PROMPTS)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=3)
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="float32 .*bfloat16.*reset"):
        model.generate(**inputs, past_key_values=cache, max_new_tokens=3)
    cache.reset()
    model.generate(**inputs, past_key_values=cache, max_new_tokens=3)


def test_another_attention_implementation():
    stock, pat = pair("Llama")
    with pytest.raises(ValueError, match="attn_implementation='sdpa'.*set_attn_implementation"):
        pat_hf.PATCache(stock)
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(CORE["Llama"]), attn_implementation="pat"
    )
    cache = pat_hf.PATCache(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        model.generate(**batch(PROMPTS), past_key_values=cache, max_new_tokens=3)
    with pytest.raises(RuntimeError, match="this one has 'sdpa'"):
        model(**batch(PROMPTS), past_key_values=cache)


@pytest.mark.parametrize(
    "make, words",
    [
        ({"block_sequence_ids": torch.tensor([[0, 0, -1]])}, "changes the causal mask"),
        ({"or_mask_function": lambda b, h, q, k: q >= k}, "changes the causal mask"),
    ],
)
def test_masks_that_are_more_than_causal(make, words):
    _, pat = pair("Mistral")
    states = torch.zeros(1, 3, 64)
    for create in (create_causal_mask, create_sliding_window_causal_mask):
        cache = pat_hf.PATCache(pat)
        create(pat.config, states, None, cache)
        with pytest.raises(ValueError, match=f"{words}.*DynamicCache"):
            create(pat.config, states, None, cache, **make)


@pytest.mark.parametrize(
    "words, name", [(words, name) for words, models in REFUSED.items() for name in models]
)
def test_models_that_a_cache_is_not_for(words, name):
    config = copy.deepcopy(REFUSED[words][name])
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with pytest.raises(ValueError, match=f"PATCache can't hold .*: {words}.*DynamicCache"):
        pat_hf.PATCache(kind.from_config(config))


def test_a_model_that_makes_no_mask():
    """Moshi, up to some version, makes one only where it is given one."""
    small = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MoshiConfig(vocab_size=50, hidden_size=32, ffn_dim=32, **small)
    model = MoshiForCausalLM._from_config(config, attn_implementation="pat")
    cache = pat_hf.PATCache(model.eval())
    kwargs = batch(PROMPTS) | {"max_new_tokens": 2, "do_sample": False}
    try:
        ours = model.generate(**kwargs, past_key_values=cache)
    except RuntimeError as error:
        assert "one that a model makes by itself" in str(error) and len(cache.prefixes) == 0
    else:
        model.set_attn_implementation("sdpa")
        assert torch.equal(ours, model.generate(**kwargs))
    _, pat = pair("Llama")
    layer, (queries, pages) = pat.model.layers[0].self_attn, torch.zeros(2, 1, 4, 16, 16)
    with pytest.raises(ValueError, match="LlamaAttention makes its mask by itself"):
        pat_attention(layer, queries, pages.expand(3, -1, -1, -1), pages, None)


@pytest.mark.parametrize("act", [copy.deepcopy, lambda cache: cache.save("never written")])
def test_a_cache_whose_model_is_gone(act):
    model = AutoModelForCausalLM.from_config(CORE["Llama"], attn_implementation="pat").eval()
    cache = pat_hf.PATCache(model)
    del model
    gc.collect()
    with pytest.raises(ReferenceError, match="Keep the model"):
        act(cache)


def test_a_cache_for_what_is_no_model():
    with pytest.raises(TypeError, match="str"):
        pat_hf.PATCache("llama")


def test_pool_exhausted_by_prompts_leaves_the_batch():
    _, pat = pair("Llama")
    cache = pat_hf.PATCache(pat, page_size=16, max_tokens=96)
    inputs = batch(PROMPTS)
    kept = pat.generate(**inputs, past_key_values=cache, max_new_tokens=3, do_sample=False)
    long = batch([list(range(2, 90)), list(range(9, 90))])
    refused(long, "max_tokens.*192 or more", cache, pat_hf.PoolExhausted)
    again = pat.generate(**inputs, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert torch.equal(again, kept)


def test_pool_exhausted_while_generating():
    _, pat = pair("Llama")
    cache = pat_hf.PATCache(pat, page_size=16, max_tokens=80)
    inputs = batch(PROMPTS)
    with pytest.raises(pat_hf.PoolExhausted, match="2 requests.*Raise max_tokens"):
        pat.generate(**inputs, past_key_values=cache, max_new_tokens=40)
    length = cache.get_seq_length()
    assert length == 4 + 16
    cache.batch_select_indices(torch.tensor([0]))
    pat(torch.tensor([[5]]), past_key_values=cache)
    assert cache.get_seq_length() == length + 1


def test_a_mask_that_changes_under_the_cache():
    _, pat = pair("Llama")
    cache = pat_hf.PATCache(pat)
    inputs = batch(PROMPTS)
    pat.generate(**inputs, past_key_values=cache, max_new_tokens=3)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], 1)
    tokens = torch.full((2, 2), 5)
    with pytest.raises(ValueError, match="it must be .2, 7."):
        pat(tokens[:, :1], attention_mask=mask[:, :-1], past_key_values=cache)
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    with pytest.raises(ValueError, match="says 1 at request 1, column 0"):
        pat(tokens, attention_mask=mask * 0 + 1, past_key_values=cache)
    pat(tokens, attention_mask=mask, past_key_values=cache)
    # In a step that needs no new plan, too.
    mask = torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], 1)
    pat(tokens[:, :1], attention_mask=mask[:, :-1], past_key_values=cache)
    mask[0, 2] = 0
    with pytest.raises(ValueError, match="says 0 at request 0, column 2"):
        pat(tokens[:, :1], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("after", range(0, 12, 3))
def test_memory_that_runs_out_amid_a_split(monkeypatch, after):
    stock, pat = pair("Llama")
    cache = pat_hf.PATCache(pat, keep_bytes=1 << 30, page_size=16)
    kwargs = {"max_new_tokens": 2, "do_sample": False}
    prompt, calls, index = list(range(3, 63)), [], page_pool._index
    pat.generate(**batch([prompt]), past_key_values=cache, **kwargs)

    def fail(*args):
        calls.append(args)
        if len(calls) > after:
            raise torch.OutOfMemoryError
        return index(*args)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(page_pool, "_index", fail)
        pat.generate(**batch([prompt[:25] + [90, 91]]), past_key_values=cache, **kwargs)
    inputs = batch([prompt + [5, 6]])
    ours = pat.generate(**inputs, past_key_values=cache, **kwargs)
    assert torch.equal(ours, stock.generate(**inputs, **kwargs))


@pytest.mark.parametrize(
    "prompts, left",
    [([[9, 8, 7]], 0), (PROMPTS, 1)],
    ids=["for new prompts", "for a split"],
)
def test_memory_that_runs_out_leaves_a_usable_cache(monkeypatch, prompts, left):
    stock, pat = pair("Llama")
    cache = pat_hf.PATCache(pat)
    inputs = batch(prompts)
    kwargs = {"max_new_tokens": 3, "do_sample": False}
    pat.generate(**batch(PROMPTS[:1]), past_key_values=cache, **kwargs)

    def fail(count):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(cache.pool, "reserve", fail)
        with pytest.raises(torch.OutOfMemoryError):
            pat.generate(**inputs, past_key_values=cache, **kwargs)
    assert len(cache.prefixes) == left
    assert (cache.pool.used > 0) == (cache.get_seq_length() > 0) == (left > 0)
    ours = pat.generate(**inputs, past_key_values=cache, **kwargs)
    assert torch.equal(ours, stock.generate(**inputs, **kwargs))


@pytest.mark.parametrize("what", ["pages", "plan"])
def test_memory_that_runs_out_in_a_step_leaves_the_batch(monkeypatch, what):
    stock, pat = pair("Llama")
    cache = pat_hf.PATCache(pat, page_size=16)
    prompt = list(range(3, 19))  # a page
    pat.generate(**batch([prompt]), past_key_values=cache, max_new_tokens=1)

    def fail(*args):
        raise torch.OutOfMemoryError

    new = torch.tensor([[5]])
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        if what == "pages":
            patch.setattr(cache.pool, "extend", fail)
        else:
            patch.setattr(pat_cache, "Step", fail)
            patch.setattr(cache._workspace, "steps", {})
        pat(new, past_key_values=cache)
    assert cache.get_seq_length() == cache.prefixes.length(0) == 16
    ours = pat(new, past_key_values=cache).logits
    theirs = stock(torch.tensor([prompt + [5]])).logits[:, -1:]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_requests_that_can_not_be_cut_are_given_up():
    stock, pat = pair("Llama")
    shared = list(range(3, 35))
    prompts = [shared, shared, list(range(40, 56))]
    cache = pat_hf.PATCache(pat, page_size=16, max_tokens=48)
    kwargs = {"max_new_tokens": 1, "do_sample": False}
    pat.generate(**batch(prompts), past_key_values=cache, **kwargs)
    with pytest.raises(pat_hf.PoolExhausted):
        cache.crop(-3)
    assert len(cache.prefixes) == cache.get_seq_length() == cache.pool.used == 0
    ours = pat.generate(**batch(prompts), past_key_values=cache, **kwargs)
    assert torch.equal(ours, stock.generate(**batch(prompts), **kwargs))


@pytest.mark.parametrize("copied", [False, True])
def test_a_forward_that_fails_leaves_the_cache_as_it_was(copied):
    stock, pat = pair("Llama")
    inputs = batch(PROMPTS)
    cache = pat_hf.PATCache(pat)
    pat.generate(**inputs, past_key_values=cache, max_new_tokens=3, do_sample=False)

    def fail(*args):
        raise KeyboardInterrupt

    hook = pat.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        pat(torch.full((2, 1), 5), past_key_values=cache)
    hook.remove()
    if copied:
        cache = copy.deepcopy(cache)
    for missing in ([0, 2], [-1, 0]):
        with pytest.raises(ValueError, match="batch has 2"):
            cache.reorder_cache(torch.tensor(missing))
    cache.reorder_cache(torch.tensor([1, 0]))
    assert [cache.prefixes.length(r) for r in range(2)] == [5, 6]
    ours = pat.generate(**inputs, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert torch.equal(ours, stock.generate(**inputs, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_step_that_breaks_off_stores_nothing(layer):
    """Some layers have its K and V and others don't; a later call must not share it."""
    stock, pat = pair("Llama")
    cache = pat_hf.PATCache(pat)
    kwargs = {"max_new_tokens": 12, "do_sample": False}
    answer = stock.generate(**batch(PROMPTS[:1]), **kwargs)
    calls = []

    def fail(*args):
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt

    hook = pat.model.layers[layer].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        pat.generate(**batch(PROMPTS[:1]), past_key_values=cache, **kwargs)
    hook.remove()
    fed = len(PROMPTS[0]) + 3  # the prompt, and three steps before the one that broke off
    assert cache.get_seq_length() == cache.tokens == fed
    more = {"output_logits": True, "return_dict_in_generate": True} | kwargs
    ours, theirs = (
        model.generate(answer, attention_mask=torch.ones_like(answer), past_key_values=c, **more)
        for model, c in ((pat, cache), (stock, None))
    )
    assert cache.report().found_tokens == fed
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.logits[0], theirs.logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"page_size": 20},
        {"page_size": "32"},
        {"max_tokens": 3},
        {"max_tokens": 200.0},
        {"max_tokens": float("nan")},
        {"prefill_tokens": 0},
        {"prefill_tokens": 8.5},
        {"prefill_tokens": "8192"},
        {"keep_bytes": -1},
        {"keep_bytes": "2GB"},
        {"decode": "fast"},
    ],
)
def test_arguments(kwargs):
    _, pat = pair("Llama")
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        pat_hf.PATCache(pat, **kwargs)


def test_gradient_checkpointing():
    """In training mode layers are not given the cache; otherwise it changes nothing."""
    stock, pat = (copy.deepcopy(model) for model in pair("Llama"))
    inputs = batch(PROMPTS)
    for model in (stock, pat):
        model.gradient_checkpointing_enable()
    cache = pat_hf.PATCache(pat)
    for training in (True, False):
        pat.train(training)
        if training:
            with pytest.raises(ValueError, match="training mode.*eval"):
                pat.generate(**inputs, past_key_values=cache, max_new_tokens=3)
            with pytest.raises(ValueError, match="training mode.*eval"):
                pat(**inputs, past_key_values=pat_hf.PATCache(pat))
        else:
            outs = [
                model.generate(**inputs, past_key_values=given, max_new_tokens=9)
                for model, given in ((stock, None), (pat, cache))
            ]
            assert torch.equal(*outs)


def test_negative_ids_are_none():
    _, pat = pair("Llama")
    with pytest.raises(ValueError, match="ids from -1 to 4, and the model's are at least 0"):
        pat_hf.PATCache(pat).pin([4, -1])


@pytest.mark.parametrize(
    "words, error",
    [
        ("DefaultCPUAllocator: can't allocate memory", torch.OutOfMemoryError),
        ("else", RuntimeError),
    ],
)
def test_the_memory_of_the_cpu(monkeypatch, words, error):
    def empty(*args, **kwargs):
        raise RuntimeError(words)

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(error) as raised:
        Memory().resize(0, 4, [(1, 16, 8)], torch.float32, torch.device("cpu"))
    assert raised.type is error
