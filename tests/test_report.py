"""The report's figures against counts made by hand, and the drawn tree."""

import numpy as np
import torch

import pat_hf
from pat_hf.cache.prefix_tree import PrefixTree
from pat_hf.cache.report import draw

from .models import batch, pair


def test_the_report_counts_what_was_shared():
    _, pat = pair("Llama")
    cache = pat_hf.PATCache(pat, page_size=16)
    assert str(cache.report()) and cache.tree() == "0 requests"
    shared = list(range(2, 42))
    prompts = [shared + [50 + i] * (i + 1) for i in range(3)]
    pat.generate(**batch(prompts), past_key_values=cache, max_new_tokens=4, do_sample=False)
    report = cache.report()
    token = 2 * 3 * 2 * 16 * 4  # K and V, layers, heads, dim, bytes
    assert report.requests == 3
    assert report.depth == 3
    assert report.prompt_tokens == 3 * 40 + 1 + 2 + 3
    assert report.prefilled_tokens == 40 + 1 + 2 + 3
    assert report.prefill_saved == 80
    assert report.tokens == 40 + 6 + 3 * 3
    assert report.dense_tokens == 3 * 40 + 6 + 3 * 3
    assert report.bytes_per_token == token
    assert report.bytes_held == (3 + 3 + 3) * 16 * token  # pages of the nodes
    assert report.bytes_saved == report.dense_tokens * token - report.bytes_held
    # 40 shared tokens once; each request's own once. Nothing is read again.
    assert report.bytes_read == report.tokens * token
    assert report.bytes_read_saved == 80 * token
    assert report.backend == "torch" and report.fallback is None
    assert "46 tokens of 126 tokens, 2.7x less" in str(report)
    assert repr(cache).startswith("PATCache(requests=3, length=46, tokens=55 stored of 135")


def test_a_cache_may_be_looked_at_from_inside_a_forward():
    stock, pat = pair("Llama")
    cache = pat_hf.PATCache(pat, keep_bytes=1 << 20, page_size=16, prefill_tokens=20)
    inputs, seen = batch([[2 + i % 60 for i in range(50)] + [70 + n] for n in range(3)]), []

    def look(*args):
        cache.pin(inputs["input_ids"][0])
        seen.append((cache.report().requests, cache.tree()))

    hook = pat.model.layers[1].register_forward_hook(look)
    kwargs = {"max_new_tokens": 4, "do_sample": False}
    ours = pat.generate(**inputs, past_key_values=cache, **kwargs)
    hook.remove()
    assert torch.equal(ours, stock.generate(**inputs, **kwargs))
    assert [requests for requests, _ in seen] == [3] * (3 + 3)  # chunks and steps
    assert cache.report().pinned_prompts == 1


def test_drawing():
    tree = PrefixTree()
    system, first, second = np.arange(100), np.arange(500, 550), np.arange(600, 630)
    for own in range(3):
        tree.insert(np.concatenate([system, first, [900 + own]]))
    for own in range(2):
        tree.insert(np.concatenate([system, second, [900 + own] * 2]))
    tree.insert(np.concatenate([system, [7]]))
    assert draw(tree).splitlines() == [
        "6 requests",
        "└─ 100 tokens · 6 requests",
        "   ├─ 1 request, 1 token of its own",
        "   ├─ 50 tokens · 3 requests",
        "   │  └─ 3 requests, 1 token of their own",
        "   └─ 30 tokens · 2 requests",
        "      └─ 2 requests, 2 tokens of their own",
    ]
