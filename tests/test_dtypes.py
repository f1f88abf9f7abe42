"""Weights, K and V in several dtypes: errors no larger than sdpa's, or a refusal by name."""

import copy

import pytest
import torch
from torch import nn

import pat_hf
from pat_hf.cache import pat_cache, step
from pat_hf.kernels import plan

from .models import batch, pair
from .test_generate import BATCHES, _forced, text

INPUTS = batch(BATCHES["two-levels"])
FORCED = torch.tensor([text(6, r) for r in range(4)])


def cast(model, dtype, *names):
    """Casts the parameters whose names contain one of `names`."""
    for name, parameter in model.named_parameters():
        if any(each in name for each in names):
            parameter.data = parameter.data.to(dtype)
    return model


def norms(model):
    return cast(model.bfloat16(), torch.float32, "norm")


def head(model):
    model.bfloat16()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().float())
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    return model


def embeddings(model):
    """`model.dtype` is the first parameter's, which is not that of K and V."""
    model.bfloat16()
    embed = model.get_input_embeddings()
    embed.weight = nn.Parameter(embed.weight.detach().float())
    embed.register_forward_hook(lambda module, args, out: out.bfloat16())
    return model


def one_layer(model):
    layer = model.model.layers[1].bfloat16()
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: (
            (args[0].bfloat16(), *args[1:]),
            kwargs | {"position_embeddings": [x.bfloat16() for x in kwargs["position_embeddings"]]},
        ),
        with_kwargs=True,
    )
    layer.register_forward_hook(lambda module, args, out: out.float())
    return model


def under_autocast(model):
    """As accelerate does it, inside the forward."""
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    return model


def half(model):
    return model.half()


@pytest.mark.parametrize(
    "name, change",
    [
        ("Gemma", norms),
        ("Gemma 2", norms),
        ("Llama", head),
        ("Llama", embeddings),
        ("Llama", one_layer),
        ("Llama", half),
    ],
)
def test_mixed_weights_stay_within_twice_the_error_of_sdpa(name, change):
    stock, pat = (change(copy.deepcopy(model)) for model in pair(name))
    # The same weights, rounded where they were, in float32 throughout.
    exact = copy.deepcopy(pair(name)[0])
    exact.load_state_dict(stock.state_dict())
    exact = _forced(exact, INPUTS, FORCED, None)
    cache = pat_hf.PATCache(pat)
    theirs = (_forced(stock, INPUTS, FORCED, None) - exact).abs()
    ours = (_forced(pat, INPUTS, FORCED, cache) - exact).abs()
    assert theirs.max() > 0
    assert ours.max() <= 2 * theirs.max() and ours.mean() <= 1.5 * theirs.mean()
    low = torch.float16 if change is half else torch.bfloat16
    assert cache.pool.layers[1].keys.dtype == cache.pool.layers[1].values.dtype == low


def test_keys_of_another_dtype_than_values():
    _, pat = pair("Qwen3")
    pat = cast(copy.deepcopy(pat).bfloat16(), torch.float32, "q_norm", "k_norm")
    cache = pat_hf.PATCache(pat)
    with pytest.raises(ValueError, match="holds .*torch.float32.* given .*torch.bfloat16"):
        pat.generate(**INPUTS, past_key_values=cache, max_new_tokens=3)
    assert len(cache.prefixes) == 0


def test_autocast_for_one_call_only():
    _, pat = pair("Llama")
    cache = pat_hf.PATCache(pat)
    kwargs = {"past_key_values": cache, "max_new_tokens": 3, "do_sample": False}
    expected = pat.generate(**INPUTS, max_new_tokens=3, do_sample=False)
    with torch.autocast(INPUTS["input_ids"].device.type, torch.bfloat16):
        pat.generate(**INPUTS, **kwargs)
    with pytest.raises(ValueError, match="bfloat16.*float32.*reset"):
        pat.generate(**INPUTS, **kwargs)
    cache.reset()
    assert torch.equal(pat.generate(**INPUTS, **kwargs), expected)


