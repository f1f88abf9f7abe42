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


class Batch:
    """A tree with pages of one layer, K being the token ids, and the lists it must equal."""

    def __init__(self):
        self.pool = PagePool(PAGE)
        self.tree = PrefixTree(self.pool)
        self.truth: list[list[int]] = []

    def store(self, node, first):
        inside = np.arange(first, node.length)
        pages = torch.from_numpy(np.array(node.pages, np.int64)[inside // PAGE])
        slots = torch.from_numpy(inside % PAGE)
        request = next(r for r in range(len(self.tree)) if node in self.tree.path(r))
        values = self.truth[request][node.start + first : node.end]
        keys = torch.tensor(values, dtype=torch.float32).view(1, 1, -1, 1)
        self.pool.write(0, keys, -keys, pages, slots)

    def insert(self, prompt):
        self.truth.append(list(prompt))
        self.tree.insert(np.array(prompt, np.int64))
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

    def select(self, indices):
        self.tree.select(indices, PAGE)
        self.truth = [list(self.truth[i]) for i in indices]

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
            assert node.requests or node.children
            assert not (node.open and (node.children or len(node.requests) != 1))
            assert len(node.pages) == pool.pages(node.length)
        held = np.zeros_like(pool.references)
        for node in nodes:
            np.add.at(held, node.pages, 1)
        held[SINK] = 1
        assert (held == pool.references).all()
        assert pool.used == (held > 0).sum() - 1
        assert len(set(pool._free)) == len(pool._free)
        for request, tokens in enumerate(self.truth):
            path = tree.path(request)
            assert tree.length(request) == len(tokens) == sum(n.length for n in path)
            for node in path:
                inside = np.arange(node.length)
                page = np.array(node.pages)[inside // PAGE]
                keys, values = pool.layers[0]
                assert keys[page, 0, inside % PAGE, 0].tolist() == tokens[node.start : node.end]
                assert values[page, 0, inside % PAGE, 0].tolist() == (
                    [-t for t in tokens[node.start : node.end]]
                )
        order = tree.preorder()
        for row, node in enumerate(order.nodes):
            below = [n for n in order.nodes if n is node or node in _ancestors(n)]
            assert below == order.nodes[row : order.end[row]]
        copy = tree.copy()
        assert spans(copy) == spans(tree)


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
    for _ in range(data.draw(st.integers(1, 8))):
        requests = len(batch.tree)
        act = data.draw(st.sampled_from(["insert", "append", "label", "select", "truncate"]))
        if act == "insert":
            start = batch.truth[data.draw(st.integers(0, requests - 1))] if requests else []
            keep = data.draw(st.integers(0, len(start)))
            batch.insert(start[:keep] + data.draw(st.lists(st.integers(0, 2), max_size=30)))
        elif act == "append":
            counts = data.draw(st.lists(st.integers(0, 20), min_size=requests, max_size=requests))
            batch.append(counts, token)
        elif act == "label" and requests:
            batch.label(data.draw(st.integers(0, requests - 1)))
        elif act == "select" and requests:
            batch.select(data.draw(st.lists(st.integers(0, requests - 1), max_size=5)))
        elif act == "truncate" and requests:
            request = data.draw(st.integers(0, requests - 1))
            batch.truncate(request, data.draw(st.integers(0, len(batch.truth[request]))))
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
