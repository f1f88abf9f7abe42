"""Decode steps and prefills as CUDA graphs have them: buffers at fixed addresses, compiled layers.

Capturing needs a GPU, where tests/test_generate.py runs by it; here steps are those of `Rerun`.
"""

import gc
import shutil
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.generation import utils

import pat_hf
from pat_hf import graphs, layers
from pat_hf.cache import pat_cache
from pat_hf.cache.columns import Columns

from .models import MODELS, VOCABULARY, batch, config, pair, pair_of
from .rerun import Rerun, as_on_a_gpu


class Counter(CompileCounter):
    """Counts what is compiled to itself, and whole what gives a sum and not its parts."""

    whole = 0

    def __call__(self, graph, inputs):
        graph = layers._without_last_sum(graph)
        self.whole += any(x.target is torch.zeros_like for x in graph.graph.output_node().args[0])
        return super().__call__(graph, inputs)


@pytest.fixture
def rerun(monkeypatch):
    """Steps are run as on a GPU, with graphs that are run again; layers compile to themselves."""
    counter = Counter()
    compiled = torch.compile(layers._forward, backend=counter, fullgraph=True, dynamic=False)
    torch._dynamo.reset()
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(layers, "_compile", lambda: compiled)
    return counter


def prompts(seed):
    rng = np.random.default_rng(seed)
    shared = rng.integers(2, VOCABULARY, 50 + 7 * seed).tolist()
    return batch([shared + rng.integers(2, VOCABULARY, n + seed).tolist() for n in (3, 9, 20)])


def generate(model, inputs, cache=None, **kwargs):
    kwargs = {"max_new_tokens": 40, "do_sample": False} | kwargs
    torch.manual_seed(0)
    return model.generate(**inputs, past_key_values=cache, **kwargs)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"DeepSeek-V2", "DeepSeek-V3", "Gemma 3n"}))
def test_layers_compile_whole_and_once(rerun, name):
    stock, pat = pair.__wrapped__(name)
    # Hooks stay that note hidden states, and can't be traced.
    pat(**prompts(0), output_hidden_states=True)
    # Each kind of layer, the last norm and, where there are any, rotary embeddings of each kind.
    kinds = getattr(pat.config, "layer_types", None) or [0, 0]
    leaves = {"GPT-2": 1, "OPT": 1, "Gemma 3": 3, "GLM-4.5": 3}.get(name, 2)
    step, prefill = (len(set(layers)) + leaves for layers in (kinds, kinds[:-1]))
    for seed in range(3):
        inputs = prompts(seed)
        cache = pat_hf.PATCache(pat, page_size=16, decode="compiled")
        assert torch.equal(generate(pat, inputs, cache), generate(stock, inputs))
        assert cache.decoding.startswith("compiled"), cache.decoding
        # A decode step and, once layers are known, a packed prefill, but for the last layer.
        assert rerun.frame_count == step + (prefill if seed else 0)
        assert bool(rerun.whole) == (name == "OPT")  # whose layers end with a reshape
        del cache


@pytest.mark.skipif(not shutil.which("g++"), reason="PyTorch compiles with g++")
def test_layers_as_inductor_compiles_them(monkeypatch):
    torch._dynamo.reset()
    as_on_a_gpu(monkeypatch)
    given, without = [], layers._without_last_sum
    monkeypatch.setattr(layers, "_without_last_sum", lambda x: given.append(x) or without(x))
    stock, pat = pair.__wrapped__("Qwen3")
    for seed in range(2):
        cache = pat_hf.PATCache(pat, page_size=16, decode="compiled")
        assert torch.equal(generate(pat, prompts(seed), cache), generate(stock, prompts(seed)))
        assert cache.decoding.startswith("compiled"), cache.decoding
        del cache
    assert len(given) == 6  # layer, last norm and rotary embedding, of steps and of prefills


def _sum(x):
    return x + x.relu()


