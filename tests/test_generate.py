"""generate() on a PATCache against stock Transformers: sdpa with DynamicCache, in float32."""

import copy
import functools
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation import EosTokenCriteria

import pat_hf
from pat_hf.cache import pat_cache
from pat_hf.cache.page_pool import SINK
from pat_hf.kernels.plan import Plan

from .models import CORE, EAGER, VOCABULARY, batch, pair, pair_of

RNG = np.random.default_rng(0)


def text(n, seed=None):
    rng = RNG if seed is None else np.random.default_rng(seed)
    return rng.integers(2, VOCABULARY, n).tolist()


SYSTEM, DOCUMENT = text(70, 1), text(45, 2)
BATCHES = {
    "ragged": [SYSTEM + text(n, n) for n in (1, 5, 17, 40)],
    "two-levels": [SYSTEM + DOCUMENT + text(n, n) for n in (3, 9)]
    + [SYSTEM + text(n, n) for n in (2, 30)],
    "identical": [SYSTEM] * 4,
    "prefix-of-another": [SYSTEM, SYSTEM[:30], SYSTEM[:1], SYSTEM + [5]],
    "disjoint": [text(n, n) for n in (33, 12, 1)],
    "one": [text(21, 3)],
}
MODES = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "samples-3": {"do_sample": True, "num_return_sequences": 3},
    "beams-4": {"num_beams": 4, "do_sample": False},
}


def generate(model, inputs, cache=None, **kwargs):
    torch.manual_seed(0)
    return model.generate(
        **inputs, past_key_values=cache, max_new_tokens=kwargs.pop("max_new_tokens", 40), **kwargs
    )


@pytest.mark.parametrize("name", CORE)
@pytest.mark.parametrize("prompts", BATCHES)
def test_same_tokens(name, prompts):
    stock, pat = pair(name)
    inputs = batch(BATCHES[prompts])
    ours = generate(pat, inputs, pat_hf.PATCache(pat), do_sample=False)
    assert torch.equal(ours, generate(stock, inputs, do_sample=False))


@pytest.mark.parametrize("name", ["Mistral", "Gemma 2"])
def test_layers_with_windows_read_no_more_than_is_in_them(name):
    stock, pat = pair(name)
    cache = pat_hf.PATCache(pat, page_size=16)
    inputs = batch([text(300, 7) + text(n, n) for n in (20, 30)])
    ours = generate(pat, inputs, cache, do_sample=False)
    assert torch.equal(ours, generate(stock, inputs, do_sample=False))
    tokens = [Plan.read(plan).chunks[:, 1].sum() for plan in cache.step.tensors]
    # A window of 19 lies in 3 chunks of 16 at most; what is generated takes 4 more.
    assert tokens[0] > 300 and tokens[1] <= 2 * 7 * 16


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT-2"])
def test_same_tokens_in_mode(name, mode):
    stock, pat = pair(name)
    inputs = batch(BATCHES["two-levels"])
    ours = generate(pat, inputs, pat_hf.PATCache(pat, page_size=16), **MODES[mode])
    assert torch.equal(ours, generate(stock, inputs, **MODES[mode]))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_logits_of_every_step_under_forced_tokens(data):
    """Forced tokens: one near-tie can't hide or cascade."""
    name = data.draw(st.sampled_from(list(CORE)))
    stock, pat = pair(name)
    prompts = []
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.sampled_from(prompts)) if prompts else []
        keep = data.draw(st.integers(0, len(start)))
        own = data.draw(st.integers(0 if keep else 1, 50))
        prompts.append(start[:keep] + text(own, data.draw(st.integers(0, 99))))
    inputs = batch(prompts)
    steps = data.draw(st.integers(1, 6))
    chunk = data.draw(st.sampled_from([1, 7, 64, 8192]))
    forced = torch.tensor([text(steps, row) for row in range(len(prompts))])
    cache = pat_hf.PATCache(
        pat, page_size=data.draw(st.sampled_from([16, 32])), prefill_tokens=chunk
    )
    ours = _forced(pat, inputs, forced, cache)
    theirs = _forced(stock, inputs, forced, DynamicCache(config=stock.config))
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


def _forced(model, inputs, forced, cache):
    """Logits [batch, steps + 1, vocabulary] when the generated tokens are given."""
    length = inputs["input_ids"].shape[1]

    def force(ids, scores):
        step = ids.shape[1] - length
        if step < forced.shape[1]:
            scores = torch.full_like(scores, -1e9)
            scores[torch.arange(len(ids)), forced[:, step]] = 0
        return scores

    out = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=forced.shape[1] + 1,
        do_sample=False,
        logits_processor=[force],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits, 1)


def test_forwards_of_a_prefill_are_even():
    _, pat = pair("Llama")
    sizes = []
    hook = pat.model.embed_tokens.register_forward_hook(
        lambda module, args, out: sizes.append(args[0].shape[1])
    )
    cache = pat_hf.PATCache(pat, prefill_tokens=300)
    pat.generate(2 + torch.arange(700)[None] % 90, past_key_values=cache, max_new_tokens=1)
    hook.remove()
    assert sizes == [256, 256, 188]