def test_plans_are_for_what_layers_store(monkeypatch):
    planned = []

    def make_plan(nodes, node, position, heads, *args):
        planned.append(heads.itemsize)
        return plan.make_plan(nodes, node, position, heads, *args)

    monkeypatch.setattr(pat_cache, "make_plan", make_plan)
    _, pat = pair("Llama")
    kind = INPUTS["input_ids"].device.type
    for dtype, size in ((torch.bfloat16, 2), (None, 4), (torch.float16, 2)):
        cache = pat_hf.PATCache(pat)
        with torch.autocast(kind, dtype, enabled=dtype is not None):
            pat.generate(**INPUTS, past_key_values=cache, max_new_tokens=3)
        assert cache.report().read_tokens  # outside of autocast
        assert set(planned) == {size} and cache.pool.dtype.itemsize == size
        planned.clear()


def test_layers_that_a_plan_is_not_for_are_refused(monkeypatch):
    """The kernels on Hopper have other tables for 16 bits than for 32."""
    check = plan.check_blocks
    monkeypatch.setattr(plan.Machine, "of", lambda device, heads: plan.Machine.gpu(132, heads, 9))
    gpu = torch.device("cuda")
    monkeypatch.setattr(step, "check_blocks", lambda shapes, heads, _: check(shapes, heads, gpu))
    pat = one_layer(copy.deepcopy(pair("Llama")[1]))
    with pytest.raises(ValueError, match="elements of 2 bytes.*one dtype"):
        pat.generate(**INPUTS, past_key_values=pat_hf.PATCache(pat), max_new_tokens=3)
    kwargs = {"max_new_tokens": 3, "do_sample": False}
    for change in (embeddings, nn.Module.bfloat16, under_autocast):
        stock, pat = (change(copy.deepcopy(model)) for model in pair("Llama"))
        given = {"output_logits": True, "return_dict_in_generate": True}
        ours = pat.generate(**INPUTS, past_key_values=pat_hf.PATCache(pat), **given, **kwargs)
        theirs = stock.generate(**INPUTS, **given, **kwargs)
        assert (ours.logits[0] - theirs.logits[0]).abs().max() < theirs.logits[0].std() / 10
        # What isn't packed; by itself, it can be tried again.
        states = {"output_hidden_states": True, "return_dict_in_generate": True}
        pat.generate(**INPUTS, past_key_values=pat_hf.PATCache(pat), **states, **kwargs)
        cache = pat_hf.PATCache(pat)
        if change is embeddings:
            with pytest.raises(ValueError, match="one dtype"):
                pat(INPUTS["input_ids"], past_key_values=cache)
        pat(INPUTS["input_ids"], past_key_values=cache)
        assert cache.pool.dtype == torch.bfloat16


def test_inference_mode_for_some_forwards_only():
    stock, pat = pair("Llama")
    cache = pat_hf.PATCache(pat)
    ids = torch.tensor([text(9, 1), text(9, 2)])
    modes = [torch.inference_mode, torch.inference_mode, torch.no_grad, torch.inference_mode]
    logits = []
    with torch.inference_mode():
        pat(ids[:, :5], past_key_values=cache)
    for i, mode in enumerate(modes):
        with mode():
            logits.append(pat(ids[:, 5 + i : 6 + i], past_key_values=cache).logits.clone())
    cache.batch_repeat_interleave(2)
    pat(torch.full((4, 1), 3), past_key_values=cache)
    torch.testing.assert_close(torch.cat(logits, 1), stock(ids).logits[:, 5:])


class Int8Linear(nn.Linear):
    """As quantisation libraries do it: integer weights, and a forward of its own."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        weight = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Phi"])
def test_quantised_weights(name):
    stock, pat = (copy.deepcopy(model) for model in pair(name))
    for model in (stock, pat):
        for path, module in list(model.model.named_modules()):
            if isinstance(module, nn.Linear):
                parent = model.model.get_submodule(path.rpartition(".")[0])
                setattr(parent, path.rpartition(".")[2], Int8Linear(module))
    assert any(p.dtype == torch.int8 for p in pat.parameters())
    kwargs = {"max_new_tokens": 20, "do_sample": False}
    expected = stock.generate(**INPUTS, **kwargs)
    assert not torch.equal(expected, pair(name)[0].generate(**INPUTS, **kwargs))
    cache = pat_hf.PATCache(pat)
    assert torch.equal(pat.generate(**INPUTS, past_key_values=cache, **kwargs), expected)
    assert cache.prefilled < cache.prompted