def _of_what_is_written_to(x):
    out = x * 2
    out.add_(1)
    return x + out


def _written_to(x):
    out = x + x.relu()
    out.view(-1).mul_(2)
    return out


def _with_a_part_written_to(x):
    part = x.relu()
    out = x + part
    part.zero_()
    return out


def _of_two_dtypes(x):
    return x + x.relu().double()


@pytest.mark.parametrize(
    "layer, split",
    [
        (_sum, True),
        (_of_what_is_written_to, True),
        (_written_to, False),
        (_with_a_part_written_to, False),
        (_of_two_dtypes, False),
    ],
)
def test_a_layer_leaves_its_last_sum(layer, split):
    class Layer(nn.Module):
        def forward(self, x):
            return layer(x)

    counter, parts = Counter(), torch.randn(2, 3, 1, 4)
    torch._dynamo.reset()
    compiled = torch.compile(layers._forward, backend=counter, fullgraph=True, dynamic=False)
    out, rest = compiled(Layer(), tuple(parts), (), {}, True)
    expected = layer(parts[0] + parts[1])
    assert torch.equal(layers.Sum(out, rest).total(), expected) and out.dtype == expected.dtype
    assert (counter.frame_count, counter.whole) == (1, not split)


def test_a_norm_that_its_user_compiled(rerun):
    stock, pat = pair.__wrapped__("Llama")
    pat.model.norm.compile(backend="eager")
    for seed in range(2):
        cache = pat_hf.PATCache(pat, page_size=16, decode="compiled")
        assert torch.equal(generate(pat, prompts(seed), cache), generate(stock, prompts(seed)))
        assert cache.decoding.startswith("compiled"), cache.decoding
        del cache


def test_layers_that_run_several_times_are_captured(rerun):
    stock, pat = pair_of(config("HrmText"))
    cache = pat_hf.PATCache(pat, page_size=16, decode="compiled")
    assert torch.equal(generate(pat, prompts(1), cache), generate(stock, prompts(1)))
    assert "or several" in cache.decoding and cache.decoding.startswith("CUDA graph")


def test_a_sum_is_a_tensor():
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    total = layers.Sum(x, y)
    assert total.parts[0] is x and total.parts[1] is y
    assert type(total * 2) is torch.Tensor and torch.equal(total * 2, (x + y) * 2)
    assert total.shape == (2, 3) and total.dtype == torch.float32
    total[0] = 7.0
    total += 1
    assert torch.equal(total, torch.cat([torch.full((1, 3), 8.0), (x + y)[1:] + 1]))
    assert torch.equal(torch.vmap(torch.neg)(layers.Sum(x, y)), -(x + y))
    whole = layers.Sum(x, y)
    whole[0] = 7.0
    assert len(whole.parts) == 1 and torch.equal(whole.parts[0], whole.clone())
    assert torch.equal(whole[1], (x + y)[1]) and (whole[0] == 7).all()


@pytest.mark.parametrize("mode", [{"do_sample": True}, {"num_return_sequences": 2}, {}])
def test_one_capture_serves_a_call_and_the_next_one(rerun, mode):
    stock, pat = pair("Llama")
    mode = {"do_sample": True} | mode
    cache = pat_hf.PATCache(pat, page_size=16)
    for cache.decode in ("eager", "captured"):  # on the CPU, pages move until there are enough
        for seed in range(2):
            inputs = prompts(seed)
            ours, theirs = generate(pat, inputs, cache, **mode), generate(stock, inputs, **mode)
            assert torch.equal(ours, theirs)
    assert Rerun.made == 1
    assert rerun.frame_count == 0


def test_a_capture_in_inference_mode_serves_outside_of_it(rerun):
    stock, pat = pair("Llama")
    cache = pat_hf.PATCache(pat, page_size=16, decode="captured")
    generate(pat, prompts(0), cache)  # on the CPU, pages move until there are enough
    with torch.inference_mode():
        generate(pat, prompts(1), cache)
    made = Rerun.made
    assert torch.equal(generate(pat, prompts(2), cache), generate(stock, prompts(2)))
    assert Rerun.made == made