@pytest.mark.parametrize("extra", [{}, {"num_return_sequences": 3, "do_sample": True}])
@pytest.mark.parametrize("chunk", [13, 8192])
def test_every_distinct_token_is_computed_once(chunk, extra):
    _, pat = pair("Llama")
    prompts = BATCHES["two-levels"] * 2
    seen = []
    hook = pat.model.embed_tokens.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    try:
        cache = pat_hf.PATCache(pat, prefill_tokens=chunk)
        generate(pat, batch(prompts), cache, max_new_tokens=2, **extra)
    finally:
        hook.remove()
    distinct = {tuple(p[: i + 1]) for p in prompts for i in range(len(p))}
    *packed, step = seen
    assert max(x.numel() for x in packed) <= chunk
    assert sum(x.numel() for x in packed) == len(distinct) == cache.prefilled
    requests = len(prompts) * extra.get("num_return_sequences", 1)
    assert step.shape == (requests, 1)
    # Prompts and the one generated token that went through the model.
    assert cache.tokens == len(distinct) + requests


@pytest.mark.parametrize("prompts", BATCHES)
def test_pages_hold_each_distinct_token_once(prompts):
    _, pat = pair("Llama")
    cache = pat_hf.PATCache(pat, page_size=16)
    generate(pat, batch(BATCHES[prompts]), cache)
    report = cache.report()
    nodes = len(list(cache.prefixes))
    assert report.bytes_per_token == 2 * 3 * 2 * 16 * 4
    assert report.bytes_held <= (report.tokens + nodes * 16) * report.bytes_per_token
    allocated = sum(t.numel() * t.element_size() for t in cache.pool._tensors())
    spare = (len(cache.prefixes) + 1) * 48  # pages reserved for 40 new tokens each, and the sink
    assert allocated <= (report.tokens + nodes * 16 + spare) * report.bytes_per_token


def test_pads_are_not_stored():
    _, pat = pair("Llama")
    cache = pat_hf.PATCache(pat)
    pages = []
    write = cache.pool.write

    def recorded(index, keys, values, page, slot):
        pages.append(page)
        return write(index, keys, values, page, slot)

    cache.pool.write = recorded
    generate(pat, batch(BATCHES["ragged"]), cache, max_new_tokens=3)
    assert cache.dense_tokens == sum(map(len, BATCHES["ragged"])) + 2 * 4
    assert all((page != SINK).all() for page in pages)


def test_eos_at_different_steps():
    stock, pat = pair("Llama")
    inputs = batch(BATCHES["ragged"])
    free = generate(stock, inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    eos = free[1, 5].item()
    kwargs = {"do_sample": False, "eos_token_id": eos, "pad_token_id": 0}
    ours = generate(pat, inputs, pat_hf.PATCache(pat), **kwargs)
    assert torch.equal(ours, generate(stock, inputs, **kwargs))


def test_second_turn_computes_only_what_is_new():
    stock, pat = pair("Llama")
    cache = pat_hf.PATCache(pat)
    inputs = batch(BATCHES["ragged"])
    first = generate(pat, inputs, cache, do_sample=False)
    before = cache.prefilled
    turn = torch.tensor([text(9, r) for r in range(4)])
    ids = torch.cat([first, turn], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(4, ids.shape[1])], 1)
    mask = mask[:, : ids.shape[1]].long()
    both = {"input_ids": ids, "attention_mask": mask}
    ours = generate(pat, both, cache, do_sample=False)
    assert torch.equal(ours, generate(stock, both, do_sample=False))
    # The last generated token of each row was never fed.
    assert cache.prefilled - before == 4 * (9 + 1)


def test_an_edited_answer_is_not_taken_for_what_was_generated():
    stock, pat = pair("Llama")
    cache = pat_hf.PATCache(pat)
    inputs = batch(BATCHES["ragged"])
    first = generate(pat, inputs, cache, do_sample=False)
    length = inputs["input_ids"].shape[1]
    ids = torch.cat([first, torch.tensor([text(4, r) for r in range(4)])], 1)
    ids[:, length + 7] = (ids[:, length + 7] + 1) % 50 + 2
    mask = torch.ones_like(ids)
    mask[:, :length] = inputs["attention_mask"]
    before = cache.prefilled
    both = {"input_ids": ids, "attention_mask": mask}
    ours = generate(pat, both, cache, do_sample=False)
    assert torch.equal(ours, generate(stock, both, do_sample=False))
    assert cache.prefilled - before == 4 * (ids.shape[1] - length - 7)


