"""A plan carried out on a GPU: packs by tile shape, then the merge of what they leave.

A kernel for each query tile m takes the blocks of that shape, as many programs as fit the machine,
so the grids depend on shapes alone and a captured graph stays valid when the plan changes. The
kernels are one chain of programmatic dependent launches: each starts while its predecessor still
runs, the merge waits for all.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pat_hf.kernels.merge import merge_kernel


class Tile(NamedTuple):
    """How blocks of up to `rows` query rows are run.

    Attributes:
        rows: the largest m of the plan that goes here.
        m, n: the kernel's tile; a block with more rows than m is run in several pieces.
        warps, stages: Triton's num_warps and num_stages.
        per_sm: programs that are resident on a streaming multiprocessor.
        registers: the most that a thread may have.
        branch: whether a tile that all rows see whole goes unmasked.
    """

    rows: int
    m: int
    n: int
    warps: int
    stages: int
    per_sm: int
    registers: int | None = None
    branch: bool = True


def tiles(itemsize: int, dim: int) -> tuple[Tile, ...]:
    """The shipped shapes, in the order of launch: wide ones take longest."""
    if itemsize == 4:
        return (
            Tile(128, 32, 32, 4, 2, 2),
            Tile(16, 16, 32, 4, 2, 2 if dim > 128 else 3),
        )
    if dim > 128:
        return (
            Tile(128, 32, 32, 4, 2, 2, branch=False),
            Tile(16, 16, 32, 4, 2, 3),
        )
    return (
        Tile(128, 128, 64, 8, 3, 1),
        Tile(64, 64, 32, 4, 2, 2, branch=False),
        Tile(16, 16, 32, 1, 2, 8, branch=False),
    )


@triton.jit
def _mask(b_s, o_p, end, position, window, USE_WINDOW: tl.constexpr):
    """Scores [BM, BN] of keys at positions o_p; -inf where a row doesn't see the key."""
    m_p = (o_p < end)[None, :] & (o_p[None, :] <= position[:, None])
    if USE_WINDOW:
        m_p = m_p & (o_p[None, :] > position[:, None] - window)
    return tl.where(m_p, b_s, float("-inf"))


