"""What Transformers asks of generation with any cache, and where a PATCache differs from others.

The behaviour that its own tests of generation and caches check, on stock models as the reference.
"""

import copy
import io
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
)
from transformers.generation import (
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.modeling_layers import MtpModel

import pat_hf

from .models import CORE, VOCABULARY, batch, pair, pair_of
from .test_generate import BATCHES, text

INPUTS = batch(BATCHES["ragged"])
ROWS, COLUMNS = INPUTS["input_ids"].shape
CLOSE = {"atol": 2e-4, "rtol": 2e-4}
NAMES = ["Llama", "Mistral", "GPT-2"]
SYNTHID = SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)


def both(name):
    """Each model with an empty cache of the kind that it goes with."""
    stock, pat = pair(name)
    return (stock, DynamicCache(config=stock.config)), (pat, pat_hf.PATCache(pat, page_size=16))


def generate(model, cache, inputs=INPUTS, **kwargs):
    torch.manual_seed(0)
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(**inputs, past_key_values=cache, **options | kwargs)


def tokens(model, cache, inputs=INPUTS, **kwargs):
    return generate(model, cache, inputs, return_dict_in_generate=False, **kwargs)


def longer(inputs, sequences):
    """Inputs of a call that goes on with the sequences of the one before."""
    mask = inputs["attention_mask"]
    more = sequences.shape[1] - mask.shape[1]
    return {
        "input_ids": sequences,
        "attention_mask": torch.cat([mask, mask.new_ones(len(mask), more)], 1),
    }


@pytest.mark.parametrize("name", NAMES)
def test_going_on_gives_what_one_call_gives(name):
    _, (pat, cache) = both(name)
    whole = generate(pat, pat_hf.PATCache(pat), max_new_tokens=9, output_scores=True)
    first = generate(pat, cache, max_new_tokens=5, output_scores=True)
    assert first.past_key_values is cache and cache.get_seq_length() == COLUMNS + 4
    second = generate(
        pat,
        first.past_key_values,
        longer(INPUTS, first.sequences),
        max_new_tokens=4,
        output_scores=True,
    )
    assert torch.equal(second.sequences, whole.sequences)
    for ours, theirs in zip(first.scores + second.scores, whole.scores, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("prompts", ["ragged", "identical"])  # with and without padding
@pytest.mark.parametrize("name", NAMES)
def test_going_on_with_the_new_tokens_alone(name, prompts):
    prompts = batch(BATCHES[prompts])
    turn = torch.tensor([text(5, r) for r in range(4)])
    outs = []
    for model, cache in both(name):
        first = generate(model, cache, prompts).sequences
        inputs = longer(prompts, torch.cat([first, turn], 1))
        given = inputs | {"input_ids": inputs["input_ids"][:, cache.get_seq_length() :]}
        outs.append(generate(model, cache, given).sequences)
    assert torch.equal(*outs)
    stock, _ = pair(name)
    assert torch.equal(outs[1][:, -6:], generate(stock, None, inputs).sequences[:, -6:])
    if prompts["attention_mask"].all():
        return
    with pytest.raises(ValueError, match="attention_mask has shape"):
        generate(pair(name)[1], cache, given)


def test_assisted_decoding_needs_the_whole_prompt():
    _, (pat, cache) = both("Llama")
    first = generate(pat, cache, batch(BATCHES["one"])).sequences
    given = longer(batch(BATCHES["one"]), first) | {"input_ids": first[:, -1:]}
    held = cache.tokens
    with pytest.raises(ValueError, match="only what is new"):
        generate(pat, cache, given, prompt_lookup_num_tokens=3)
    assert cache.tokens == held


def test_going_on_from_embeddings():
    stock, pat = pair("Llama")
    embed = stock.get_input_embeddings()
    cache = pat_hf.PATCache(pat)
    given = INPUTS | {"inputs_embeds": embed(INPUTS["input_ids"])}
    first = generate(pat, cache, given)
    given = longer(INPUTS, first.sequences)
    given["inputs_embeds"] = embed(first.sequences)
    second = generate(pat, cache, given)
    assert torch.equal(second.sequences, generate(stock, None, max_new_tokens=12).sequences)


@pytest.mark.parametrize("name", NAMES)
def test_more_padding_on_the_left_changes_nothing(name):
    _, (pat, cache) = both(name)
    wide = {key: torch.nn.functional.pad(x, (29, 0)) for key, x in INPUTS.items()}
    narrow = generate(pat, pat_hf.PATCache(pat), output_logits=True)
    out = generate(pat, cache, wide, output_logits=True)
    assert torch.equal(out.sequences[:, 29:], narrow.sequences)
    for ours, theirs in zip(out.logits, narrow.logits, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"do_sample": True}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=["greedy", "samples", "beams"],
)
def test_everything_that_a_call_returns(kwargs):
    kwargs = kwargs | {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    (stock, dense), (pat, cache) = both("Llama")
    theirs, ours = generate(stock, dense, **kwargs), generate(pat, cache, **kwargs)
    beams = "num_beams" in kwargs
    assert type(ours) is (GenerateBeamDecoderOnlyOutput if beams else GenerateDecoderOnlyOutput)
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours.sequences, theirs.sequences)
    assert ours.past_key_values is cache
    for name in ("scores", "logits"):
        torch.testing.assert_close(ours[name], theirs[name], **CLOSE)
    rows = INPUTS["attention_mask"].bool().repeat_interleave(kwargs.get("num_beams", 1), 0)
    for step, (mine, stocks) in enumerate(
        zip(ours.hidden_states, theirs.hidden_states, strict=True)
    ):
        for a, b in zip(mine, stocks, strict=True):
            real = rows if step == 0 else slice(None)
            torch.testing.assert_close(a[real], b[real], **CLOSE)
    indices = None
    if beams:
        indices = ours.beam_indices
        assert torch.equal(indices, theirs.beam_indices)
        torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, **CLOSE)
        sums = pat.compute_transition_scores(ours.sequences, ours.scores, indices).sum(1)
        torch.testing.assert_close(sums / 6, ours.sequences_scores, **CLOSE)


