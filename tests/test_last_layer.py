"""A prefill's last layer, of which most tokens need K and V only."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

import pat_hf
from pat_hf import last_layer
from pat_hf.cache.pat_cache import PATCache

from .models import MODELS, PAD, batch, pair, pair_of
from .rerun import as_on_a_gpu
from .test_rotary import SCALED

WITHOUT = {"Gemma 3n"}  # its last layer reads the K and V of another
SHARED = torch.arange(2, 62).tolist()
PROMPTS = [SHARED + [3] * n + [7] for n in (0, 5, 18)] + [SHARED[:30] + [9, 9]]
TOKENS = 60 + 18 + 3 + 2  # that are distinct


def generate(model, cache=None, prompts=PROMPTS, **kwargs):
    kwargs = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD} | kwargs
    return model.generate(**batch(prompts), past_key_values=cache, **kwargs)


@pytest.fixture
def llama():
    """A Llama with "pat", and what it is to generate."""
    stock, pat = pair("Llama")
    return copy.deepcopy(pat), generate(stock)


@pytest.fixture
def rows(llama, monkeypatch):
    """How many tokens each MLP of a Llama computes."""
    seen, forward = [], LlamaMLP.forward

    def noted(self, x):
        seen.append(x.shape[-2])
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", noted)
    return seen


@pytest.mark.parametrize("name", [*MODELS, *SCALED])
def test_logits_are_those_of_sdpa(name, monkeypatch):
    spread, shortened = last_layer._spread, []
    monkeypatch.setattr(
        last_layer, "_spread", lambda x, *args: (shortened.append(x), spread(x, *args))[1]
    )
    stock, pat = pair(name) if name in MODELS else pair_of(SCALED[name])
    given = {"output_logits": True, "return_dict_in_generate": True}
    expected = generate(stock, DynamicCache(config=stock.config), **given)
    # The first of the chunks has no token whose logits are wanted.
    out = generate(pat, pat_hf.PATCache(pat, prefill_tokens=50), **given)
    assert torch.equal(out.sequences, expected.sequences)
    for logits, wanted in zip(out.logits, expected.logits, strict=True):
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    assert bool(shortened) == (name not in WITHOUT)


@pytest.mark.parametrize("decode", ["eager", "compiled"])
def test_only_wanted_tokens_go_through_the_last_layer(decode, llama, rows, monkeypatch):
    as_on_a_gpu(monkeypatch)
    model, expected = llama
    for _ in range(2):  # a first call compiles no prefill
        rows.clear()
        assert torch.equal(generate(model, pat_hf.PATCache(model, decode=decode)), expected)
        assert rows.count(len(PROMPTS)) == 1
    assert decode == "compiled" or rows.count(TOKENS) == 2


def test_few_tokens_are_not_worth_it(llama, rows, monkeypatch):
    model, expected = llama
    generate(model, pat_hf.PATCache(model), [[5, 6, n] for n in range(10, 14)])
    assert rows[:3] == [6, 6, 6]  # and 4 are wanted
    monkeypatch.setattr(last_layer, "LEAST", TOKENS)
    rows.clear()
    assert torch.equal(generate(model, pat_hf.PATCache(model)), expected)
    assert rows[:3] == [TOKENS] * 3


@pytest.mark.parametrize("name", ["model.layers.2", "model.layers.2.mlp.act_fn", "model.norm"])
def test_a_hook_sees_all_tokens(name, llama, rows):
    model, expected = llama
    seen = []
    hook = lambda module, args, out: seen.append(out[0].any(-1).sum())  # noqa: E731
    model.get_submodule(name).register_forward_hook(hook)
    assert torch.equal(generate(model, pat_hf.PATCache(model)), expected)
    assert seen[0] == TOKENS and rows[:3] == [TOKENS] * 3


@pytest.mark.parametrize("register", ["hook", "pre_hook"])
def test_a_hook_of_all_modules_sees_all_tokens(register, llama, rows):
    model, expected = llama
    handle = getattr(nn.modules.module, f"register_module_forward_{register}")(lambda *args: None)
    with handle:
        assert torch.equal(generate(model, pat_hf.PATCache(model)), expected)
    assert rows[:3] == [TOKENS] * 3


def test_scores_want_few(llama, rows):
    model, _ = llama
    pat_hf.loglikelihoods(model, [SHARED, SHARED], [[7], [8, 9]])
    assert rows == [61, 61, 2]  # of 60 and an 8, the last ones


@pytest.mark.parametrize("how", ["forward", "norm", "compiled"])
def test_a_layer_with_a_forward_of_its_own_computes_all_tokens(how, llama, rows):
    model, expected = llama
    layer = model.model.layers[-1]
    if how != "compiled":
        module = layer if how == "forward" else model.model.norm
        forward = module.forward
        module.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    else:
        layer.compile(backend="eager")
    assert torch.equal(generate(model, pat_hf.PATCache(model)), expected)
    assert len(PROMPTS) not in rows[:3]


@pytest.mark.parametrize("shape", [(64,), (1, 64)])
def test_what_is_not_of_tokens_leaves_the_layer_as_it_is(shape, llama, rows, monkeypatch):
    model, expected = llama
    call, forward = LlamaDecoderLayer.__call__, LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer,
        "__call__",
        lambda self, *args, **kwargs: call(self, *args, bias=torch.zeros(shape), **kwargs),
    )
    monkeypatch.setattr(
        LlamaDecoderLayer,
        "forward",
        lambda self, *args, bias, **kwargs: forward(self, *args, **kwargs) + bias,
    )
    assert torch.equal(generate(model, pat_hf.PATCache(model)), expected)
    assert rows[:3] == [TOKENS] * 3


def test_another_thread_s_forward_is_left_alone(llama, monkeypatch):
    """While the last layer stores, and while it computes the rest; as many tokens as there."""
    model, expected = llama
    ids = torch.arange(TOKENS)[None] % 90
    alone, beside, left = model(ids).logits, [], []
    layer, update, forward = model.model.layers[-1], PATCache.update, LlamaMLP.forward

    def elsewhere():
        assert layer._forward_pre_hooks
        thread = threading.Thread(target=lambda: beside.append(model(ids).logits))
        thread.start()
        thread.join()

    def updated(cache, *args, **kwargs):
        if args[2] == 2 and not beside:
            elsewhere()
        return update(cache, *args, **kwargs)

    def computed(mlp, x):
        if mlp is layer.mlp and len(beside) == 1 and x.shape[1] == len(PROMPTS):
            elsewhere()
            left.extend(layer._forward_pre_hooks.values())
        return forward(mlp, x)

    monkeypatch.setattr(PATCache, "update", updated)
    monkeypatch.setattr(LlamaMLP, "forward", computed)
    assert torch.equal(generate(model, pat_hf.PATCache(model)), expected)
    assert len(beside) == 2
    # As an interrupt might leave it.
    layer.register_forward_pre_hook(left[-1], with_kwargs=True)
    for logits in (*beside, model(ids).logits):
        torch.testing.assert_close(logits, alone)


def test_two_threads_prefill_at_once(llama):
    model, expected = llama
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda _: generate(model, pat_hf.PATCache(model)), range(40)))
    assert all(torch.equal(out, expected) for out in outs)


def test_nothing_is_left_of_it(llama, monkeypatch):
    model, expected = llama
    layer = model.model.layers[-1]
    before = [*layer._forward_pre_hooks, *layer._forward_hooks]
    forward = LlamaMLP.forward
    with monkeypatch.context() as patch:
        patch.setattr(
            LlamaMLP, "forward", lambda self, x: 1 / 0 if self is layer.mlp else forward(self, x)
        )
        with pytest.raises(ZeroDivisionError):
            generate(model, pat_hf.PATCache(model))
    assert "forward" not in vars(layer.input_layernorm)
    assert torch.equal(generate(model, pat_hf.PATCache(model)), expected)
    assert [*layer._forward_pre_hooks, *layer._forward_hooks] == before
