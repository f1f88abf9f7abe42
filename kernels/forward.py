"""A plan carried out on a GPU: blocks by shape, then the merge of what they leave.

A kernel for each of the plan's shapes, as many programs as fit the machine, so the grids depend on
shapes alone and a captured graph stays valid when the plan changes. A program's work is one loop
over the steps of its lane, whatever blocks they are of: the keys of the next block are on their
way while this one is computed. The kernels are one chain of programmatic dependent launches: each
starts as soon as there is room for it, the merge waits for all.

What Triton makes of the loop decides its speed. It fetches ahead, asynchronously, what a step loads
by addresses that are known before; so addresses are read a step ahead and handed on, and all that
is wanted after the first product is loaded by the step itself.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pat_hf.kernels.merge import merge_kernel
from pat_hf.kernels.plan import Machine


class Tile(NamedTuple):
    """How blocks of a shape are run.

    Attributes:
        m, n: the kernel's tile. A block of more rows is run by several programs, a step of more
            tokens in several pieces.
        warps, stages: Triton's num_warps and num_stages.
        per_sm: programs that are resident on a streaming multiprocessor.
        stream_q: whether every step fetches its queries, like its keys; else the first step of a
            block does, and they are kept in registers.
    """

    m: int
    n: int
    warps: int
    stages: int
    per_sm: int
    stream_q: bool = False


def tiles(itemsize: int, dim: int, major: int, rows: int) -> tuple[Tile, ...]:
    """One for each shape of `Machine.gpu`; for GPUs of compute capability `major`.

    The large tiles are Hopper's: others have less shared memory, or products of another kind. Of
    few rows, blocks are short, and a wide tile is the sooner under way the smaller it is.
    """
    if itemsize == 4:
        return (Tile(16, 32, 4, 2, 2, stream_q=True),) * 3
    if dim > 128:
        wide = Tile(32, 32, 4, 2, 2, stream_q=True)
        return (Tile(16, 32, 4, 2, 2, stream_q=True), wide, wide)
    if major != 9:
        return (
            Tile(16, 32, 2, 2, 4, stream_q=True),
            Tile(64, 32, 4, 2, 2, stream_q=True),
            Tile(128, 32, 8, 2, 1, stream_q=True),
        )
    return (
        Tile(16, 32, 2, 3, 4, stream_q=True),
        Tile(64, 64, 4, 2, 2),
        Tile(128, 128 if rows > 256 else 64, 8, 3, 1),
    )


@triton.jit
def _seen(p_step, advance):
    """How many keys of a step some row sees."""
    return tl.minimum(tl.load(p_step + 1), tl.load(p_step + 2) + advance)


@triton.jit
def _past(p_step, advance, window, USE_WINDOW: tl.constexpr):
    """How many keys of a step no row's window reaches back to; it may be none."""
    if USE_WINDOW:
        return tl.load(p_step + 3) + advance - window
    else:
        return 0