def test_hidden_states_of_requests_that_have_ended():
    kwargs = {"output_hidden_states": True, "eos_token_id": list(range(2, VOCABULARY, 3))}
    kwargs |= {"pad_token_id": 0, "max_new_tokens": 12}
    (stock, dense), (pat, cache) = both("Llama")
    theirs, ours = generate(stock, dense, **kwargs), generate(pat, cache, **kwargs)
    ends = (theirs.sequences[:, COLUMNS:] == 0).int().sum(1)
    assert len(set(ends.tolist())) > 1  # at different steps
    for mine, stocks in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True):
        for a, b in zip(mine, stocks, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def test_without_a_prompt():
    outs = [
        generate(model, cache, {}, bos_token_id=1, num_return_sequences=3, do_sample=True)
        for model, cache in both("Llama")
    ]
    assert torch.equal(outs[0].sequences, outs[1].sequences)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"max_length": COLUMNS, "max_new_tokens": None}, "max_length"),
        ({"cache_implementation": "static"}, "cache_implementation.*past_key_values"),
        ({"num_beams": 2, "low_memory": True}, "low_memory"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "Group Beam Search"),
        ({"num_beams": 2, "force_words_ids": [[5]]}, "Constrained Beam Search"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive Search"),
        ({"dola_layers": "low"}, "Dola Generation"),
        ({"assistant_early_exit": 2}, "batch_size = 1"),
        ({"num_beams": 2, "streamer": object()}, "streamer"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_what_generate_refuses_with_any_cache(kwargs, words):
    for model, cache in both("Llama"):
        with pytest.raises(ValueError, match=words):
            generate(model, cache, **kwargs)
        assert cache.get_seq_length() == 0


def test_continuous_batching_is_refused():
    """It would have a cache of its own."""
    _, (pat, cache) = both("Llama")
    with pytest.raises(ValueError, match="cache_implementation='paged'.*PATCache"):
        generate(pat, cache, cache_implementation="paged")


def test_processors_and_criteria_of_ones_own():
    seen = []

    class Own(RepetitionPenaltyLogitsProcessor):
        def __call__(self, ids, scores):
            seen.append(tuple(ids.shape))
            return super().__call__(ids, scores)

    def at_length(ids, scores):
        return ids[:, -1] % 5 == 0

    outs = []
    for model, cache in both("Llama"):
        outs.append(
            generate(
                model,
                cache,
                logits_processor=LogitsProcessorList([Own(1.5)]),
                stopping_criteria=StoppingCriteriaList([at_length, MaxTimeCriteria(3600)]),
                max_new_tokens=20,
                eos_token_id=90,
            ).sequences
        )
    assert torch.equal(*outs)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]


def allowed(request, ids):
    return [3 + request, 7, 9, int(ids[-1])]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"assistant_early_exit": 2},
        {"assistant_early_exit": 1, "do_sample": True},
        {"assistant_model": "Qwen3", "assistant_ensemble_weight": 0.5},
        {"assistant_model": "Qwen3", "assistant_confidence_threshold": 0.4},
        {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "prefill_chunk_size": 8},
        {"prefix_allowed_tokens_fn": allowed, "num_beams": 3},
        {"num_beams": 3, "early_stopping": "never", "eos_token_id": [*range(2, 97, 5)]},
        {"guidance_scale": 1.5, "negative_prompt_ids": [[5, 6, 7]] * ROWS},
        {"do_sample": True, "watermarking_config": SYNTHID, "top_h": 0.6},
        {"stop_strings": ["a", "e"], "num_beams": 2},
        {"stop_strings": ["a", "e"]},
        {"token_healing": True},
        {"max_time": 1e-9},
        {"forced_bos_token_id": 5, "remove_invalid_values": True, "max_cache_len": 9},
    ],
    ids=lambda kwargs: ", ".join(kwargs),
)
def test_what_else_generate_can_do(kwargs):
    kwargs = dict(kwargs)
    single = any("assistant" in name or "lookup" in name for name in kwargs)
    inputs = batch(BATCHES["one"]) if single else INPUTS
    if "assistant_model" in kwargs:
        kwargs["assistant_model"] = pair(kwargs["assistant_model"])[1]
    if "negative_prompt_ids" in kwargs:
        kwargs["negative_prompt_ids"] = torch.tensor(kwargs["negative_prompt_ids"])
    models = pair("Llama")
    if {"stop_strings", "token_healing"} & kwargs.keys():
        folder = Path(__file__).parent.parent / "examples" / "facts-llama"
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        kwargs["tokenizer"] = tokenizer
        inputs = tokenizer(["Who wrote the bo", "The capital of Fra"], padding=True)
        inputs = {name: torch.tensor(x) for name, x in inputs.items()}
        models = [
            AutoModelForCausalLM.from_pretrained(
                folder, attn_implementation=attention, dtype=torch.float32
            )
            for attention in ("sdpa", "pat")
        ]
    stock, pat = models
    ours = generate(pat, pat_hf.PATCache(pat, page_size=16), inputs, **kwargs)
    assert torch.equal(ours.sequences, generate(stock, None, inputs, **kwargs).sequences)


