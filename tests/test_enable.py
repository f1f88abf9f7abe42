"""enable() and enabled(): everything is taken over, and nothing of it is left behind."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, DynamicCache, GenerationConfig

import pat_hf

from .models import batch, pair
from .test_generate import BATCHES

INPUTS = batch(BATCHES["two-levels"])


def remains(model) -> dict:
    """All that a patch could have changed: attributes, hooks, attention."""
    return {
        "attributes": sorted(vars(model)),
        "hooks": [
            len(hooks)
            for module in model.modules()
            for name, hooks in vars(module).items()
            if name.endswith("_hooks")
        ],
        "methods": [type(model).generate, model.generate.__func__, model.forward.__func__],
        "attention": model.config._attn_implementation,
    }


def tokens_through(model, **kwargs) -> tuple[torch.Tensor, int]:
    """The sequences, and how many tokens went through the model."""
    seen = []
    hook = model.model.embed_tokens.register_forward_hook(
        lambda module, args, out: seen.append(args[0].numel())
    )
    out = model.generate(**INPUTS, max_new_tokens=4, do_sample=False, **kwargs)
    hook.remove()
    return out, sum(seen)


def test_a_block_takes_over_and_leaves_no_trace():
    model = copy.deepcopy(pair("Llama")[0])
    before = remains(model)
    stock, dense = tokens_through(model)
    with pat_hf.enabled(model, page_size=16) as same:
        assert same is model
        ours, distinct = tokens_through(model)
        again, _ = tokens_through(model)
    assert remains(model) == before
    assert torch.equal(ours, stock) and torch.equal(again, stock)
    assert distinct < dense / 1.5
    assert tokens_through(model)[1] == dense


def test_an_exception_and_a_nested_block_leave_no_trace():
    model = copy.deepcopy(pair("Llama")[0])
    before = remains(model)
    with pytest.raises(KeyError), pat_hf.enabled(model):
        with pat_hf.enabled(model):
            pass
        assert model.config._attn_implementation == "pat"
        raise KeyError
    assert remains(model) == before
    pat_hf.disable(model)
    assert remains(model) == before


def test_a_cache_of_the_callers_own_is_respected():
    model = copy.deepcopy(pair("Llama")[0])
    stock, dense = tokens_through(model)
    pat_hf.enable(model)
    own = DynamicCache(config=model.config)
    out, count = tokens_through(model, past_key_values=own)
    assert torch.equal(out, stock) and count == dense
    assert own.get_seq_length() == INPUTS["input_ids"].shape[1] + 3
    for kwargs in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(tokens_through(model, **kwargs)[0], stock)
    uncached = GenerationConfig(use_cache=False, max_new_tokens=2, do_sample=False)
    ids = INPUTS["input_ids"][:1]
    assert torch.equal(model.generate(ids, uncached), model.generate(ids, max_new_tokens=2))


def test_what_the_models_own_config_asks_for():
    """As `generate()` takes it: where the call's config says nothing, and "hybrid" for nothing."""
    model = copy.deepcopy(pair("Llama")[0])
    stock, dense = tokens_through(model)
    with pat_hf.enabled(model):
        model.generation_config.cache_implementation = "hybrid"
        out, count = tokens_through(model)
        assert torch.equal(out, stock) and count < dense
        model.generation_config.use_cache = False
        given = GenerationConfig(max_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(**INPUTS, generation_config=given), stock)


def test_what_is_no_model():
    with pytest.raises(TypeError, match="not a str"):
        pat_hf.enable("facts-llama")
    with pytest.raises(TypeError, match="not a str"), pat_hf.enabled("facts-llama"):
        pass


def test_a_copy_is_enabled_by_itself():
    model = copy.deepcopy(pair("Llama")[0])
    before = remains(model)
    pat_hf.enable(model, page_size=16)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.neg_()
    stock = copy.deepcopy(pair("Llama")[0])
    stock.load_state_dict(twin.state_dict())
    dense = tokens_through(stock)[1]
    for enabled, same in ((model, pair("Llama")[0]), (twin, stock)):
        out, distinct = tokens_through(enabled)
        assert torch.equal(out, tokens_through(same)[0]) and distinct < dense
        pat_hf.disable(enabled)
        assert remains(enabled) == before


@pytest.mark.parametrize(
    "first, second, words",
    [({}, {"keep_bytes": 9}, "keep_bytes.*each call"), ({}, {"page_size": 64}, "disable")],
)
def test_options_that_would_do_nothing(first, second, words):
    model = copy.deepcopy(pair("Llama")[0])
    pat_hf.enable(model, **first)
    pat_hf.enable(model)
    with pytest.raises(ValueError, match=words):
        pat_hf.enable(model, **second)


def test_a_model_that_cannot_be_taken_over_is_left_as_it_was():
    config = BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=2)
    model = AutoModelForCausalLM.from_config(config)
    before = remains(model)
    with pytest.raises(ValueError, match="Bloom"):
        pat_hf.enable(model)
    assert remains(model) == before


def test_a_model_in_the_wrapper_of_torch_compile():
    model = copy.deepcopy(pair("Llama")[0])
    stock, dense = tokens_through(model)
    wrapper = torch.compile(model, backend="eager")
    before = remains(model)
    with pat_hf.enabled(wrapper):
        ours, distinct = tokens_through(model)
    assert remains(model) == before and distinct < dense and torch.equal(ours, stock)
    pat_hf.enable(wrapper)
    pat_hf.disable(wrapper)
    assert remains(model) == before


def test_blocks_that_overlap():
    model = copy.deepcopy(pair("Llama")[0])
    before = remains(model)
    first, second = pat_hf.enabled(model), pat_hf.enabled(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert tokens_through(model)[1] < tokens_through(pair("Llama")[0])[1]
    second.__exit__(None, None, None)
    assert remains(model) == before


def test_an_enabled_model_from_a_file_is_enabled_anew(tmp_path):
    model = pair.__wrapped__("Llama")[0]
    pat_hf.enable(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    pat_hf.enable(loaded)
    assert tokens_through(loaded)[1] == tokens_through(model)[1]
    pat_hf.disable(loaded)
    assert loaded.config._attn_implementation == "sdpa" and "generate" not in vars(loaded)


def test_a_block_leaves_enabled_what_was():
    model = copy.deepcopy(pair("Llama")[0])
    pat_hf.enable(model)
    with pat_hf.enabled(model):
        pass
    assert tokens_through(model)[1] < tokens_through(pair("Llama")[0])[1]


def test_enabling_again_leaves_a_wrapper_alone():
    model = copy.deepcopy(pair("Llama")[0])
    pat_hf.enable(model)
    inner = model.generate
    model.generate = wrapper = lambda *args, **kwargs: inner(*args, **kwargs)
    pat_hf.enable(model)
    assert model.generate is wrapper
