"""The plan carried out with torch operations, made for the CPU: gather pages, matmul, merge."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from pat_hf.kernels.plan import Plan, Tables

_SCORES = 1 << 24  # elements of scores held at a time
_PADDING = 0.75  # blocks go together if the shortest has this share of the longest's tiles


def attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    plan: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `pat_hf.kernels.ops.attention`; computes in float32, or in float64 if q is."""
    tables = Plan.read(plan)
    batch, query_heads, length, _ = q.shape
    kv_heads, value_dim = v_pages.shape[1], v_pages.shape[-1]
    group, rows = query_heads // kv_heads, batch * length
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries = (q.transpose(1, 2).to(dtype) * scale).reshape(rows, kv_heads, group, q.shape[-1])

    # Rows' results in front, the partials behind them.
    count = rows + int(tables.merge_ptr[-1])
    out = queries.new_zeros(count, kv_heads, group, value_dim)
    lse = queries.new_full((count, kv_heads, group), -torch.inf)
    for part in _batches(tables, kv_heads * group):
        keys, values = _gather(k_pages, part, dtype), _gather(v_pages, part, dtype)
        query = queries[torch.from_numpy(part.rows)].permute(0, 2, 1, 3, 4).flatten(2, 3)
        scores = query @ keys.transpose(-1, -2)
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        seen, stored = _masks(part, window)
        if seen is not None:
            heads = scores.unflatten(2, (-1, group))
            heads.masked_fill_(~torch.from_numpy(seen)[:, None, :, None], -torch.inf)
        if stored is not None:
            values.masked_fill_(~torch.from_numpy(stored)[:, None, :, None], 0)
        top = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(dtype).min)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        result = (weights @ values).div_(total.clamp_min(torch.finfo(dtype).tiny))
        used = torch.from_numpy(part.used)
        target = torch.from_numpy(part.targets[part.used])
        out[target] = result.unflatten(2, (-1, group)).transpose(1, 2)[used]
        lse[target] = (top + total.log()).unflatten(2, (-1, group))[..., 0].transpose(1, 2)[used]

    _merge(out, lse, tables, rows)
    out, lse = out[:rows], lse[:rows]
    if sinks is not None:
        sink = sinks.to(out).view(kv_heads, group)
        out = out * torch.sigmoid(lse - sink)[..., None]
    return out.reshape(batch, length, query_heads, value_dim).to(q.dtype)


class _Batch(NamedTuple):
    """Blocks computed together, padded to the most rows and tiles among them."""

    rows: np.ndarray  # int64 [blocks, m] of q
    used: np.ndarray  # bool [blocks, m], false where padded
    targets: np.ndarray  # int64 [blocks, m], where the results go
    last: np.ndarray  # int32 [blocks, m], the rows' positions; -1 where padded
    pages: np.ndarray  # int64 [blocks, tokens / page size]
    positions: np.ndarray  # int32 [blocks, tokens] of the keys
    stored: np.ndarray  # bool [blocks, tokens], false behind the end of a tile


def _batches(tables: Tables, heads: int) -> Iterator[_Batch]:
    size = tables.page_size
    for _, tokens, begin, end in tables.shapes.tolist():
        blocks = tables.blocks[begin:end]
        rows = blocks[:, 1] - blocks[:, 0]
        tiles = blocks[:, 3] - blocks[:, 2]
        at = 0
        while at < len(blocks):
            alike = int(np.searchsorted(-tiles, -tiles[at] * _PADDING, side="right"))
            scores = int(tiles[at]) * tokens * heads * int(rows[at:alike].max())
            upto = min(alike, at + max(_SCORES // scores, 1))
            yield _batch(tables, blocks[at:upto], tokens, size)
            at = upto


def _batch(tables: Tables, blocks: np.ndarray, tokens: int, size: int) -> _Batch:
    entry, used = _padded(blocks[:, 0], blocks[:, 1])
    rows = tables.rows[entry].astype(np.int64)
    slots = tables.slots[entry]
    targets = np.where(slots < 0, rows, len(tables.positions) + slots)
    last = np.where(used, tables.positions[rows], -1)

    tile, real = _padded(blocks[:, 2], blocks[:, 3])
    page, first, end = np.moveaxis(tables.tiles[tile], -1, 0)
    end = np.where(real, end, 0)
    pages = page[..., None] + np.arange(tokens // size)
    # A tile may be longer than what is left of its node.
    pages = np.where(np.arange(0, tokens, size) < (end - first)[..., None], pages, page[..., None])
    positions = first[..., None] + np.arange(tokens, dtype=np.int32)
    stored = positions < end[..., None]
    many = len(blocks)
    return _Batch(
        rows,
        used,
        targets,
        last,
        tables.pages[pages.reshape(many, -1)].astype(np.int64),
        positions.reshape(many, -1),
        stored.reshape(many, -1),
    )


def _padded(begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranges as rows of one array, the shorter ones filled with their first; and what is real."""
    index = np.arange((end - begin).max())
    real = index < (end - begin)[:, None]
    return np.where(real, begin[:, None] + index, begin[:, None]), real


def _gather(pool: torch.Tensor, part: _Batch, dtype: torch.dtype) -> torch.Tensor:
    """Pages [pages, heads, page size, dim] as [blocks, heads, tokens, dim], in one copy."""
    _, heads, size, dim = pool.shape
    index = part.pages[:, None, :] * heads + np.arange(heads)[:, None]
    flat = pool.reshape(-1, size, dim).index_select(0, torch.from_numpy(index.ravel()))
    return flat.view(*index.shape[:2], -1, dim).to(dtype)


def _masks(part: _Batch, window: int | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Which keys each row sees [blocks, m, tokens], which are stored [blocks, tokens].

    `None` stands for all. What is stored but seen by no row, ahead of the positions, may be
    anything; so it counts as not stored.
    """
    furthest = part.last.max(1, keepdims=True)
    stored = part.stored & (part.positions <= furthest)
    if stored.all():
        stored = None
    last = np.where(part.used, part.last, furthest)
    inside = window is None or int(part.positions.min()) > int(furthest.max()) - window
    if stored is None and inside and (part.positions.max(1) <= last.min(1)).all():
        return None, None
    last = last[..., None]
    positions = part.positions[:, None, :]
    seen = positions <= last
    if stored is not None:
        seen &= stored[:, None, :]
    if not inside:
        seen &= positions > last - window
    return seen, stored


def _merge(out: torch.Tensor, lse: torch.Tensor, tables: Tables, rows: int) -> None:
    """Adds up the partials behind `rows` into their rows, by log-sum-exp, in place."""
    counts = np.diff(tables.merge_ptr)
    split = np.flatnonzero(counts)
    if not len(split):
        return
    split, owner = torch.from_numpy(split), torch.from_numpy(np.repeat(split, counts[split]))
    index = owner[:, None, None].expand_as(lse[rows:])
    top = lse[:rows].scatter_reduce(0, index, lse[rows:], "amax")
    top = top.clamp_min_(torch.finfo(lse.dtype).min)
    weights = (lse[rows:] - top[owner]).exp_()
    total = torch.zeros_like(top).index_add_(0, owner, weights)
    out[:rows].index_add_(0, owner, out[rows:].mul_(weights[..., None]))
    out[split] = out[split] / total[split].clamp_min(torch.finfo(lse.dtype).tiny)[..., None]
    lse[split] = top[split] + total[split].log()
