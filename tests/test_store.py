"""What a PATCache keeps beyond a call, against a fresh cache and stock Transformers."""

import copy
import random
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import pat_hf
from pat_hf.cache import archive, pat_cache
from pat_hf.cache.columns import Columns
from pat_hf.cache.prefix_tree import PrefixTree

from .models import CORE, batch, pair, pair_of
from .test_generate import text

SYSTEM = text(70, 21)
PAGE = 16
TOKEN = 2 * 3 * 2 * 16 * 4  # bytes of K and V: layers, heads, dim, float32
ROOM = 1 << 30


def cache_of(keep_bytes=ROOM, **options):
    return pat_hf.PATCache(pair("Llama")[1], keep_bytes, page_size=PAGE, **options)


def generate(model, prompts, cache=None, **kwargs):
    torch.manual_seed(0)
    kwargs = {"max_new_tokens": 6, "do_sample": False} | kwargs
    return model.generate(**batch(prompts), past_key_values=cache, **kwargs)


class Fed:
    """How many tokens go through the model in the first forward inside the block: the prefill."""

    def __enter__(self):
        self.packed, self.stepping = 0, False
        embed = pair("Llama")[1].model.embed_tokens
        self.hook = embed.register_forward_hook(self.note)
        return self

    def note(self, module, args, out):
        rows, columns = args[0].shape
        if not self.stepping:
            self.packed += rows * columns
        self.stepping = True

    def __exit__(self, *error):
        self.hook.remove()


def same(cache, prompts, **kwargs):
    """Generates on the cache, compares with stock, and returns the tokens that it computed."""
    stock, pat = pair("Llama")
    before = cache.report()
    with Fed() as fed:
        ours = generate(pat, prompts, cache, **kwargs)
    assert torch.equal(ours, generate(stock, prompts, **kwargs))
    report = cache.report()
    computed = report.prefilled_tokens - before.prefilled_tokens
    found = report.found_tokens - before.found_tokens
    distinct = {tuple(p[: i + 1]) for p in prompts for i in range(len(p))}
    assert computed + found == len(distinct)
    # Prompts that are stored whole go through with their last token only.
    assert computed <= fed.packed <= computed + len(prompts)
    cache.pool.check(cache.prefixes)
    check_budget(cache)
    return computed