def test_drafts_from_hidden_states(monkeypatch):
    """MTP heads draft from the states of the whole prompt, which a warm cache must not shorten."""

    def drafter(model, **kwargs):
        torch.manual_seed(1)
        return MtpModel(model, model.config.num_mtp_layers).eval()

    monkeypatch.setattr(MtpModel, "from_pretrained", drafter)
    (stock, _), (pat, cache) = both("DeepSeek-V3")
    for prompt in (text(20, 1), text(20, 1) + [5, 6]):
        ours = generate(pat, cache, batch([prompt]), use_mtp=True).sequences
        assert torch.equal(ours, generate(stock, None, batch([prompt]), use_mtp=True).sequences)
    # An interrupt in the forward that gives those states.
    cache, calls = pat_hf.PATCache(pat, page_size=16), []

    def fail(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    hook = pat.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        generate(pat, cache, batch([text(40, 1)]), use_mtp=True)
    hook.remove()
    inputs = batch([text(40, 1) + [5]])
    ours = generate(pat, cache, inputs).sequences
    assert torch.equal(ours, generate(stock, None, inputs).sequences)


def test_one_cache_for_calls_of_all_kinds():
    """Batches of other sizes and modes, one after the other: each as on a cache of its own."""
    (stock, _), (pat, cache) = both("Llama")
    calls = [
        ("two-levels", {"num_beams": 3}),
        ("ragged", {"do_sample": True, "num_return_sequences": 3}),
        ("one", {"prompt_lookup_num_tokens": 3}),
        ("disjoint", {}),
        ("two-levels", {"prefill_chunk_size": 16}),
        ("one", {"assistant_model": pair("Qwen3")[1]}),
        ("prefix-of-another", {"num_beams": 2, "num_return_sequences": 2}),
        ("ragged", {"max_new_tokens": 1}),
        ("ragged", {"generation_config": GenerationConfig(max_new_tokens=3, top_k=5)}),
    ]
    for prompts, kwargs in calls:
        inputs = batch(BATCHES[prompts])
        expected = generate(stock, None, inputs, **kwargs).sequences
        assert torch.equal(generate(pat, cache, inputs, **kwargs).sequences, expected), kwargs


def test_a_prefix_is_copied_for_each_prompt():
    """The recipe of Transformers' documentation for a system prompt."""
    prefix = BATCHES["identical"][:1]
    ends = [text(n, 70 + n) for n in (3, 11)]
    for model, cache in both("Mistral"):
        with torch.no_grad():
            model(**batch(prefix), past_key_values=cache)
        outs = [
            generate(model, copy.deepcopy(cache), batch([prefix[0] + end])).sequences
            for end in ends
        ]
        assert cache.get_seq_length() == len(prefix[0])
        plain = [generate(model, None, batch([prefix[0] + end])).sequences for end in ends]
        assert all(map(torch.equal, outs, plain))


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_the_batch_is_rearranged_as_in_a_dynamic_cache(name):
    logits = []
    for model, cache in both(name):
        generate(model, cache)
        mask = longer(INPUTS, torch.empty(ROWS, cache.get_seq_length()))["attention_mask"]
        rows = torch.arange(ROWS)
        for change, argument, chosen in (
            ("reorder_cache", torch.tensor([3, 1, 1, 0]), [3, 1, 1, 0]),
            ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2, 3, 3]),
            ("batch_select_indices", torch.tensor([7, 0, 3]), [7, 0, 3]),
            ("crop", -3, [0, 1, 2]),
        )[: 4 if name == "Llama" else 3]:  # a stock cache with windows can't be cropped
            getattr(cache, change)(argument)
            rows = rows[chosen]
            mask = mask[chosen]
            if change == "crop":
                mask = mask[:, :argument]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            place = mask.sum(1, keepdim=True) - 1
            tokens = 2 + torch.arange(len(rows))[:, None]
            out = model(tokens, attention_mask=mask, position_ids=place, past_key_values=cache)
            logits.append(out.logits)
    half = len(logits) // 2
    for ours, theirs in zip(logits[half:], logits[:half], strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_figures_of_a_cache():
    for steps in range(3):
        figures = []
        for model, cache in both("Llama"):
            if steps:
                generate(model, cache, max_new_tokens=steps)
            figures.append(
                (
                    len(cache),
                    *(cache.get_seq_length(layer) for layer in range(3)),
                    *(cache.get_mask_sizes(2, layer) for layer in range(3)),
                    cache.get_query_offset(),
                    cache.get_max_length(),
                    cache.is_initialized,
                    cache.is_sliding,
                    cache.is_linear,
                    getattr(cache, "is_croppable", True),  # from 5.17 on
                )
            )
            lengths = []
            for count in (0, -1, -2, -1000) if steps else ():
                cache.crop(count)
                lengths.append(cache.get_seq_length())
            figures[-1] += (lengths,)
            cache.reset()
            assert cache.get_seq_length() == 0 and cache.batch_size == -1
        assert figures[0] == figures[1]


# Where it differs: the README lists these.


def test_layers_are_not_to_be_had_as_tensors():
    (_, dense), (pat, cache) = both("Llama")
    generate(pat, cache)
    assert cache.layers == []
    for access in (iter, lambda cache: cache[0]):
        with pytest.raises(TypeError, match="PATCache"):
            access(cache)
    iter(dense)


def test_a_prompt_that_is_not_the_one_before_is_not_taken_for_its_continuation():
    (stock, dense), (pat, cache) = both("Llama")
    other = batch([text(COLUMNS + 9, r) for r in range(ROWS)])
    expected = generate(stock, None, other).sequences
    for model, used, same in ((stock, dense, False), (pat, cache, True)):
        generate(model, used)
        assert torch.equal(generate(model, used, other).sequences, expected) == same


def test_windows_keep_their_tokens():
    """So that it can always be cropped."""
    (stock, dense), (pat, cache) = both("Mistral")
    for model, used in ((stock, dense), (pat, cache)):
        generate(model, used)
    assert all(dense.is_sliding) and not any(cache.is_sliding)
    with pytest.raises(RuntimeError):
        dense.crop(-20)
    cache.crop(-20)
    assert cache.get_seq_length() == COLUMNS + 5 - 20


def test_no_gradients_through_stored_tokens():
    (stock, dense), (pat, cache) = both("Llama")
    for model, used, flows in ((stock, dense, True), (pat, cache, False)):
        ids = INPUTS["input_ids"][:, -4:]
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeds, past_key_values=used)
        with torch.enable_grad():
            loss = model(ids[:, :1], past_key_values=used).logits.sum()
        (grad,) = torch.autograd.grad(loss, embeds, allow_unused=True)
        assert (grad is not None) == flows


