"""Log-likelihoods against stock sdpa, pair by pair, in float32."""

import copy

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, RobertaConfig

import pat_hf

from .models import CORE, PAD, batch, pair
from .test_generate import text

SHOTS = text(50, 21)
CONTEXTS = [SHOTS + text(n, n) for n in (12, 7, 30)] + [text(5, 22), SHOTS[:20], [9]]
ANSWERS = [[[2 + i] for i in range(4)], [text(n, 30 + n) for n in (3, 8)]]
# Every context with one-token choices, longer answers, two that share a beginning, and itself.
PAIRS = [
    (context, answer)
    for context in CONTEXTS
    for answer in (*ANSWERS[0], *ANSWERS[1], ANSWERS[1][1][:5] + [3], context)
]
ORDER = np.random.default_rng(0).permutation(len(PAIRS)).tolist()
PAIRS = [PAIRS[i] for i in ORDER]


def expected(model, pairs):
    """Sums of log-probabilities and greediness, each pair by itself."""
    sums, greedy = [], []
    with torch.no_grad():
        for context, answer in pairs:
            logits = model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
            sums.append(logits.log_softmax(-1)[range(len(answer)), answer].sum())
            greedy.append(logits.argmax(-1).tolist() == answer)
    return torch.stack(sums).cpu(), torch.tensor(greedy, device="cpu")


def through(model, function):
    """What a function returns, and how many tokens went through the model in each forward."""
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: seen.append(args[0].numel())
    )
    try:
        return function(), seen
    finally:
        hook.remove()


@pytest.mark.parametrize("name", CORE)
def test_same_as_pair_by_pair(name):
    stock, pat = pair(name)
    greedy = [model_answer(stock, context, 4) for context in CONTEXTS]
    pairs = PAIRS + list(zip(CONTEXTS, greedy, strict=True))
    sums, best = expected(stock, pairs)
    assert best.sum() >= len(CONTEXTS) and not best.all()
    scores, seen = through(pat, lambda: pat_hf.loglikelihoods(pat, *zip(*pairs, strict=True)))
    torch.testing.assert_close(scores.logprobs, sums, atol=1e-3, rtol=1e-4)
    assert torch.equal(scores.greedy, best)
    fed = [context + answer[:-1] for context, answer in pairs]
    assert seen == [len({tuple(f[: i + 1]) for f in fed for i in range(len(f))})]


def model_answer(model, context, count):
    out = model.generate(torch.tensor([context]), max_new_tokens=count, do_sample=False)
    return out[0, len(context) :].tolist()


@pytest.mark.parametrize("options", [{"prefill_tokens": 40}, {"max_tokens": 192}])
def test_in_parts(monkeypatch, options):
    """Few tokens at a time, few logits at a time, little memory: the same, nothing twice."""
    stock, pat = pair("Llama")
    monkeypatch.setattr("pat_hf.score._LOGITS", 5 * pat.config.vocab_size)
    cache = pat_hf.PATCache(pat, page_size=16, **options)
    run = lambda: pat_hf.loglikelihoods(pat, *zip(*PAIRS, strict=True), cache)  # noqa: E731
    scores, seen = through(pat, run)
    sums, best = expected(stock, PAIRS)
    torch.testing.assert_close(scores.logprobs, sums, atol=1e-3, rtol=1e-4)
    assert torch.equal(scores.greedy, best)
    fed = [context + answer[:-1] for context, answer in PAIRS]
    distinct = len({tuple(f[: i + 1]) for f in fed for i in range(len(f))})
    assert cache.prompted == sum(map(len, fed))
    if "prefill_tokens" in options:
        assert cache.prefilled == distinct and max(seen) <= 40
        # Beyond them, tokens of the group before whose logits are wanted once more.
        assert distinct <= sum(seen) < 1.2 * distinct
    else:
        assert cache.pool.used <= cache.pool.limit < cache.pool.pages(distinct)
    more = text(9, 40)
    scores, seen = through(
        pat, lambda: pat_hf.loglikelihoods(pat, [PAIRS[0][0]], [torch.tensor(more)], cache)
    )
    torch.testing.assert_close(scores.logprobs, expected(stock, [(PAIRS[0][0], more)])[0])


def test_logits_are_held_in_parts(monkeypatch):
    _, pat = pair("Llama")
    monkeypatch.setattr("pat_hf.score._LOGITS", 3 * pat.config.vocab_size)
    seen = []
    hook = pat.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    pat_hf.loglikelihoods(pat, *zip(*PAIRS, strict=True))
    hook.remove()
    assert max(seen) == 3


