"""The forward for Hopper's matrix units and its copy engine, of 16-bit K and V of dims up to 128.

What `forward.py` does, for layers without windows, in one kernel for all shapes: a program fills a
multiprocessor, and its warps have parts. Two of them copy chunks of keys and of values, by TMA, as
soon as there is room. Two groups of four compute: each has half of a block's rows, or every other
step of a block of up to 64, whose results are added up in shared memory. While a group's matrix
products with the values run, its weights for the next step are computed.
"""

from __future__ import annotations

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.6 has other names for them.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

STAGES = 4  # steps whose keys, and values, are held or under way; even, for groups to share them
# A thread's: at the start, and of those that compute. The merge's programs start in what is left.
REGISTERS = 152, 216
TILE = gl.NVMMASharedLayout(128, 16, 2)  # of 64 columns, that are copied at once
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # of 64 columns, in memory


def by_rows(pages: torch.Tensor) -> torch.Tensor:
    """Pages that the copy engine can take for rows [any, dim], evenly apart; copied if need be."""
    dim = pages.shape[-1]
    even = pages.stride()[2:] == (dim, 1) and not any(step % dim for step in pages.stride()[:2])
    if even and pages.data_ptr() % 16 == 0:
        return pages
    return pages.clone(memory_format=torch.contiguous_format)


def descriptor(pages: torch.Tensor, chunk: int) -> TensorDescriptor:
    """What the copy engine takes for pages [pages, KV heads, page size, dim], see `by_rows`.

    Rows that are not there yet count, too: a pool may grow behind a captured graph.
    """
    dim = pages.shape[-1]
    return TensorDescriptor(pages, [(1 << 31) - 1, dim], [dim, 1], [chunk, 64], TILE)


def pitches(k_pages: torch.Tensor, v_pages: torch.Tensor) -> dict[str, int]:
    """Rows of [any, dim] from a page, and from a head, to the next."""
    return {
        f"{name}{step}": pages.stride(i) // pages.shape[-1]
        for name, pages in (("K", k_pages), ("V", v_pages))
        for i, step in enumerate("PH")
    }


