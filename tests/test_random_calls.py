"""One cache through many calls of generate(), in mixed modes, short of memory, interrupted."""

import dis
import linecache
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import pat_hf

from .models import PAD, batch
from .rerun import Rerun, as_on_a_gpu

PAGE = 16
LIMIT = 40  # pages
KEPT = 14
CALLS = 500
VOCABULARY = 41
TOKEN = 2 * 2 * 1 * 16 * 4  # bytes of K and V: layers, heads, dim, float32


def models():
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    pat = AutoModelForCausalLM.from_config(config, attn_implementation="pat").eval()
    pat.load_state_dict(stock.state_dict())
    return stock, pat


def prompt_of(rng, said):
    """A path of a small tree of texts, cut anywhere, or a turn after an earlier answer."""
    if said and rng.random() < 0.3:
        return said[rng.integers(len(said))] + rng.integers(2, VOCABULARY, 2).tolist()
    tokens, branch = [], 0
    for length in (14, 9, 17):
        branch = 3 * branch + rng.integers(3)
        tokens += (
            np.random.default_rng(branch + 100 * length).integers(2, VOCABULARY, length).tolist()
        )
    return tokens[: rng.integers(1, len(tokens) + 1)]


def own_loop(model, input_ids, **kwargs):
    """Greedy, as a user of `custom_generate` writes it."""
    cache, mask = kwargs["past_key_values"], kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    new = input_ids
    for _ in range(4):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        given = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        new = model(input_ids=new, **given).logits[:, -1].argmax(-1, keepdim=True)
        input_ids, mask = torch.cat([input_ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    return input_ids


def mode_of(rng):
    modes = ["greedy", "sample", "samples", "beams", "lookup", "eos", "one token", "states", "loop"]
    mode = rng.choice(modes)
    return mode, {
        "greedy": {},
        "sample": {"do_sample": True, "temperature": 1.5},
        "samples": {"do_sample": True, "num_return_sequences": 3},
        "beams": {"num_beams": 3, "num_return_sequences": 2},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "eos": {"eos_token_id": list(range(2, VOCABULARY, 4)), "max_new_tokens": 9},
        "one token": {"max_new_tokens": 1},
        "states": {"output_hidden_states": True},
        "loop": {"custom_generate": own_loop},
    }[mode]


def check(cache):
    """The pool counts what the nodes hold, the budget is kept, nothing grows."""
    pool, nodes = cache.pool, list(cache.prefixes)
    pool.check(nodes)
    assert len(pool.references) <= LIMIT + 1
    for tensor in pool._tensors():
        assert len(tensor) == len(pool.references)
    assert len(nodes) <= LIMIT
    report = cache.report()
    assert report.kept_bytes <= KEPT * PAGE * TOKEN
    assert report.kept_tokens == sum(node.length for node in cache.prefixes.idle())


@pytest.mark.parametrize("decode", ["eager", "captured"])
def test_hundreds_of_calls(decode, monkeypatch):
    if decode == "captured":
        as_on_a_gpu(monkeypatch)
    stock, pat = models()
    options = {"page_size": PAGE, "max_tokens": LIMIT * PAGE, "decode": decode}
    cache = pat_hf.PATCache(pat, KEPT * PAGE * TOKEN, **options)
    rng = np.random.default_rng(0)
    said, pinned, modes = [], None, set()
    for call in range(CALLS):
        mode, kwargs = mode_of(rng)
        modes.add(mode)
        prompts = [
            prompt_of(rng, said) for _ in range(1 if mode == "lookup" else rng.integers(1, 5))
        ]
        if mode == "loop":
            cache.clear()  # it goes on with what a cache holds
        outs = []
        for model, given in ((stock, DynamicCache(config=stock.config)), (pat, cache)):
            torch.manual_seed(call)
            outs.append(
                model.generate(
                    **batch(prompts),
                    past_key_values=given,
                    pad_token_id=PAD,
                    **{"do_sample": False, "max_new_tokens": 4} | kwargs,
                )
            )
        assert torch.equal(*outs), (call, mode, prompts)
        check(cache)
        answer = outs[0][-1].tolist()
        if len(answer) < 70 and PAD not in answer:
            said = [*said[-3:], answer]
        if call % 7 == 0:
            if pinned is not None:
                cache.unpin(pinned)
            pinned = prompts[0][:40]
            cache.pin(pinned)
        if call % 11 == 0:
            cache.clear()
            cache.drop(prompts[-1] + [2])
            check(cache)
    assert len(modes) == 9 and len(cache.prefixes.roots) == 1
    assert decode == "eager" or Rerun.made > 10
    assert "forward" not in vars(pat)
    report = cache.report()
    # The store was of use, and too small.
    assert report.found_tokens > report.prefilled_tokens / 4 and report.evicted_tokens > 1000


def run(model, prompts, cache=None, **kwargs):
    torch.manual_seed(0)
    kwargs = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": PAD} | kwargs
    return model.generate(**batch(prompts), past_key_values=cache, **kwargs)


EXITS = "LOAD_CONST", "SWAP", "PUSH_EXC_INFO"  # what the exit of a `with` begins with, in CPython


class Interrupt(KeyboardInterrupt):
    """Ctrl-C at a line of our own code."""


def interrupted(call, line):
    """Runs `call`, interrupted at its line number `line`; how many lines of ours there were."""
    root = Path(pat_hf.__file__).parents[1]
    ours = tuple(f"{root / name}{os.sep}" for name in ("pat_hf", "cache", "kernels"))
    count = 0

    def in_frame(frame, event, argument):
        nonlocal count
        if event == "line" and not leaves(frame):
            count += 1
            if count == line:
                raise Interrupt
        return in_frame

    def leaves(frame):
        """Whether a `with` is about to exit: no signal comes before that has begun."""
        code, at = frame.f_code, frame.f_lineno
        begun = linecache.getline(code.co_filename, at).lstrip().startswith("with ")
        return begun and dis.opname[code.co_code[frame.f_lasti]] in EXITS

    def trace(frame, event, argument):
        file = frame.f_code.co_filename
        return in_frame if file.startswith(ours) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupt:
        pass
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("mode", ["greedy", "captured", "samples", "beams", "lookup", "eos"])
def test_an_interrupt_anywhere_leaves_a_sound_cache(mode, monkeypatch):
    if mode == "captured":
        as_on_a_gpu(monkeypatch)
    stock, pat = models()
    kwargs = {
        "greedy": {},
        "captured": {"max_new_tokens": 6},
        "samples": {"do_sample": True, "num_return_sequences": 2},
        "beams": {"num_beams": 3},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "eos": {"eos_token_id": list(range(2, VOCABULARY, 4))},
    }[mode]
    rng = np.random.default_rng(1)
    shared = rng.integers(2, VOCABULARY, 40).tolist()
    first, second = (
        [shared[:cut] + rng.integers(2, VOCABULARY, n).tolist() for cut, n in cuts]
        for cuts in ([(40, 5), (40, 9), (20, 8)], [(33, 9), (40, 30), (11, 4)])
    )
    second = second[:1] if mode == "lookup" else second
    expected = run(stock, first), run(stock, second, **kwargs)
    lines, kept = 0, 0
    for at in [-1, *np.random.default_rng(2).uniform(size=40)]:
        cache = pat_hf.PATCache(pat, 20 * PAGE * TOKEN, page_size=PAGE, prefill_tokens=25)
        cache.pin(shared[:25])
        run(pat, first, cache)
        held = cache.report().kept_tokens
        count = interrupted(lambda: run(pat, second, cache, **kwargs), int(at * lines))  # noqa: B023
        lines = lines or count
        cache.pool.check(list(cache.prefixes))
        kept += cache.report().kept_tokens >= held
        assert "forward" not in vars(pat)
        assert torch.equal(run(pat, second, cache, **kwargs), expected[1])
        assert torch.equal(run(pat, first, cache), expected[0])
        cache.pool.check(list(cache.prefixes))
        cache.unpin(shared[:25])
    assert lines > 1000 and kept > 20
