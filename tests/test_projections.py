"""Projections of the same hidden states: one product, and the same model before and after."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM

from pat_hf.graphs import _state
from pat_hf.projections import joined, lay_together

from .models import MODELS

IDS = torch.arange(2, 14).view(2, 6)
# Linear layers in three decoder layers: q, k, v, o, gate, up, down; the head.
PRODUCTS = {"Llama": (22, 13), "Qwen2, 6 heads on 2": (22, 13), "Phi-3": (13, 13), "Phi": (19, 13)}


def model_of(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[name])).eval()


def products(model, ids=IDS):
    """Logits, and how many linear layers they took."""
    with torch.no_grad(), torch.profiler.profile() as profile:
        logits = model(ids, use_cache=False).logits
    return logits, sum(x.count for x in profile.key_averages() if x.key == "aten::linear")


@pytest.mark.parametrize("name", PRODUCTS)
def test_as_many_products_as_inputs(name):
    model = model_of(name)
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    plain, many = products(model)
    with joined(lay_together(model)[0]):
        together, few = products(model)
        meanwhile, _ = lay_together(model)  # as a call in another thread would
    assert (many, few) == PRODUCTS[name]
    torch.testing.assert_close(together, plain, atol=1e-5, rtol=1e-5)
    assert [*map(id, model.modules())] == [*map(id, modules)]
    with joined(meanwhile):
        assert products(model)[1] == few
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert torch.equal(products(model)[0], plain)


def test_weights_stay_what_they_are_to_others(tmp_path):
    model, other = model_of("Llama"), model_of("Llama")
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.1) for x in (model, other)]
    laid, _ = lay_together(model)
    for each, optimizer in zip((model, other), optimizers, strict=True):
        each(IDS, labels=IDS).loss.backward()
        optimizer.step()
    with joined(laid):
        torch.testing.assert_close(products(model)[0], products(other)[0], atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    for again in (copy.deepcopy(model), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(products(again.eval())[0], products(model)[0])
    # A copy's weights lie apart, until they are moved in turn.
    address = model.model.layers[0].mlp.gate_proj.weight.data_ptr()
    lay_together(model)
    assert address == model.model.layers[0].mlp.gate_proj.weight.data_ptr()


@pytest.mark.parametrize("who", ["a view", "a flat buffer", "a hook of another library"])
def test_what_others_hold_is_left_alone(who):
    model = model_of("Llama")
    attention = model.model.layers[0].self_attn
    weight = attention.k_proj.weight
    if who == "a view":
        held = weight.data
    elif who == "a flat buffer":
        held = torch.cat([torch.zeros(8), weight.data.flatten()])
        weight.data = held[8:].view_as(weight)
    else:
        attention.k_proj.forward = attention.k_proj.forward
    with joined(lay_together(model)[0]):
        assert products(model)[1] == 22 - 9 + 2
    if who != "a hook of another library":
        held.zero_()
        assert not weight.any()


def test_what_was_left_stays_as_long_as_it_is_held():
    """Another call's graph may read it, though what referred to it is gone."""
    model = model_of("Llama")
    weight = model.model.layers[0].self_attn.q_proj.weight
    address, other = weight.data_ptr(), weight.data
    products, left = lay_together(model)
    del other
    assert len(lay_together(model)[0]) == len(products) and weight.data_ptr() == address
    del left
    assert len(lay_together(model)[0]) == len(products) + 1 and weight.data_ptr() != address


def test_weights_without_memory_of_their_own_are_left_alone():
    """As those of quantised models are."""
    model, plain = model_of("Llama"), model_of("Llama")
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(layer.self_attn, name)
            held = TwoTensor(linear.weight.data, linear.weight.data.clone())
            linear.weight = nn.Parameter(held, requires_grad=False)
    before = _state(model)
    with joined(lay_together(model)[0]), torch.no_grad():
        logits = model(IDS, use_cache=False).logits
    assert torch.equal(logits.a, products(plain)[0])
    model.model.layers[1].self_attn.q_proj.weight.b = torch.zeros(64, 64)
    assert _state(model) != before


def test_a_layer_that_is_asked_by_itself_answers():
    model = model_of("Qwen2, 6 heads on 2")
    laid, _ = lay_together(model)
    attention = model.model.layers[0].self_attn
    first, second = torch.randn(2, 3, 96)
    names = ["v_proj", "k_proj", "q_proj", "k_proj"]
    plain = [getattr(attention, name)(x) for name in names for x in (first, second)]
    with joined(laid), torch.no_grad():
        ours = [getattr(attention, name)(x) for name in names for x in (first, second)]
        assert isinstance(attention.q_proj, nn.Linear) and attention.q_proj.bias is not None
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_another_thread_is_given_its_own():
    model = model_of("Llama")
    attention, x = model.model.layers[0].self_attn, torch.randn(2, 3, 64)
    with joined(lay_together(model)[0]), torch.no_grad(), ThreadPoolExecutor() as pool:
        held = attention.q_proj.held
        attention.q_proj(x)
        before, other = list(held), torch.randn(2, 3, 64)
        ours = pool.submit(torch.no_grad()(attention.q_proj), other).result()
        assert held[0] is before[0]
    torch.testing.assert_close(ours, attention.q_proj(other))  # threads may round otherwise


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_with_a_scripted_module():
    model = model_of("Llama")
    plain, many = products(model)
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.jit.script(nn.SiLU())
    with joined(lay_together(model)[0]):
        together, few = products(model)
    torch.testing.assert_close(together, plain, atol=1e-5, rtol=1e-5)
    assert (many, few) == PRODUCTS["Llama"]
