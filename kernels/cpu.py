"""The plan carried out with torch operations, made for the CPU: gather pages, attend, merge."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from pat_hf.kernels.plan import Plan, Tables, chunk_size, extrema

_ELEMENTS = 1 << 20  # of K and V, or of scores, held at a time; they should stay in the cache
_ALIKE = 0.75  # blocks go together if the shortest has this share of the longest's tiles
_NOWHERE = np.iinfo(np.int32).max  # position of a slot without a token


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
    merge: bool = True,
) -> torch.Tensor:
    """See `pat_hf.kernels.ops.attention`; computes in float32, or in float64 if q is."""
    batch, query_heads, length, key_dim = q.shape
    kv_heads, value_dim = v_pages.shape[1], v_pages.shape[-1]
    group, rows = query_heads // kv_heads, batch * length
    dtype = torch.promote_types(q.dtype, torch.float32)
    fused = softcap is None and key_dim == value_dim and q.device.type == "cpu"

    # A plan serves many layers: what follows from its bytes alone is worked out once.
    raw = plan.cpu().numpy()
    work = _work(raw.tobytes(), raw.shape, kv_heads, group, key_dim + value_dim, window)
    if rows != work.rows or k_pages.shape[2] != work.page_size:
        raise ValueError(
            f"The plan was made for {work.rows} query rows and pages of {work.page_size} tokens; "
            f"q has {batch} x {length} rows and the pool pages of {k_pages.shape[2]}. Make a plan "
            "for this batch and pool."
        )
    if work.merges and not merge:
        raise ValueError("The plan has rows to merge, and merge=False. Give merge=plan.merges.")
    queries = q.transpose(1, 2).to(dtype).reshape(rows, kv_heads, group, key_dim)
    # The rows' results in front, the partials behind them.
    out = queries.new_zeros(work.results, kv_heads, group, value_dim)
    lse = queries.new_full((work.results, kv_heads, group), -torch.inf)
    for job in work.jobs:
        job = job.to(q.device)
        blocks, many = job.shape
        keys, values = _gather(k_pages, job, dtype), _gather(v_pages, job, dtype)
        query = queries.index_select(0, job.rows).view(blocks, many, kv_heads, group, key_dim)
        query = query.transpose(1, 2).reshape(blocks, kv_heads, many * group, key_dim)
        mask = None if job.hidden is None else _mask(job.hidden, group, dtype)
        if fused:
            result, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, keys, values, attn_mask=mask, scale=scale
            )
        else:
            result, sums = _attend(query, keys, values, mask, scale, softcap)
        result = result.reshape(blocks, kv_heads, many, group, value_dim).transpose(1, 2)
        sums = sums.reshape(blocks, kv_heads, many, group).transpose(1, 2)
        result, sums = result.flatten(0, 1), sums.flatten(0, 1)
        if job.seeing is not None:
            result, sums = result[job.seeing], sums[job.seeing]
        out.index_copy_(0, job.target, result)
        lse.index_copy_(0, job.target, sums)

    if work.results > rows:
        _merge(out, lse, rows, work.owner.to(q.device), work.split.to(q.device))
    out = out[:rows]
    if sinks is not None:
        sinks = sinks.to(dtype).clamp_min(torch.finfo(dtype).min).view(kv_heads, group)
        out = out * torch.sigmoid(lse[:rows] - sinks)[..., None]
    return out.reshape(batch, length, query_heads, value_dim).to(q.dtype)


class _Job(NamedTuple):
    """Blocks computed together, padded to the most rows and tiles among them."""

    rows: torch.Tensor  # int64 [blocks * m] of q
    seeing: torch.Tensor | None  # int64, which of them see a key; None: all
    target: torch.Tensor  # int64, where the results of those go
    chunks: torch.Tensor  # int64 [blocks, KV heads, chunks], into the pool cut into chunks
    size: int  # tokens in a chunk
    tokens: int  # of the chunks' slots these many, from the first
    unread: torch.Tensor | None  # int64 [2, slots], block and token; they may hold anything
    hidden: torch.Tensor | None  # bool [blocks, m, tokens] from whom; None: nothing
    shape: tuple[int, int]  # blocks, m

    def to(self, device: torch.device) -> _Job:
        if device == self.rows.device:
            return self
        return _Job(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in self))


class _Work(NamedTuple):
    jobs: list[_Job]
    rows: int
    page_size: int
    results: int  # rows and partials
    owner: torch.Tensor  # int64 [partials], their rows
    split: torch.Tensor  # int64, rows that have partials
    merges: bool  # whether there are rows of those, or of no block


@functools.lru_cache(maxsize=4)
def _work(
    raw: bytes,
    shape: tuple[int, ...],
    kv_heads: int,
    group: int,
    dims: int,
    window: int | None,
) -> _Work:
    """Of a plan tensor of these bytes, for layers of these heads and window."""
    tables = Plan.read(torch.frombuffer(bytearray(raw), dtype=torch.int32).view(shape))
    jobs = [
        _job(tables, blocks, chunks, size, kv_heads, window)
        for blocks, chunks, size in _batches(tables, kv_heads, group, dims, window)
    ]
    counts = np.diff(tables.merge_ptr)
    rows, split = len(tables.positions), tables.merge_rows[counts > 0].astype(np.int64)
    owner = np.empty(len(tables.slots), np.int64)
    owner[tables.slots] = np.repeat(tables.merge_rows, counts)
    return _Work(
        jobs,
        rows,
        tables.page_size,
        rows + len(owner),
        torch.from_numpy(owner),
        torch.from_numpy(split),
        len(tables.merge_rows) > 0,
    )


def _batches(
    tables: Tables, kv_heads: int, group: int, dims: int, window: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Blocks that are computed together, the chunks that their rows see, and a chunk's tokens.

    The chunks of block b are chunks[blocks[b, 2]:blocks[b, 3]].
    """
    size = chunk_size(tables.shapes[:, 1].tolist(), tables.page_size)
    chunks, lengths = tables.chunks, tables.blocks[:, 3] - tables.blocks[:, 2]
    if not len(chunks):
        return
    block = np.repeat(np.arange(len(lengths)), lengths)
    first, end = chunks[:, 5] & 0xFFFF, chunks[:, 5] >> 16
    furthest, hindmost = extrema(
        tables.positions[tables.rows], chunks[:, 6] + first, chunks[:, 6] + end
    )
    seen = (chunks[:, 1] > 0) & (chunks[:, 2] <= furthest)
    if window is not None:
        seen &= chunks[:, 2] + chunks[:, 1] > hindmost - window + 1
    chunks = chunks[seen]
    upto = np.cumsum(np.bincount(block[seen], minlength=len(lengths)))
    all_blocks = tables.blocks.copy()
    all_blocks[:, 2], all_blocks[:, 3] = np.append(0, upto[:-1]), upto
    for _, _, begin, last, _, _ in tables.shapes.tolist():
        blocks = all_blocks[begin:last]
        steps = blocks[:, 3] - blocks[:, 2]
        order = np.argsort(-steps, kind="stable")[: np.count_nonzero(steps > 0)]
        blocks, steps = blocks[order], steps[order]
        rows = int((blocks[:, 1] - blocks[:, 0]).max(initial=0))
        at = 0
        while at < len(blocks):
            longest = int(steps[at])
            alike = int(np.searchsorted(-steps, -longest * _ALIKE, side="right"))
            elements = longest * size * kv_heads * max(rows * group, dims)
            stop = min(alike, at + max(_ELEMENTS // elements, 1))
            yield blocks[at:stop], chunks, size
            at = stop


def _job(
    tables: Tables,
    blocks: np.ndarray,
    chunks: np.ndarray,
    size: int,
    kv_heads: int,
    window: int | None,
) -> _Job:
    entry, used = _padded(blocks[:, 0], blocks[:, 1])
    rows = tables.rows[entry].astype(np.int64)
    last = tables.positions[rows][..., None]
    slot = chunks[blocks[:, 2], 7][:, None]
    behind = slot + np.arange(rows.shape[1])
    target = np.where(slot < 0, rows, len(tables.positions) + behind)

    index, real = _padded(blocks[:, 2], blocks[:, 3])
    chunk = chunks[index]
    inside = np.arange(size, dtype=np.int32)
    first = chunk[..., 2, None]
    positions = np.where(
        (inside < chunk[..., 1, None]) & real[..., None], first + inside, _NOWHERE
    ).reshape(len(blocks), 1, -1)
    hidden = positions > last
    if window is not None:
        hidden |= positions <= last - window
    begin, end = chunk[..., 5] & 0xFFFF, chunk[..., 5] >> 16
    if begin.any() or (end < (blocks[:, 1] - blocks[:, 0])[:, None]).any():
        query = (entry - blocks[:, :1])[..., None]
        begin, end = (np.repeat(x, size, 1)[:, None] for x in (begin, end))
        hidden |= (query < begin) | (query >= end)

    unread = hidden.all(1)
    width = unread.shape[1] - int(unread.all(0)[::-1].argmin())
    hidden, unread = hidden[..., :width], unread[:, :width]
    page, at = np.divmod(chunk[:, None, : -(-width // size), 0].astype(np.int64), tables.page_size)
    places = page * kv_heads + np.arange(kv_heads)[:, None]
    places = places * (tables.page_size // size) + at // size
    sees = used & ~hidden.all(2)
    return _Job(
        torch.from_numpy(rows.ravel()),
        None if sees.all() else torch.from_numpy(np.flatnonzero(sees)),
        torch.from_numpy(target[sees]),
        torch.from_numpy(places),
        size,
        width,
        torch.from_numpy(np.stack(unread.nonzero())) if unread.any() else None,
        torch.from_numpy(np.ascontiguousarray(hidden)) if hidden.any() else None,
        rows.shape,
    )


def _padded(begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranges as rows of one array, the shorter ones filled with their first; and what is real."""
    index = np.arange((end - begin).max())
    real = index < (end - begin)[:, None]
    return begin[:, None] + np.where(real, index, 0), real


def _gather(pool: torch.Tensor, job: _Job, dtype: torch.dtype) -> torch.Tensor:
    """Pages [pages, KV heads, page size, dim] as [blocks, KV heads, tokens, dim]."""
    dim = pool.shape[-1]
    blocks, heads, _ = job.chunks.shape
    flat = pool.reshape(-1, job.size, dim).index_select(0, job.chunks.view(-1))
    gathered = flat.view(blocks, heads, -1, dim)[:, :, : job.tokens].to(dtype)
    if job.unread is not None:
        # 0 * NaN is NaN: a weight of zero does not hide what the slot holds.
        gathered.transpose(1, 2)[job.unread[0], job.unread[1]] = 0
    return gathered


def _mask(hidden: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """[blocks, 1, m * group, tokens]: 0, and -inf for keys that a row does not see."""
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    mask.masked_fill_(hidden, -torch.inf)
    return mask[:, None, :, None].expand(-1, -1, -1, group, -1).flatten(2, 3)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the fused operation gives, for all dims and with a softcap.

    Args:
        query: [blocks, KV heads, m, key dim].
        keys, values: [blocks, KV heads, tokens, dim].
        mask: [blocks, 1, m, tokens], added to the scores. A row of -inf alone gives NaN.

    Returns:
        The attention [blocks, KV heads, m, value dim] and log-sum-exp [blocks, KV heads, m].
    """
    scores = (query * scale) @ keys.transpose(-1, -2)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores.add_(mask)
    lse = scores.logsumexp(-1)
    return scores.sub_(lse[..., None]).exp_() @ values, lse


def _merge(
    out: torch.Tensor, lse: torch.Tensor, rows: int, owner: torch.Tensor, split: torch.Tensor
) -> None:
    """Adds up the partials behind `rows` into their rows, by log-sum-exp, in place."""
    index = owner[:, None, None].expand_as(lse[rows:])
    top = lse[:rows].scatter_reduce(0, index, lse[rows:], "amax")
    weights = lse[rows:].sub_(top.clamp_min(torch.finfo(lse.dtype).min)[owner]).exp_()
    total = torch.zeros_like(top).index_add_(0, owner, weights)
    out[:rows].index_add_(0, owner, out[rows:].mul_(weights[..., None]))
    total, top = total[split], top[split]
    out[split] = out[split] / total.clamp_min(torch.finfo(lse.dtype).tiny)[..., None]
    lse[split] = top + total.log()