def test_few_graphs_are_kept_and_none_after_reset(rerun):
    _, pat = pair("Llama")
    cache = pat_hf.PATCache(pat, page_size=16, decode="captured")
    for size in range(1, 12):
        inputs = {name: x[:1].expand(size, -1) for name, x in prompts(0).items()}
        generate(pat, inputs, cache, max_new_tokens=4)
    kept = cache._workspace
    assert [shape[0] for shape in kept.graphs] == [*range(4, 12)]
    assert {batch for _, batch in kept.steps} == {*range(4, 12)}
    cache.reset()
    assert not kept.graphs and not kept.steps


def test_requests_in_turn_have_one_plan_buffer(rerun):
    """A plan goes where another one was if it fits, whatever the proportions of both."""
    _, pat = pair("Llama")
    cache = pat_hf.PATCache(pat, page_size=16, decode="captured")
    shared = prompts(1)
    apart = batch(np.random.default_rng(5).integers(2, VOCABULARY, (3, 40)).tolist())
    for inputs in (shared, apart, shared, apart):
        generate(pat, inputs, cache, max_new_tokens=4)
    made = Rerun.made
    for inputs in (shared, apart):
        generate(pat, inputs, cache, max_new_tokens=4)
    assert Rerun.made == made


class Event:
    """What a GPU would tell; the CPU is always done."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self):
        pass

    synchronize = record


@pytest.fixture
def deferred(monkeypatch):
    """Stops are seen a step late, as on a GPU."""
    undos = []

    def end_step(self, undone):
        undos.append(undone)
        if undone:
            torch.set_rng_state(self._offset)
        self._offset = torch.get_rng_state()

    as_on_a_gpu(monkeypatch, deferred=True)
    monkeypatch.setattr(graphs.Decoder, "end_step", end_step)
    monkeypatch.setattr(torch, "Event", Event)
    return undos


@pytest.mark.skipif(not hasattr(utils, "DeferredStopCheck"), reason="from Transformers 5.17 on")
@pytest.mark.parametrize("mode", [{}, {"do_sample": True, "top_k": 2}, {"max_new_tokens": 9}])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_that_is_seen_late_leaves_no_trace(deferred, mode, streamed):
    stock, pat = pair("Llama")
    inputs = {name: x[:1] for name, x in prompts(0).items()} if streamed else prompts(0)
    length = inputs["input_ids"].shape[1]
    # Each request has a token to stop at, some early and some late.
    plain = generate(stock, inputs, do_sample=False)[:, length:]
    stops = [int(row[3 + 5 * i]) for i, row in enumerate(plain)]
    mode = mode | {"eos_token_id": stops, "pad_token_id": 1}
    outs, streams, randoms = [], [], []
    cache = pat_hf.PATCache(pat, page_size=16, decode="captured")
    for model, given in ((stock, None), (pat, cache)):
        seen = []
        streamer = Mock(put=lambda ids, seen=seen: seen.extend(ids.flatten().tolist()))
        kwargs = {"streamer": streamer} if streamed else {}
        outs.append(generate(model, inputs, given, **mode, **kwargs))
        streams.append(seen)
        randoms.append(torch.rand(1).item())
    assert torch.equal(*outs) and streams[0] == streams[1] and randoms[0] == randoms[1]
    early = outs[0].shape[1] < length + mode.get("max_new_tokens", 40)
    assert deferred[:2] == [False] * 2 and deferred.count(True) == early
    assert cache.get_seq_length() == outs[0].shape[1] - 1
    # What comes after it is right, too.
    more = {"input_ids": torch.cat([outs[0], outs[0][:, :3]], 1)}
    more["attention_mask"] = torch.ones_like(more["input_ids"])
    more["attention_mask"][:, :length] = inputs["attention_mask"]
    assert torch.equal(generate(pat, more, cache), generate(stock, more))


def test_another_page_size_takes_no_layers_over(rerun):
    stock, pat = pair.__wrapped__("Llama")
    for page_size in (16, 32, 32):
        cache = pat_hf.PATCache(pat, page_size=page_size, decode="compiled")
        assert torch.equal(generate(pat, prompts(0), cache), generate(stock, prompts(0)))
        assert cache.decoding.startswith("compiled")
        del cache


def test_other_forwards_go_by_the_layers_as_they_are(rerun):
    _, pat = pair.__wrapped__("Llama")
    cache = pat_hf.PATCache(pat, decode="eager")
    generate(pat, prompts(0), cache, max_new_tokens=2)
    ids = prompts(1)["input_ids"]
    with torch.no_grad():
        alone = pat(ids).logits
        held = layers.Pages(cache.pool, cache.step)
        with layers.compiled_layers(pat, held), ThreadPoolExecutor() as pool:
            beside = pool.submit(torch.no_grad()(pat), ids).result().logits
    assert torch.equal(alone, beside) and rerun.frame_count == 0
    assert all("forward" not in vars(layer) for layer in pat.model.layers)


def test_hidden_states_are_noted_again_after_compiled_steps(rerun):
    stock, pat = pair.__wrapped__("Llama")
    kwargs = {"output_hidden_states": True, "return_dict_in_generate": True, "max_new_tokens": 4}
    for states in (False, True, False, True):
        cache = pat_hf.PATCache(pat, decode="compiled")
        if states:
            ours = generate(pat, prompts(0), cache, **kwargs).hidden_states
            theirs = generate(stock, prompts(0), **kwargs).hidden_states
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(generate(pat, prompts(0), cache), generate(stock, prompts(0)))
            assert cache.decoding.startswith("compiled"), cache.decoding


class Untraceable(nn.Identity):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x


def test_what_does_not_compile_is_captured(rerun):
    stock, pat = pair.__wrapped__("Llama")
    pat.model.layers[0].mlp.act_fn = nn.Sequential(pat.model.layers[0].mlp.act_fn, Untraceable())
    cache = pat_hf.PATCache(pat, decode="compiled")
    assert torch.equal(generate(pat, prompts(0), cache), generate(stock, prompts(0)))
    assert cache.decoding.startswith("CUDA graph (compiled steps failed")


def test_layers_that_share_what_one_of_them_stored_are_captured(rerun):
    stock, pat = pair.__wrapped__("Gemma 3n")
    cache = pat_hf.PATCache(pat, page_size=16, decode="compiled")
    assert torch.equal(generate(pat, prompts(0), cache), generate(stock, prompts(0)))
    assert "store no K and V" in cache.decoding and cache.decoding.startswith("CUDA graph")


def test_beams_go_by_captured_steps(rerun):
    stock, pat = pair("Llama")
    cache = pat_hf.PATCache(pat, page_size=16, decode="captured")
    kwargs = {"num_beams": 4, "num_return_sequences": 2}
    inputs = prompts(0)
    assert torch.equal(generate(pat, inputs, cache, **kwargs), generate(stock, inputs, **kwargs))
    assert 1 <= Rerun.made <= 3


def test_changed_weights_modules_or_sizes_are_captured_anew(rerun):
    model = AutoModelForCausalLM.from_config(MODELS["Llama"], attn_implementation="pat").eval()
    inputs = prompts(0)
    cache = pat_hf.PATCache(model, page_size=16, decode="captured")
    first = generate(model, inputs, cache)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.rand_like(model.model.norm.weight))  # in place
    cache._weights = {}  # on a GPU, a cache that is emptied keeps its addresses
    second = generate(model, inputs, cache)
    assert Rerun.made == 1 and not torch.equal(first, second)
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.detach().clone())
    assert torch.equal(generate(model, inputs, cache), second)
    assert Rerun.made == 2
    generate(model, {name: x[:2] for name, x in inputs.items()}, cache)
    assert Rerun.made == 3


def test_a_failed_capture_falls_back_to_the_model_itself(rerun, monkeypatch):
    pools = []

    class Failing(Rerun):
        def __init__(self, *args):
            pools.append(args[-1])
            if len(pools) == 2:
                raise RuntimeError("no capture today")
            super().__init__(*args)
            self.pool = (0, len(pools))

    monkeypatch.setattr(graphs, "Graph", Failing)
    stock, pat = pair.__wrapped__("Llama")
    cache = pat_hf.PATCache(pat, page_size=16, decode="captured")
    for count in (1, 2, 3):
        inputs = {name: x[:count] for name, x in prompts(0).items()}
        assert torch.equal(generate(pat, inputs, cache), generate(stock, inputs))
        assert ("no capture today" in cache.decoding) == (count == 2)
        assert ("no capture today" in str(cache.report())) == (count == 2)
    assert pools == [None, (0, 1), None]  # what a failed one leaves is not captured into


def test_what_a_replay_would_miss_is_left_to_the_model():
    _, pat = pair("Llama")
    decoder = graphs.Decoder(pat, "captured", 100)
    assert decoder.mode == "eager" and "cpu" in str(decoder)

    class OnGpu:
        device, hf_device_map, config = torch.device("cuda"), {}, pat.config
        _modules, _forward_hooks, _forward_pre_hooks = pat._modules, {}, {}

        def named_modules(self):
            return pat.named_modules()

    assert graphs._obstacle(OnGpu()) is None
    hook = pat.model.layers[0].register_forward_hook(lambda *args: None)
    assert "layers.0" in graphs._obstacle(OnGpu())
    hook.remove()
    OnGpu.hf_device_map = {"a": 0, "b": 1}
    assert "several devices" in graphs._obstacle(OnGpu())
    OnGpu.hf_device_map, OnGpu.config = {}, MODELS["DeepSeek-V3"]
    assert "latent attention" in graphs._obstacle(OnGpu())


def test_auto_goes_by_the_steps_ahead(monkeypatch):
    _, pat = pair("Llama")
    monkeypatch.setattr(graphs, "_obstacle", lambda model: None)
    chosen = {steps: graphs.Decoder(pat, "auto", steps).mode for steps in (1, 50, 100_000)}
    assert chosen == {1: "eager", 50: "captured", 100_000: "compiled"}
    assert graphs.Decoder(pat, "auto", 100_000, compile=False).mode == "captured"


def test_a_workspace_is_passed_on_when_its_cache_goes():
    model = AutoModelForCausalLM.from_config(MODELS["Llama"], attn_implementation="pat").eval()
    first, second = pat_hf.PATCache(model), pat_hf.PATCache(model)
    assert first._workspace is not second._workspace
    kept = first._workspace
    del first
    gc.collect()
    assert pat_hf.PATCache(model)._workspace is kept


@pytest.mark.parametrize("way", ["model", "forward", "wrapper"])
def test_a_model_that_its_user_compiled(way):
    stock, pat = pair.__wrapped__("Llama")
    given = pat
    if way == "model":
        pat.compile(backend="eager")
    elif way == "forward":
        pat.forward = torch.compile(pat.forward, backend="eager")
    else:
        given = torch.compile(pat, backend="eager")
    torch._dynamo.reset()
    cache = pat_hf.PATCache(given, page_size=16)
    for seed in range(2):
        inputs = prompts(seed)
        ours = generate(given, inputs, cache, max_new_tokens=5)
        assert torch.equal(ours, generate(stock, inputs, max_new_tokens=5))


@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"num_return_sequences": 2}])
@pytest.mark.parametrize("decode", ["captured", "eager"])
def test_the_first_step_is_planned_before_the_first_token(rerun, monkeypatch, mode, decode):
    stock, pat = pair("Llama")
    mode = {"do_sample": "num_return_sequences" in mode} | mode
    plans, seen = Mock(wraps=pat_cache.make_plan), []
    monkeypatch.setattr(pat_cache, "make_plan", plans)

    def note(input_ids, scores):
        seen.append(plans.call_count)
        return scores

    cache = pat_hf.PATCache(pat, page_size=16, decode=decode)
    mode |= {"max_new_tokens": 3, "logits_processor": [note]}
    ours = generate(pat, prompts(0), cache, **mode)
    before, after, last = seen
    assert torch.equal(ours, generate(stock, prompts(0), **mode))
    # A prefill has two: another one for the tokens that go through all of its last layer.
    assert (before == 2) == (decode == "eager") and after == last
    assert (before == after) == (decode == "captured")
    plans.reset_mock()
    generate(pat, prompts(1), cache, **mode | {"max_new_tokens": 1})
    assert plans.call_count == 2


@pytest.mark.parametrize("limited", [False, True])
def test_a_step_that_never_comes_leaves_no_trace(rerun, limited):
    """All requests end with their first token; and there may be pages for the prompts alone."""
    stock, pat = pair("Llama")
    inputs = prompts(0)
    ends = generate(stock, inputs, max_new_tokens=1)[:, -1].tolist()
    alone = pat_hf.PATCache(pat, page_size=16, decode="captured")
    generate(pat, inputs, alone, max_new_tokens=1)
    limit = 16 * alone.pool.used if limited else None
    cache = pat_hf.PATCache(pat, page_size=16, max_tokens=limit, decode="captured")
    kwargs = {"eos_token_id": ends, "pad_token_id": 1}
    for _ in range(2):
        assert torch.equal(
            generate(pat, inputs, cache, **kwargs), generate(stock, inputs, **kwargs)
        )
        assert cache.dense_tokens == int(inputs["attention_mask"].sum())
        assert cache.pool.used == alone.pool.used
        cache.pool.check(list(cache.prefixes))
    assert Rerun.made == 0


def test_requests_that_end_at_once_leave_their_pages_to_others(rerun):
    stock, pat = pair("Llama")
    inputs = batch(np.random.default_rng(0).integers(2, VOCABULARY, (4, 32)).tolist())
    plain = generate(stock, inputs, max_new_tokens=30)[:, 32:]
    ends = plain[:3, 0].tolist()
    assert not set(ends) & set(plain[3].tolist())
    kwargs = {"eos_token_id": ends, "pad_token_id": 1, "max_new_tokens": 30}
    cache = pat_hf.PATCache(pat, page_size=16, max_tokens=16 * 10, decode="captured")
    assert torch.equal(generate(pat, inputs, cache, **kwargs), generate(stock, inputs, **kwargs))


def _padding(model, input_ids, generation_config, **kwargs):
    """A loop of the caller's own, in which the first request's last token is padding."""
    given = {"past_key_values": kwargs["past_key_values"]}
    mask = kwargs["attention_mask"]
    logits = [model._prefill(input_ids, generation_config, kwargs).logits[:, -1]]
    for _ in range(2):
        new = torch.ones_like(mask[:, :1])
        new[0] = 0
        mask = torch.cat([mask, new], 1)
        positions = (mask.cumsum(1) - 1)[:, -1:]
        ids = logits[-1].argmax(-1, keepdim=True)
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, **given)
        logits.append(out.logits[:, -1])
    return torch.stack(logits)[:, 1:]


@pytest.mark.parametrize("inside", [True, False])
def test_a_loop_of_the_callers_own_may_pad(rerun, inside):
    stock, pat = pair("Llama")
    cache, outs = pat_hf.PATCache(pat, page_size=16, decode="captured"), []
    for seed in range(2):
        for model, given in ((stock, DynamicCache(config=stock.config)), (pat, cache)):
            kwargs = prompts(seed) | {"past_key_values": given}
            with torch.no_grad():
                if inside:
                    outs.append(generate(model, prompts(seed), given, custom_generate=_padding))
                else:
                    settings = GenerationConfig(max_length=200)
                    outs.append(
                        _padding(model, generation_config=settings, **kwargs, use_cache=True)
                    )
        torch.testing.assert_close(outs[-1], outs[-2], atol=1e-4, rtol=1e-4)
        real = int(prompts(seed)["attention_mask"].sum())
        assert cache.dense_tokens == real + 2 * 2
        generate(pat, prompts(2), cache, max_new_tokens=3)


def test_a_prefill_is_refused_for_another_model():
    _, pat = pair.__wrapped__("Llama")
    _, other = pair("Llama")
    kwargs = {"past_key_values": pat_hf.PATCache(pat), "use_cache": True}
    with pytest.raises(ValueError, match="another model"):
        other._prefill(prompts(0)["input_ids"], GenerationConfig(max_length=200), kwargs)


@pytest.mark.parametrize("decode", ["captured", "compiled"])
def test_a_model_that_asks_whether_there_is_a_cache(rerun, monkeypatch, decode):
    stock, pat = pair.__wrapped__("Llama")
    expected = [generate(stock, prompts(seed)) for seed in range(2)]
    own = type(pat.model).forward

    def forward(self, *args, past_key_values=None, **kwargs):
        past_key_values = past_key_values or DynamicCache(config=self.config)
        return own(self, *args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(type(pat.model), "forward", forward)
    for seed in range(2):
        cache = pat_hf.PATCache(pat, page_size=16, decode=decode)
        assert torch.equal(generate(pat, prompts(seed), cache), expected[seed])
        assert "as asked for" in cache.decoding
        del cache


def test_layers_are_expected_of_the_same_model_only(rerun):
    """A prefill that breaks off before its first layer leaves nothing to be gone by."""
    model = AutoModelForCausalLM.from_config(MODELS["Llama"], attn_implementation="pat").eval()
    generate(model, prompts(0), pat_hf.PATCache(model, page_size=16, decode="compiled"))
    gc.collect()
    cache = pat_hf.PATCache(model, page_size=16, decode="compiled")
    hook = model.model.embed_tokens.register_forward_hook(Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompts(0), cache)
    hook.remove()
    assert len(cache.pool.numbers) == 3 and not cache.pool.layers
    model.to(torch.bfloat16)
    generate(model, prompts(0), cache)
    assert cache.pool.layers[0].keys.dtype == torch.bfloat16
    assert cache.decoding.startswith("compiled, CUDA graph (as asked for")


def test_what_a_graph_takes_for_granted():
    _, pat = pair.__wrapped__("Llama")
    states = [graphs._state(pat)]
    assert states[0] == graphs._state(pat)
    pat.model.layers[1].train()
    states.append(graphs._state(pat))
    pat.model.rotary_emb.inv_freq = pat.model.rotary_emb.inv_freq.clone()
    states.append(graphs._state(pat))
    assert len(set(states)) == 3


@pytest.mark.parametrize("change", [lambda columns: columns.select([1, 0]), lambda c: c.cut(1)])
def test_ends_are_found_after_the_batch_has_changed(change):
    columns = Columns(np.ones((2, 3), bool))
    columns.stop_at([7])
    for ids in ([1, 1], [2, 2], [3, 3]):
        columns.fed.append(torch.tensor(ids)[:, None])
        columns.advance(1)
        columns.find_ends()
    change(columns)
    columns.fed.append(torch.tensor([[7], [4]]))
    columns.advance(1)
    columns.find_ends()
    assert columns.alive.tolist() == [False, True]


def test_garbage_waits_for_the_end_of_a_capture():
    with pytest.raises(KeyError), graphs._uncollected():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
