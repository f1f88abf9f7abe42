"""A plan carried out on a GPU: blocks by shape, then the merge of what they leave.

On Hopper, most layers have the one kernel of `hopper.py`; others have one for each of the plan's
shapes. As many programs start as fit the machine, so the grids depend on shapes alone and a
captured graph stays valid when the plan changes. A program's work is one loop over the steps of its
queue, whatever blocks they are of: the keys of the next block are on their way while this one is
computed. The kernels are one chain of programmatic dependent launches: each starts as soon as there
is room for it, the merge waits for all.

What Triton makes of the loop decides its speed. It fetches ahead, asynchronously, what a step loads
by addresses that are known before; so addresses are read a step ahead and handed on, and all that
is wanted after the first product is loaded by the step itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from pat_hf.kernels import hopper
from pat_hf.kernels.constants import (
    BEGINS,
    CHUNK_COLUMNS,
    CHUNKS_AT,
    COUNT,
    END_BIT,
    END_QUEUE,
    FIRST_MASK,
    FIRST_QUEUE,
    FLAGS,
    FOR_ROWS,
    FURTHEST,
    HINDMOST,
    LOG2E,
    ORIGIN,
    PLACE,
    POSITION,
    QUEUE_CHUNK,
    QUEUE_COLUMNS,
    ROW,
    ROWS_AT,
    SHAPE_COLUMNS,
    SLOT,
    TOKENS,
    UNMASKED,
)
from pat_hf.kernels.launch import Launch, run
from pat_hf.kernels.merge import merge_kernel
from pat_hf.kernels.plan import COLUMNS, Heads, Machine, aligned, is_hopper, processors_of

# Of a multiprocessor, that the merge of few rows is to keep busy: a head of a row each.
MERGE_WARPS = 8


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


def tiles(heads: Heads, major: int) -> tuple[Tile, ...]:
    """One for each shape of `Machine.gpu`, whose steps it divides; for capability `major`.

    The large tiles are Hopper's, where only layers with windows run them: others have less shared
    memory, or products of another kind.
    """
    if is_hopper(heads, major):
        return Tile(64, 64, 4, 2, 2), Tile(128, 64, 8, 3, 1)
    if heads.itemsize == 4:
        return (Tile(16, 32, 4, 2, 2, stream_q=True),) * 3
    if max(heads.key_dim, heads.value_dim) > 128:
        wide = Tile(32, 32, 4, 2, 2, stream_q=True)
        return (Tile(16, 32, 4, 2, 2, stream_q=True), wide, wide)
    return (
        Tile(16, 32, 2, 2, 4, stream_q=True),
        Tile(64, 32, 4, 2, 2, stream_q=True),
        Tile(128, 32, 8, 2, 1, stream_q=True),
    )


@triton.jit
def _of_chunk(p_chunk, o_n, COLUMN: tl.constexpr, CHUNK: tl.constexpr):
    """A column of a step's chunks: of each token's, or one number if there is but one chunk."""
    if o_n.shape[0] > CHUNK:
        return tl.load(p_chunk + COLUMN + o_n // CHUNK * CHUNK_COLUMNS)
    else:
        return tl.load(p_chunk + COLUMN)


@triton.jit
def _rows(p_rows, p_chunk, o_r, G: tl.constexpr):
    """A block's query rows, [BM]; -1 if there are fewer."""
    m_r = o_r < tl.load(p_chunk + FLAGS) // COUNT * G
    return tl.load(p_rows + tl.load(p_chunk + ROW) + o_r // G, mask=m_r, other=-1)


@triton.jit
def _load_queries(q, i_r, o_k, i_hq, sq_r, sq_h, K: tl.constexpr):
    """Queries of the rows i_r and heads i_hq, [BM, BK]."""
    p_q = q + (i_r.to(tl.int64) * sq_r + i_hq.to(tl.int64) * sq_h)
    m_q = (i_r >= 0)[:, None] & (o_k < K)[None, :]
    return tl.load(p_q[:, None] + o_k[None, :], mask=m_q, other=0.0)


@triton.jit
def _keys(
    p_chunk,
    o_n,
    advance,
    window,
    CHUNK: tl.constexpr,
    USE_WINDOW: tl.constexpr,
):
    """Places of a step's chunks, and the tokens [past, seen) of each that any row sees."""
    where = _of_chunk(p_chunk, o_n, PLACE, CHUNK)
    seen = _of_chunk(p_chunk, o_n, FURTHEST, CHUNK) + advance
    seen = tl.minimum(seen, _of_chunk(p_chunk, o_n, TOKENS, CHUNK))
    if USE_WINDOW:
        past = _of_chunk(p_chunk, o_n, HINDMOST, CHUNK) + advance - window
    else:
        past = 0
    return where, seen, past


@triton.jit
def _tile(p, where, o_n, o_d, sp, st, P: tl.constexpr, CHUNK: tl.constexpr):
    """Pointers [BN, BD] to the keys or values at `where`, of a head."""
    page = (where // P).to(tl.int64) * sp
    slot = where % P * st
    if where.type.is_block():
        return p + (page + slot + o_n % CHUNK * st)[:, None] + o_d[None, :]
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
    m_r = o_r < rows // COUNT * G
    if slot >= 0:
        o_p = (slot + o_r // G).to(tl.int64) * (H * G) + i_hq
        b_scale = 1.0 / tl.where(b_sum == 0.0, 1.0, b_sum)
        tl.store(lse + o_p, b_max + tl.log2(b_sum), mask=m_r)
        _store(partial, o_p, m_r, b_out * b_scale[:, None], V, True)
    else:
        i_r = tl.load(p_rows + row + o_r // G, mask=m_r, other=0)
        if USE_SINKS:
            b_sink = tl.load(sinks + i_hq, mask=m_r, other=0.0).to(tl.float32)
            b_sink = b_sink * LOG2E
            b_top = tl.maximum(b_max, b_sink)
            b_ref = tl.where(b_top == float("-inf"), 0.0, b_top)
            b_old = tl.exp2(b_max - b_ref)
            b_sum = b_sum * b_old + tl.exp2(b_sink - b_ref)
            b_scale = b_old / tl.where(b_sum == 0.0, 1.0, b_sum)
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
    W,
    sq_r,
    sq_h,
    window,
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
    QUEUES: tl.constexpr,
    CHUNK: tl.constexpr,
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
    """Queues of one shape; one program takes every so many-th of them.

    Args:
        q: [B * T, H * G, K] by strides; k, v: [pages, H, P, K or V] by strides.
        plan: int32 [C, W], see `Plan`.
        out: [B * T, H * G, V] contiguous.
        partial: fp32 [W, H * G, V]; lse: fp32 [W, H * G], in base 2.
        qk_scale: the scale times log2 e; without the log2 e if there is a softcap.
        SHAPE: which; its m is ROWS. QUEUES: where the plan's queues are, from its shapes on.
        CHUNK: tokens of a chunk.
    """
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    STEP: tl.constexpr = BN // CHUNK * CHUNK_COLUMNS
    SUB: tl.constexpr = (max(ROWS, G) + BM - 1) // BM
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_t = o_n % CHUNK
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    p_shape = plan + 2 * W + SHAPE * SHAPE_COLUMNS
    queue = tl.load(p_shape + FIRST_QUEUE)
    jobs = (tl.load(p_shape + END_QUEUE) - queue) * (H * SUB)
    p_queues = plan + 2 * W + QUEUES
    p_chunks = plan + tl.load(plan + CHUNKS_AT)
    p_rows = plan + tl.load(plan + ROWS_AT)
    advance = tl.load(plan + W) - tl.load(plan + ORIGIN)
    # Scores as they come from the first product, or as the softcap leaves them, to base 2.
    c_scale = 1.0 if USE_SOFTCAP else qk_scale

    for i_j in range(tl.program_id(0), jobs, tl.num_programs(0)):
        i_h = (i_j // SUB) % H
        o_r = (i_j % SUB) * BM + o_m
        i_hq = i_h * G + o_r % G
        p_queue = p_queues + QUEUE_COLUMNS * (queue + i_j // (H * SUB))
        begin = tl.load(p_queue + QUEUE_CHUNK)
        steps = (tl.load(p_queue + QUEUE_COLUMNS + QUEUE_CHUNK) - begin) // (BN // CHUNK)
        p_first = p_chunks + begin * CHUNK_COLUMNS
        p_k = k + i_h * sk_h
        p_v = v + i_h * sv_h

        where, seen, past = _keys(p_first, o_n, advance, window, CHUNK, USE_WINDOW)
        i_r = _rows(p_rows, p_first, o_r, G)
        p_next = p_first + tl.minimum(1, steps - 1) * STEP
        row, rows = tl.load(p_next + ROW), tl.load(p_next + FLAGS)

        b_q = tl.zeros([BM, BK], q.dtype.element_ty)
        b_max = tl.full([BM], float("-inf"), tl.float32)
        b_sum = tl.zeros([BM, BN] if STREAM_Q else [BM], tl.float32)
        b_out = tl.zeros([BM, BV], tl.float32)
        for i in range(steps):
            p_chunk = p_first + i * STEP
            # Whether a block begins, and whether all its rows see all keys.
            flags = tl.load(p_chunk + FLAGS)
            starts = flags & BEGINS > 0
            # Of the step before, whose block may have ended.
            p_old = p_chunk - STEP
            old_row, old_slot, old_rows = (
                tl.load(p_old + ROW),
                tl.load(p_old + SLOT),
                tl.load(p_old + FLAGS),
            )
            # [BN, BK], [BN, BV]
            m_k = o_t < seen
            if USE_WINDOW:
                m_k = m_k & (o_t >= past)
            b_k = tl.load(
                _tile(p_k, where, o_n, o_k, sk_p, sk_t, P, CHUNK),
                mask=m_k[:, None] & (o_k < K)[None, :],
                other=0.0,
            )
            b_v = tl.load(
                _tile(p_v, where, o_n, o_v, sv_p, sv_t, P, CHUNK),
                mask=m_k[:, None] & (o_v < V)[None, :],
                other=0.0,
            )
            # [BM, BK]
            if STREAM_Q:
                b_q = _load_queries(q, i_r, o_k, i_hq, sq_r, sq_h, K)
            else:
                if starts:
                    i_q = _rows(p_rows, p_chunk, o_r, G)
                    b_q = _load_queries(q, i_q, o_k, i_hq, sq_r, sq_h, K)

            # What a step needs is read a step ahead, the places of the rows' numbers two.
            keys = seen
            i_r = tl.load(p_rows + row + o_r // G, mask=o_r < rows // COUNT * G, other=-1)
            p_next = p_first + tl.minimum(i + 1, steps - 1) * STEP
            where, seen, past = _keys(p_next, o_n, advance, window, CHUNK, USE_WINDOW)
            p_next = p_first + tl.minimum(i + 2, steps - 1) * STEP
            row, rows = tl.load(p_next + ROW), tl.load(p_next + FLAGS)

            # [BM, BN]
            if IS_FLOAT32:
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            else:
                b_s = tl.dot(b_q, tl.trans(b_k))
            if USE_SOFTCAP:
                b_s = b_s * qk_scale
                b_s = (1.0 - 2.0 / (1.0 + tl.exp2(b_s * (2 * LOG2E / softcap)))) * (softcap * LOG2E)
            # The block before is finished here: between the second product and the next step's
            # first, which waits for it, nothing may touch b_out.
            if starts & (i > 0):
                _finish(
                    old_row, old_slot, old_rows, p_rows, o_r, i_hq, b_max,
                    tl.sum(b_sum, 1) if STREAM_Q else b_sum,
                    b_out, out, partial, lse, sinks, H, G, V, USE_SINKS,
                )  # fmt: skip
                b_max = tl.full([BM], float("-inf"), tl.float32)
                b_sum = tl.zeros_like(b_sum)
                b_out = tl.zeros([BM, BV], tl.float32)
            if USE_WINDOW or flags & UNMASKED == 0:
                i_p = _rows(p_rows, p_chunk, o_r, G)
                o_p = tl.load(plan + W + i_p, mask=i_p >= 0, other=0)
                first = _of_chunk(p_chunk, o_n, POSITION, CHUNK) + o_t
                rows_for = _of_chunk(p_chunk, o_n, FOR_ROWS, CHUNK)
                o_q = (o_r // G)[:, None]
                m_s = (o_t < keys)[None, :] & (first[None, :] <= o_p[:, None])
                if rows_for.type.is_block():
                    rows_for = rows_for[None, :]
                m_s = m_s & (o_q >= (rows_for & FIRST_MASK)) & (o_q < (rows_for >> END_BIT))
                if USE_WINDOW:
                    m_s = m_s & (first[None, :] > o_p[:, None] - window)
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

        p_old = p_first + (steps - 1) * STEP
        old_row, old_slot, old_rows = (
            tl.load(p_old + ROW),
            tl.load(p_old + SLOT),
            tl.load(p_old + FLAGS),
        )
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
    merge: bool = True,
) -> torch.Tensor:
    """See `pat_hf.kernels.ops.attention`; on a GPU, or on the CPU under Triton's interpreter."""
    shape = q.shape[0], q.shape[2], q.shape[1], v_pages.shape[3]
    if 0 in shape:
        return q.new_empty(shape)
    call, launches = _planned(q, k_pages, v_pages, plan, scale, window, softcap, sinks, merge)
    run(launches, lambda: _merges(call))
    return call.out


def likely(
    k_pages: torch.Tensor, v_pages: torch.Tensor, query_heads: int, softcap: float | None
) -> list[Launch]:
    """Launches as calls on such pages will have them, see `pat_hf.kernels.ops.compile_ahead`."""
    rows = 129  # of which there may be blocks of any shape
    q = k_pages.new_empty(rows, query_heads, 1, k_pages.shape[-1])
    plan = q.new_empty(1, 1, 2, 64, dtype=torch.int32)
    call, launches = _planned(q, k_pages, v_pages, plan, 1.0, None, softcap, None, merge=False)
    return [*launches, *_merges(call)]


def _planned(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    plan: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    merge: bool,
) -> tuple[_Call, list[Launch]]:
    """A call of `forward`, and what is launched for it."""
    batch, query_heads, length, key_dim = q.shape
    kv_heads, page_size, value_dim = v_pages.shape[1:]
    width = plan.shape[-1]
    heads = Heads(query_heads, kv_heads, key_dim, value_dim, q.element_size())
    processors, major = processors_of(q.device)
    on_hopper = is_hopper(heads, major) and window is None
    q, row_stride = by_rows(q)
    if on_hopper and (q.data_ptr() % 16 or row_stride % 16 or q.stride(1) % 16):
        # They are copied by rows of whole 32 bytes, or Triton refuses.
        q = q.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
        row_stride = q.stride(2)
    k_pages, v_pages = (x if x.stride(-1) == 1 else x.contiguous() for x in (k_pages, v_pages))
    sinks = None if sinks is None else sinks.contiguous()
    out = q.new_empty(batch, length, query_heads, value_dim)
    partial = q.new_empty(width, query_heads, value_dim, dtype=torch.float32)
    lse = q.new_empty(width, query_heads, dtype=torch.float32)
    pdl = q.is_cuda and major >= 9
    call = _Call(
        q, k_pages, v_pages, plan, out, partial, lse, sinks,
        qk_scale=scale if softcap is not None else scale * LOG2E.value,
        softcap=softcap or 0.0, width=width, strides=(row_stride, q.stride(1)),
    )  # fmt: skip
    machine = Machine.gpu(processors, heads, major)
    constants = dict(
        H=kv_heads, G=heads.group, K=key_dim, V=value_dim, P=page_size,
        QUEUES=aligned(len(machine.shapes) * COLUMNS["shapes"]),
        USE_SOFTCAP=softcap is not None, USE_SINKS=sinks is not None,
    )  # fmt: skip
    if on_hopper:
        launches = [_of_hopper(call, machine, processors, constants)]
    else:
        choice = tiles(heads, major)
        launches = _of_tiles(call, machine, choice, processors, constants, window, pdl)
    if merge:
        launches.append(_of_merge(call, call.rows, processors, pdl))
    return call, launches


class _Call(NamedTuple):
    """What the kernels of one call share, see `forward_kernel`; strides of q's rows and heads."""

    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    plan: torch.Tensor
    out: torch.Tensor
    partial: torch.Tensor
    lse: torch.Tensor
    sinks: torch.Tensor | None
    qk_scale: float
    softcap: float
    width: int
    strides: tuple[int, int]

    @property
    def rows(self) -> int:
        """Query rows, of a head."""
        return self.out.shape[0] * self.out.shape[1]

    @property
    def behind_pages(self) -> tuple[Any, ...]:
        """The arguments that follow q, K and V."""
        outputs = self.out, self.partial, self.lse
        return self.plan, *outputs, self.sinks, self.qk_scale, self.softcap, self.width


def _of_hopper(call: _Call, machine: Machine, processors: int, constants: dict[str, Any]) -> Launch:
    k_pages, v_pages = hopper.copyable(call.k_pages), hopper.copyable(call.v_pages)
    sources = [
        hopper.descriptor(pages, tokens)
        for tokens in (machine.chunk(constants["P"]), hopper.PIECE)
        for pages in (k_pages, v_pages)
    ]
    options = constants | dict(
        **hopper.pitches(k_pages, v_pages),
        BN=machine.shapes[-1].tokens, STAGES=hopper.STAGES, num_warps=4,
        maxnreg=hopper.REGISTERS[0], REGISTERS=hopper.REGISTERS[1],
    )  # fmt: skip
    span = 1 + sum((n - 1) * step for n, step in zip(call.q.shape, call.q.stride(), strict=True))
    sizes = call.plan.numel(), min(span, 1 << 30)
    arguments = (call.q, *sources, *call.behind_pages, *sizes, *call.strides)
    return Launch(hopper.hopper_kernel, (processors,), arguments, options)


def _of_tiles(
    call: _Call,
    machine: Machine,
    choice: Sequence[Tile],
    processors: int,
    constants: dict[str, Any],
    window: int | None,
    pdl: bool,
) -> list[Launch]:
    """A launch for each shape, the widest first."""
    constants = constants | dict(
        **{f"s{name}_{d}": x.stride(i) for name, x in (("k", call.k_pages), ("v", call.v_pages))
           for i, d in enumerate("pht")},
        # A product takes 16 at least.
        BK=max(triton.next_power_of_2(constants["K"]), 16),
        BV=max(triton.next_power_of_2(constants["V"]), 16),
        CHUNK=machine.chunk(constants["P"]), USE_WINDOW=window is not None,
        IS_FLOAT32=call.q.dtype == torch.float32, USE_PDL=pdl,
    )  # fmt: skip
    pages = call.k_pages, call.v_pages
    arguments = (call.q, *pages, *call.behind_pages, *call.strides, window or 0)
    launches = []
    for i, tile in reversed(list(enumerate(choice))):
        # No block has more rows than the batch.
        if i and call.rows * constants["G"] <= machine.shapes[i - 1].rows:
            continue
        options = constants | dict(
            SHAPE=i, ROWS=machine.shapes[i].rows, BM=tile.m, BN=tile.n, STREAM_Q=tile.stream_q,
            num_warps=tile.warps, num_stages=tile.stages,
            **({"launch_pdl": bool(launches)} if pdl else {}),
        )  # fmt: skip
        grid = (processors * tile.per_sm,)
        launches.append(Launch(forward_kernel, grid, arguments, options))
    return launches


def _of_merge(call: _Call, rows: int, processors: int, pdl: bool) -> Launch:
    query_heads, value_dim = call.out.shape[2:]
    value_block = triton.next_power_of_2(value_dim)
    # Few rows are spread over the machine by heads.
    each = -(-rows * query_heads // processors)
    many = min(query_heads, max(1024 // value_block, 1), -(-each // MERGE_WARPS))
    many, at_once = triton.next_power_of_2(many), 4
    if MERGE_WARPS // 2 < each <= MERGE_WARPS and value_block <= 128:
        # Programs of one warp would pile up on the processors that the forward leaves first.
        many, at_once = min(4, triton.next_power_of_2(query_heads)), 16
    options = dict(
        HQ=query_heads, V=value_dim, N=at_once, BH=many, BV=value_block,
        USE_SINKS=call.sinks is not None, USE_PDL=pdl,
        # More programs of one warp than of four start beside Hopper's blocks.
        num_warps=4 if many * value_block > 128 else 1, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    arguments = call.plan, call.partial, call.lse, call.out, call.sinks
    return Launch(merge_kernel, (rows, triton.cdiv(query_heads, many)), arguments, options)


def _merges(call: _Call) -> list[Launch]:
    """Of many rows, of few and of one, as a prefill, its last layer and decode steps have them."""
    processors, major = processors_of(call.q.device)
    few = max(MERGE_WARPS * processors // call.out.shape[2], 1)
    return [_of_merge(call, rows, processors, major >= 9) for rows in (1 << 16, few, 1)]