@gluon.jit
def _touch(p):
    """Has what lies at p on its way."""
    gl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.b32 $0, 0;", "=r,l", [p], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def _produce(
    desc,
    tiles,
    ready,
    free,
    plan,
    W,
    H: gl.constexpr,
    P: gl.constexpr,
    PAGE: gl.constexpr,
    HEAD: gl.constexpr,
    LANES: gl.constexpr,
    COLUMNS: gl.constexpr,
):
    """Copies keys, or values, of the program's lanes."""
    CHUNK: gl.constexpr = desc.block_type.shape[0]
    CHUNKS: gl.constexpr = tiles.shape[1] // CHUNK
    STAGES: gl.constexpr = ready.shape[0]
    PARTS: gl.constexpr = tiles.shape[0] // STAGES
    BYTES: gl.constexpr = PARTS * tiles.shape[1] * 64 * 2
    p_lanes = plan + 2 * W + LANES
    p_chunks = plan + gl.load(plan + 8)
    lanes = gl.load(plan + 7) // 4 - 1
    n = 0
    for i_j in range(gl.program_id(0), lanes * H, gl.num_programs(0)):
        i_h = i_j % H
        p_lane = p_lanes + i_j // H * 4
        for i_c in range(gl.load(p_lane), gl.load(p_lane + 4), CHUNKS):
            p_chunk = p_chunks + i_c * COLUMNS
            stage = n % STAGES
            bar = ready.index(stage)
            mbarrier.wait(free.index(stage), (n // STAGES & 1) ^ 1)
            mbarrier.expect(bar, BYTES)
            for c in gl.static_range(CHUNKS):
                where = gl.load(p_chunk + c * COLUMNS)
                row = where // P * PAGE + i_h * HEAD + where % P
                for part in gl.static_range(PARTS):
                    to = tiles.index(stage * PARTS + part).slice(c * CHUNK, CHUNK)
                    async_load(desc, [row, part * 64], bar, to)
            n += 1


@gluon.jit
def _load_queries(
    q,
    q_tile,
    p_rows,
    count,
    first,
    i_h,
    sq_r,
    sq_h,
    G: gl.constexpr,
    K: gl.constexpr,
):
    """A block's queries, from row `first` of `count` on."""
    o_r = first + gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
    o_k = gl.arange(0, 64, layout=gl.SliceLayout(0, ROWS))
    m_r = o_r < count
    i_r = gl.load(p_rows + o_r // G, mask=m_r, other=0)
    p_q = q + (i_r.to(gl.int64) * sq_r + (i_h * G + o_r % G).to(gl.int64) * sq_h)
    for part in gl.static_range((K + 63) // 64):
        m_q = m_r[:, None] & (part * 64 + o_k < K)[None, :]
        b_q = gl.load(p_q[:, None] + (part * 64 + o_k)[None, :], mask=m_q, other=0.0)
        q_tile.index(part).store(b_q)
    fence_async_shared()


@gluon.jit
def _scores(q_tile, k_tiles, stage, PARTS: gl.constexpr, S: gl.constexpr):
    """Starts Q K^T, [64, BN]."""
    zeros = gl.full([64, k_tiles.shape[1]], 0.0, gl.float32, S)
    keys = k_tiles.index(stage * PARTS).permute((1, 0))
    acc = warpgroup_mma(q_tile.index(0), keys, zeros, use_acc=False, is_async=True)
    for part in gl.static_range(1, PARTS):
        keys = k_tiles.index(stage * PARTS + part).permute((1, 0))
        acc = warpgroup_mma(q_tile.index(part), keys, acc, is_async=True)
    return acc


@gluon.jit
def _add_values(weights, v_tiles, stage, b_left, b_right, PARTS: gl.constexpr):
    """Starts adding P V, [64, 64] for each 64 columns."""
    b_left = warpgroup_mma(weights, v_tiles.index(stage * PARTS), b_left, is_async=True)
    if PARTS > 1:
        b_right = warpgroup_mma(weights, v_tiles.index(stage * PARTS + 1), b_right, is_async=True)
    return b_left, b_right


@gluon.jit
def _wait_for_values(b_left, b_right, PARTS: gl.constexpr):
    if PARTS > 1:
        b_left, b_right = warpgroup_mma_wait(0, [b_left, b_right])
    else:
        b_left = warpgroup_mma_wait(0, [b_left])
    return b_left, b_right


@gluon.jit
def _release(bar, wide):
    """A stage is free once both groups are through with it, or the one whose step it is."""
    barrier()
    if wide > 0:
        mbarrier.arrive(bar, count=1)
    else:
        mbarrier.arrive(bar, count=2)


@gluon.jit
def _bounds(p_chunk, CHUNKS: gl.constexpr, COLUMNS: gl.constexpr):
    """What bounds each chunk of a step: its tokens, the first's position, the rows it is for."""
    bounds = ()
    for c in gl.static_range(CHUNKS):
        p_c = p_chunk + c * COLUMNS
        bounds = bounds + (gl.load(p_c + 1), gl.load(p_c + 2), gl.load(p_c + 5))
    return bounds


@gluon.jit
def _weights(
    b_s,
    b_max,
    b_sum,
    flags,
    bounds,
    o_q,
    o_p,
    o_n,
    qk_scale,
    softcap,
    S: gl.constexpr,
    CHUNK: gl.constexpr,
    USE_SOFTCAP: gl.constexpr,
):
    """The softmax's next step: the weights [64, BN], the rows' new maximum, base 2, and sum, and by
    what the results so far are to be multiplied. The rows are of queries o_q, at positions o_p."""
    c_scale = 1.0 if USE_SOFTCAP else qk_scale
    if USE_SOFTCAP:
        b_s = b_s * qk_scale
        b_s = (1.0 - 2.0 / (1.0 + gl.exp2(b_s * (2.8853900817779268 / softcap)))) * (
            softcap * 1.4426950408889634
        )
    if flags & 2 == 0:
        # Of each chunk a row sees the first tokens: one bound takes in all there is to mind.
        b_end = gl.full([64, 1], 0, gl.int32, S)
        for c in gl.static_range(o_n.shape[0] // CHUNK):
            tokens, start, rows = bounds[3 * c], bounds[3 * c + 1], bounds[3 * c + 2]
            r_end = gl.minimum(tokens, o_p - start + 1) + c * CHUNK
            r_end = gl.where((o_q >= (rows & 65535)) & (o_q < (rows >> 16)), r_end, 0)
            b_end = gl.where((o_n >= c * CHUNK)[None, :], r_end[:, None], b_end)
        m_s = o_n[None, :] < b_end
        b_s = gl.where(m_s, b_s, float("-inf"))
    b_new = gl.maximum(b_max, gl.max(b_s, 1) * c_scale)
    b_ref = gl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = gl.exp2(b_s * c_scale - b_ref[:, None])
    b_old = gl.exp2(b_max - b_ref)
    return b_p, b_new, b_sum * b_old + gl.sum(b_p, 1), b_old


@gluon.jit
def _clear_unread(
    v_tiles,
    stage,
    p_chunk,
    advance,
    PARTS: gl.constexpr,
    CHUNK: gl.constexpr,
    COLUMNS: gl.constexpr,
):
    """Values that no row sees may be anything, and 0 * NaN is NaN."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    o_n = gl.arange(0, v_tiles.shape[1], layout=gl.SliceLayout(1, LAYOUT))
    p_n = p_chunk + o_n // CHUNK * COLUMNS
    seen = gl.minimum(gl.load(p_n + 3) + advance, gl.load(p_n + 1))
    for part in gl.static_range(PARTS):
        tile = v_tiles.index(stage * PARTS + part)
        b_v = tile.load(LAYOUT)
        tile.store(gl.where((o_n % CHUNK < seen)[:, None], b_v, 0.0))
    fence_async_shared()
    barrier()


@gluon.jit
def _store(tile, p, i_p, m_r, b_x, first: gl.constexpr, V: gl.constexpr):
    """Stores b_x [64, 64] as columns `first`.. of rows i_p of [.., V], lines written whole.

    By way of `tile`: Triton's own memory for changes of layout would be the same for both groups.
    """
    tile.store(b_x)
    barrier()
    b_x = tile.load(ROWS)
    barrier()
    o_v = first + gl.arange(0, 64, layout=gl.SliceLayout(0, ROWS))
    m_x = m_r[:, None] & (o_v < V)[None, :]
    gl.store(p + i_p[:, None] * V + o_v[None, :], b_x, mask=m_x)


@gluon.jit
def _consume(
    GROUP: gl.constexpr,
    q,
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
    q_tile,
    k_tiles,
    v_tiles,
    k_ready,
    k_free,
    v_ready,
    v_free,
    other_out,
    other_sums,
    sent,
    taken,
    H: gl.constexpr,
    G: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    CHUNK: gl.constexpr,
    LANES: gl.constexpr,
    COLUMNS: gl.constexpr,
    USE_SOFTCAP: gl.constexpr,
    USE_SINKS: gl.constexpr,
):
    """One of the two groups that compute."""
    DTYPE: gl.constexpr = q.dtype.element_ty
    BN: gl.constexpr = k_tiles.shape[1]
    STAGES: gl.constexpr = k_ready.shape[0]
    K_PARTS: gl.constexpr = k_tiles.shape[0] // STAGES
    V_PARTS: gl.constexpr = v_tiles.shape[0] // STAGES
    CHUNKS: gl.constexpr = BN // CHUNK
    STEP: gl.constexpr = CHUNKS * COLUMNS
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    o_m = gl.arange(0, 64, layout=S_ROWS)
    o_n = gl.arange(0, BN, layout=gl.SliceLayout(0, S))
    o_f = gl.arange(0, 64, layout=O_ROWS)

    p_lanes = plan + 2 * W + LANES
    p_chunks = plan + gl.load(plan + 8)
    p_blocks = plan + gl.load(plan + 10)
    p_all_rows = plan + gl.load(plan + 12)
    advance = gl.load(plan + W) - gl.load(plan + 3)
    lanes = gl.load(plan + 7) // 4 - 1
    n = 0  # steps of this program so far
    split = 0  # blocks of which the groups had different steps
    for i_j in range(gl.program_id(0), lanes * H, gl.num_programs(0)):
        i_h = i_j % H
        p_lane = p_lanes + i_j // H * 4
        next_begin = gl.load(p_lane)
        next_row, next_end = gl.load(p_lane + 2), gl.load(p_lane + 3)
        for i_b in range(gl.load(p_lane + 1), gl.load(p_lane + 5)):
            row, begin = next_row, next_begin
            count = (next_end - row) * G
            slot = gl.load(p_chunks + begin * COLUMNS + 7)
            # Of the last block of all it is another table that is read, to no end.
            p_block = p_blocks + i_b * 4
            next_begin = gl.load(p_block + 3)
            next_row, next_end = gl.load(p_block + 4), gl.load(p_block + 5)
            steps = (next_begin - begin) // CHUNKS
            wide = (count > 64).to(gl.int32)
            first = wide * (64 * GROUP)
            mine = (1 - wide) * GROUP  # the first of this group's steps, and from one to the next
            stride = 2 - wide
            p_rows = p_all_rows + row
            o_q = (first + o_m) // G
            i_q = gl.load(p_rows + o_q, mask=first + o_m < count, other=0)
            b_max = gl.full([64], float("-inf"), gl.float32, S_ROWS)
            b_sum = gl.full([64], 0.0, gl.float32, S_ROWS)
            b_left = gl.full([64, 64], 0.0, gl.float32, OUT)
            b_right = gl.full([64, 64], 0.0, gl.float32, OUT)
            if mine < steps:
                at = n + mine
                p_chunk = p_chunks + begin * COLUMNS + mine * STEP
                flags, bounds = gl.load(p_chunk + 8), _bounds(p_chunk, CHUNKS, COLUMNS)
                o_p = gl.load(plan + W + i_q)
                _load_queries(q, q_tile, p_rows, count, first, i_h, sq_r, sq_h, G, K)
                barrier()
                mbarrier.wait(k_ready.index(at % STAGES), at // STAGES & 1)
                b_s = warpgroup_mma_wait(0, [_scores(q_tile, k_tiles, at % STAGES, K_PARTS, S)])
                _release(k_free.index(at % STAGES), wide)
                b_p, b_max, b_sum, b_old = _weights(
                    b_s, b_max, b_sum, flags, bounds, o_q, o_p, o_n, qk_scale, softcap,
                    S, CHUNK, USE_SOFTCAP,
                )  # fmt: skip
                weights = gl.convert_layout(b_p.to(DTYPE), WEIGHTS)
                mbarrier.wait(v_ready.index(at % STAGES), at // STAGES & 1)
                for _ in range(mine + stride, steps, stride):
                    stage = at % STAGES
                    ahead = at + stride
                    unread = flags & 4 == 0
                    flags = gl.load(p_chunk + stride * STEP + 8)
                    bounds = _bounds(p_chunk + stride * STEP, CHUNKS, COLUMNS)
                    if unread:
                        _clear_unread(v_tiles, stage, p_chunk, advance, V_PARTS, CHUNK, COLUMNS)
                    p_chunk += stride * STEP
                    mbarrier.wait(k_ready.index(ahead % STAGES), ahead // STAGES & 1)
                    next_s = _scores(q_tile, k_tiles, ahead % STAGES, K_PARTS, S)
                    left, right = _add_values(weights, v_tiles, stage, b_left, b_right, V_PARTS)
                    b_s = warpgroup_mma_wait(V_PARTS, [next_s])
                    _release(k_free.index(ahead % STAGES), wide)
                    b_p, b_max, b_sum, b_old = _weights(
                        b_s, b_max, b_sum, flags, bounds, o_q, o_p, o_n, qk_scale, softcap,
                        S, CHUNK, USE_SOFTCAP,
                    )  # fmt: skip
                    o_old = gl.convert_layout(b_old, O_ROWS)[:, None]
                    # Not later: the loop in this keeps the compiler from waiting for the products
                    # before it has the weights computed.
                    mbarrier.wait(v_ready.index(ahead % STAGES), ahead // STAGES & 1)
                    b_left, b_right = _wait_for_values(left, right, V_PARTS)
                    b_left = b_left * o_old
                    if V_PARTS > 1:
                        b_right = b_right * o_old
                    _release(v_free.index(stage), wide)
                    weights = gl.convert_layout(b_p.to(DTYPE), WEIGHTS)
                    at = ahead
                stage = at % STAGES
                if flags & 4 == 0:
                    _clear_unread(v_tiles, stage, p_chunk, advance, V_PARTS, CHUNK, COLUMNS)
                left, right = _add_values(weights, v_tiles, stage, b_left, b_right, V_PARTS)
                b_left, b_right = _wait_for_values(left, right, V_PARTS)
                _release(v_free.index(stage), wide)
            n += steps

            f_max = gl.convert_layout(b_max, O_ROWS)
            f_sum = gl.convert_layout(b_sum, O_ROWS)
            if wide == 0:
                # Each waits for the other: parities tell a step from the one before it only.
                if GROUP == 1:
                    if steps > 1:
                        other_sums.index(0).store(f_max)
                        other_sums.index(1).store(f_sum)
                        other_out.index(0).store(b_left)
                        if V_PARTS > 1:
                            other_out.index(1).store(b_right)
                    barrier()
                    mbarrier.arrive(sent.index(0), count=1)
                    mbarrier.wait(taken.index(0), split & 1)
                else:
                    mbarrier.wait(sent.index(0), split & 1)
                    if steps > 1:
                        o_max = other_sums.index(0).load(O_ROWS)
                        f_top = gl.maximum(f_max, o_max)
                        f_ref = gl.where(f_top == float("-inf"), 0.0, f_top)
                        f_old, o_old = gl.exp2(f_max - f_ref), gl.exp2(o_max - f_ref)
                        f_max = f_top
                        f_sum = f_sum * f_old + other_sums.index(1).load(O_ROWS) * o_old
                        b_left = b_left * f_old[:, None]
                        b_left += other_out.index(0).load(OUT) * o_old[:, None]
                        if V_PARTS > 1:
                            b_right = b_right * f_old[:, None]
                            b_right += other_out.index(1).load(OUT) * o_old[:, None]
                    barrier()
                    mbarrier.arrive(taken.index(0), count=1)
                split += 1
            if (wide > 0) | (GROUP == 0):
                o_b = first + o_f
                m_f = o_b < count
                if slot >= 0:
                    i_p = (slot + o_b // G).to(gl.int64) * (H * G) + i_h * G + o_b % G
                    gl.store(lse + i_p, f_max + gl.log2(f_sum), mask=m_f)
                    f_scale = (1.0 / gl.where(f_sum == 0.0, 1.0, f_sum))[:, None]
                    b_left, b_right = b_left * f_scale, b_right * f_scale
                    o_v = gl.arange(0, 64, layout=gl.SliceLayout(0, OUT))
                    p_x = partial + i_p[:, None] * V + o_v[None, :]
                    m_x = m_f[:, None] & (o_v < V)[None, :]
                    gl.store(p_x, b_left, mask=m_x, eviction_policy="evict_last")
                    if V_PARTS > 1:
                        m_x = m_f[:, None] & (64 + o_v < V)[None, :]
                        gl.store(p_x + 64, b_right, mask=m_x, eviction_policy="evict_last")
                else:
                    if USE_SINKS:
                        p_sink = sinks + i_h * G + o_b % G
                        b_sink = gl.load(p_sink, mask=m_f, other=0.0).to(gl.float32)
                        b_sink = b_sink * 1.4426950408889634
                        f_top = gl.maximum(f_max, b_sink)
                        f_old = gl.exp2(f_max - f_top)
                        f_scale = f_old / (f_sum * f_old + gl.exp2(b_sink - f_top))
                    else:
                        f_scale = 1.0 / gl.where(f_sum == 0.0, 1.0, f_sum)
                    f_scale = f_scale[:, None]
                    o_x = first + gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
                    i_r = gl.load(p_rows + o_x // G, mask=o_x < count, other=0)
                    i_o = i_r.to(gl.int64) * (H * G) + i_h * G + o_x % G
                    # The queries are through.
                    tile = q_tile.index(0)
                    _store(tile, out, i_o, o_x < count, (b_left * f_scale).to(DTYPE), 0, V)
                    if V_PARTS > 1:
                        o_right = (b_right * f_scale).to(DTYPE)
                        _store(tile, out, i_o, o_x < count, o_right, 64, V)


@gluon.jit
def hopper_kernel(
    q,
    k_desc,
    v_desc,
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
    H: gl.constexpr,
    G: gl.constexpr,
    KP: gl.constexpr,
    KH: gl.constexpr,
    VP: gl.constexpr,
    VH: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    P: gl.constexpr,
    LANES: gl.constexpr,
    COLUMNS: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    USE_SOFTCAP: gl.constexpr,
    USE_SINKS: gl.constexpr,
):
    """Lanes of all shapes; as `forward_kernel`, but for

    Args:
        k_desc, v_desc: of K and V as [any, K or V], in boxes of a chunk's rows and 64 columns.
        KP, KH, VP, VH: rows of these from a page, or a head, to the next.
    """
    tl.extra.cuda.gdc_launch_dependents()
    # What all warps are going to read first is on its way while the barriers are made.
    _touch(plan)
    _touch(plan + W)
    _touch(plan + 2 * W + LANES + gl.program_id(0) // H * 4)
    DTYPE: gl.constexpr = q.dtype.element_ty
    CHUNK: gl.constexpr = k_desc.block_type.shape[0]
    K_PARTS: gl.constexpr = (K + 63) // 64
    V_PARTS: gl.constexpr = (V + 63) // 64
    LAYOUT: gl.constexpr = k_desc.layout
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    q_left = gl.allocate_shared_memory(DTYPE, [K_PARTS, 64, 64], LAYOUT)
    q_right = gl.allocate_shared_memory(DTYPE, [K_PARTS, 64, 64], LAYOUT)
    k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES * K_PARTS, BN, 64], LAYOUT)
    v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES * V_PARTS, BN, 64], LAYOUT)
    other_out = gl.allocate_shared_memory(
        gl.float32, [V_PARTS, 64, 64], gl.NVMMASharedLayout(128, 32, 2)
    )
    other_sums = gl.allocate_shared_memory(
        gl.float32, [2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    sent = gl.allocate_shared_memory(gl.int64, [1, 1], BAR)
    taken = gl.allocate_shared_memory(gl.int64, [1, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    mbarrier.init(sent.index(0), count=1)
    mbarrier.init(taken.index(0), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0, q, plan, out, partial, lse, sinks, qk_scale, softcap, W, sq_r, sq_h,
                    q_left, k_tiles, v_tiles, k_ready, k_free, v_ready, v_free,
                    other_out, other_sums, sent, taken,
                    H, G, K, V, CHUNK, LANES, COLUMNS, USE_SOFTCAP, USE_SINKS,
                ),
            ),
            (
                _consume,
                (
                    1, q, plan, out, partial, lse, sinks, qk_scale, softcap, W, sq_r, sq_h,
                    q_right, k_tiles, v_tiles, k_ready, k_free, v_ready, v_free,
                    other_out, other_sums, sent, taken,
                    H, G, K, V, CHUNK, LANES, COLUMNS, USE_SOFTCAP, USE_SINKS,
                ),
            ),
            (
                _produce,
                (k_desc, k_tiles, k_ready, k_free, plan, W, H, P, KP, KH, LANES, COLUMNS),
            ),
            (
                _produce,
                (v_desc, v_tiles, v_ready, v_free, plan, W, H, P, VP, VH, LANES, COLUMNS),
            ),
        ],
        [4, 1, 1],
        [REGISTERS, 24, 24],
    )  # fmt: skip