def test_a_model_inside_a_wrapper():
    """As PEFT wraps it."""
    _, pat = pair("Llama")

    class Wrapper:
        def get_base_model(self):
            return pat

    ours, theirs = (
        pat_hf.loglikelihoods(model, *zip(*PAIRS[:3], strict=True)) for model in (Wrapper(), pat)
    )
    assert torch.equal(ours.logprobs, theirs.logprobs)


def test_what_a_cache_holds_is_not_computed_again():
    _, pat = pair("Llama")
    cache = pat_hf.PATCache(pat)
    pat.generate(**batch(CONTEXTS[:3]), past_key_values=cache, max_new_tokens=2)
    answer = text(6, 41)
    run = lambda: pat_hf.loglikelihoods(pat, CONTEXTS[:3], [answer] * 3, cache)  # noqa: E731
    _, seen = through(pat, run)
    assert seen == [3 * (1 + 5)]


@pytest.mark.parametrize(
    "contexts, continuations, words",
    [
        ([[3]], [[4], [5]], "1 contexts and 2 continuations"),
        ([[3], []], [[4], [5]], "Context 1 .*beginning-of-text"),
        ([[3], [4]], [[], [5]], "Continuation 0 "),
        ([[[3]]], [[5]], "Context 0 .*int64 .1, 1."),
        ([[3]], [[1.7, 2.2]], "Continuation 0 .*float64 .2."),
        ([[3]], [[9, 97]], "Continuation 0 has ids from 9 to 97, .* 0 to 96"),
        ([[3], [97]], [[4], [5]], "Context 1 has ids from 97"),
        (["Who?"], [[5]], "Context 0 .*text 'Who[?]'"),
    ],
)
def test_pairs_that_make_no_sense(contexts, continuations, words):
    _, pat = pair("Llama")
    with pytest.raises(ValueError, match=words):
        pat_hf.loglikelihoods(pat, contexts, continuations)


def test_a_pair_that_does_not_fit_and_no_pairs():
    stock, pat = pair("Llama")
    with pytest.raises(pat_hf.PoolExhausted, match="max_tokens"):
        cache = pat_hf.PATCache(pat, page_size=16, max_tokens=32)
        pat_hf.loglikelihoods(pat, CONTEXTS, [[3]] * len(CONTEXTS), cache)
    with pytest.raises(ValueError, match="attn_implementation"):
        pat_hf.loglikelihoods(stock, [[3]], [[4]])
    assert len(pat_hf.loglikelihoods(pat, [], []).logprobs) == 0


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
@pytest.mark.parametrize("first", ["forward", "generate"])
def test_by_hand_with_right_padded_continuations(name, first):
    """Repeat the contexts' requests, then one forward of all continuations."""
    stock, pat = pair(name)
    inputs = batch(CONTEXTS[:3])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    answers = [text(n, 50 + n) for n in (4, 1, 6, 2, 3, 5)]
    width = max(map(len, answers))
    more = torch.tensor([a + [PAD] * (width - len(a)) for a in answers])
    real = torch.tensor([[1] * len(a) + [0] * (width - len(a)) for a in answers])
    logits = []
    for model, cache in (
        (stock, DynamicCache(config=stock.config)),
        (pat, pat_hf.PATCache(pat, page_size=16)),
    ):
        if first == "forward":
            model(
                ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                past_key_values=cache,
            )
        else:
            model.generate(**inputs, past_key_values=cache, max_new_tokens=1)
        cache.batch_repeat_interleave(2)
        wide = torch.cat([mask.repeat_interleave(2, 0), real], 1)
        place = (wide.cumsum(-1) - 1)[:, -width:]
        logits.append(
            model(more, attention_mask=wide, position_ids=place, past_key_values=cache).logits
        )
    torch.testing.assert_close(logits[1][real.bool()], logits[0][real.bool()], atol=2e-4, rtol=2e-4)
    if first == "generate":
        assert cache.tokens == cache.prefilled + sum(map(len, answers))


@pytest.mark.parametrize(
    "adapter, words",
    [
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PROMPT_TUNING"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PREFIX_TUNING"),
        (peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3, 4]), "aLoRA"),
    ],
)
def test_adapters_that_change_more_than_weights_are_refused(adapter, words):
    model = peft.get_peft_model(copy.deepcopy(pair("Llama")[1]), adapter)
    with pytest.raises(ValueError, match=words):
        pat_hf.loglikelihoods(model, [[1, 2, 3, 4]], [[7, 8]])


def test_models_that_number_tokens_by_their_padding_are_refused():
    config = RobertaConfig(vocab_size=97, hidden_size=16, num_attention_heads=2, is_decoder=True)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="pat")
    with pytest.raises(ValueError, match="Roberta.* by its padding token"):
        pat_hf.loglikelihoods(model, [[5, 6, 7]], [[8, 9]])
