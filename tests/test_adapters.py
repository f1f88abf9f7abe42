"""PEFT adapters on one cache: no K or V of one is read under another."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from peft.helpers import rescale_adapter_scale

import pat_hf
from pat_hf import graphs

from .models import batch, pair
from .test_generate import text

SYSTEM = text(40, 31)
NAMES = ["first", "second"]
PROMPTS = [SYSTEM + text(3, 1), SYSTEM, SYSTEM + text(9, 2), SYSTEM + text(3, 1), SYSTEM[:30]]
MIXED = ["second", "first", "__base__", "first", "second"]


def adapted(model):
    """Two adapters with weights that matter; alike for alike models."""
    torch.manual_seed(1)
    model = copy.deepcopy(model)
    config = LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "up_proj"], r=4)
    model = get_peft_model(model, config, adapter_name=NAMES[0])
    model.add_adapter(NAMES[1], config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model.eval()


@pytest.fixture
def models():
    return [adapted(model) for model in pair("Llama")]


def generate(model, prompts, cache=None, **kwargs):
    torch.manual_seed(0)
    kwargs = {"max_new_tokens": 8, "do_sample": False} | kwargs
    return model.generate(**batch(prompts), past_key_values=cache, **kwargs)


def same(models, cache, prompts, **kwargs):
    """As stock; returns the prompt tokens that were computed."""
    stock, pat = models
    before = cache.prefilled
    ours = generate(pat, prompts, cache, **kwargs)
    assert torch.equal(ours, generate(stock, prompts, **kwargs))
    cache.pool.check(cache.prefixes)
    return cache.prefilled - before


def test_the_adapters_matter(models):
    stock, _ = models
    outs = set()
    for name in [*NAMES, "__base__"]:
        out = generate(stock, [SYSTEM], adapter_names=[name])
        outs.add(tuple(out[0].tolist()))
    assert len(outs) == 3


@pytest.mark.parametrize("chunk", [7, 8192])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_a_batch_of_several_adapters(models, mode, chunk):
    cache = pat_hf.PATCache(models[1], 1 << 30, page_size=16, prefill_tokens=chunk)
    # Each adapter computes what its rows share once.
    assert same(models, cache, PROMPTS, adapter_names=MIXED, **mode) == 43 + 43 + 49
    assert same(models, cache, PROMPTS, adapter_names=MIXED, **mode) == 0
    others = MIXED[1:] + MIXED[:1]
    assert same(models, cache, PROMPTS, adapter_names=others, **mode) == 9
    assert cache.fallback is None
    assert cache.tuned and not any(layer._forward_pre_hooks for layer in cache.tuned)


def test_changing_adapters_between_calls(models):
    cache = pat_hf.PATCache(models[1], 1 << 30, page_size=16)
    computed = []
    for name in [*NAMES, *NAMES]:
        for model in models:
            model.set_adapter(name)
        computed.append(same(models, cache, PROMPTS))
    assert computed == [52, 52, 0, 0]
    with models[0].disable_adapter(), models[1].disable_adapter():
        assert same(models, cache, PROMPTS) == 52
    # A mixed batch finds what each adapter has stored by itself.
    assert same(models, cache, PROMPTS, adapter_names=MIXED) == 0
    # Answers, too, are under the adapter that gave them.
    turns = generate(models[1], [SYSTEM], cache)[:, :-1].tolist()
    for model in models:
        model.set_adapter(NAMES[0])
    assert same(models, cache, turns) == 7


def test_adapters_that_transformers_holds_itself():
    models = [copy.deepcopy(model) for model in pair("Llama")]
    for model in models:
        torch.manual_seed(2)
        for name in NAMES:
            config = LoraConfig(target_modules=["v_proj"], r=4, init_lora_weights=False)
            model.add_adapter(config, name)
        model.eval()
    cache = pat_hf.PATCache(models[1], 1 << 30, page_size=16)
    computed = []
    for name in NAMES * 2:
        for model in models:
            model.set_adapter(name)
        computed.append(same(models, cache, [SYSTEM]))
    assert computed == [40, 40, 0, 0]
    for model in models:
        model.disable_adapters()
    assert same(models, cache, [SYSTEM]) == 40


def test_plain_forwards_under_another_adapter_are_not_kept(models):
    stock, pat = models
    cache = pat_hf.PATCache(pat, 1 << 30, page_size=16)
    pat.set_adapter(NAMES[0])
    stock.set_adapter(NAMES[0])
    same(models, cache, [SYSTEM])
    pat.set_adapter(NAMES[1])
    more = text(5, 3)
    pat.get_base_model()(input_ids=torch.tensor([more]), past_key_values=cache)
    pat.set_adapter(NAMES[0])
    assert same(models, cache, [generate(stock, [SYSTEM])[0, :-1].tolist() + more]) == 7 + 5


def test_changed_scale_and_merged_weights_are_other_adapters():
    models = [adapted(model) for model in pair("Llama")]
    cache = pat_hf.PATCache(models[1], 1 << 30, page_size=16)
    assert same(models, cache, [SYSTEM]) == 40
    for model in models:
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale(NAMES[0], 3)
    assert same(models, cache, [SYSTEM]) == 40
    for model in models:
        model.merge_adapter()
    assert same(models, cache, [SYSTEM]) == 40


def test_pins_are_of_the_active_adapter(models):
    cache = pat_hf.PATCache(models[1], 0, page_size=16)
    for model in models:
        model.set_adapter(NAMES[0])
    cache.pin(SYSTEM)
    same(models, cache, [SYSTEM])
    for model in models:
        model.set_adapter(NAMES[1])
    with pytest.raises(ValueError, match="not pinned; 1 others"):
        cache.unpin(SYSTEM)
    assert same(models, cache, [SYSTEM]) == 40
    assert same(models, cache, [text(5, 1)]) == 5
    for model in models:
        model.set_adapter(NAMES[0])
    assert same(models, cache, [SYSTEM]) == 0


def test_only_what_no_adapter_computed_is_saved(models, tmp_path):
    cache = pat_hf.PATCache(models[1], 1 << 30, page_size=16)
    same(models, cache, PROMPTS, adapter_names=MIXED)
    cache.save(tmp_path / "file")
    # The same base model without PEFT may read it.
    plain = pair("Llama")
    loaded = pat_hf.PATCache.load(tmp_path / "file", plain[1], page_size=16)
    assert same(plain, loaded, PROMPTS) == 3
    assert loaded.report().found_tokens == 49


def test_names_that_do_not_fit_the_batch(models):
    cache = pat_hf.PATCache(models[1])
    kwargs = {"adapter_names": NAMES, "num_return_sequences": 2, "do_sample": True}
    with pytest.raises(ValueError, match="2 names and the batch 4 rows.*num_return_sequences"):
        generate(models[1], PROMPTS[:2], cache, **kwargs)
    assert len(cache.prefixes) == 0
    # By hand.
    prompts = [prompt for prompt in PROMPTS[:2] for _ in range(2)]
    names = [name for name in NAMES for _ in range(2)]
    same(models, cache, prompts, adapter_names=names, do_sample=True)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj", "v_proj"], r=4, use_dora=True),
        LoraConfig(target_modules=["embed_tokens"], r=4, modules_to_save=["lm_head"]),
        IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        OFTConfig(target_modules=["q_proj", "k_proj"], r=4, oft_block_size=0),
        VeraConfig(target_modules=["q_proj", "o_proj"], r=4),
        LNTuningConfig(target_modules=["input_layernorm"]),
        TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=SYSTEM[3:9]),
    ],
    ids=lambda config: "DoRA" if getattr(config, "use_dora", False) else config.peft_type.value,
)
def test_adapters_of_other_kinds(config, tmp_path):
    models = []
    for model in pair("Llama"):
        torch.manual_seed(1)
        models.append(get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).eval())
        for weight in models[-1].parameters():
            if weight.requires_grad:
                torch.nn.init.normal_(weight, std=0.2)
    cache = pat_hf.PATCache(models[1], 1 << 30, page_size=16)
    assert [same(models, cache, PROMPTS) for _ in range(2)] == [52, 0]
    with models[0].disable_adapter(), models[1].disable_adapter():
        assert same(models, cache, PROMPTS) == 52
        plain = generate(models[0], PROMPTS)
    assert not torch.equal(plain, generate(models[0], PROMPTS))
    cache.save(tmp_path / "prompts")
    loaded = pat_hf.PATCache.load(tmp_path / "prompts", pair("Llama")[1], page_size=16)
    assert same(pair("Llama"), loaded, PROMPTS) == 0  # what no adapter computed


def test_an_adapter_that_begins_inside_the_prompts():
    """aLoRA: tokens before its invocation are the base model's, so equal ones may differ."""
    models = []
    for model in pair("Llama"):
        torch.manual_seed(1)
        targets = ["q_proj", "k_proj", "v_proj"]
        config = LoraConfig(
            target_modules=targets,
            r=4,
            alora_invocation_tokens=SYSTEM[30:32],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        models.append(get_peft_model(copy.deepcopy(model), config).eval())
    cache = pat_hf.PATCache(models[1], 1 << 30, page_size=16)
    for _ in range(2):
        assert same(models, cache, PROMPTS) == 0
        assert "aLoRA" in cache.fallback
    assert not torch.equal(generate(models[0], PROMPTS), generate(pair("Llama")[0], PROMPTS))


@pytest.mark.parametrize(
    "config",
    [
        *(
            kind(num_virtual_tokens=3, task_type="CAUSAL_LM")
            for kind in (PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig)
        ),
        AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM"),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_virtual_tokens_are_refused(config):
    model = get_peft_model(copy.deepcopy(pair("Llama")[1]), config)
    cache = pat_hf.PATCache(model)
    words = f"{config.peft_type.value} puts virtual tokens.*DynamicCache"
    with pytest.raises(ValueError, match=words):
        generate(model, [SYSTEM], cache)


def test_captured_steps_know_the_factors(models):
    _, pat = models
    before = graphs._state(pat.get_base_model())
    with rescale_adapter_scale(pat, 0.1):
        assert graphs._state(pat.get_base_model()) != before
    assert graphs._state(pat.get_base_model()) == before


def test_a_loop_of_ones_own_on_a_fresh_cache():
    def loop(model, input_ids, **kwargs):
        model(input_ids=input_ids, past_key_values=kwargs["past_key_values"])
        return input_ids

    models = [adapted(model) for model in pair("Llama")]
    cache = pat_hf.PATCache(models[1], keep_bytes=1 << 30, page_size=16)
    kwargs = {"custom_generate": loop, "max_new_tokens": 5}
    models[1].generate(**batch([SYSTEM]), past_key_values=cache, **kwargs)
    with models[0].disable_adapter(), models[1].disable_adapter():
        assert same(models, cache, [SYSTEM + [5]]) == len(SYSTEM) + 1


@pytest.mark.parametrize("unloaded", ["merge_and_unload", "unload"])
def test_adapters_that_are_gone_may_be_in_the_weights(models, unloaded):
    cache = pat_hf.PATCache(models[1], keep_bytes=1 << 30)
    with models[0].disable_adapter(), models[1].disable_adapter():
        same(models, cache, PROMPTS)
    same([getattr(model, unloaded)() for model in models], cache, PROMPTS)


def test_an_adapter_that_is_added_or_removed_changes_nothing_stored(models):
    cache = pat_hf.PATCache(models[1], keep_bytes=1 << 30)
    same(models, cache, PROMPTS)
    config = LoraConfig(target_modules=["q_proj"], r=2)
    for model in models:
        model.add_adapter("third", config)
    assert same(models, cache, PROMPTS) == 0
    for model in models:
        model.delete_adapter("third")
    assert same(models, cache, PROMPTS) == 0


def test_another_adapter_of_the_same_name(models):
    cache = pat_hf.PATCache(models[1], keep_bytes=1 << 30)
    before = generate(models[0], PROMPTS)
    same(models, cache, PROMPTS)
    for model in models:
        config = model.peft_config["first"]
        model.delete_adapter("first")
        model.add_adapter("first", config)
        model.set_adapter("first")
        torch.manual_seed(2)
        for name, weight in model.named_parameters():
            if "first" in name:
                torch.nn.init.normal_(weight, std=0.3)
    assert same(models, cache, PROMPTS) == 52
    assert not torch.equal(before, generate(models[0], PROMPTS))
    assert same(models, cache, PROMPTS) == 0


def test_offloaded_adapters_are_the_same_in_each_call(models):
    for model in models:
        cpu_offload(model.get_base_model(), execution_device=torch.device("cpu"))
    cache = pat_hf.PATCache(models[1], keep_bytes=1 << 30)
    assert same(models, cache, PROMPTS) == 52
    assert same(models, cache, PROMPTS) == 0


def test_dropout_of_an_adapter_alone():
    models = [
        get_peft_model(
            copy.deepcopy(model),
            LoraConfig(target_modules=["v_proj"], r=4, lora_dropout=0.5, init_lora_weights=False),
        )
        for model in pair("Llama")
    ]
    models[1].load_state_dict(models[0].state_dict())
    cache = pat_hf.PATCache(models[1], keep_bytes=1 << 30)
    assert models[1].training and not models[1].get_base_model().training
    generate(models[1], PROMPTS, cache)
    same([model.eval() for model in models], cache, PROMPTS)
