"""The prefix tree and the page pool against a plain list of requests."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pat_hf.cache.page_pool import SINK, PagePool, PoolExhausted
from pat_hf.cache.prefix_tree import PrefixTree

PAGE = 16


def tree_of(*prompts):
    tree = PrefixTree()
    for prompt in prompts:
        tree.insert(np.array(prompt, np.int64))
    return tree


def spans(tree):
    return sorted((n.start, n.tokens.tolist(), sorted(n.requests)) for n in tree)


def test_shares_to_the_token():
    tree = tree_of([1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 9])
    assert spans(tree) == [
        (0, [1, 2], []),
        (2, [3], []),
        (2, [9], [2]),
        (3, [4], [0]),
        (3, [5, 6], [1]),
    ]
    assert [n.tokens.tolist() for n in tree.path(1)] == [[1, 2], [3], [5, 6]]


def test_identical_prefix_of_another_and_single_tokens():
    tree = tree_of([7, 8, 9], [7, 8, 9], [7, 8], [7], [3])
    assert spans(tree) == [(0, [3], [4]), (0, [7], [3]), (1, [8], [2]), (2, [9], [0, 1])]


def test_generated_tokens_get_a_leaf_each_and_are_shared_once_labelled():
    tree = tree_of([1, 2], [1, 2])
    for request in (0, 1):
        tree.append(request, 2)
    assert [tree.length(r) for r in (0, 1)] == [4, 4]
    assert len({id(tree.ends[r]) for r in (0, 1)}) == 2
    tree.label(0, np.array([5, 6]))
    tree.insert(np.array([1, 2, 5, 6, 7]))
    assert tree.path(2)[1] is tree.ends[0]


def test_fork_cuts_at_a_page():
    tree = tree_of([1])
    tree.append(0, PAGE + 3)
    tree.select([0, 0, 0], align=PAGE)
    assert [n.length for n in tree.path(0)] == [1, PAGE, 3]
    assert len({tree.path(r)[1] for r in range(3)}) == 1
    assert len({tree.ends[r] for r in range(3)}) == 3


@pytest.mark.parametrize(
    "act, error, words",
    [
        (lambda tree: tree.select([0, 5]), IndexError, "5"),
        (lambda tree: tree.truncate(0, 9), ValueError, "9"),
        (lambda tree: tree.split(tree.ends[0], 3), ValueError, "at 3"),
    ],
)
def test_errors_change_nothing(act, error, words):
    tree = tree_of([1, 2, 3])
    before = spans(tree)
    with pytest.raises(error, match=words):
        act(tree)
    assert spans(tree) == before


def test_families_share_nothing():
    tree = PrefixTree()
    for family in (None, "a", None, "a"):
        tree.insert(np.array([1, 2, 3]), family)
    assert spans(tree) == [(0, [1, 2, 3], [0, 2]), (0, [1, 2, 3], [1, 3])]
    assert tree.root(0) is tree.root(2) is not tree.root(1)


def test_answers_are_merged_once_their_ids_are_told():
    batch = Batch()
    for _ in range(3):
        batch.insert([1, 2])
    answers = iter([3, 4, 5, 3, 4, 6, 3, 4, 5])
    batch.append([3, 3, 3], lambda: next(answers))
    for request in range(3):
        batch.tree.label(request, np.array(batch.truth[request]))
    for request in range(3):
        batch.tree.merge(request)
    batch.check()
    assert spans(batch.tree) == [(0, [1, 2], []), (2, [3, 4], []), (4, [5], [0, 2]), (4, [6], [1])]
    assert batch.pool.used == 4


def test_answers_that_branched_are_merged_branch_by_branch():
    batch = Batch()
    batch.insert([1])
    batch.insert([1])
    batch.append([PAGE, PAGE], lambda: 2)  # whole pages, which branches share
    batch.select([0, 0, 1, 1])
    answers = iter([3, 4, 3, 4])
    batch.append([1, 1, 1, 1], lambda: next(answers))
    for request in range(4):
        batch.tree.label(request, np.array(batch.truth[request]))
    for request in range(4):
        batch.tree.merge(request)
    batch.check()
    assert spans(batch.tree) == [
        (0, [1], []),
        (1, [2] * PAGE, []),
        (1 + PAGE, [3], [0, 2]),
        (1 + PAGE, [4], [1, 3]),
    ]


def test_idle_leaves_are_evicted_by_their_last_use():
    batch = Batch()
    for prompt in ([1, 2], [1, 3], [4], [1, 2, 5]):
        batch.insert(prompt)
    batch.select([], keep=True)
    assert len(batch.tree.idle()) == 5 and not batch.tree.live()
    batch.insert([1, 2])
    batch.tree.pin(np.array([4]), 0)
    evictions = batch.tree.evict()
    assert next(evictions) == 1  # [1, 3]
    assert spans(batch.tree) == [(0, [1], []), (0, [4], []), (1, [2], [0]), (2, [5], [])]
    assert list(evictions) == [1]
    assert spans(batch.tree) == [(0, [1], []), (0, [4], []), (1, [2], [0])]
    batch.tree.unpin(np.array([4]), 0)
    assert list(batch.tree.evict()) == [1]


def test_a_prompt_that_is_found_whole_is_used():
    batch = Batch()
    for prompt in ([1, 2, 2], [1, 3, 3, 3], [4] * 5, [1, 2, 2]):
        batch.insert(prompt)
    batch.select([], keep=True)
    assert list(batch.tree.evict()) == [3, 5, 2, 1]


def test_drop_takes_answers_and_leaves_other_prompts():
    batch = Batch()
    batch.insert([1, 2, 3])
    batch.append([2], lambda: 7)
    batch.label(0)
    batch.insert([1, 2, 3, 7, 8])
    batch.insert([1, 2, 4])
    batch.select([], keep=True)
    tree = batch.tree
    assert tree.drop(np.array([1, 2, 3]), 0) == 1  # the end of its answer, [7]
    assert tree.drop(np.array([1, 2, 3]), 0) == 0
    assert tree.drop(np.array([1, 2, 3, 7, 8]), 0) == 3
    assert spans(tree) == [(0, [1, 2], []), (2, [4], [])]
    tree.pin(np.array([1, 2]), 0)
    assert tree.drop(np.array([1, 2, 4]), 0) == 1
    batch.check()


def test_a_pool_that_miscounts_is_caught():
    batch = Batch()
    batch.insert(range(2 * PAGE))
    batch.pool.check(batch.tree)
    with pytest.raises(AssertionError, match="held by 0 nodes, counted 1 times"):
        batch.pool.check([])
    batch.pool._free.append(1)
    with pytest.raises(AssertionError, match="1 times among the free"):
        batch.pool.check(batch.tree)


class Batch:
    """A tree with pages of one layer and the lists it must equal.

    K is the token's id, with a hundred more in the second family.
    """

    def __init__(self):
        self.pool = PagePool(PAGE)
        self.tree = PrefixTree(self.pool)
        self.truth: list[list[int]] = []
        self.family: list[int] = []

    def store(self, node, first):
        inside = np.arange(first, node.length)
        pages = torch.from_numpy(np.array(node.pages, np.int64)[inside // PAGE])
        slots = torch.from_numpy(inside % PAGE)
        request = next(r for r in range(len(self.tree)) if node in self.tree.path(r))
        values = self.truth[request][node.start + first : node.end]
        keys = torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1)
        keys = keys + 100 * self.family[request]
        self.pool.write(0, keys, -keys, pages, slots)

    def insert(self, prompt, family=0):
        self.truth.append(list(prompt))
        self.family.append(family)
        self.tree.insert(np.array(prompt, np.int64), family)
        for node in self.tree.path(len(self.tree) - 1):
            if node.pages is None:
                self.pool.extend([(node, 0)])
                self.store(node, 0)

    def append(self, counts, draw_token):
        leaves = []
        for request, count in enumerate(counts[: len(self.tree)]):
            if count:
                self.truth[request] += [draw_token() for _ in range(count)]
                leaf = self.tree.append(request, count)
                leaves.append((leaf, leaf.length - count))
        self.pool.extend(leaves)
        for leaf, first in leaves:
            self.store(leaf, first)

    def label(self, request):
        self.tree.label(request, np.array(self.truth[request]))
        self.tree.merge(request)

    def select(self, indices, keep=False):
        self.tree.select(indices, PAGE, keep)
        self.truth = [list(self.truth[i]) for i in indices]
        self.family = [self.family[i] for i in indices]

    def truncate(self, request, count):
        self.tree.truncate(request, count)
        del self.truth[request][len(self.truth[request]) - count :]

    def check(self):
        tree, pool = self.tree, self.pool
        nodes = list(tree)
        seen = set()
        for node in nodes:
            assert node.parent in tree.roots.values() or node.parent in seen
            seen.add(node)
            assert node.length > 0 and node.start == node.parent.end
            assert node.parent.children[node.key] is node
            assert node.requests or node.children or len(node.tokens) == node.length
            assert not (node.open and (node.children or len(node.requests) != 1))
            assert len(node.pages) == pool.pages(node.length)
            inside = np.arange(len(node.tokens))
            stored = pool.layers[0].keys[np.array(node.pages)[inside // PAGE], 0, inside % PAGE, 0]
            assert stored.int().tolist() == (node.tokens + 100 * family_of(tree, node)).tolist()
        held = np.zeros_like(pool.references)
        for node in nodes:
            np.add.at(held, node.pages, 1)
        held[SINK] = 1
        assert (held == pool.references).all()
        assert pool.used == (held > 0).sum() - 1
        assert len(set(pool._free)) == len(pool._free)
        pool.check(nodes)
        live, idle = tree.live(), tree.idle()
        assert set(live) == {node for request in range(len(tree)) for node in tree.path(request)}
        pinned = {node for (f, _), tokens in tree.pins.items() for node in tree.match(tokens, f)[0]}
        assert set(idle) == set(nodes) - set(live) - pinned
        for request, tokens in enumerate(self.truth):
            extra = 100 * self.family[request]
            path = tree.path(request)
            assert tree.length(request) == len(tokens) == sum(n.length for n in path)
            for node in path:
                inside = np.arange(node.length)
                page = np.array(node.pages)[inside // PAGE]
                keys, values = pool.layers[0]
                expected = [token + extra for token in tokens[node.start : node.end]]
                assert keys[page, 0, inside % PAGE, 0].tolist() == expected
                assert values[page, 0, inside % PAGE, 0].tolist() == [-key for key in expected]
        order = tree.preorder()
        for row, node in enumerate(order.nodes):
            below = [n for n in live if n is node or node in _ancestors(n)]
            assert below == order.nodes[row : order.end[row]]
        copy = tree.copy()
        assert spans(copy) == spans(tree) and len(copy.idle()) == len(idle)


def family_of(tree, node):
    root = list(_ancestors(node))[-1]
    return next(family for family, each in tree.roots.items() if each is root)


def _ancestors(node):
    while node.parent is not None:
        node = node.parent
        yield node


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_history_keeps_every_request(data):
    batch = Batch()
    token = lambda: data.draw(st.integers(0, 2))  # noqa: E731
    batch.insert(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=40)))
    prompts = [(list(batch.truth[0]), 0)]
    acts = ["insert", "append", "label", "select", "truncate", "pin", "evict", "drop"]
    for _ in range(data.draw(st.integers(1, 10))):
        requests, tree = len(batch.tree), batch.tree
        act = data.draw(st.sampled_from(acts))
        if act == "insert":
            start = data.draw(st.sampled_from([p for p, _ in prompts] + batch.truth))
            keep = data.draw(st.integers(0, len(start)))
            prompt = start[:keep] + data.draw(st.lists(st.integers(0, 2), max_size=30))
            prompts.append((prompt, data.draw(st.integers(0, 1))))
            batch.insert(*prompts[-1])
        elif act == "append":
            counts = data.draw(st.lists(st.integers(0, 20), min_size=requests, max_size=requests))
            batch.append(counts, token)
        elif act == "label" and requests:
            batch.label(data.draw(st.integers(0, requests - 1)))
        elif act == "select" and requests:
            some = data.draw(st.lists(st.integers(0, requests - 1), max_size=5))
            batch.select(some, keep=data.draw(st.booleans()))
        elif act == "truncate" and requests:
            request = data.draw(st.integers(0, requests - 1))
            batch.truncate(request, data.draw(st.integers(0, len(batch.truth[request]))))
        elif act == "pin":
            tokens, family = data.draw(st.sampled_from(prompts))
            tokens = np.array(tokens[: data.draw(st.integers(0, len(tokens)))], np.int64)
            if (family, tokens.tobytes()) in tree.pins:
                tree.unpin(tokens, family)
            else:
                tree.pin(tokens, family)
                tree.cut()
        elif act == "evict":
            pinned = [tree.match(tokens, family)[1] for (family, _), tokens in tree.pins.items()]
            evictions = tree.evict()
            for _ in range(data.draw(st.integers(1, 9))):
                leaves = [node for node in tree.idle() if not node.children]
                length = next(evictions, 0)
                gone = [node for node in leaves if node not in set(tree)]
                assert len(gone) == bool(length) == bool(leaves)
                assert all(node.used == min(leaf.used for leaf in leaves) for node in gone)
            assert pinned == [tree.match(t, family)[1] for (family, _), t in tree.pins.items()]
        elif act == "drop":
            dropped = data.draw(st.sampled_from(prompts))
            whole = [
                (tokens, family)
                for tokens, family in prompts
                if (nodes := tree.match(np.array(tokens, np.int64), family)[0])
                and nodes[-1].end == len(tokens)
                and nodes[-1].ended
                and (tokens, family) != dropped
            ]
            before = sum(node.length for node in tree)
            count = tree.drop(np.array(dropped[0], np.int64), dropped[1])
            assert before - count == sum(node.length for node in tree)
            for tokens, family in whole:
                assert tree.match(np.array(tokens, np.int64), family)[1] == len(tokens)
            assert tree.drop(np.array(dropped[0], np.int64), dropped[1]) == 0
        batch.check()


def test_pool_limit_leaves_everything_as_it_was():
    batch = Batch()
    batch.pool = PagePool(PAGE, max_tokens=3 * PAGE)
    batch.tree = PrefixTree(batch.pool)
    batch.insert(range(2 * PAGE))
    batch.append([PAGE], lambda: 7)
    leaf = batch.tree.append(0, 1)
    with pytest.raises(PoolExhausted, match="3 of 3 pages of 16"):
        batch.pool.extend([(leaf, PAGE)])
    batch.tree.truncate(0, 1)
    batch.check()


@pytest.mark.parametrize("most", [105, 102])
def test_growth_takes_what_memory_there_is(monkeypatch, most):
    """It asks for an eighth more, then for what is needed; a failure half way changes nothing."""
    pool = PagePool(PAGE)
    at = torch.zeros(1, dtype=torch.int64)
    pool.reserve(100)
    for layer in range(2):
        pool.write(layer, torch.full((1, 2, 1, 8), 5.0), torch.zeros(1, 2, 1, 8), at, at)
    pool._take()
    resize = pool.memory.resize

    def short(index, pages, *args):
        if index == 1 and pages > most:
            raise torch.OutOfMemoryError
        return resize(index, pages, *args)

    monkeypatch.setattr(pool.memory, "resize", short)
    if most == 105:
        pool.reserve(103)
    else:
        with pytest.raises(torch.OutOfMemoryError):
            pool.reserve(103)
    sizes = {len(layer.keys) for layer in pool.layers.values()}
    assert len(pool.references) == {105: 105, 102: 101}[most]
    assert min(sizes) == len(pool.references)
    pool.reserve(100)
    assert all((layer.keys[0, :, 0] == 5).all() for layer in pool.layers.values())


@pytest.mark.parametrize("size", [0, 8, 24])
def test_page_size_is_a_power_of_two(size):
    with pytest.raises(ValueError, match=f"page_size={size}"):
        PagePool(size)


def test_pages_belong_to_one_kind_of_layer():
    pool = PagePool(PAGE)
    at = torch.zeros(1, dtype=torch.int64)
    pool.write(0, torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 4), at, at)
    with pytest.raises(ValueError, match="float16"):
        half = torch.zeros(1, 2, 1, 8, dtype=torch.float16)
        pool.write(0, half, torch.zeros(1, 2, 1, 4), at, at)