@triton.jit
def forward_kernel(
    q,
    k,
    v,
    plan,
    out,
    partial,
    lse,
    sinks,
    qk_scale,
    softcap,
    window,
    W,
    sq_b,
    sq_h,
    sq_t,
    T,
    H: tl.constexpr,
    G: tl.constexpr,
    sk_p: tl.constexpr,
    sk_h: tl.constexpr,
    sk_t: tl.constexpr,
    sv_p: tl.constexpr,
    sv_h: tl.constexpr,
    sv_t: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    ABOVE: tl.constexpr,
    ROWS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    USE_WINDOW: tl.constexpr,
    USE_SOFTCAP: tl.constexpr,
    USE_SINKS: tl.constexpr,
    IS_FLOAT32: tl.constexpr,
    USE_BRANCH: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Blocks whose m is in (ABOVE, ROWS]; one program takes every so many-th of them.

    Args:
        q: [B, H * G, T, K] by strides; k, v: [pages, H, P, K or V] by strides.
        plan: int32 [C, W], see `Plan`.
        out: [B * T, H * G, V] contiguous.
        partial: fp32 [W, H * G, V]; lse: fp32 [W, H * G], in base 2.
        qk_scale: the scale times log2 e; without the log2 e if there is a softcap.
    """
    SUB: tl.constexpr = ROWS // BM
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    p_blocks = plan + tl.load(plan + 5)
    p_rows = plan + tl.load(plan + 7)
    p_slots = plan + tl.load(plan + 9)
    p_tiles = plan + tl.load(plan + 11)
    p_pages = plan + tl.load(plan + 13)

    o_s = tl.arange(0, 32)
    m_s = o_s < tl.load(plan + 4) // 4
    p_shapes = plan + tl.load(plan + 3) + o_s * 4
    b_rows = tl.load(p_shapes, mask=m_s, other=0)
    b_tokens = tl.load(p_shapes + 1, mask=m_s, other=0)
    b_first = tl.load(p_shapes + 2, mask=m_s, other=0)
    b_last = tl.load(p_shapes + 3, mask=m_s, other=0)
    m_s = (b_rows > ABOVE) & (b_rows <= ROWS)
    first = tl.min(tl.where(m_s, b_first, 0x7FFFFFFF), 0)
    last = tl.max(tl.where(m_s, b_last, 0), 0)
    jobs = tl.maximum(last - first, 0) * (H * SUB)

    # A block's entry is read while the one before it is run.
    i_n = tl.minimum(tl.program_id(0), jobs - 1)
    p_block = p_blocks + (first + i_n // (H * SUB)) * 4
    next_row = tl.load(p_block, mask=jobs > 0, other=0)
    next_row_end = tl.load(p_block + 1, mask=jobs > 0, other=0)
    next_tile = tl.load(p_block + 2, mask=jobs > 0, other=0)
    next_tile_end = tl.load(p_block + 3, mask=jobs > 0, other=0)
    for i_j in range(tl.program_id(0), jobs, tl.num_programs(0)):
        i_b = first + i_j // (H * SUB)
        i_h = (i_j // SUB) % H
        i_sub = i_j % SUB
        row_begin = next_row
        row_end = next_row_end
        tile_begin = next_tile
        tile_end = next_tile_end
        i_n = tl.minimum(i_j + tl.num_programs(0), jobs - 1)
        p_block = p_blocks + (first + i_n // (H * SUB)) * 4
        next_row = tl.load(p_block)
        next_row_end = tl.load(p_block + 1)
        next_tile = tl.load(p_block + 2)
        next_tile_end = tl.load(p_block + 3)
        tokens = tl.max(tl.where((b_first <= i_b) & (i_b < b_last), b_tokens, 0), 0)
        o_r = i_sub * BM + o_m
        m_r = o_r < (row_end - row_begin) * G
        # A block's pieces: later ones may have no rows.
        if i_sub * BM < (row_end - row_begin) * G:
            pieces = tl.maximum(tokens // BN, 1)
            # What depends on nothing else is asked for first.
            i_e = row_begin + o_r // G
            i_r = tl.load(p_rows + i_e, mask=m_r, other=0).to(tl.int64)
            p_tile = p_tiles + tile_end * 3
            last_begin = tl.load(p_tile - 2)
            run_end = tl.load(p_tile - 1)
            p_tile = p_tiles + tile_begin * 3
            begin = tl.load(p_tile + 1)
            end = tl.load(p_tile + 2)
            if P >= BN:
                i_p = tl.load(p_pages + tl.load(p_tile))
            else:
                i_p = tl.load(p_pages + tl.load(p_tile) + o_n // P, mask=begin + o_n < end, other=0)
            position = tl.load(plan + W + i_r, mask=m_r, other=-1)
            i_hq = i_h * G + o_r % G
            # [BM, BK]
            b_q = tl.load(
                q + ((i_r // T) * sq_b + i_hq * sq_h + (i_r % T) * sq_t)[:, None] + o_k[None, :],
                mask=m_r[:, None] & (o_k < K)[None, :],
                other=0.0,
            )
            latest = tl.max(position, 0)
            earliest = tl.min(tl.where(m_r, position, 0x7FFFFFFF), 0)

            b_max = tl.full([BM], float("-inf"), tl.float32)
            b_sum = tl.zeros([BM], tl.float32)
            b_out = tl.zeros([BM, BV], tl.float32)
            steps = (tile_end - tile_begin - 1) * pieces
            steps += tl.maximum(tl.cdiv(tl.minimum(run_end, latest + 1) - last_begin, BN), 1)
            # [BN, BK], [BN, BV]: of a tile that lies in one page
            o_nk = o_n[:, None] * sk_t + o_k[None, :]
            o_nv = o_n[:, None] * sv_t + o_v[None, :]

            # Tables are read two steps ahead, pages one, so that no load of K waits for them.
            i_next = tl.minimum(1, steps - 1)
            p_tile = p_tiles + (tile_begin + i_next // pieces) * 3
            next_page = tl.load(p_tile)
            next_begin = tl.load(p_tile + 1)
            next_end = tl.load(p_tile + 2)
            for i in range(0, steps):
                o_t = (i % pieces) * BN + o_n
                position_k = begin + o_t
                m_k = (position_k < end) & (position_k <= latest)
                if USE_WINDOW:
                    m_k = m_k & (position_k > earliest - window)
                page = i_p.to(tl.int64)
                # [BN, BK], [BN, BV]
                if P >= BN:
                    slot = (i % pieces) * BN % P
                    p_k = k + (page * sk_p + i_h * sk_h + slot * sk_t) + o_nk
                    p_v = v + (page * sv_p + i_h * sv_h + slot * sv_t) + o_nv
                else:
                    p_k = k + i_h * sk_h + (page * sk_p + (o_t % P) * sk_t)[:, None] + o_k[None, :]
                    p_v = v + i_h * sv_h + (page * sv_p + (o_t % P) * sv_t)[:, None] + o_v[None, :]
                b_k = tl.load(p_k, mask=m_k[:, None] & (o_k < K)[None, :], other=0.0)
                b_v = tl.load(p_v, mask=m_k[:, None] & (o_v < V)[None, :], other=0.0)
                whole = (end - begin >= tokens) & (end <= earliest + 1) & (tokens >= BN)
                if USE_WINDOW:
                    whole = whole & (begin > latest - window)
                seen_begin = begin
                seen_end = end

                if P >= BN:
                    # A page's tail may be no node's: there is one token at least in a tile.
                    o_next = tl.minimum(((i + 1) % pieces) * BN, next_end - next_begin - 1)
                    i_p = tl.load(p_pages + next_page + o_next // P)
                else:
                    o_next = ((i + 1) % pieces) * BN + o_n
                    i_p = tl.load(
                        p_pages + next_page + o_next // P,
                        mask=next_begin + o_next < next_end,
                        other=0,
                    )
                # Read again: to hand `next_begin` on would keep the loop from being pipelined.
                p_tile = p_tiles + (tile_begin + tl.minimum(i + 1, steps - 1) // pieces) * 3
                begin = tl.load(p_tile + 1)
                end = tl.load(p_tile + 2)
                i_next = tl.minimum(i + 2, steps - 1)
                p_tile = p_tiles + (tile_begin + i_next // pieces) * 3
                next_page = tl.load(p_tile)
                next_begin = tl.load(p_tile + 1)
                next_end = tl.load(p_tile + 2)

                # [BM, BN]
                if IS_FLOAT32:
                    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
                else:
                    b_s = tl.dot(b_q, tl.trans(b_k))
                b_s = b_s * qk_scale
                if USE_SOFTCAP:
                    b_s = (1.0 - 2.0 / (1.0 + tl.exp2(b_s * (2.8853900817779268 / softcap)))) * (
                        softcap * 1.4426950408889634
                    )
                if USE_BRANCH:
                    if not whole:
                        b_s = _mask(b_s, seen_begin + o_t, seen_end, position, window, USE_WINDOW)
                else:
                    b_s = _mask(b_s, seen_begin + o_t, seen_end, position, window, USE_WINDOW)
                b_new = tl.maximum(b_max, tl.max(b_s, 1))
                b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
                b_p = tl.exp2(b_s - b_ref[:, None])
                b_old = tl.exp2(b_max - b_ref)
                b_sum = b_sum * b_old + tl.sum(b_p, 1)
                b_out = b_out * b_old[:, None]
                if IS_FLOAT32:
                    b_out = tl.dot(b_p, b_v, b_out, input_precision="ieee")
                else:
                    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out)
                b_max = b_new

            # Read again: kept, it would take registers from the loop.
            o_r = o_r + (tl.load(p_blocks + i_b * 4, volatile=True) - row_begin) * G
            i_e = row_begin + o_r // G
            m_r = o_r < (row_end - row_begin) * G
            i_r = tl.load(p_rows + i_e, mask=m_r, other=0).to(tl.int64)
            slot = tl.load(p_slots + i_e, mask=m_r, other=-1).to(tl.int64)
            i_hq = i_h * G + o_r % G
            m_v = (o_v < V)[None, :]
            m_last = m_r & (slot < 0)
            b_ref = tl.where(b_sum == 0.0, 1.0, b_sum)
            p_slot = slot * (H * G) + i_hq
            tl.store(lse + p_slot, b_max + tl.log2(b_sum), mask=m_r & (slot >= 0))
            tl.store(
                partial + p_slot[:, None] * V + o_v[None, :],
                b_out * (1.0 / b_ref)[:, None],
                mask=(m_r & (slot >= 0))[:, None] & m_v,
            )
            b_scale = 1.0 / b_ref
            if USE_SINKS:
                b_sink = tl.load(sinks + i_hq, mask=m_r, other=0.0).to(tl.float32)
                b_sink = b_sink * 1.4426950408889634
                b_top = tl.maximum(b_max, b_sink)
                b_old = tl.exp2(b_max - b_top)
                b_scale = b_old / (b_sum * b_old + tl.exp2(b_sink - b_top))
            tl.store(
                out + (i_r * (H * G) + i_hq)[:, None] * V + o_v[None, :],
                (b_out * b_scale[:, None]).to(out.dtype.element_ty),
                mask=m_last[:, None] & m_v,
            )
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
        # Whoever waits for this kernel has waited for the one before, too.
        tl.extra.cuda.gdc_wait()


def forward(
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
    """See `pat_hf.kernels.ops.attention`; on a GPU, or on the CPU under Triton's interpreter."""
    batch, query_heads, length, key_dim = q.shape
    kv_heads, page_size, value_dim = v_pages.shape[1:]
    group, rows, width = query_heads // kv_heads, batch * length, plan.shape[-1]
    q, k_pages, v_pages = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_pages, v_pages)
    )
    out = q.new_empty(batch, length, query_heads, value_dim)
    partial = q.new_empty(width, query_heads, value_dim, dtype=torch.float32)
    lse = q.new_empty(width, query_heads, dtype=torch.float32)
    if not out.numel():
        return out
    processors, pdl = _machine(q.device)
    shapes = tiles(q.element_size(), max(key_dim, value_dim))
    # No pack has more rows than the batch.
    need = min(tile.rows for tile in shapes if tile.rows >= min(rows * group, 128))
    shapes = [tile for tile in shapes if tile.rows <= need]
    for i, tile in enumerate(shapes):
        forward_kernel[(processors * tile.per_sm,)](
            q, k_pages, v_pages, plan, out, partial, lse, sinks,
            scale if softcap is not None else scale * 1.4426950408889634,
            softcap or 0.0, window or 0, width,
            q.stride(0), q.stride(1), q.stride(2),
            length, kv_heads, group, *k_pages.stride()[:3], *v_pages.stride()[:3],
            K=key_dim, V=value_dim, P=page_size,
            ABOVE=shapes[i + 1].rows if i + 1 < len(shapes) else 0, ROWS=tile.rows,
            BM=tile.m, BN=tile.n,
            BK=triton.next_power_of_2(key_dim), BV=triton.next_power_of_2(value_dim),
            USE_WINDOW=window is not None, USE_SOFTCAP=softcap is not None,
            USE_SINKS=sinks is not None, IS_FLOAT32=q.dtype == torch.float32,
            USE_BRANCH=tile.branch, USE_PDL=pdl,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
            **({"launch_pdl": i > 0} if pdl else {}),
        )  # fmt: skip
    value_block = triton.next_power_of_2(value_dim)
    heads = min(triton.next_power_of_2(query_heads), max(1024 // value_block, 1))
    merge_kernel[(rows, triton.cdiv(query_heads, heads))](
        plan, partial, lse, out, sinks, width,
        HQ=query_heads, V=value_dim, BH=heads, BV=value_block,
        USE_SINKS=sinks is not None, USE_PDL=pdl, num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out


@functools.cache
def _machine(device: torch.device) -> tuple[int, bool]:
    """Streaming multiprocessors, and whether programmatic dependent launches exist."""
    if device.type != "cuda":
        return 2, False
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major >= 9