@triton.jit
def _rows(p_rows, p_step, o_r, G: tl.constexpr):
    """A block's query rows, [BM]; -1 if there are fewer."""
    m_r = o_r < tl.load(p_step + 6) // 2 * G
    return tl.load(p_rows + tl.load(p_step + 4) + o_r // G, mask=m_r, other=-1)


@triton.jit
def _load_queries(q, i_r, o_k, i_hq, sq_r, sq_h, K: tl.constexpr):
    """Queries of the rows i_r and heads i_hq, [BM, BK]."""
    p_q = q + (i_r.to(tl.int64) * sq_r + i_hq.to(tl.int64) * sq_h)
    m_q = (i_r >= 0)[:, None] & (o_k < K)[None, :]
    return tl.load(p_q[:, None] + o_k[None, :], mask=m_q, other=0.0)


@triton.jit
def _chunks(p_step, i_piece, o_n, seen, BN: tl.constexpr, CHUNK: tl.constexpr):
    """Where a piece's keys lie: page * page size + slot, of the first or of each."""
    if CHUNK >= BN:
        return tl.load(p_step + 7 + i_piece * BN // CHUNK) + i_piece * BN % CHUNK
    else:
        o_t = i_piece * BN + o_n
        where = tl.load(p_step + 7 + o_t // CHUNK, mask=o_t < seen, other=0)
        return where + o_t % CHUNK


@triton.jit
def _tile(p, where, o_n, o_d, sp, st, P: tl.constexpr):
    """Pointers [BN, BD] to the keys or values at `where`, of a head."""
    page = (where // P).to(tl.int64) * sp
    slot = where % P * st
    if where.type.is_block():
        return p + (page + slot)[:, None] + o_d[None, :]
    else:
        return p + (page + slot) + (o_n[:, None] * st + o_d[None, :])


@triton.jit
def _store(p, o_p, m_r, b_x, V: tl.constexpr, KEEP: tl.constexpr):
    """Stores b_x [BM, BV] as rows o_p of [.., V], to be kept in the L2 or not; in halves: they are
    laid out for it in shared memory, of which the wide tile has no more to spare."""
    BM: tl.constexpr = b_x.shape[0]
    BH: tl.constexpr = b_x.shape[1] // 2
    POLICY: tl.constexpr = "evict_last" if KEEP else ""
    b_left, b_right = tl.split(tl.permute(tl.reshape(b_x, [BM, 2, BH]), (0, 2, 1)))
    o_v = tl.arange(0, BH)
    p_left = p + o_p[:, None] * V + o_v[None, :]
    m_left = m_r[:, None] & (o_v < V)[None, :]
    m_right = m_r[:, None] & (o_v + BH < V)[None, :]
    tl.store(p_left, b_left, mask=m_left, eviction_policy=POLICY)
    tl.store(p_left + BH, b_right, mask=m_right, eviction_policy=POLICY)


@triton.jit
def _finish(
    row,
    slot,
    rows,
    p_rows,
    o_r,
    i_hq,
    b_max,
    b_sum,
    b_out,
    out,
    partial,
    lse,
    sinks,
    H: tl.constexpr,
    G: tl.constexpr,
    V: tl.constexpr,
    USE_SINKS: tl.constexpr,
):
    """Stores a block's partials from `slot` on; if that is -1, its rows' output."""
    m_r = o_r < rows // 2 * G
    if slot >= 0:
        o_p = (slot + o_r // G).to(tl.int64) * (H * G) + i_hq
        b_scale = 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum)
        tl.store(lse + o_p, b_max + tl.log2(b_sum), mask=m_r)
        _store(partial, o_p, m_r, b_out * b_scale[:, None], V, True)
    else:
        i_r = tl.load(p_rows + row + o_r // G, mask=m_r, other=0)
        if USE_SINKS:
            b_sink = tl.load(sinks + i_hq, mask=m_r, other=0.0).to(tl.float32)
            b_sink = b_sink * 1.4426950408889634
            b_top = tl.maximum(b_max, b_sink)
            b_old = tl.exp2(b_max - b_top)
            b_scale = b_old / (b_sum * b_old + tl.exp2(b_sink - b_top))
        else:
            b_scale = 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum)
        o_p = i_r.to(tl.int64) * (H * G) + i_hq
        _store(out, o_p, m_r, (b_out * b_scale[:, None]).to(out.dtype.element_ty), V, False)


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
    sq_r,
    sq_h,
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
    SHAPE: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    USE_WINDOW: tl.constexpr,
    USE_SOFTCAP: tl.constexpr,
    USE_SINKS: tl.constexpr,
    IS_FLOAT32: tl.constexpr,
    STREAM_Q: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Lanes of one shape; one program takes every so many-th of them.

    Args:
        q: [B * T, H * G, K] by strides; k, v: [pages, H, P, K or V] by strides.
        plan: int32 [C, W], see `Plan`.
        out: [B * T, H * G, V] contiguous.
        partial: fp32 [W, H * G, V]; lse: fp32 [W, H * G], in base 2.
        qk_scale: the scale times log2 e; without the log2 e if there is a softcap.
        SHAPE: which; its m and n are ROWS and N. STEP: columns of a step.
    """
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    PIECES: tl.constexpr = N // BN
    CHUNK: tl.constexpr = min(N, P)
    SUB: tl.constexpr = (max(ROWS, G) + BM - 1) // BM
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    p_shape = plan + 2 * W + SHAPE * 6
    lane = tl.load(p_shape + 4)
    jobs = (tl.load(p_shape + 5) - lane) * (H * SUB)
    p_lanes = plan + tl.load(plan + 7)
    p_steps = plan + tl.load(plan + 9)
    p_rows = plan + tl.load(plan + 13)
    advance = tl.load(plan + W) - tl.load(plan + 3)
    # Scores as they come from the first product, or as the softcap leaves them, to base 2.
    c_scale = 1.0 if USE_SOFTCAP else qk_scale

    for i_j in range(tl.program_id(0), jobs, tl.num_programs(0)):
        i_h = (i_j // SUB) % H
        o_r = (i_j % SUB) * BM + o_m
        i_hq = i_h * G + o_r % G
        p_lane = p_lanes + lane + i_j // (H * SUB)
        begin = tl.load(p_lane) * PIECES
        end = tl.load(p_lane + 1) * PIECES
        p_k = k + i_h * sk_h
        p_v = v + i_h * sv_h

        p_step = p_steps + (begin // PIECES) * STEP
        seen, past = _seen(p_step, advance), _past(p_step, advance, window, USE_WINDOW)
        where = _chunks(p_step, 0, o_n, seen, BN, CHUNK)
        i_r = _rows(p_rows, p_step, o_r, G)
        p_step = p_steps + (tl.minimum(begin + 1, end - 1) // PIECES) * STEP
        row, rows = tl.load(p_step + 4), tl.load(p_step + 6)

        b_q = tl.zeros([BM, BK], q.dtype.element_ty)
        b_max = tl.full([BM], float("-inf"), tl.float32)
        b_sum = tl.zeros([BM, BN] if STREAM_Q else [BM], tl.float32)
        b_out = tl.zeros([BM, BV], tl.float32)
        for i in range(begin, end):
            p_step = p_steps + (i // PIECES) * STEP
            i_piece = i % PIECES
            keys = seen - i_piece * BN
            # Whether a block begins; and how many keys all its rows see.
            starts = tl.load(p_step + 6) % 2 > i_piece
            common = tl.load(p_step + 3) + advance - i_piece * BN
            # Of the step before, whose block may have ended.
            p_old = p_step - STEP
            old_row, old_slot, old_rows = tl.load(p_old + 4), tl.load(p_old + 5), tl.load(p_old + 6)
            # [BN, BK], [BN, BV]
            m_k = o_n < keys
            if USE_WINDOW:
                m_k = m_k & (o_n >= past - i_piece * BN)
            b_k = tl.load(
                _tile(p_k, where, o_n, o_k, sk_p, sk_t, P),
                mask=m_k[:, None] & (o_k < K)[None, :],
                other=0.0,
            )
            b_v = tl.load(
                _tile(p_v, where, o_n, o_v, sv_p, sv_t, P),
                mask=m_k[:, None] & (o_v < V)[None, :],
                other=0.0,
            )
            # [BM, BK]
            if STREAM_Q:
                b_q = _load_queries(q, i_r, o_k, i_hq, sq_r, sq_h, K)
            else:
                if starts:
                    i_q = _rows(p_rows, p_step, o_r, G)
                    b_q = _load_queries(q, i_q, o_k, i_hq, sq_r, sq_h, K)

            # What a step needs is read a step ahead, the places of the rows' numbers two.
            i_r = tl.load(p_rows + row + o_r // G, mask=o_r < rows // 2 * G, other=-1)
            i_next = tl.minimum(i + 1, end - 1)
            p_next = p_steps + (i_next // PIECES) * STEP
            seen, past = _seen(p_next, advance), _past(p_next, advance, window, USE_WINDOW)
            where = _chunks(p_next, i_next % PIECES, o_n, seen, BN, CHUNK)
            p_next = p_steps + (tl.minimum(i + 2, end - 1) // PIECES) * STEP
            row, rows = tl.load(p_next + 4), tl.load(p_next + 6)

            # [BM, BN]
            if IS_FLOAT32:
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            else:
                b_s = tl.dot(b_q, tl.trans(b_k))
            if USE_SOFTCAP:
                b_s = b_s * qk_scale
                b_s = (1.0 - 2.0 / (1.0 + tl.exp2(b_s * (2.8853900817779268 / softcap)))) * (
                    softcap * 1.4426950408889634
                )
            # The block before is finished here: between the second product and the next step's
            # first, which waits for it, nothing may touch b_out.
            if starts & (i > begin):
                _finish(
                    old_row, old_slot, old_rows, p_rows, o_r, i_hq, b_max,
                    tl.sum(b_sum, 1) if STREAM_Q else b_sum,
                    b_out, out, partial, lse, sinks, H, G, V, USE_SINKS,
                )  # fmt: skip
                b_max = tl.full([BM], float("-inf"), tl.float32)
                b_sum = tl.zeros_like(b_sum)
                b_out = tl.zeros([BM, BV], tl.float32)
            ragged = keys > common
            if USE_WINDOW:
                ragged = ragged | (tl.load(p_step + 2) + advance > window + i_piece * BN)
            if STREAM_Q:
                b_s = tl.where((o_n < keys)[None, :], b_s, float("-inf"))
            else:
                ragged = ragged | (keys < BN)
            if ragged:
                i_p = _rows(p_rows, p_step, o_r, G)
                o_p = tl.load(plan + W + i_p, mask=i_p >= 0, other=0) - tl.load(p_step)
                o_p = o_p - i_piece * BN
                m_s = (o_n < keys)[None, :] & (o_n[None, :] <= o_p[:, None])
                if USE_WINDOW:
                    m_s = m_s & (o_n[None, :] > o_p[:, None] - window)
                b_s = tl.where(m_s, b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 1) * c_scale)
            b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_p = tl.exp2(b_s * c_scale - b_ref[:, None])
            b_old = tl.exp2(b_max - b_ref)
            # Rows of few queries lie across warps, which would have to meet for every step's sums.
            if STREAM_Q:
                b_sum = b_sum * b_old[:, None] + b_p
            else:
                b_sum = b_sum * b_old + tl.sum(b_p, 1)
            b_out = b_out * b_old[:, None]
            if IS_FLOAT32:
                b_out = tl.dot(b_p, b_v, b_out, input_precision="ieee")
            else:
                b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out)
            b_max = b_new

        p_old = p_steps + (end // PIECES - 1) * STEP
        old_row, old_slot, old_rows = tl.load(p_old + 4), tl.load(p_old + 5), tl.load(p_old + 6)
        _finish(
            old_row, old_slot, old_rows, p_rows, o_r, i_hq, b_max,
            tl.sum(b_sum, 1) if STREAM_Q else b_sum,
            b_out, out, partial, lse, sinks, H, G, V, USE_SINKS,
        )  # fmt: skip
    # Whoever waits for this kernel has waited for the one before, too. One program is enough, and
    # the others make room for the next kernel's.
    if USE_PDL and tl.program_id(0) == 0:
        tl.extra.cuda.gdc_wait()


def by_rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x [B, heads, T, dim] with rows b * T + t evenly apart, as Transformers has it; how far."""
    batch, _, length, _ = x.shape
    even = batch == 1 or length == 1 or x.stride(0) == length * x.stride(2)
    if x.stride(3) != 1 or not even:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    return x, x.stride(0) if length == 1 else x.stride(2)


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
    q, row_stride = by_rows(q)
    k_pages, v_pages = (x if x.stride(-1) == 1 else x.contiguous() for x in (k_pages, v_pages))
    out = q.new_empty(batch, length, query_heads, value_dim)
    partial = q.new_empty(width, query_heads, value_dim, dtype=torch.float32)
    lse = q.new_empty(width, query_heads, dtype=torch.float32)
    if not out.numel():
        return out
    processors, major = _machine(q.device)
    pdl = q.is_cuda and major >= 9
    shapes = Machine.gpu(processors).shapes
    chunks = max(max(shape.tokens for shape in shapes) // page_size, 1)
    choice = tiles(q.element_size(), max(key_dim, value_dim), major, rows)
    launches = []
    for i, tile in reversed(list(enumerate(choice))):
        # No block has more rows than the batch.
        if i and rows * group <= shapes[i - 1].rows:
            continue
        arguments = (
            q, k_pages, v_pages, plan, out, partial, lse, sinks,
            scale if softcap is not None else scale * 1.4426950408889634,
            softcap or 0.0, window or 0, width, row_stride, q.stride(1),
            kv_heads, group, *k_pages.stride()[:3], *v_pages.stride()[:3],
        )  # fmt: skip
        options = dict(
            K=key_dim, V=value_dim, P=page_size,
            SHAPE=i, ROWS=shapes[i].rows, N=shapes[i].tokens, STEP=7 + chunks,
            BM=tile.m, BN=tile.n,
            BK=triton.next_power_of_2(key_dim), BV=triton.next_power_of_2(value_dim),
            USE_WINDOW=window is not None, USE_SOFTCAP=softcap is not None,
            USE_SINKS=sinks is not None, IS_FLOAT32=q.dtype == torch.float32,
            STREAM_Q=tile.stream_q, USE_PDL=pdl,
            num_warps=tile.warps, num_stages=tile.stages,
            **({"launch_pdl": bool(launches)} if pdl else {}),
        )  # fmt: skip
        launches.append((forward_kernel, (processors * tile.per_sm,), arguments, options))
    value_block = triton.next_power_of_2(value_dim)
    heads = min(triton.next_power_of_2(query_heads), max(1024 // value_block, 1))
    options = dict(
        HQ=query_heads, V=value_dim, BH=heads, BV=value_block,
        USE_SINKS=sinks is not None, USE_PDL=pdl, num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    grid = (rows, triton.cdiv(query_heads, heads))
    launches.append((merge_kernel, grid, (plan, partial, lse, out, sinks, width), options))
    if q.is_cuda:
        layout = (*k_pages.shape[1:], *k_pages.stride(), *v_pages.shape[1:], *v_pages.stride())
        used = (window is None, softcap is None, sinks is None, row_stride % 16)
        _compile(launches, (q.device, q.dtype, query_heads, *choice, *layout, *used))
    for kernel, grid, arguments, options in launches:
        kernel[grid](*arguments, **options)
    return out


_compiled: set[tuple[object, ...]] = set()


def _compile(launches: list[tuple], kind: tuple[object, ...]) -> None:
    """Has the kernels of a new kind of call compiled and loaded side by side."""
    if kind in _compiled:
        return

    def load(kernel) -> None:
        with torch.cuda.device(kind[0]):
            (kernel.result() if isinstance(kernel, triton.FutureKernel) else kernel).run  # noqa: B018

    with ThreadPoolExecutor(len(launches)) as pool:
        with triton.AsyncCompileMode(pool):
            kernels = [
                kernel.warmup(*arguments, grid=grid, **options)
                for kernel, grid, arguments, options in launches
            ]
        list(pool.map(load, kernels))
    _compiled.add(kind)


@functools.cache
def _machine(device: torch.device) -> tuple[int, int]:
    """Streaming multiprocessors and compute capability; for the interpreter, those to imitate."""
    if device.type != "cuda":
        return 2, 9
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major
