"""One model, several threads, a cache for each: the tokens are those of one thread."""

import copy
import sys
import threading

import pytest
import torch

import pat_hf

from .models import batch, pair
from .test_generate import BATCHES

PROMPTS = ["two-levels", "ragged", "disjoint", "identical"]
KWARGS = {"max_new_tokens": 20, "do_sample": False}


@pytest.fixture
def hurried():
    """Threads that take turns far more often than they would."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def test_caches_in_threads_do_not_meet(hurried):
    stock, pat = pair("Mistral")
    expected = {name: stock.generate(**batch(BATCHES[name]), **KWARGS) for name in PROMPTS}
    found, errors = {}, []
    start = threading.Barrier(len(PROMPTS))

    def run(name):
        cache = pat_hf.PATCache(pat, page_size=16)
        start.wait()
        try:
            outs = []
            for _ in range(2):  # the second finds the prompts stored
                outs.append(pat.generate(**batch(BATCHES[name]), past_key_values=cache, **KWARGS))
            found[name] = outs, cache.prefilled
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for name in PROMPTS:
        outs, prefilled = found[name]
        assert all(torch.equal(out, expected[name]) for out in outs)
        distinct = {tuple(p[: i + 1]) for p in BATCHES[name] for i in range(len(p))}
        assert prefilled == len(distinct)


def test_a_cache_is_one_threads_at_a_time():
    stock, pat = pair("Llama")
    cache, errors = pat_hf.PATCache(pat, keep_bytes=1 << 30), []
    inputs = batch(BATCHES["ragged"])
    expected = stock.generate(**inputs, **KWARGS)

    def intrude():
        for act in (
            lambda: pat.generate(**inputs, past_key_values=cache, **KWARGS),
            lambda: pat_hf.loglikelihoods(pat, [[3, 4]], [[5]], cache),
        ):
            try:
                act()
            except RuntimeError as error:
                errors.append(str(error))

    def beside(ids, scores):
        if not errors:
            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()
        return scores

    out = pat.generate(**inputs, past_key_values=cache, logits_processor=[beside], **KWARGS)
    assert torch.equal(out, expected)
    assert len(errors) == 2 and all("in use by another thread" in error for error in errors)
    intrude()
    assert len(errors) == 2


def test_a_copy_is_free_while_its_original_is_in_use():
    _, pat = pair("Llama")
    cache = pat_hf.PATCache(pat)
    twin, outs = copy.deepcopy(cache), []
    inputs = batch(BATCHES["ragged"])
    run = lambda: outs.append(pat.generate(**inputs, past_key_values=twin, **KWARGS))  # noqa: E731
    with cache.in_use():
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert len(outs) == 1