@pytest.mark.parametrize("mode", ["beams-4", "samples-3"])
def test_a_second_turn_of_other_rows(mode):
    """Beams come back sorted, and the finished ones are not those that the cache ended with."""
    stock, pat = pair("Llama")
    cache = pat_hf.PATCache(pat, page_size=16)
    inputs = batch(BATCHES["ragged"])
    first = generate(pat, inputs, cache, **MODES[mode] | {"num_return_sequences": 3})
    ids = torch.cat([first.flip(0), torch.tensor([text(4, r) for r in range(12)])], 1)
    mask = torch.ones_like(ids)
    width = inputs["input_ids"].shape[1]
    mask[:, :width] = inputs["attention_mask"].repeat_interleave(3, 0).flip(0)
    both = {"input_ids": ids, "attention_mask": mask}
    ours = generate(pat, both, cache, do_sample=False)
    assert torch.equal(ours, generate(stock, both, do_sample=False))
    assert cache.prompted - cache.prefilled > sum(map(len, BATCHES["ragged"]))


def test_the_models_forward_is_replaced_only_during_generate():
    _, pat = pair("Llama")
    inputs, forward = batch(BATCHES["one"]), pat.forward
    seen = []

    class Look(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            seen.append("forward" in vars(pat))
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    cache = pat_hf.PATCache(pat)
    generate(pat, inputs, cache, max_new_tokens=3, stopping_criteria=[Look()])
    assert seen == [True] * 3
    assert "forward" not in vars(pat) and pat.forward == forward
    with pytest.raises(ValueError, match="attn_implementation"):
        generate(pat, inputs, cache, max_new_tokens=3, output_attentions=True)
    assert "forward" not in vars(pat)


def test_a_forward_that_was_replaced_before_is_there_again():
    stock, pat = pair("Llama")
    pat = copy.deepcopy(pat)
    calls, forward = [], pat.forward

    def own(*args, **kwargs):
        calls.append(kwargs)
        return forward(*args, **kwargs)

    pat.forward = functools.wraps(forward)(own)
    inputs = batch(BATCHES["ragged"])
    ours = generate(pat, inputs, pat_hf.PATCache(pat, decode="eager"), do_sample=False)
    assert torch.equal(ours, generate(stock, inputs, do_sample=False))
    assert pat.forward.__wrapped__ == forward and len(calls) == 40


@pytest.mark.parametrize("page_size", [16, 64])
def test_beams_begin_with_the_pages_of_one(page_size):
    _, pat = pair("Llama")
    prompt, used = batch([text(4096, 8)]), {}
    for beams in (1, 8):
        cache = pat_hf.PATCache(pat, page_size=page_size)
        generate(pat, prompt, cache, do_sample=False, num_beams=beams, max_new_tokens=3)
        assert cache.batch_size == beams
        used[beams] = cache.pool.used
    assert used[8] <= 1.1 * used[1]


def finishing(stock, inputs):
    """An id that some requests of a batch generate early and others late or never."""
    out = generate(stock, inputs, do_sample=False, max_new_tokens=90)
    out = out[:, inputs["input_ids"].shape[1] :]
    firsts = {
        token: [row.index(token) if token in row else 90 for row in out.tolist()]
        for token in out.unique().tolist()
    }
    return max(firsts, key=lambda token: max(firsts[token]) - min(firsts[token]))


@pytest.mark.parametrize("mode", ["greedy", "sample", "samples-3"])
def test_finished_requests_take_no_more_pages_or_plans(mode):
    stock, pat = pair("Llama")
    inputs = batch(BATCHES["ragged"])
    stop = finishing(stock, inputs)
    kwargs = MODES[mode] | {"eos_token_id": stop, "pad_token_id": 1, "max_new_tokens": 90}
    cache = pat_hf.PATCache(pat, page_size=16)
    ours = generate(pat, inputs, cache, **kwargs)
    assert torch.equal(ours, generate(stock, inputs, **kwargs))
    new = ours[:, inputs["input_ids"].shape[1] :]
    for request, row in enumerate(new.tolist()):
        generated = row.index(stop) + 1 if stop in row else len(row)
        leaf = cache.prefixes.path(request)[-1]
        # Told by the end of the page that follows the one it finished in.
        assert leaf.length <= generated + 2 * 16
    assert len({cache.prefixes.length(r) for r in range(len(new))}) > 1


@pytest.mark.parametrize("prompts", ["ragged", "disjoint"])
def test_a_plan_serves_a_page_of_steps(prompts, monkeypatch):
    _, pat = pair("Llama")
    plans = Mock(wraps=pat_cache.make_plan)
    monkeypatch.setattr(pat_cache, "make_plan", plans)
    made = []
    for steps in (2, 2 + 4 * 16):
        plans.reset_mock()
        cache = pat_hf.PATCache(pat, page_size=16, decode="eager")
        generate(pat, batch(BATCHES[prompts]), cache, do_sample=False, max_new_tokens=steps)
        made.append(plans.call_count)
    assert made[1] - made[0] == 4


def test_answers_that_ended_at_different_steps_are_shared_with_the_next_turn():
    stock, pat = pair("Llama")
    inputs = batch(BATCHES["ragged"])
    kwargs = {"do_sample": False, "pad_token_id": 1, "eos_token_id": finishing(stock, inputs)}
    cache = pat_hf.PATCache(pat, page_size=16)
    length = inputs["input_ids"].shape[1]
    out = generate(pat, inputs, cache, max_new_tokens=90, **kwargs)
    turns = []
    for i, row in enumerate(out.tolist()):
        answer = row[length:]
        if kwargs["eos_token_id"] in answer:
            answer = answer[: answer.index(kwargs["eos_token_id"]) + 1]
        turns.append(BATCHES["ragged"][i] + answer + text(5, i))
    before = cache.prefilled
    both = batch(turns)
    ours = generate(pat, both, cache, do_sample=False)
    assert torch.equal(ours, generate(stock, both, do_sample=False))
    assert cache.prefilled - before <= 4 * (5 + 1)


def test_random_numbers_go_on_as_after_stocks_generate():
    stock, pat = pair("Llama")
    inputs = batch(BATCHES["ragged"])
    stop = generate(stock, inputs, do_sample=False)[:, inputs["input_ids"].shape[1] + 2].tolist()
    kwargs = {"do_sample": True, "top_k": 4, "eos_token_id": stop, "pad_token_id": 1}
    ours = generate(pat, inputs, pat_hf.PATCache(pat, page_size=16), **kwargs)
    next_ours = torch.rand(3)
    theirs = generate(stock, inputs, **kwargs)
    assert torch.equal(ours, theirs) and torch.equal(torch.rand(3), next_ours)
    assert ours.shape[1] < inputs["input_ids"].shape[1] + 40


def test_scores_of_finished_requests_are_stocks():
    stock, pat = pair("Llama")
    inputs = batch(BATCHES["ragged"])
    kwargs = {"do_sample": False, "pad_token_id": 1, "eos_token_id": finishing(stock, inputs)}
    kwargs |= {"max_new_tokens": 60, "output_logits": True, "return_dict_in_generate": True}
    ours = generate(pat, inputs, pat_hf.PATCache(pat, page_size=16), **kwargs)
    theirs = generate(stock, inputs, **kwargs)
    torch.testing.assert_close(
        torch.stack(ours.logits), torch.stack(theirs.logits), rtol=1e-4, atol=1e-4
    )


def test_a_finished_request_is_not_continued_unnoticed():
    stock, pat = pair("Llama")
    inputs = batch(BATCHES["ragged"])
    kwargs = {"do_sample": False, "pad_token_id": 1, "eos_token_id": finishing(stock, inputs)}
    cache = pat_hf.PATCache(pat, page_size=16)
    out = generate(pat, inputs, cache, max_new_tokens=90, **kwargs)
    mask = torch.ones((len(out), out.shape[1] + 2), dtype=torch.long, device=out.device)
    mask[:, : inputs["input_ids"].shape[1]] = inputs["attention_mask"]
    with pytest.raises(ValueError, match="had ended"):
        pat(out[:, -3:], attention_mask=mask, past_key_values=cache)
    new = torch.cat([out[:, -1:], out[:, :2]], 1)
    with pytest.raises(ValueError, match="had ended.*all their tokens"):
        generate(pat, {"input_ids": new, "attention_mask": mask}, cache, **kwargs)
    # Behind the ends as they were seen there is padding, and all go on.
    mask[:, : out.shape[1] - 1] = torch.from_numpy(cache._columns.tokens())
    mask[:, out.shape[1] - 1 :] = 1
    ids, positions = torch.cat([out, out[:, :2]], 1), (mask.cumsum(1) - 1).clamp_min(0)
    theirs = stock(ids, attention_mask=mask, position_ids=positions).logits[:, -3:]
    ids, positions = ids[:, -3:], positions[:, -3:]
    ours = pat(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whole", [True, False])
def test_an_end_inside_the_prompts_ends_nothing(whole):
    """As between the turns of a chat; also where prompts don't go through the packed prefill."""
    outs = []
    for model, cache in zip(pair("Llama"), (None, pat_hf.PATCache(pair("Llama")[1])), strict=True):
        inputs = batch([SYSTEM, SYSTEM])
        kwargs = {"do_sample": False, "return_dict_in_generate": True, "pad_token_id": 1}
        first = generate(model, inputs, cache, **kwargs)
        turns = [first.sequences, torch.tensor([[5] + text(4, r) for r in range(2)])]
        ids = torch.cat(turns, 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if not whole:
            inputs["input_ids"] = ids[:, first.past_key_values.get_seq_length() :]
        kwargs |= {"eos_token_id": 5, "output_hidden_states": whole}
        outs.append(generate(model, inputs, first.past_key_values, **kwargs).sequences)
    assert torch.equal(*outs)


def test_ends_are_those_of_the_criteria():
    """A criterion of the call takes the place of the config's, and a loop of one's own has none."""

    def endless(model, input_ids, generation_config, logits_processor, stopping_criteria, **kwargs):
        outputs = model._prefill(input_ids, generation_config, kwargs)
        for _ in range(39):
            new = outputs.logits[:, -1].argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, new], 1)
            kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
            inputs = model.prepare_inputs_for_generation(
                input_ids, next_sequence_length=1, **kwargs
            )
            outputs = model(**inputs)
        return input_ids

    stock, pat = pair("Llama")
    inputs = batch(BATCHES["ragged"])
    free = generate(stock, inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    kwargs = {"do_sample": False, "pad_token_id": 1, "eos_token_id": free[:, 2].tolist()}
    later = StoppingCriteriaList([EosTokenCriteria(free[:, 38].tolist())])
    for own in ({"custom_generate": endless}, {"stopping_criteria": later}):
        ours = generate(pat, inputs, pat_hf.PATCache(pat, page_size=16), **kwargs | own)
        assert torch.equal(ours, generate(stock, inputs, **kwargs | own))


def test_second_turn_with_padding_behind_the_first_answers():
    stock, pat = pair("Llama")
    cache = pat_hf.PATCache(pat)
    inputs = batch(BATCHES["ragged"])
    first = generate(pat, inputs, cache, do_sample=False)
    length = inputs["input_ids"].shape[1]
    ids = torch.cat([first, torch.tensor([text(4, r) for r in range(4)])], 1)
    mask = torch.ones_like(ids)
    mask[:, :length] = inputs["attention_mask"]
    mask[1, length + 6 : first.shape[1]] = 0
    both = {"input_ids": ids, "attention_mask": mask}
    ours = generate(pat, both, cache, do_sample=False)
    assert torch.equal(ours, generate(stock, both, do_sample=False))


def test_a_batch_of_another_size_reuses_what_it_shares():
    stock, pat = pair("Llama")
    cache = pat_hf.PATCache(pat)
    generate(pat, batch(BATCHES["two-levels"]), cache)
    before = cache.prefilled
    inputs = batch([SYSTEM + DOCUMENT + text(6, 77), SYSTEM + DOCUMENT])
    ours = generate(pat, inputs, cache, do_sample=False)
    assert torch.equal(ours, generate(stock, inputs, do_sample=False))
    assert cache.prefilled - before == 6


def test_the_same_prompts_again_compute_nothing_but_the_last_logits():
    stock, pat = pair("Llama")
    cache = pat_hf.PATCache(pat)
    inputs = batch(BATCHES["identical"])
    generate(pat, inputs, cache, do_sample=False)
    before = cache.prefilled
    ours = generate(pat, inputs, cache, do_sample=False)
    assert torch.equal(ours, generate(stock, inputs, do_sample=False))
    assert cache.prefilled == before


@pytest.mark.parametrize(
    "name, mode, ids",
    [
        *(("Llama", mode, "with ids") for mode in MODES),
        ("Llama", "greedy", "without ids"),
        ("Gemma", "greedy", "without ids"),
        ("GPT-2", "beams-4", "without ids"),
    ],
)
def test_inputs_embeds_are_shared_where_they_are_equal(name, mode, ids):
    stock, pat = pair(name)
    inputs = batch(BATCHES["two-levels"])
    kwargs = MODES[mode] | {"max_new_tokens": 12}
    if ids == "with ids":
        kwargs |= {"input_ids": inputs["input_ids"]}
    cache = pat_hf.PATCache(pat, prefill_tokens=50)
    embeds = stock.get_input_embeddings()(inputs["input_ids"]).detach()
    # Not what any token looks like: vectors of one prompt, and some that two of them share.
    torch.manual_seed(0)
    noise = embeds.std() * torch.randn(9, embeds.shape[-1])
    embeds[0, -3:], embeds[:2, 90:96] = noise[:3], noise[3:]
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    expected = generate(stock, given, **kwargs)
    plain = generate(stock, inputs, **MODES[mode] | {"max_new_tokens": 12})
    assert not torch.equal(expected, plain[:, -expected.shape[1] :])
    distinct = {
        tuple(map(bytes, row[real][: i + 1].cpu().numpy()))
        for row, real in zip(embeds, inputs["attention_mask"].bool(), strict=True)
        for i in range(real.sum())
    }
    for _ in range(2):  # all of it is stored in the second call
        assert torch.equal(generate(pat, given, cache, **kwargs), expected)
        assert cache.prefilled == len(distinct) < cache.prompted
    assert cache.fallback is None
    # The tokens themselves are something else.
    assert torch.equal(generate(pat, inputs, cache, **MODES[mode] | {"max_new_tokens": 12}), plain)


def test_prompts_that_are_not_packed_on_a_cache_that_is_not_empty():
    stock, pat = pair("Llama")
    cache = pat_hf.PATCache(pat)
    generate(pat, batch(BATCHES["two-levels"]), cache, max_new_tokens=5)
    kwargs = {"do_sample": False, "output_hidden_states": True, "return_dict_in_generate": True}
    for prompts in ("ragged", "disjoint", "disjoint"):
        inputs = batch(BATCHES[prompts])
        ours = generate(pat, inputs, cache, **kwargs)
        theirs = generate(stock, inputs, **kwargs)
        assert torch.equal(ours.sequences, theirs.sequences)
        for mine, stocks in zip(ours.hidden_states[0], theirs.hidden_states[0], strict=True):
            real = inputs["attention_mask"].bool()
            torch.testing.assert_close(mine[real], stocks[real], atol=2e-4, rtol=2e-4)


def test_plain_forward_with_several_tokens_and_crop():
    """What assisted decoding and scoring do: forwards without generate()."""
    stock, pat = pair("Llama")
    inputs = batch(BATCHES["ragged"])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    caches = [DynamicCache(config=stock.config), pat_hf.PATCache(pat)]
    more = torch.tensor([text(6, r) for r in range(4)])
    outputs = []
    for model, cache in zip((stock, pat), caches, strict=True):
        out = [model(ids, attention_mask=mask, position_ids=position, past_key_values=cache)]
        for cut in (-4, 0):
            wide = torch.cat([mask, torch.ones_like(more)], 1)
            past = cache.get_seq_length()
            wide = (
                wide[:, : past + 6]
                if past == ids.shape[1]
                else torch.cat([mask, mask.new_ones(4, past + 6 - ids.shape[1])], 1)
            )
            place = (wide.cumsum(-1) - 1)[:, -6:]
            out.append(model(more, attention_mask=wide, position_ids=place, past_key_values=cache))
            cache.crop(cut)
        assert cache.get_seq_length() == ids.shape[1] + 8
        outputs.append([o.logits for o in out])
    real = mask.bool()
    torch.testing.assert_close(outputs[1][0][real], outputs[0][0][real], atol=2e-4, rtol=2e-4)
    for ours, theirs in zip(outputs[1][1:], outputs[0][1:], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


def test_prompt_lookup_decoding():
    stock, pat = pair("Llama")
    inputs = batch([(SYSTEM[:20]) * 3])
    kwargs = {"do_sample": False, "prompt_lookup_num_tokens": 4}
    ours = generate(pat, inputs, pat_hf.PATCache(pat), **kwargs)
    assert torch.equal(ours, generate(stock, inputs, **kwargs))


def test_repeat_and_select_go_by_reference():
    stock, pat = pair("Llama")
    inputs = batch(BATCHES["ragged"])
    caches = [DynamicCache(config=stock.config), pat_hf.PATCache(pat, page_size=16)]
    generate(stock, inputs, caches[0], max_new_tokens=24, do_sample=False)
    out = generate(pat, inputs, caches[1], max_new_tokens=24, do_sample=False)
    held = caches[1].pool.used
    logits = []
    for model, cache in zip((stock, pat), caches, strict=True):
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0, 1, 7]))
        rows = torch.tensor([2, 0, 0, 3])
        mask = inputs["attention_mask"][rows]
        mask = torch.cat([mask, mask.new_ones(4, out.shape[1] - mask.shape[1])], 1)
        last = torch.tensor([[5], [6], [7], [8]])  # rows 1 and 2 part here
        for token in (last, last + 1):
            place = mask.sum(1, keepdim=True) - 1
            logits.append(
                model(token, attention_mask=mask, position_ids=place, past_key_values=cache).logits
            )
            mask = torch.cat([mask, mask.new_ones(4, 1)], 1)
    torch.testing.assert_close(logits[2], logits[0], atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(logits[3], logits[1], atol=2e-4, rtol=2e-4)
    assert caches[1].pool.used <= held + 2


def test_deepcopy_is_a_cache_of_its_own():
    _, pat = pair("Llama")
    cache = pat_hf.PATCache(pat)
    inputs = batch(BATCHES["ragged"])
    first = generate(pat, inputs, cache, do_sample=False)
    twin = copy.deepcopy(cache)
    before = str(cache.report())
    assert torch.equal(generate(pat, inputs, twin, do_sample=False), first)
    assert str(cache.report()) == before
    assert twin.config is cache.config


def test_inference_mode_and_grad_do_not_bind_the_pages():
    stock, pat = pair("Llama")
    cache = pat_hf.PATCache(pat)
    inputs = batch(BATCHES["ragged"])
    with torch.inference_mode():
        first = pat.generate(**inputs, past_key_values=cache, max_new_tokens=5, do_sample=False)
    second = generate(pat, inputs, cache, do_sample=False, max_new_tokens=5)
    assert torch.equal(first, second)
    pat(torch.full((4, 1), 3), past_key_values=cache)
    assert not any(t.requires_grad for t in cache.pool._tensors())


@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT-2"])
def test_pat_without_its_cache_is_sdpa(name):
    stock, pat = pair(name)
    inputs = batch(BATCHES["ragged"])
    assert torch.equal(pat(**inputs).logits, stock(**inputs).logits)
    assert torch.equal(
        generate(pat, inputs, do_sample=False), generate(stock, inputs, do_sample=False)
    )
    pat(**inputs, labels=inputs["input_ids"]).loss.backward()
    pat.zero_grad()


def test_half_precision_stays_within_twice_the_error_of_sdpa():
    prompts = batch(BATCHES["two-levels"])
    forced = torch.tensor([text(8, r) for r in range(4)])
    stock, pat = pair("Llama", torch.bfloat16)
    exact_weights = copy.deepcopy(stock).float()
    exact = _forced(exact_weights, prompts, forced, None).double()
    theirs = (_forced(stock, prompts, forced, None).double() - exact).abs()
    ours = (_forced(pat, prompts, forced, pat_hf.PATCache(pat)).double() - exact).abs()
    assert ours.max() <= 2 * theirs.max() + 1e-5
    assert ours.mean() <= 2 * theirs.mean() + 1e-5


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "DeepSeek-V3"])
def test_autocast_computes_in_its_dtype_as_sdpa_does(name):
    config = copy.deepcopy(CORE[name])
    if hasattr(config, "first_k_dense_replace"):  # rounding may choose other experts
        config.first_k_dense_replace = config.num_hidden_layers
    stock, pat = pair_of(config, stock="eager" if name in EAGER else "sdpa")
    inputs = batch(BATCHES["two-levels"])
    forced = torch.tensor([text(4, r) for r in range(4)])
    exact = _forced(stock, inputs, forced, None)
    cache = pat_hf.PATCache(pat)
    with torch.autocast(inputs["input_ids"].device.type, torch.bfloat16):
        theirs = _forced(stock, inputs, forced, None)
        ours = _forced(pat, inputs, forced, cache)
    assert cache.pool.layers[0].keys.dtype == cache.pool.layers[0].values.dtype == torch.bfloat16
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-5


