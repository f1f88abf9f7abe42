"""Attention over a prefix tree in float64, row by row: what the others are judged by."""

from __future__ import annotations

import numpy as np
import torch

from pat_hf.kernels.plan import Nodes


def attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    nodes: Nodes,
    node: np.ndarray,
    position: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reads no plan, so that it can judge one.

    Args:
        q: [B, query heads, T, key dim]; row r is q[r // T, :, r % T].
        k_pages, v_pages: [pages, KV heads, page size, dim].
        nodes: the tree.
        node, position: int [B * T], of each row.
        scale, window, softcap, sinks: as in `pat_hf.kernels.ops.attention`.

    Returns:
        float64 [B, T, query heads, value dim].
    """
    batch, query_heads, length, _ = q.shape
    group = query_heads // k_pages.shape[1]
    out = torch.zeros(batch, length, query_heads, v_pages.shape[-1], dtype=torch.float64)
    for row in range(batch * length):
        b, t = divmod(row, length)
        keys, values, where = _path(k_pages, v_pages, nodes, int(node[row]))
        seen = where <= int(position[row])
        if window is not None:
            seen &= where > int(position[row]) - window
        keys, values = keys[seen].repeat_interleave(group, 1), values[seen]
        values = values.repeat_interleave(group, 1)
        scores = torch.einsum("hd,nhd->hn", q[b, :, t].double(), keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        count = scores.shape[1]
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None]], 1)
        if count:
            out[b, t] = torch.einsum("hn,nhd->hd", scores.softmax(1)[:, :count], values)
    return out


def _path(
    k_pages: torch.Tensor, v_pages: torch.Tensor, nodes: Nodes, node: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K and V in float64 [tokens, KV heads, dim] and positions of a node and those above it."""
    size = k_pages.shape[2]
    page, slot, where = [], [], []
    while node >= 0:
        inside = np.arange(nodes.length[node])
        page.append(nodes.pages[nodes.page_ptr[node] + inside // size])
        slot.append(inside % size)
        where.append(nodes.start[node] + inside)
        node = int(nodes.parent[node])
    empty = [np.empty(0, np.int64)]
    page, slot, where = (
        torch.from_numpy(np.concatenate(part + empty).astype(np.int64))
        for part in (page, slot, where)
    )
    return k_pages[page, :, slot].double(), v_pages[page, :, slot].double(), where
