"""Prefix trees with queries, hand-made or drawn by hypothesis, for the tests of kernels/."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from pat_hf.kernels.plan import Heads, Nodes


class Case(NamedTuple):
    """What an attention is computed from, but for the numbers."""

    nodes: Nodes
    node: np.ndarray  # [B * T]
    position: np.ndarray  # [B * T]
    heads: Heads
    page_size: int
    length: int  # T


def nodes_of(depths, lengths, page_size=16) -> Nodes:
    """A tree given by the depth and the number of tokens of each node in preorder.

    Pages are numbered from the last node's to the first's, so that neighbours lie apart.
    """
    parent, start, path = [], [], []
    end = np.arange(1, len(depths) + 1)
    for i, depth in enumerate(depths):
        del path[depth:]
        parent.append(path[-1] if path else -1)
        start.append(start[path[-1]] + lengths[path[-1]] if path else 0)
        path.append(i)
        end[path] = i + 1
    page_ptr = np.cumsum([0] + [-(-n // page_size) for n in lengths])
    return Nodes(
        np.array(parent, np.int32),
        end.astype(np.int32),
        np.array(start, np.int64),
        np.array(lengths, np.int32),
        page_ptr.astype(np.int32),
        np.arange(page_ptr[-1], 0, -1, dtype=np.int32),
    )


def path_tokens(case: Case, row: int, position: int) -> np.ndarray:
    """What a row sees, each token as page * page size + slot."""
    nodes, node, seen = case.nodes, case.node[row], [np.empty(0, np.int64)]
    while node >= 0:
        inside = np.arange(nodes.length[node])
        inside = inside[nodes.start[node] + inside <= position]
        page = nodes.pages[nodes.page_ptr[node] + inside // case.page_size]
        seen.append(page.astype(np.int64) * case.page_size + inside % case.page_size)
        node = nodes.parent[node]
    return np.concatenate(seen)


def pools(case: Case, dtype=torch.float32, position=None, seed=0):
    """q, k_pages and v_pages; every slot that no row sees is NaN."""
    position = case.position if position is None else position
    heads, size = case.heads, case.page_size
    generator = torch.Generator().manual_seed(seed)
    rows = range(len(case.node))
    seen = np.concatenate([path_tokens(case, row, position[row]) for row in rows])
    hidden = torch.ones(len(case.nodes.pages) + 1, size, dtype=torch.bool)
    hidden.view(-1)[torch.from_numpy(seen)] = False
    pages = []
    for dim in (heads.key_dim, heads.value_dim):
        pool = torch.randn(len(hidden), heads.kv, size, dim, generator=generator)
        pages.append(pool.masked_fill(hidden[:, None, :, None], torch.nan).to(dtype))
    shape = (len(case.node) // case.length, heads.query, case.length, heads.key_dim)
    return torch.randn(shape, generator=generator).to(dtype), *pages


def room(case: Case) -> int:
    """Steps that all rows can go before one leaves its node."""
    end = (case.nodes.start + case.nodes.length)[case.node]
    return int(min((end - 1 - case.position)[case.node >= 0], default=0))


@st.composite
def cases(draw, max_nodes=24, max_length=200, early=False):
    """Trees of depth 1 to 8 with ragged nodes, and rows anywhere in them.

    With `early` all rows are in the first quarter of their node.
    """
    page_size = draw(st.sampled_from([16, 32, 64]))
    count = draw(st.integers(1, max_nodes))
    depths, lengths = [], []
    for _ in range(count):
        deepest = min(depths[-1] + 1, 7) if depths else 0
        depths.append(draw(st.integers(0, deepest)))
        lengths.append(draw(st.integers(1, draw(st.sampled_from([3, 20, max_length])))))
    nodes = nodes_of(depths, lengths, page_size)
    length = draw(st.sampled_from([1, 1, 2, 5]))
    node, position = [], []
    for _ in range(draw(st.integers(1, 12))):
        last = draw(st.integers(-1, count - 1))
        inside = draw(st.integers(0, 10**6))
        for t in range(length):
            node.append(last)
            inside_node = (inside + t) % lengths[last] // (4 if early else 1)
            position.append(int(nodes.start[last]) + inside_node if last >= 0 else 0)
    group, kv = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    dims = st.sampled_from([8, 16, 24])
    heads = Heads(group * kv, kv, draw(dims), draw(dims), draw(st.sampled_from([2, 4])))
    node, position = np.array(node, np.int32), np.array(position, np.int32)
    return Case(nodes, node, position, heads, page_size, length)
