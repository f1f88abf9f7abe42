"""RMS norms as one kernel."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import pat_hf
from pat_hf import layers, norms
from pat_hf.norms import fused, rms_norms

from .models import MODELS, batch, pair
from .rerun import as_on_a_gpu

# Others have no RMS norms, or ones by a weight of 1 + w.
WITHOUT = {"Gemma", "Gemma 2", "Gemma 3", "Gemma 3n", "GPT-2", "OPT", "StarCoder2", "OLMo"}
WITHOUT |= {"Cohere", "Cohere 2", "GPT-NeoX", "Nemotron", "Phi", "Phi-MoE"}
PROMPTS = batch([[5, 6, 7, 8, 9], [5, 6, 7, 10]])


@pytest.fixture
def taken(monkeypatch):
    """The weights of the norms that PyTorch computes."""
    rms_norms(pair("Llama")[1])  # the example that tells its class is computed once a process
    weights, rms_norm = [], F.rms_norm

    def noted(x, shape, weight, eps):
        weights.append(weight)
        return rms_norm(x, shape, weight, eps)

    monkeypatch.setattr(F, "rms_norm", noted)
    return weights


@pytest.fixture
def llama():
    return copy.deepcopy(pair("Llama")[1])


def generate(model, cache):
    given = {"max_new_tokens": 3, "do_sample": False}
    return model.generate(**PROMPTS, past_key_values=cache, **given)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_as_their_classes_have_them(name, dtype, taken):
    model = copy.deepcopy(pair(name)[1]).to(dtype)
    norms = rms_norms(model)
    assert bool(norms) == (name not in WITHOUT)
    assert not norms or type(norms[-1]).__name__.endswith("RMSNorm")
    torch.manual_seed(0)
    for norm in norms:
        norm.weight.data.normal_()
        x = torch.randn(3, 7, len(norm.weight), dtype=dtype) * 5
        taken.clear()
        own = norm(x)
        assert not taken
        with fused(norms):
            out = norm(x)
        assert taken[0] is norm.weight and out.dtype == own.dtype
        exact = copy.deepcopy(norm).double()(x.double())
        # In float32 at least, they all compute.
        assert (out - exact).abs().max() <= 2 * (own - exact).abs().max() + 1e-5
        assert norm.forward.__func__ is type(norm).forward


@pytest.mark.parametrize("decode", ["eager", "captured"])
def test_forwards_on_a_cache_have_them(decode, llama, taken, monkeypatch):
    as_on_a_gpu(monkeypatch)
    cache = pat_hf.PATCache(llama, decode=decode)
    expected = generate(pair("Llama")[0], None)
    assert not taken
    assert torch.equal(generate(llama, cache), expected)
    assert {id(x) for x in taken} == {id(x.weight) for x in rms_norms(llama)}
    steps = 2 + (decode == "captured")  # a capture runs a step, and replays it then
    # Of the last layer, K and V of all tokens, and all of it for some.
    assert len(taken) == 7 * (1 + steps) + 1
    taken.clear()
    llama(PROMPTS["input_ids"])
    assert not taken


def test_compiled_layers_have_their_own(llama, taken, monkeypatch):
    as_on_a_gpu(monkeypatch)
    torch._dynamo.reset()
    compiled = torch.compile(layers._forward, backend="eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(layers, "_compile", lambda: compiled)
    expected = generate(pair("Llama")[0], None)
    for _ in range(2):  # a first call's prefill isn't compiled
        taken.clear()
        assert torch.equal(generate(llama, pat_hf.PATCache(llama, decode="compiled")), expected)
    # The last layer's K and V of all tokens are not compiled.
    assert {id(x) for x in taken} == {id(llama.model.layers[-1].input_layernorm.weight)}


def test_scores_have_them(llama, taken):
    pat_hf.loglikelihoods(llama, [[5, 6, 7]], [[8, 9]])
    assert {id(x) for x in taken} == {id(x.weight) for x in rms_norms(llama)}


class Scaled(LlamaRMSNorm):
    def forward(self, x):
        return LlamaRMSNorm.forward(self, x) * 2


class Gated(LlamaRMSNorm):
    def forward(self, x, gate):
        return LlamaRMSNorm.forward(self, x) * gate


class Pair(LlamaRMSNorm):
    def forward(self, x):
        return LlamaRMSNorm.forward(self, x), x


class MaybeGated(LlamaRMSNorm):
    def forward(self, x, gate=1):
        return LlamaRMSNorm.forward(self, x) * gate


def test_classes_that_do_more_are_left_alone():
    model = nn.ModuleList([Scaled(64), LlamaRMSNorm(64), Gated(64), Pair(64)])
    assert rms_norms(model) == [model[1]]


def test_what_a_class_may_be_given_beside():
    norm, x = MaybeGated(64), torch.randn(2, 64)
    with fused(rms_norms(norm)):
        torch.testing.assert_close(norm(x, gate=3), norm(x) * 3)


@pytest.mark.parametrize("what", ["dtype", "autocast", "forward"])
def test_what_cannot_be_one_kernel_is_computed_as_ever(what, llama, taken):
    norm = rms_norms(llama)[0]
    x = torch.randn(2, 64, dtype=torch.bfloat16 if what == "dtype" else torch.float32)
    expected = norm(x)
    if what == "forward":
        expected, norm.forward = expected + 1, lambda x: LlamaRMSNorm.forward(norm, x) + 1
    with fused([norm]), torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        out = norm(x)
    assert torch.equal(out, expected) and out.dtype == expected.dtype and not taken
    assert ("forward" in vars(norm)) == (what == "forward")


@pytest.mark.parametrize("part", ["", "model.layers.1"])
def test_what_is_compiled_is_left_alone(part, llama):
    llama.get_submodule(part).compile(backend="eager")
    assert not rms_norms(llama)


def test_threads_overlap(llama, taken):
    """Each of two has them for as long as it asks for; a third one never."""
    norm = rms_norms(llama)[0]
    x, seen = torch.randn(2, 64), {}
    first, second, third = (threading.Event() for _ in range(3))

    def compute(name):
        taken.clear()
        norm(x)
        seen[name] = len(taken)

    def other():
        with fused([norm]):
            first.set()
            assert second.wait(60)
            compute("other")
        third.set()

    thread = threading.Thread(target=other)
    thread.start()
    assert first.wait(60)
    compute("beside")
    with fused([norm]):
        second.set()
        assert third.wait(60)
        compute("this")
    thread.join()
    compute("after")
    assert seen == {"beside": 0, "other": 1, "this": 1, "after": 0}
    assert "forward" not in vars(norm)


def test_an_interrupt_while_norms_are_put_back(monkeypatch):
    _, pat = pair("Llama")
    calls = []
    restore = norms._restore

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 1:
            restore(args[0][:2], *args[1:])
            raise KeyboardInterrupt
        restore(*args)

    monkeypatch.setattr(norms, "_restore", interrupted)
    with pytest.raises(KeyboardInterrupt), norms.fused(norms.rms_norms(pat)):
        pass
    assert not norms._held and not any("forward" in vars(x) for x in pat.modules())