def test_a_copy_that_is_made_meanwhile_is_a_model_of_its_own():
    stock, pat = pair.__wrapped__("Llama")
    copies = []

    def snapshot(ids, scores):
        copies.append(copy.deepcopy(pat))
        torch.save(pat, io.BytesIO())
        return scores

    inputs = batch([[3, 4, 5]])
    cache = pat_hf.PATCache(pat)
    pat.generate(**inputs, past_key_values=cache, logits_processor=[snapshot], max_new_tokens=1)
    twin = copies[0]
    out = twin.generate(**inputs, past_key_values=pat_hf.PATCache(twin), max_new_tokens=3)
    assert torch.equal(out, stock.generate(**inputs, max_new_tokens=3))
    assert "forward" not in vars(twin)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert not twin(**inputs).logits.any() and pat(**inputs).logits.any()


def test_a_loop_that_feeds_one_buffer_again_and_again():
    stock, pat = pair("Llama")

    def loop(model, input_ids, *args, generation_config=None, **kwargs):
        given = {name: kwargs[name] for name in ("past_key_values", "attention_mask")}
        out, token = model._prefill(input_ids, generation_config, given), input_ids[:, :1].clone()
        step = {"input_ids": token, "past_key_values": kwargs["past_key_values"]}
        for position in range(input_ids.shape[1], input_ids.shape[1] + 6):
            token.copy_(out.logits[:, -1:].argmax(-1))
            input_ids = torch.cat([input_ids, token], 1)
            out = model(**step, position_ids=torch.full_like(token, position))
        return input_ids

    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 20]])
    cache = pat_hf.PATCache(pat, keep_bytes=1 << 30)
    out = pat.generate(ids, past_key_values=cache, custom_generate=loop, max_new_tokens=9)
    other = torch.cat([ids, out[:, -1:].expand(-1, 6)], 1)
    kwargs = {"max_new_tokens": 8, "do_sample": False}
    ours = pat.generate(other, past_key_values=cache, **kwargs)
    assert torch.equal(ours, stock.generate(other, **kwargs))
    assert cache.report().found_tokens == len({5, 6, 7}) + 2  # of other answers, none