def check_budget(cache):
    report = cache.report()
    idle = cache.prefixes.idle()
    assert report.kept_tokens == sum(n.length for n in idle)
    page = cache.pool.page_size
    assert report.kept_bytes == sum(-(-n.length // page) for n in idle) * page * TOKEN
    assert report.kept_bytes <= (cache.keep_bytes or 0)


def answers(out, prompts, row):
    """The tokens of a row's prompt and answer, without padding."""
    return out[row, out.shape[1] - 6 - len(prompts[row]) :].tolist()


def test_batches_that_share_a_system_prompt_compute_what_is_new():
    cache = cache_of()
    batches = [[SYSTEM + text(n, 10 * k + n) for n in (3, 9, 20)[: 3 - k]] for k in range(3)]
    assert [same(cache, prompts) for prompts in batches] == [70 + 32, 12, 3]
    # All are there still, in any order and number.
    again = [batches[2][0], batches[0][2], batches[1][1], batches[0][0], batches[0][0]]
    assert same(cache, again) == 0
    assert same(cache, [batches[1][0] + [5], batches[0][1][:75]]) == 1
    report = cache.report()
    assert report.found_tokens > 0 and f"{report.found_tokens} of" in str(report)


def test_without_a_budget_only_the_last_batch_stays():
    cache = cache_of(None)
    first, second = [SYSTEM + text(5, 1)], [text(30, 2)]
    assert [same(cache, x) for x in (first, first, second, first)] == [75, 0, 30, 75]
    report = cache.report()
    assert report.kept_tokens == 0 and "kept" not in str(report)


def test_chat_of_several_users_in_turn():
    cache = cache_of()
    chats = {user: SYSTEM + text(4, user) for user in range(3)}
    _, pat = pair("Llama")
    for turn in range(3):
        for user in chats:
            new = text(5, 100 * turn + user)
            prompt = chats[user] + (new if turn else [])
            # The last token of an answer was never fed.
            fresh = 5 + 1 if turn else 4 + (70 if user == 0 else 0)
            assert same(cache, [prompt]) == fresh
            chats[user] = generate(pat, [prompt], cache)[0].tolist()


@pytest.mark.parametrize("mode", [{"do_sample": True, "num_return_sequences": 4}, {"num_beams": 3}])
def test_answers_of_samples_and_beams_are_kept(mode):
    """All of them, also those that begin alike."""
    _, pat = pair("Llama")
    cache = cache_of()
    prompts = [SYSTEM + text(4, 1), SYSTEM]
    generate(pat, prompts, cache, **mode)
    fed = cache._columns.ids.tolist()
    rows = [prompts[row * 2 // len(fed)] + ids for row, ids in enumerate(fed)]
    assert len({(len(row), row[-5]) for row in rows}) < len({tuple(row) for row in rows})
    same(cache, [text(20, 5)])
    assert same(cache, rows) == 0


def test_equal_answers_are_stored_once():
    _, pat = pair("Llama")
    cache = cache_of()
    generate(pat, [SYSTEM] * 4, cache)
    cache.clear()
    assert cache.report().kept_tokens == 70 + 5
    assert cache.pool.used == 5 + 1
    cache.pool.check(cache.prefixes)


def test_clear_keeps_and_reset_forgets():
    cache = cache_of()
    cache.pin(SYSTEM)
    same(cache, [SYSTEM + text(5, 1)])
    cache.clear()
    report = cache.report()
    assert (report.requests, report.tokens, report.kept_tokens) == (0, 0, 5 + 5)
    assert same(cache, [SYSTEM + text(5, 1)]) == 0
    cache.reset()
    report = cache.report()
    assert not list(cache.prefixes) and not report.pinned_prompts and not report.found_tokens


def test_the_batch_is_reported_without_what_is_kept():
    _, pat = pair("Llama")
    full, fresh = cache_of(), cache_of()
    for seed in range(6):
        same(full, [SYSTEM[:40] + text(30, seed)])
    prompts = [text(20, 9) + text(n, n) for n in (2, 4)]
    same(full, prompts)
    same(fresh, prompts)
    reports = [cache.report() for cache in (full, fresh)]
    for name in ("requests", "depth", "tokens", "dense_tokens", "bytes_held", "read_tokens"):
        ours, theirs = (getattr(report, name) for report in reports)
        assert ours == theirs, name
    assert full.tree() == fresh.tree()
    plans = []
    for cache in (full, fresh):
        order = cache.prefixes.preorder()
        node = np.array([order.index[end] for end in cache.prefixes.ends], np.int32)
        position = np.array([end.end - 1 for end in cache.prefixes.ends], np.int32)
        plan = cache.plans(order, node, position, torch.device("cpu"))[0]
        plans.append((plan.tensor(torch.device("cpu")).shape, plan.kv_tokens))
    assert plans[0] == plans[1]


def test_the_least_recently_used_go_first():
    prompts = [text(PAGE, seed) for seed in range(4)]
    # Three prompts of one page, each with the page of its answer.
    cache = cache_of(3 * 2 * PAGE * TOKEN)
    for prompt in prompts[:3]:
        assert same(cache, [prompt]) == PAGE
    assert same(cache, [prompts[0]]) == 0  # used again: now 1 is the oldest
    assert same(cache, [prompts[3]]) == PAGE
    assert same(cache, [text(PAGE, 9)]) == PAGE
    evicted = cache.report().evicted_tokens
    # The answers of 0 were equal, and 1 has lost its own first.
    assert evicted == 5 + PAGE
    for prompt, tokens in [(prompts[0], 0), (prompts[2], 0), (prompts[3], 0), (prompts[1], PAGE)]:
        assert same(cache, [prompt]) == tokens


@pytest.mark.parametrize("budget", [0, 1, 3 * PAGE * TOKEN, 9 * PAGE * TOKEN])
def test_the_budget_holds_after_every_call(budget):
    cache = cache_of(budget)
    for seed in range(8):
        same(cache, [SYSTEM[: 9 * seed] + text(n, seed + n) for n in range(1, 2 + seed % 3)])
    cache.batch_select_indices(torch.tensor([0]))
    check_budget(cache)
    cache.clear()
    check_budget(cache)
    assert cache.report().evicted_tokens > 0


def test_full_memory_evicts_before_it_refuses():
    limit = 12 * PAGE
    cache = cache_of(max_tokens=limit)
    for seed in range(12):
        same(cache, [text(40, seed), text(9, seed)])
        assert cache.pool.used <= 12
    assert cache.report().kept_tokens and cache.report().evicted_tokens
    # Decoding finds room, too: 3 pages of prompts and 9 of answers.
    same(cache, [text(PAGE, seed) for seed in (1, 2, 3)], max_new_tokens=3 * PAGE + 1)
    # A prompt that fits alone fits, however what is stored would cut it up.
    for cut in range(1, 11):
        same(cache, [SYSTEM[: 6 * cut] + [90 + cut % 3]], max_new_tokens=1)
    same(cache, [(SYSTEM * 3)[: limit - PAGE]], max_new_tokens=2)
    before = cache.report()
    with pytest.raises(pat_hf.PoolExhausted, match="take 13 pages.*max_tokens.*208 or more"):
        generate(pair("Llama")[1], [(SYSTEM * 3)[: limit + 1]], cache)
    assert cache.report() == before


def test_pinned_prompts_stay_over_the_budget_until_they_are_unpinned():
    _, pat = pair("Llama")
    cache = cache_of(0)
    cache.pin(torch.tensor(SYSTEM))  # before it is there
    cache.pin(np.array(SYSTEM))
    assert cache.report().pinned_prompts == 1
    question = SYSTEM + text(20, 1)
    assert same(cache, [question]) == 90
    assert same(cache, [text(30, 2)]) == 30
    assert same(cache, [question]) == 20
    cache.unpin(SYSTEM)
    assert same(cache, [question]) == 0  # the last batch
    assert same(cache, [text(30, 2)]) == 30
    assert same(cache, [question]) == 90


def test_pins_that_end_inside_a_node_and_pins_in_the_way():
    cache = cache_of(0, max_tokens=8 * PAGE)
    assert same(cache, [SYSTEM]) == 70
    cache.pin(SYSTEM[:20])
    assert same(cache, [text(30, 2)]) == 30
    assert cache.pool.used == 2 + 2 + 1  # pinned: 20 tokens, not 70
    assert same(cache, [SYSTEM]) == 50
    assert same(cache, [text(6 * PAGE, 3)], max_new_tokens=1) == 6 * PAGE
    with pytest.raises(pat_hf.PoolExhausted, match="9 pages.*with the 2 that are pinned"):
        generate(pair("Llama")[1], [text(7 * PAGE, 3)], cache)
    cache.unpin(SYSTEM[:20])
    assert same(cache, [text(7 * PAGE, 3)], max_new_tokens=1) == PAGE


def test_drop_removes_what_no_other_kept_prompt_needs():
    cache = cache_of()
    first, second = SYSTEM + text(20, 1), SYSTEM + text(9, 2)
    same(cache, [first, second])
    with pytest.raises(ValueError, match="90 tokens is in use by the batch"):
        cache.drop(first)
    _, pat = pair("Llama")
    turn = generate(pat, [second], cache)[0].tolist() + [7]
    same(cache, [turn])
    cache.clear()
    # Its own tokens and its answer, not the system prompt of the other.
    assert cache.drop(first) == 20 + 5
    assert cache.drop(first) == 0
    assert cache.drop(text(40, 5)) == 0
    # The next turn goes on from the prompt; its answer is part of that.
    assert cache.drop(second) == 0
    assert same(cache, [second]) == 0
    assert same(cache, [first]) == 20
    cache.pin(second)
    cache.clear()
    with pytest.raises(ValueError, match="79 tokens is pinned: unpin"):
        cache.drop(second)
    assert cache.drop(turn) == 5 + 2 + 5  # the first answer, what follows it, its own
    cache.unpin(second)
    assert cache.drop(second) == 9
    cache.pool.check(cache.prefixes)
    assert cache.drop(first) == 70 + 20 + 5
    assert cache.pool.used == 0


@pytest.mark.parametrize("act", ["pin", "unpin", "drop"])
def test_what_is_no_prompt(act):
    cache = cache_of()
    for given, words in [
        ([[1, 2]], r"int64 \[1, 2\]"),
        ([1.5], r"float64 \[1\]"),
        ([], r"\[0\]"),
        ("text", "was given"),
    ]:
        with pytest.raises(ValueError, match=words):
            getattr(cache, act)(given)


def test_unpin_of_what_is_not_pinned():
    cache = cache_of()
    cache.pin(SYSTEM)
    with pytest.raises(ValueError, match="3 tokens is not pinned; 1 others are"):
        cache.unpin([1, 2, 3])


def test_a_prefill_that_fails_stores_nothing():
    _, pat = pair("Llama")
    cache = cache_of()
    same(cache, [SYSTEM])

    def fail(*args):
        raise KeyboardInterrupt

    hook = pat.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        generate(pat, [SYSTEM + [5], text(30, 1)], cache)
    hook.remove()
    cache.pool.check(cache.prefixes)
    assert len(cache.prefixes) == 0
    assert same(cache, [SYSTEM + [5], text(30, 1)]) == 1 + 30


def test_prompts_whose_tokens_do_not_tell_their_keys_are_not_shared():
    stock, pat = pair("Llama")
    cache = cache_of()
    place = torch.arange(70)[None] * 2
    outs = [
        model.generate(
            torch.tensor([SYSTEM]), position_ids=place, past_key_values=given, max_new_tokens=6
        )
        for model, given in ((stock, None), (pat, cache))
    ]
    assert torch.equal(*outs)
    assert cache.report().fallback
    assert same(cache, [SYSTEM]) == 70


@pytest.mark.parametrize("mode", ["prompt_lookup_num_tokens", "assistant_early_exit"])
def test_assisted_decoding_reuses_and_keeps(mode):
    cache = cache_of()
    mode = {mode: 2, "max_new_tokens": 12}
    stock, pat = pair("Llama")

    def added(given):
        before = cache.prefilled
        ours = generate(pat, [given], cache, **mode)
        assert torch.equal(ours, generate(stock, [given], **mode))
        cache.pool.check(cache.prefixes)
        return ours[0].tolist(), cache.prefilled - before

    padded = batch([[3], [4, 5, 6]])
    ours, theirs = (
        m.generate(**{name: x[:1] for name, x in padded.items()}, past_key_values=c, **mode)
        for m, c in ((pat, cache_of()), (stock, None))
    )
    assert torch.equal(ours, theirs)
    for given in (text(20, 1), [3], SYSTEM[:10] * 3):
        answered, computed = added(given)
        assert computed == len(given) - 1  # the first candidates come with the last token
    assert added(SYSTEM[:10] * 3)[1] == 0
    assert added(answered + [5, 6, 7])[1] <= 3  # a further turn: its own tokens, and the last fed
    assert same(cache, [SYSTEM[:10] * 3]) == 0


def test_a_store_in_the_way_of_candidates_is_evicted():
    """What cuts the prompt costs a page, which drafted tokens need, too."""
    cache = cache_of(max_tokens=4 * PAGE)
    prompt = text(5, 0) * 6
    same(cache, [prompt[:10] + [2], prompt[:20] + [2]], max_new_tokens=1)
    given, mode = [prompt], {"prompt_lookup_num_tokens": 3, "max_new_tokens": 15}
    stock, pat = pair("Llama")
    assert torch.equal(generate(pat, given, cache, **mode), generate(stock, given, **mode))


def test_the_report_is_of_the_last_call():
    _, pat = pair("Llama")
    cache = pat_hf.PATCache(pat, keep_bytes=1 << 20)
    inputs = batch([SYSTEM])
    pat.generate(**inputs, past_key_values=cache, max_new_tokens=3)
    assert "cpu" in cache.report().decoding
    pat.generate(**inputs, past_key_values=cache, max_new_tokens=3, prompt_lookup_num_tokens=2)
    assert cache.report().decoding == "eager (assisted decoding)"
    before = cache.report().prompt_tokens, cache.report().prefilled_tokens

    def fail(*args):
        raise KeyError("no more")

    hook = pat.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="no more"):
        pat.generate(**batch([SYSTEM + [3]]), past_key_values=cache, max_new_tokens=3)
    hook.remove()
    assert (cache.report().prompt_tokens, cache.report().prefilled_tokens) == before
    cache.reset()
    assert cache.report().decoding is None and not cache.report().prompt_tokens


def test_interrupted_assisted_decoding_leaves_a_sound_cache():
    cache = cache_of()
    _, pat = pair("Llama")

    def broken(ids, scores):
        raise KeyError("criterion")

    with pytest.raises(KeyError):
        generate(pat, [SYSTEM], cache, prompt_lookup_num_tokens=2, stopping_criteria=[broken])
    assert same(cache, [SYSTEM + [5]]) <= 2


def test_two_caches_share_nothing():
    one, other = cache_of(), cache_of()
    same(one, [SYSTEM])
    assert same(other, [SYSTEM]) == 70
    twin = copy.deepcopy(one)
    assert same(twin, [SYSTEM + [5]]) == 1
    twin.reset()
    assert same(one, [SYSTEM]) == 0


def saved(tmp_path, cache):
    path = tmp_path / "prompts.safetensors"
    cache.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    return path


@pytest.mark.parametrize("options", [{}, {"page_size": PAGE}])
def test_save_and_load(tmp_path, options):
    _, pat = pair("Llama")
    cache = cache_of()
    prompts = [SYSTEM + text(n, n) for n in (3, 20)]
    same(cache, [text(30, 5), SYSTEM[:50]])
    out = generate(pat, prompts, cache)
    path = saved(tmp_path, cache)
    report = cache.report()
    loaded = pat_hf.PATCache.load(path, pat, **options)
    stored = loaded.report()
    assert stored.kept_tokens == report.kept_tokens + report.tokens
    assert stored.kept_bytes == loaded.keep_bytes > 0
    # Tokens, not pages, make the file.
    assert path.stat().st_size < stored.kept_tokens * (TOKEN + 8) + 8000
    with Fed() as fed:
        assert torch.equal(generate(pat, prompts, loaded), out)
    assert fed.packed == 2  # the last token of each, for its logits
    loaded.pool.check(loaded.prefixes)
    follow = [answers(out, prompts, 1) + [7]]
    assert same(loaded, follow) == 2
    # The cache that was saved goes on as if nothing had been.
    assert same(cache, follow) == 2


@pytest.mark.parametrize("name", CORE)
def test_every_model_is_served_from_the_store_and_from_a_file(name, tmp_path):
    stock, pat = pair(name)
    cache = pat_hf.PATCache(pat, ROOM, page_size=PAGE)
    prompts = [SYSTEM + text(n, n) for n in (3, 20)]
    generate(pat, prompts, cache)
    generate(pat, [text(9, 9)], cache)
    expected = generate(stock, prompts[::-1])
    loaded = pat_hf.PATCache.load(saved(tmp_path, cache), pat)
    for given, computed in ((cache, 70 + 23 + 9), (loaded, 0)):
        assert torch.equal(generate(pat, prompts[::-1], given), expected)
        assert given.prefilled == computed


def test_decoding_goes_on_after_saving(tmp_path):
    stock, pat = pair("Llama")
    cache = cache_of()
    files = []

    def save_now_and_then(ids, scores):
        if ids.shape[1] % 6 == 0:
            files.append(saved(tmp_path, cache))  # the rows, equal so far or in part, are merged
        return scores

    mode = {"max_new_tokens": 30, "do_sample": True, "temperature": 0.3}
    ours = generate(pat, [SYSTEM] * 4, cache, logits_processor=[save_now_and_then], **mode)
    assert torch.equal(ours, generate(stock, [SYSTEM] * 4, **mode))
    assert len(files) == 5
    distinct = {tuple(row[:end]) for row in ours.tolist() for end in range(1, 70 + 30)}
    assert 70 + 29 < len(distinct) < 70 + 4 * 29
    loaded = pat_hf.PATCache.load(saved(tmp_path, cache), pat)
    assert loaded.report().kept_tokens == len(distinct)


def test_load_keeps_to_its_budget_and_limit(tmp_path):
    _, pat = pair("Llama")
    cache = cache_of()
    same(cache, [text(PAGE, seed) for seed in range(6)])
    path = saved(tmp_path, cache)
    small = pat_hf.PATCache.load(path, pat, keep_bytes=4 * PAGE * TOKEN, page_size=PAGE)
    assert small.report().kept_bytes <= 4 * PAGE * TOKEN
    same(small, [text(PAGE, 3)])
    with pytest.raises(
        pat_hf.PoolExhausted, match=f"max_tokens={5 * PAGE}: .* of 5 pages"
    ) as error:
        pat_hf.PATCache.load(path, pat, max_tokens=5 * PAGE, page_size=PAGE)
    least = int(re.search(r"Give at least (\d+)", str(error.value))[1])
    pat_hf.PATCache.load(path, pat, max_tokens=least, page_size=PAGE)
    with pytest.raises(pat_hf.PoolExhausted):
        pat_hf.PATCache.load(path, pat, max_tokens=least - PAGE, page_size=PAGE)


def test_an_empty_cache_is_saved_and_loaded(tmp_path):
    path = saved(tmp_path, cache_of())
    loaded = pat_hf.PATCache.load(path, pair("Llama")[1], page_size=PAGE)
    assert same(loaded, [SYSTEM]) == 70


def test_load_refuses_another_model(tmp_path):
    cache = cache_of()
    same(cache, [SYSTEM])
    path = saved(tmp_path, cache)
    _, pat = pair("Llama")
    weights = copy.deepcopy(pat)
    with torch.no_grad():
        weights.model.layers[2].mlp.up_proj.weight += 1e-3
    config = copy.deepcopy(CORE["Llama"])
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    config.num_hidden_layers = 2
    config = AutoModelForCausalLM.from_config(config, attn_implementation="pat")
    quantized = copy.deepcopy(pat)
    quantized.model.layers[1].register_buffer("scale", torch.ones(3))
    switched = copy.deepcopy(pat)
    switched.config.max_position_embeddings = 256  # some ways of numbering depend on it
    for model, words in [
        (weights, "the weights are others"),
        (quantized, "the weights are others"),
        (switched, "max_position_embeddings is 512, not 256"),
        (config, "num_hidden_layers is 3, not 2; rope_parameters is .*10000.*not.*500"),
        (pair("Llama", torch.bfloat16)[1], "dtype is 'torch.float32', not 'torch.bfloat16'"),
        (pair("Qwen3")[1], "architecture is 'LlamaForCausalLM', not 'Qwen3ForCausalLM'"),
    ]:
        with pytest.raises(ValueError, match=words):
            pat_hf.PATCache.load(path, model)
    same_weights = copy.deepcopy(pat)
    loaded = pat_hf.PATCache.load(path, same_weights)
    stock, _ = pair("Llama")
    assert torch.equal(generate(same_weights, [SYSTEM], loaded), generate(stock, [SYSTEM]))
    assert loaded.report().prefilled_tokens == 0


def test_load_refuses_what_is_no_store(tmp_path):
    _, pat = pair("Llama")
    cache = cache_of()
    same(cache, [SYSTEM])
    whole = saved(tmp_path, cache).read_bytes()
    path = tmp_path / "other"
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:5], b"", b"text" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cut off or no safetensors file"):
            pat_hf.PATCache.load(path, pat)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not written by PATCache.save"):
        pat_hf.PATCache.load(path, pat)
    with pytest.raises(FileNotFoundError):
        pat_hf.PATCache.load(tmp_path / "missing", pat)
    with pytest.raises(OSError, match="can't be written"):
        cache.save(tmp_path / "missing" / "prompts")


def test_load_refuses_what_has_changed_by_a_bit(tmp_path):
    _, pat = pair("Llama")
    cache = cache_of()
    same(cache, [SYSTEM])
    path = saved(tmp_path, cache)
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")  # of the tensors, behind the header
    generator = random.Random(0)
    places = [generator.randrange(8, begin) for _ in range(40)]
    places += [generator.randrange(begin, len(whole)) for _ in range(40)]
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged|cut off or no safetensors|not written by"):
            pat_hf.PATCache.load(path, pat)


def test_weights_that_were_changed_in_place_leave_nothing_stored():
    stock, pat = (copy.deepcopy(model) for model in pair("Llama"))
    cache = pat_hf.PATCache(pat, ROOM)
    generate(pat, [SYSTEM], cache)
    for model in (stock, pat):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(0)
        for weight in model.parameters():
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    assert torch.equal(generate(pat, [SYSTEM], cache), generate(stock, [SYSTEM]))
    before = cache.prefilled
    pat_hf.loglikelihoods(pat, [SYSTEM], [[3]], cache)
    assert cache.prefilled == before


def test_dropout_is_looked_for_once_a_call(monkeypatch):
    pat = pair_of(CORE["Llama"])[1].train()
    asked = []
    monkeypatch.setattr(pat_cache, "drops_out", lambda model: asked.append(1) and False)
    cache = pat_hf.PATCache(pat)
    for _ in range(2):
        generate(pat, [SYSTEM], cache)
    assert len(asked) == 2


def test_changed_weights_are_noticed_before_saving_and_after_loading(tmp_path):
    _, pat = pair.__wrapped__("Llama")
    cache = pat_hf.PATCache(pat, ROOM)
    generate(pat, [SYSTEM], cache)
    path = saved(tmp_path, cache)
    loaded = pat_hf.PATCache.load(path, pat)
    with torch.no_grad():
        pat.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    generate(pat, [SYSTEM], loaded)
    assert loaded.prefilled == len(SYSTEM)
    cache.save(path)
    assert not pat_hf.PATCache.load(path, pat).pool.used


def test_new_tokens_alone_for_an_emptied_cache_are_refused():
    _, pat = pair.__wrapped__("Llama")
    cache = pat_hf.PATCache(pat)
    out = generate(pat, [SYSTEM], cache)
    with torch.no_grad():
        pat.model.norm.weight.mul_(1.5)
    more = {"input_ids": out[:, -1:], "attention_mask": torch.ones_like(out)}
    with pytest.raises(ValueError, match="holds none.*was emptied.*all tokens"):
        pat.generate(**more, past_key_values=cache)


def test_what_was_computed_with_dropout_is_not_reused():
    config = copy.deepcopy(CORE["GPT-2"])
    config.resid_pdrop = config.attn_pdrop = config.embd_pdrop = 0.5
    stock, pat = pair_of(config)
    cache = pat_hf.PATCache(pat, ROOM)
    pat.train()
    generate(pat, [SYSTEM], cache)
    pat.eval()
    out = generate(pat, [SYSTEM], cache)
    assert torch.equal(out, generate(stock, [SYSTEM]))
    pat.train()
    more = torch.cat([out, torch.tensor([[5, 6]])], 1)
    new = {"input_ids": more[:, -3:], "attention_mask": torch.ones_like(more)}
    longer = pat.generate(**new, past_key_values=cache, max_new_tokens=3)
    pat.eval()
    whole = [more[0].tolist() + longer[0, 3:].tolist()]
    assert torch.equal(generate(pat, whole, cache), generate(stock, whole))


def once(monkeypatch, owner, name, error, call=1, before=True):
    """Has the `call`-th call of a function fail, before its work or after it."""
    function, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(1)
        out = None if before and len(calls) == call else function(*args, **kwargs)
        if len(calls) == call:
            raise error
        return out

    monkeypatch.setattr(owner, name, failing)


def test_an_interrupt_once_a_step_is_stored_leaves_no_wrong_tokens(monkeypatch):
    stock, pat = pair("Llama")
    cache = cache_of()
    once(monkeypatch, Columns, "advance", KeyboardInterrupt, 6, before=False)
    with pytest.raises(KeyboardInterrupt):
        generate(pat, [SYSTEM], cache, max_new_tokens=12)
    longer = generate(stock, [SYSTEM], max_new_tokens=12)[0, :-2].tolist()
    assert torch.equal(generate(pat, [longer], cache), generate(stock, [longer]))


def test_equal_answers_stay_apart_where_memory_is_full(monkeypatch):
    stock, pat = pair("Llama")
    cache = pat_hf.PATCache(pat, page_size=PAGE)
    answer = generate(stock, [SYSTEM], max_new_tokens=12)[0].tolist()
    generate(pat, [SYSTEM, answer[:-6]], cache, max_new_tokens=12)
    full = torch.OutOfMemoryError("full")
    once(monkeypatch, PrefixTree, "merge", full)
    cache.clear()
    assert not cache.pool.used


def test_a_length_is_that_of_the_emptied_cache(monkeypatch):
    stock, pat = pair("GPT-2")
    cache = pat_hf.PATCache(pat)
    generate(pat, [SYSTEM], cache)
    once(monkeypatch, PrefixTree, "select", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.clear()
    ids = torch.tensor([SYSTEM])
    ours, theirs = pat(ids, past_key_values=cache).logits, stock(ids).logits
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


def test_a_first_forward_that_fails_leaves_no_requests(monkeypatch):
    stock, pat = pair("Llama")
    cache = pat_hf.PATCache(pat)
    once(monkeypatch, type(cache.pool), "write", RuntimeError("no"))
    with pytest.raises(RuntimeError):
        pat(torch.tensor([SYSTEM] * 3), past_key_values=cache)
    ids = torch.tensor([SYSTEM])
    ours, theirs = pat(ids, past_key_values=cache).logits, stock(ids).logits
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


def test_pins_outlive_a_restart_that_is_interrupted(monkeypatch):
    cache = cache_of()
    cache.pin(SYSTEM)
    same(cache, [SYSTEM])
    cache._broken = True
    once(monkeypatch, pat_hf.PATCache, "_begin_batch", KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.report()
    same(cache, [SYSTEM])
    assert len(cache.prefixes.pins) == 1


def test_a_save_that_fails_leaves_no_file(monkeypatch, tmp_path):
    cache = cache_of()
    same(cache, [SYSTEM])
    once(monkeypatch, archive, "save_file", OSError("no space"), before=False)
    with pytest.raises(OSError):
        cache.save(tmp_path / "cache.safetensors")
    assert not list(tmp_path.iterdir())