def test_a_continuation_at_other_positions_is_not_shared_later():
    stock, pat = pair("Llama")
    cache = pat_hf.PATCache(pat, 1 << 24)
    ids, new = torch.arange(3, 15)[None], torch.arange(20, 26)[None]
    both = torch.cat([ids, new], 1)
    generate(pat, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cache)
    cache.crop(-cache.get_seq_length() + 12)
    inputs = {"input_ids": new, "attention_mask": torch.ones_like(both)}
    generate(pat, inputs | {"position_ids": new + 20}, cache, max_new_tokens=2)
    ids = torch.cat([both, torch.tensor([[30, 31]])], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(generate(pat, inputs, cache), generate(stock, inputs))


def test_padding_before_a_forward_that_is_given_no_positions():
    """As one whose signature doesn't name them: stock numbers the padding then."""
    stock, pat = (copy.deepcopy(model) for model in pair("Llama"))
    for model in (stock, pat):
        model.forward = functools.partial(
            lambda f, *args, **kwargs: f(*args, **kwargs), model.forward
        )
    cache, inputs = pat_hf.PATCache(pat), batch(BATCHES["ragged"])
    assert torch.equal(generate(pat, inputs, cache), generate(stock, inputs))
    assert "position_ids" in cache.fallback


def _at_other_positions(model, input_ids, *args, **kwargs):
    positions = 2 * torch.arange(30, 30 + input_ids.shape[1])[None]
    cache = kwargs["past_key_values"]
    model(input_ids=input_ids, position_ids=positions, past_key_values=cache)
    return input_ids


def _padded_without_positions(model, input_ids, *args, **kwargs):
    given = {name: kwargs[name] for name in ("attention_mask", "past_key_values")}
    model(input_ids=input_ids, **given)
    return input_ids


def _elsewhere_after_a_prefill(
    model, input_ids, generation_config, logits_processor, stopping_criteria, **kwargs
):
    model._prefill(input_ids, generation_config, kwargs)
    for i, token in enumerate(text(6, 9)):
        model(
            input_ids=torch.tensor([[token]]),
            position_ids=torch.tensor([[100 + i]]),
            past_key_values=kwargs["past_key_values"],
        )
    return input_ids


@pytest.mark.parametrize(
    "loop", [_at_other_positions, _padded_without_positions, _elsewhere_after_a_prefill]
)
def test_a_loop_at_other_positions_is_not_shared_later(loop):
    stock, pat = pair("Llama")
    prompt = text(30, 1)
    rows = [prompt] if loop is not _padded_without_positions else [text(40, 2), prompt]
    cache = pat_hf.PATCache(pat, keep_bytes=1 << 30, page_size=16)
    kwargs = {"custom_generate": loop, "max_new_tokens": 5, "do_sample": False}
    pat.generate(**batch(rows), past_key_values=cache, **kwargs)
    known = loop is _elsewhere_after_a_prefill
    later = batch([prompt + text(6, 9) * known + text(3, 3)])
    assert torch.equal(generate(pat, later, cache), generate(stock, later))
    assert cache.report().found_tokens == 30 * known


def test_a_loop_with_arguments_of_its_own_is_not_shared_later():
    def loop(model, input_ids, **kwargs):
        kinds, cache = torch.full_like(input_ids, 7), kwargs["past_key_values"]
        model(input_ids=input_ids, token_type_ids=kinds, past_key_values=cache)
        return input_ids

    stock, pat = pair("GPT-2")
    cache = pat_hf.PATCache(pat, keep_bytes=1 << 30, page_size=16)
    prompt = text(30, 1)
    kwargs = {"custom_generate": loop, "max_new_tokens": 5}
    pat.generate(torch.tensor([prompt]), past_key_values=cache, **kwargs)
    later = batch([prompt + [5]])
    assert torch.equal(generate(pat, later, cache), generate(stock, later))
    assert cache.report().found_tokens == 0


def test_a_step_behind_requests_that_ended_at_different_steps():
    stock, pat = pair("Llama")
    for seed in range(60):
        inputs = batch([text(10, seed), text(10, 100 + seed)])
        plain = generate(stock, inputs, do_sample=False)[:, 10:35]
        # The first ends soon and goes without pages from the next one on; the second doesn't end.
        if stops := set(plain[0, 2:4].tolist()) - set(plain[0, :2].tolist() + plain[1].tolist()):
            break
    kwargs = {"eos_token_id": min(stops), "pad_token_id": 1, "max_new_tokens": 25}
    cache = pat_hf.PATCache(pat, page_size=16)
    logits = []
    for model, held in ((pat, cache), (stock, DynamicCache(config=stock.config))):
        generate(model, inputs, held, do_sample=False, **kwargs)
        if model is pat:
            mask = torch.from_numpy(cache._columns.tokens()).long()
            assert not mask[0].all() and mask[1].all()
            mask = torch.cat([mask, torch.ones(2, 1).long()], 1)
        step = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, -1:]}
        with torch.no_grad():
            logits.append(model(torch.tensor([[5], [6]]), past_key_values=held, **step).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_a_loop_that_feeds_padding_step_by_step():
    def loop(model, cache):
        mask = torch.ones(2, 20).long()
        ids = torch.tensor([text(20, 1), text(20, 2)])
        out = model(ids, attention_mask=mask, past_key_values=cache)
        for step in range(12):
            new = torch.ones(2, 1).long()
            new[1] = step not in (2, 7)
            mask = torch.cat([mask, new], 1)
            out = model(
                torch.tensor([[5 + step], [9 + step]]),
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1)[:, -1:],
                past_key_values=cache,
            )
            yield out.logits[new[:, 0] == 1]

    stock, pat = pair("Llama")
    caches = DynamicCache(config=stock.config), pat_hf.PATCache(pat, page_size=16)
    with torch.no_grad():
        for theirs, ours in zip(*map(loop, (stock, pat), caches), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_gave_hidden_states_is_shared_later():
    stock, pat = pair("Llama")
    cache = pat_hf.PATCache(pat, keep_bytes=1 << 30, page_size=16)
    inputs = batch([text(30, 1), text(30, 1)[:20] + text(4, 2)])
    generate(pat, inputs, cache, output_hidden_states=True, return_dict_in_generate=True)
    assert "output_hidden_states" in cache.fallback
    inputs = batch([text(30, 1) + text(5, 3)])
    assert torch.equal(generate(pat, inputs, cache), generate(stock, inputs))
    assert cache.report().found_tokens == 30


def test_a_forward_that_failed_before_it_stored_anything_leaves_no_plan():
    stock, pat = pair("Llama")
    ids = torch.tensor([text(6, 1), text(6, 2)])
    masks = torch.ones(2, 2, 6, dtype=torch.long)
    masks[0, 0, 0] = masks[1, 1, :3] = 0

    def forward(model, cache, mask):
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        given = {"attention_mask": mask, "position_ids": position_ids, "past_key_values": cache}
        return model(ids, **given).logits[mask.bool()]

    def fail(*args):
        raise RuntimeError("no memory")

    cache = pat_hf.PATCache(pat)
    hook = pat.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        forward(pat, cache, masks[0])
    hook.remove()
    expected = forward(stock, DynamicCache(config=stock.config), masks[1])
    torch.testing.assert_close(forward(pat, cache, masks[1]), expected, rtol=1e-4, atol=1e-4)


def test_types_of_tokens_matter():
    """GPT-2 has an embedding for each type, 0 included."""
    stock, pat = pair("GPT-2")
    cache = pat_hf.PATCache(pat, page_size=16)
    inputs = batch(BATCHES["two-levels"])
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    expected = generate(stock, inputs)
    assert torch.equal(generate(pat, inputs, cache), expected)
    assert "token_type_ids" in cache.fallback
    del inputs["token_type_ids"]
    assert not torch.equal(generate(stock, inputs), expected)


def test_a_model_may_ask_for_a_mask_twice(monkeypatch):
    from transformers.models.llama import modeling_llama

    create = modeling_llama.create_causal_mask

    def twice(*args, **kwargs):
        mask = create(*args, **kwargs)
        create(*args, **kwargs)
        return mask

    stock, pat = pair("Llama")
    inputs = batch(BATCHES["ragged"])
    expected = generate(stock, inputs)
    monkeypatch.setattr(modeling_llama, "create_causal_mask", twice)
    assert torch.equal(generate(pat, inputs, pat_hf.PATCache(pat, page_size=16)), expected)
    cache = pat_hf.PATCache(pat, page_size=16)
    states = {"output_hidden_states": True, "return_dict_in_generate": True}
    assert torch.equal(generate(pat, inputs, cache, **states).sequences, expected)