def test_a_model_that_prepares_an_argument_of_its_own():
    class Louder(LlamaForCausalLM):
        def prepare_inputs_for_generation(self, input_ids, **kwargs):
            return super().prepare_inputs_for_generation(input_ids, **kwargs) | {"gain": 2.0}

        def forward(
            self,
            input_ids=None,
            attention_mask=None,
            position_ids=None,
            past_key_values=None,
            gain=1.0,
            **kwargs,
        ):
            embeds = self.get_input_embeddings()(input_ids) * gain
            given = attention_mask, position_ids, past_key_values
            return super().forward(None, *given, inputs_embeds=embeds, **kwargs)

    stock, pat = (Louder(CORE["Llama"]).eval() for _ in range(2))
    pat.load_state_dict(stock.state_dict())
    pat.set_attn_implementation("pat")
    cache = pat_hf.PATCache(pat)
    inputs, kwargs = batch([[3, 4, 5], [3, 4, 6, 7]]), {"max_new_tokens": 8, "do_sample": False}
    ours = pat.generate(**inputs, past_key_values=cache, **kwargs)
    assert torch.equal(ours, stock.generate(**inputs, **kwargs))
    assert cache.report().fallback == "Louder adds gain"


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "GPT-OSS"])
def test_masks_to_be_added_without_a_cache(name):
    stock, pat = pair(name)
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    mask = torch.full((1, 1, 5, 5), torch.finfo(torch.float32).min).triu(1)
    mask[..., 1] -= 2
    ours, theirs = (model(ids, attention_mask=mask).logits for model in (pat, stock))
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


def test_dropout_of_attention_in_training_without_a_cache():
    config = copy.deepcopy(CORE["Gemma 2"])
    config.attention_dropout = 0.5
    _, pat = pair_of(config, stock="eager")
    pat.train()
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    assert not torch.equal(pat(ids).logits, pat(ids).logits)


def test_a_loop_of_ones_own_goes_on_behind_the_ends_of_a_stock_one():
    def loop(model, input_ids, generation_config=None, **kwargs):
        first = type(model)._sample(model, input_ids, generation_config=generation_config, **kwargs)
        cache = kwargs["past_key_values"]
        length = cache.get_seq_length()
        new = torch.cat([first[:, length:], torch.full((len(first), 2), 7)], 1)
        out = [first, new[:, 1:]]
        for _ in range(5):
            positions = length + torch.arange(new.shape[1])[None].expand(len(new), -1)
            length += new.shape[1]
            logits = model(input_ids=new, position_ids=positions, past_key_values=cache).logits
            new = logits[:, -1:].argmax(-1)
            out.append(new)
        return torch.cat(out, 1)

    stock, pat = pair("Llama")
    inputs = batch([text(20, 1)])
    ends = list(range(2, VOCABULARY, 12))
    kwargs = {"eos_token_id": ends, "max_new_tokens": 60, "custom_generate": loop}
    wanted = tokens(stock, DynamicCache(), inputs, **kwargs)
    assert torch.equal(tokens(pat, pat_hf.PATCache(pat), inputs, **kwargs), wanted)


def test_a_processor_may_make_one_rows_scores_of_those_of_a_row_that_has_ended():
    def contrast(ids, scores):
        return torch.cat([scores[:1] - 0.5 * scores[1:2], scores[1:]])

    stock, pat = pair("Llama")
    inputs = batch([text(20, 1), text(20, 2)])
    kwargs = {"logits_processor": [contrast], "eos_token_id": 3, "max_new_tokens": 60}
    cache = pat_hf.PATCache(pat, page_size=16)
    assert torch.equal(tokens(pat, cache, inputs, **kwargs), tokens(stock, None, inputs, **kwargs))


def test_another_caches_call_does_not_vouch_for_what_a_forward_stores():
    stock, pat = (copy.deepcopy(model) for model in pair("Llama"))
    prompt, other = text(40, 3), pat_hf.PATCache(pat, keep_bytes=1 << 26)

    def look(ids, scores):
        if other.get_seq_length() == 0:
            pat(input_ids=torch.tensor([prompt]), past_key_values=other)
        return scores

    tokens(pat, pat_hf.PATCache(pat), batch([text(9, 1)]), logits_processor=[look])
    for model in (stock, pat):
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight.mul_(-1.5)
    inputs = batch([[*prompt, 5]])
    assert torch.equal(tokens(pat, other, inputs), tokens(stock, None, inputs))


@pytest.mark.parametrize("what", ["scores", "clear", "reset"])
def test_a_cache_in_use_is_kept_from_callbacks(what):
    _, pat = pair("Llama")
    cache = pat_hf.PATCache(pat)

    def meddle(ids, scores):
        if ids.shape[1] == 22 and what == "scores":
            pat_hf.loglikelihoods(pat, [text(9, 1), text(9, 2)], [[5], [6]], cache)
        elif ids.shape[1] == 22:
            getattr(cache, what)()
        return scores

    with pytest.raises(RuntimeError, match="in use by the call"):
        tokens(pat, cache, batch([text(20, 1), text(20, 2)]), logits_processor=[meddle])
    inputs = batch([text(20, 1)])
    stock = pair("Llama")[0]
    assert torch.equal(tokens(pat, cache, inputs), tokens(stock, None, inputs))


def test_a_copy_made_in_a_call_goes_on_with_the_requests_that_have_ended():
    stock, pat = pair("Llama")
    cache, copies = pat_hf.PATCache(pat), []

    def look(ids, scores, **kwargs):
        copies.append(copy.deepcopy(cache))
        return torch.zeros(len(ids), dtype=torch.bool)

    inputs = batch([text(20, 1), text(20, 2), text(20, 3)])
    kwargs = {"eos_token_id": list(range(2, VOCABULARY, 12)), "max_new_tokens": 60}
    ids = tokens(pat, cache, inputs, stopping_criteria=[look], **kwargs)
    twin = copies[-1]
    lengths = [twin.prefixes.length(request) for request in range(3)]
    assert len(set(lengths)) > 1
    positions = torch.tensor(lengths)[:, None]
    logits = pat(torch.full((3, 1), 7), position_ids=positions, past_key_values=twin).logits[:, -1]
    for row, length, ours in zip(ids, lengths, logits, strict=True):
        whole = torch.cat([row[:length], torch.tensor([7])])
        torch.testing.assert_close(ours, stock(whole[None]).logits[0, -1], **CLOSE)
