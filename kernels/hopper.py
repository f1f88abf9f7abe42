"""The forward for Hopper's matrix units and its copy engine, of 16-bit K and V of dims up to 128.

What `forward.py` does, for layers without windows, in one kernel for all shapes: a program fills a
multiprocessor, and its warps have parts. Two of them copy chunks of keys and of values, by TMA, as
soon as there is room, and of what is seen in part that part; two more the queries of the blocks to
come. Two groups of four compute: each has half of a block's rows, and of its steps all that are for
them; or every other step of a block of up to 64 rows, whose results are added up in shared memory;
short ones of these they take in turn. While a group's matrix products with the values run, its
weights for the next step are computed.

If a plan has more queues than there are programs, a program that is through with one claims the
next: the one of its warps that copies keys does, and tells the others.
"""

from __future__ import annotations

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pat_hf.kernels.constants import (
    BLOCK_COLUMNS,
    BLOCK_END_CHUNK,
    BLOCK_END_ROW,
    BLOCK_PAIRED,
    BLOCK_ROW,
    BLOCKS_AT,
    CHUNK_COLUMNS,
    CHUNKS_AT,
    CLAIMS,
    END_BIT,
    FIRST_MASK,
    FLAGS,
    FOR_ROWS,
    FURTHEST,
    LOG2E,
    ORIGIN,
    PAIR_NEXT,
    PAIRED,
    POSITION,
    QUEUE_BLOCK,
    QUEUE_CHUNK,
    QUEUE_COLUMNS,
    QUEUE_END_ROW,
    QUEUE_PAIRED,
    QUEUE_ROW,
    QUEUES_SIZE,
    ROWS_AT,
    SEEN,
    SLOT,
    TOKENS,
    UNMASKED,
)

# Triton 3.6 has other names for them.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_rows = getattr(async_copy, "async_load", async_copy.async_copy_global_to_shared)
memory = gl.shared_memory_descriptor
reinterpret = memory.reinterpret if hasattr(memory, "reinterpret") else memory._reinterpret

# Steps whose keys, and values, are held or under way. A group holds the values of its last step
# until it has those of its next, which may be two on.
STAGES = 4
ALONE = gl.constexpr(2)  # steps up to which a block of few rows is one group's
PIECE = 8  # tokens, in which chunks are copied that are not seen whole: rows of a swizzled tile
AHEAD = gl.constexpr(8)  # steps by which a loader has the plan fetched
# Registers of a thread: at the launch, and of the two groups that compute; the warps that copy have
# 24 to 40. The merge's programs start in what is left of a multiprocessor's.
REGISTERS = 152, 208
TILE = gl.NVMMASharedLayout(128, 16, 2)  # of 64 columns, that are copied at once
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # of 64 columns, in memory
# The same of 32 words: to choose among those takes a quarter of the instructions.
WORDS = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))
WORD_ROWS = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0]))
# Two sums a row, as the threads have them that hold a row's weights.
SUMS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0]], [[0, 0], [0, 1], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 2]
    )
)


def copyable(pages: torch.Tensor) -> torch.Tensor:
    """Pages that the copy engine can take for rows [any, dim], evenly apart; copied if need be."""
    dim = pages.shape[-1]
    even = pages.stride()[2:] == (dim, 1) and not any(step % dim for step in pages.stride()[:2])
    if even and pages.data_ptr() % 16 == 0:
        return pages
    return pages.clone(memory_format=torch.contiguous_format)


def descriptor(pages: torch.Tensor, tokens: int) -> TensorDescriptor:
    """What the copy engine takes for pages [pages, KV heads, page size, dim], see `copyable`, to
    copy so many tokens at once.

    Rows that are not there yet count, too: a pool may grow behind a captured graph.
    """
    dim = pages.shape[-1]
    return TensorDescriptor(pages, [(1 << 31) - 1, dim], [dim, 1], [tokens, 64], TILE)


def pitches(k_pages: torch.Tensor, v_pages: torch.Tensor) -> dict[str, int]:
    """Rows of [any, dim] from a page, and from a head, to the next."""
    return {
        f"{name}{step}": pages.stride(i) // pages.shape[-1]
        for name, pages in (("K", k_pages), ("V", v_pages))
        for i, step in enumerate("PH")
    }


@gluon.jit
def _prefetch(p):
    """Has the cache line at p fetched."""
    gl.inline_asm_elementwise(
        "prefetch.global.L1 [$1]; mov.b32 $0, 0;", "=r,l", [p], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def _wait(bars, n, flip: gl.constexpr = 0):
    """Waits for the n-th step at its stage's barrier; flipped, for the one before in that stage."""
    STAGES: gl.constexpr = bars.shape[0]
    gl.static_assert(STAGES == 4)
    mbarrier.wait(bars.index(n & 3), (n >> 2 & 1) ^ flip)


@gluon.jit
def _count(p, last):
    """The number at p, to which a warp adds 1; if it is `last`, that becomes 0."""
    return gl.inline_asm_elementwise(
        """{
            .reg .pred %first;
            .reg .b32 %lane;
            mov.b32 $0, 0;
            mov.u32 %lane, %laneid;
            setp.eq.u32 %first, %lane, 0;
            @%first atom.relaxed.gpu.global.inc.u32 $0, [$1], $2;
            shfl.sync.idx.b32 $0, $0, 0, 31, 0xffffffff;
        }""",
        "=&r,l,r", [p, last], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _first_ticket(plan, H: gl.constexpr):
    """A program's first ticket, and how many queues there are, of all heads.

    A ticket is the number of a queue, of one head, times two; plus 1 for a program's second queue,
    its fourth, ..; below 0: there are no more.
    """
    queues = (gl.load(plan + QUEUES_SIZE) // QUEUE_COLUMNS - 1) * H
    return gl.where(gl.program_id(0) < queues, gl.program_id(0) * 2, -1), queues


@gluon.jit
def _claim(claims, ticket, plan, queues):
    """Claims the ticket behind this one, for all parts of the program."""
    number, full, empty = claims
    i_j = queues
    if queues > gl.num_programs(0):
        # All claims but one of each program find a queue: there are `queues`, and the count is 0.
        i_j = gl.num_programs(0) + _count(plan + CLAIMS, queues - 1)
    behind = gl.where(i_j < queues, i_j * 2 + (ticket & 1 ^ 1), -1)
    mbarrier.wait(empty.index(0), ticket & 1 ^ 1)
    number.store(gl.full([32], behind, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    barrier()
    mbarrier.arrive(full.index(0), count=1)
    return behind


@gluon.jit
def _next_ticket(claims, ticket, WARPS: gl.constexpr):
    """The ticket behind this one, as the part that claims them tells one of so many warps."""
    number, full, empty = claims
    mbarrier.wait(full.index(0), ticket & 1)
    behind = gl.max(number.load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)
    barrier()
    mbarrier.arrive(empty.index(0), count=1)
    return behind


@gluon.jit
def _places(p_chunks, i_c, advance, CHUNKS: gl.constexpr):
    """Where each chunk of a step lies, from chunk i_c on, and how many of its tokens any row sees;
    and the step's flags."""
    places = ()
    for c in gl.static_range(CHUNKS):
        p_c = p_chunks + (i_c + c) * CHUNK_COLUMNS
        seen = gl.minimum(gl.load(p_c + FURTHEST) + advance, gl.load(p_c + TOKENS))
        places = places + (gl.load(p_c), seen)
    return places + (gl.load(p_chunks + i_c * CHUNK_COLUMNS + FLAGS),)


@gluon.jit
def _copy_chunk(desc, pieces, row, seen, bar, to):
    """Starts to copy the first tokens of a chunk, `seen` of them at least, from a row on."""
    CHUNK: gl.constexpr = desc.block_type.shape[0]
    PIECE: gl.constexpr = pieces.block_type.shape[0]
    BYTES: gl.constexpr = to.shape[1] * 2
    PARTS: gl.constexpr = to.shape[1] // 64
    if seen > CHUNK - PIECE:
        mbarrier.expect(bar, CHUNK * BYTES)
        for part in gl.static_range(PARTS):
            async_load(desc, [row, part * 64], bar, to.slice(part * 64, 64, dim=1))
    else:
        count = (gl.maximum(seen, 0) + PIECE - 1) // PIECE
        for i in gl.static_range(CHUNK // PIECE):
            mbarrier.expect(bar, i * PIECE * BYTES, pred=count == i)
        for i in gl.static_range(CHUNK // PIECE - 1):
            if i < count:
                piece = to.slice(i * PIECE, PIECE)
                for part in gl.static_range(PARTS):
                    where = [row + i * PIECE, part * 64]
                    async_load(pieces, where, bar, piece.slice(part * 64, 64, dim=1))


@gluon.jit
def _load_kv(
    desc,
    pieces,
    pipe,
    asked,
    claims,
    plan,
    W,
    H: gl.constexpr,
    P: gl.constexpr,
    PAGE: gl.constexpr,
    HEAD: gl.constexpr,
    QUEUES: gl.constexpr,
    LEADS: gl.constexpr,
):
    """Copies keys, or values, of the program's queues into a pipe: tiles, full, empty barriers.

    What no row sees is left as it was. The one that leads claims the queues.
    """
    tiles, full, empty = pipe
    CHUNK: gl.constexpr = desc.block_type.shape[0]
    CHUNKS: gl.constexpr = tiles.shape[1] // CHUNK
    STAGES: gl.constexpr = tiles.shape[0]
    p_queues = plan + 2 * W + QUEUES
    p_chunks = plan + gl.load(plan + CHUNKS_AT)
    advance = gl.load(plan + W) - gl.load(plan + ORIGIN)
    n = 0
    before, last = 0, 0  # flags of the steps n - 2 and n - 1
    ticket, queues = _first_ticket(plan, H)
    while ticket >= 0:
        i_j = ticket // 2
        i_h = i_j % H
        p_queue = p_queues + i_j // H * QUEUE_COLUMNS
        begin = gl.load(p_queue + QUEUE_CHUNK)
        end = gl.load(p_queue + QUEUE_COLUMNS + QUEUE_CHUNK)
        next_places = _places(p_chunks, begin, advance, CHUNKS)
        for i_c in range(begin, end, CHUNKS):
            # To read places takes about as long as to compute a step: the next ones are read while
            # this step waits for room; the last step reads its own again.
            places, next_places = (
                next_places,
                _places(p_chunks, gl.minimum(i_c + CHUNKS, end - CHUNKS), advance, CHUNKS),
            )
            # Where much is read, copies would wait for those loads else.
            _prefetch(p_chunks + gl.minimum(i_c + AHEAD * CHUNKS, end - 1) * CHUNK_COLUMNS)
            if n == 1:
                # Behind several steps' keys and values, the queries would be late for the first.
                mbarrier.wait(asked.index(0), 0)
            if before & PAIRED > 0:
                # One group passes by that step, but by no two in a row: it sees n or n + 1 before
                # it asks for n + 2. By parity, that would seem to have come while n - 2 has not.
                _wait(full, n - 2)
            before, last = last, places[2 * CHUNKS]
            stage = n & (STAGES - 1)
            _wait(empty, n, 1)
            for c in gl.static_range(CHUNKS):
                place, seen = places[2 * c], places[2 * c + 1]
                row = place // P * PAGE + i_h * HEAD + place % P
                to = tiles.index(stage).slice(c * CHUNK, CHUNK)
                _copy_chunk(desc, pieces, row, seen, full.index(stage), to)
            n += 1
        if LEADS:
            ticket = _claim(claims, ticket, plan, queues)
        else:
            ticket = _next_ticket(claims, ticket, 1)


@gluon.jit
def _is_wide(count):
    """Whether each group has half of a block's rows, or else every other step."""
    return (count > 64).to(gl.int32)


@gluon.jit
def _whose(count, steps, turn, GROUP: gl.constexpr):
    """How the groups divide a block: whether one has it alone, and whether this one has a part."""
    alone = (count <= 64) & (steps <= ALONE)
    mine = ((turn & 1) == GROUP) | (alone == 0)
    return alone, mine


@gluon.jit
def _next_block(p_blocks, i_b):
    """The first chunk, first and end row, and chunks in pairs of the block behind i_b; behind the
    last one of all, what is read is of another table, and not used."""
    p_block = p_blocks + i_b * BLOCK_COLUMNS
    p_next = p_block + BLOCK_COLUMNS
    begin, paired = gl.load(p_block + BLOCK_END_CHUNK), gl.load(p_next + BLOCK_PAIRED)
    return begin, gl.load(p_next + BLOCK_ROW), gl.load(p_next + BLOCK_END_ROW), paired


@gluon.jit
def _copy_queries(
    q,
    i_m,
    first,
    count,
    i_h,
    sq_r,
    sq_h,
    tile,
    numbers,
    G: gl.constexpr,
    K: gl.constexpr,
):
    """Starts to copy up to 64 queries of a block from row `first` on, and stores the numbers i_m of
    their rows; the copies are to be waited for."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    SOME: gl.constexpr = 16
    SOME_ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    o_i = gl.arange(0, SOME, layout=SOME_ROWS)
    o_k = gl.arange(0, 64, layout=gl.SliceLayout(0, LAYOUT))
    numbers.store(i_m)
    barrier()
    for i in gl.static_range(64 // SOME):
        o_r = first + i * SOME + o_i
        if first + i * SOME < count:
            m_r = o_r < count
            # Few registers: from memory they would come one after the other.
            i_r = numbers.slice(i * SOME, SOME).load(SOME_ROWS)
            i_hq = i_h * G + o_r % G
            p_q = q + (i_r.to(gl.int64) * sq_r + i_hq.to(gl.int64) * sq_h)
            to = tile.slice(i * SOME, SOME)
            for part in gl.static_range((K + 63) // 64):
                m_q = m_r[:, None] & (part * 64 + o_k < K)[None, :]
                p_x = p_q[:, None] + (part * 64 + o_k)[None, :]
                copy_rows(to.slice(part * 64, 64, dim=1), p_x, mask=m_q)
    async_copy.commit_group()


@gluon.jit
def _load_q(
    GROUP: gl.constexpr,
    q,
    plan,
    W,
    sq_r,
    sq_h,
    pipe,
    asked,
    claims,
    H: gl.constexpr,
    G: gl.constexpr,
    K: gl.constexpr,
    CHUNKS: gl.constexpr,
    QUEUES: gl.constexpr,
):
    """Copies the queries of a group's blocks, and their rows' numbers and positions."""
    tile, numbers, full, empty = pipe
    p_queues = plan + 2 * W + QUEUES
    p_blocks = plan + gl.load(plan + BLOCKS_AT)
    p_rows = plan + gl.load(plan + ROWS_AT)
    o_m = gl.arange(0, 64, layout=gl.BlockedLayout([1], [32], [1], [0]))
    n = 0
    turn = 0
    ticket, _ = _first_ticket(plan, H)
    while ticket >= 0:
        i_j = ticket // 2
        i_h = i_j % H
        p_queue = p_queues + i_j // H * QUEUE_COLUMNS
        p_end = p_queue + QUEUE_COLUMNS
        next_begin = gl.load(p_queue + QUEUE_CHUNK)
        next_row, next_end = gl.load(p_queue + QUEUE_ROW), gl.load(p_queue + QUEUE_END_ROW)
        for i_b in range(gl.load(p_queue + QUEUE_BLOCK), gl.load(p_end + QUEUE_BLOCK)):
            row, begin = next_row, next_begin
            count = (next_end - row) * G
            first = _is_wide(count) * (64 * GROUP)
            # On its way before it is known whose block this is.
            i_m = gl.load(p_rows + row + (first + o_m) // G, mask=first + o_m < count, other=0)
            next_begin, next_row, next_end, _ = _next_block(p_blocks, i_b)
            alone, mine = _whose(count, (next_begin - begin) // CHUNKS, turn, GROUP)
            turn += alone.to(gl.int32)
            if mine:
                i_n = (n & 1) * 2
                mbarrier.wait(empty.index(0), (n & 1) ^ 1)
                i_p = gl.load(plan + W + i_m)
                _copy_queries(q, i_m, first, count, i_h, sq_r, sq_h, tile, numbers.index(i_n), G, K)
                if GROUP == 0:  # which has a part in every program's first block
                    if n == 0:
                        mbarrier.arrive(asked.index(0), count=1)
                numbers.index(i_n + 1).store(i_p)
                async_copy.wait_group(0)
                barrier()
                mbarrier.arrive(full.index(0), count=1)
                n += 1
        ticket = _next_ticket(claims, ticket, 1)


@gluon.jit
def _scores(queries, k_tile, S: gl.constexpr):
    """Starts Q K^T, [64, BN]."""
    zeros = gl.full([64, k_tile.shape[0]], 0.0, gl.float32, S)
    return warpgroup_mma(queries, k_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _release(bar, wide):
    """A stage is empty once both groups are through with it, or the one whose step it is."""
    barrier()
    if wide > 0:
        mbarrier.arrive(bar, count=1)
    else:
        mbarrier.arrive(bar, count=2)


@gluon.jit
def _bounds(p_chunk, CHUNKS: gl.constexpr):
    """What bounds each chunk of a step: its tokens, the first's position, the rows it is for."""
    bounds = ()
    for c in gl.static_range(CHUNKS):
        p_c = p_chunk + c * CHUNK_COLUMNS
        bounds = bounds + (gl.load(p_c + TOKENS), gl.load(p_c + POSITION), gl.load(p_c + FOR_ROWS))
    return bounds


@gluon.jit
def _sums(b_p):
    """Sums of rows, in two parts each [64, 2]: of half the threads that a row lies in.

    To meet once keeps the compiler from waiting for products before it has the weights computed;
    to meet twice in each step would take longer.
    """
    b_p = b_p.reshape([64, b_p.shape[1] // 8, 2, 2, 2])
    return gl.convert_layout(gl.sum(gl.sum(gl.sum(b_p, 4), 1), 2), SUMS)


@gluon.jit
def _softmax(
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
        b_s = (1.0 - 2.0 / (1.0 + gl.exp2(b_s * (2 * LOG2E / softcap)))) * (softcap * LOG2E)
    if flags & UNMASKED == 0:
        # Of each chunk a row sees the first tokens: one bound takes in all there is to mind.
        b_end = gl.full([64, 1], 0, gl.int32, S)
        for c in gl.static_range(o_n.shape[0] // CHUNK):
            tokens, start, rows = bounds[3 * c], bounds[3 * c + 1], bounds[3 * c + 2]
            r_end = gl.minimum(tokens, o_p - start + 1) + c * CHUNK
            r_end = gl.where((o_q >= (rows & FIRST_MASK)) & (o_q < (rows >> END_BIT)), r_end, 0)
            b_end = gl.where((o_n >= c * CHUNK)[None, :], r_end[:, None], b_end)
        m_s = o_n[None, :] < b_end
        b_s = gl.where(m_s, b_s, float("-inf"))
    b_new = gl.maximum(b_max, gl.max(b_s, 1) * c_scale)
    b_ref = gl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = gl.exp2(b_s * c_scale - b_ref[:, None])
    b_old = gl.exp2(b_max - b_ref)
    b_sum = b_sum * gl.convert_layout(b_old, gl.SliceLayout(1, SUMS))[:, None]
    return b_p, b_new, b_sum + _sums(b_p), b_old


@gluon.jit
def _clear_unread(v_tiles, stage, p_chunk, advance, CHUNK: gl.constexpr):
    """Values that no row sees may be anything, and 0 * NaN is NaN.

    Where both groups read a step, both do this to it, and write the same.
    """
    BN: gl.constexpr = v_tiles.shape[1]
    BW: gl.constexpr = v_tiles.shape[2] // 2
    words = reinterpret(v_tiles, gl.int32, [v_tiles.shape[0], BN, BW], WORDS).index(stage)
    o_n = gl.arange(0, BN, layout=gl.SliceLayout(1, WORD_ROWS))
    p_n = p_chunk + o_n // CHUNK * CHUNK_COLUMNS
    seen = gl.minimum(gl.load(p_n + FURTHEST) + advance, gl.load(p_n + TOKENS))
    for part in gl.static_range(BW // 32):
        tile = words.slice(part * 32, 32, dim=1)
        tile.store(gl.where((o_n % CHUNK < seen)[:, None], tile.load(WORD_ROWS), 0))
    fence_async_shared()
    barrier()


@gluon.jit
def _exchange(GROUP: gl.constexpr, f_max, f_sum, b_out, split, exchange):
    """Adds up what the groups have of a shared block, in the first."""
    o_tiles, other_rows, room, sent, taken = exchange
    BV: gl.constexpr = o_tiles.shape[2]
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BV, 16])
    O_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    other_out = reinterpret(o_tiles, gl.float32, [64, BV], WORDS)
    if GROUP == 1:
        mbarrier.wait(room.index(0), split & 1)
        other_rows.index(0).store(f_max)
        other_rows.index(1).store(f_sum)
        other_out.store(b_out)
        barrier()
        mbarrier.arrive(sent.index(0), count=1)
        mbarrier.wait(taken.index(0), split & 1)
    else:
        mbarrier.wait(sent.index(0), split & 1)
        o_max, o_sum = other_rows.index(0).load(O_ROWS), other_rows.index(1).load(O_ROWS)
        f_top = gl.maximum(f_max, o_max)
        f_ref = gl.where(f_top == float("-inf"), 0.0, f_top)
        f_old, o_old = gl.exp2(f_max - f_ref), gl.exp2(o_max - f_ref)
        f_max = f_top
        f_sum = f_sum * f_old + o_sum * o_old
        b_out = b_out * f_old[:, None]
        b_out += other_out.load(OUT) * o_old[:, None]
        barrier()
        mbarrier.arrive(taken.index(0), count=1)
    return f_max, f_sum, b_out


@gluon.jit
def _attend(
    GROUP: gl.constexpr,
    p_chunk,
    n,
    steps,
    paired,
    wide,
    alone,
    done,
    split,
    advance,
    qk_scale,
    softcap,
    queries,
    keys,
    values,
    exchange,
    G: gl.constexpr,
    CHUNK: gl.constexpr,
    USE_SOFTCAP: gl.constexpr,
):
    """A group's share of a block, of `steps` steps from p_chunk on: maxima, base 2, sums, results
    and the next `split`. Of a wide block's steps, `paired` are for the rows of one group, as FLAGS
    say, and the others for those of both.

    Not written out inside the loops: Triton goes through a loop's body twice, so through that of
    three loops eight times, which took a third of the time to compile the kernel.
    """
    q_tile, numbers, q_full, q_empty = queries
    k_tiles, k_full, k_empty = keys
    v_tiles, v_full, v_empty = values
    room = exchange[2]
    DTYPE: gl.constexpr = q_tile.dtype
    BN: gl.constexpr = k_tiles.shape[1]
    BV: gl.constexpr = v_tiles.shape[2]
    STAGES: gl.constexpr = k_tiles.shape[0]
    CHUNKS: gl.constexpr = BN // CHUNK
    STEP: gl.constexpr = CHUNKS * CHUNK_COLUMNS
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BV, 16])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    QUERIES: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    o_m = gl.arange(0, 64, layout=S_ROWS)
    o_n = gl.arange(0, BN, layout=gl.SliceLayout(0, S))
    first = wide * (64 * GROUP)
    shared = (wide == 0) & (alone == 0)
    # So many steps are this group's, and one of each pair.
    whole = wide * (steps - paired) + alone.to(gl.int32) * steps
    mine = whole + (steps - whole + 1 - GROUP) // 2
    o_q = (first + o_m) // G
    i_n = (done & 1) * 2
    b_max = gl.full([64], float("-inf"), gl.float32, S_ROWS)
    b_sum = gl.full([64, 2], 0.0, gl.float32, SUMS)
    b_out = gl.full([64, BV], 0.0, gl.float32, OUT)
    if shared:
        # This group is through with all blocks before, and `o_tiles` with them.
        if GROUP == 0:
            barrier()
            mbarrier.arrive(room.index(0), count=1)
    mbarrier.wait(q_full.index(0), done & 1)
    # A block with steps for both groups begins with one.
    i = (whole == 0).to(gl.int32) * GROUP
    at = n + i
    p_chunk += i * STEP
    flags, bounds = gl.load(p_chunk + FLAGS), _bounds(p_chunk, CHUNKS)
    b_q = q_tile.load(QUERIES)
    o_p = numbers.index(i_n + 1).load(S_ROWS)
    barrier()
    mbarrier.arrive(q_empty.index(0), count=1)
    weights = gl.full([64, BN], 0.0, DTYPE, WEIGHTS)
    stage, both = at & (STAGES - 1), wide
    for j in range(mine):
        before, of_both = stage, both
        stage = at & (STAGES - 1)
        _wait(k_full, at)
        next_s = _scores(b_q, k_tiles.index(stage), S)
        # The first step has no weights yet, and multiplies whatever lies there; the next one's sum
        # begins anew. A first step written out would be code that a launch has to fetch, where
        # other kernels ran before it.
        next_out = warpgroup_mma(
            weights, v_tiles.index(before), b_out, use_acc=j > 1, is_async=True
        )
        b_s = warpgroup_mma_wait(1, [next_s])
        both = wide & (flags & PAIRED == 0).to(gl.int32)
        _release(k_empty.index(stage), both)
        b_p, b_max, b_sum, b_old = _softmax(
            b_s, b_max, b_sum, flags, bounds, o_q, o_p, o_n, qk_scale, softcap,
            S, CHUNK, USE_SOFTCAP,
        )  # fmt: skip
        o_old = gl.convert_layout(b_old, O_ROWS)[:, None]
        _wait(v_full, at)
        b_out = warpgroup_mma_wait(0, [next_out]) * o_old
        if j > 0:
            _release(v_empty.index(before), of_both)
        weights = gl.convert_layout(b_p.to(DTYPE), WEIGHTS)
        if flags & SEEN == 0:
            _clear_unread(v_tiles, stage, p_chunk, advance, CHUNK)
        # Past the other's of a pair: behind one's own, or before it.
        skips = flags & (PAIR_NEXT if GROUP else PAIRED) > 0
        stride = (1 + (shared | skips).to(gl.int32)) * (j + 1 < mine).to(gl.int32)
        at += stride
        p_chunk += stride * STEP
        flags, bounds = gl.load(p_chunk + FLAGS), _bounds(p_chunk, CHUNKS)
    next_out = warpgroup_mma(weights, v_tiles.index(stage), b_out, use_acc=mine > 1, is_async=True)
    b_out = warpgroup_mma_wait(0, [next_out])
    _release(v_empty.index(stage), both)

    f_max = gl.convert_layout(b_max, O_ROWS)
    f_sum = gl.convert_layout(gl.sum(b_sum, 1), O_ROWS)
    if shared:
        f_max, f_sum, b_out = _exchange(GROUP, f_max, f_sum, b_out, split, exchange)
        split += 1
    return f_max, f_sum, b_out, split


@gluon.jit
def _write(
    GROUP: gl.constexpr,
    f_max,
    f_sum,
    b_out,
    slot,
    i_h,
    first,
    count,
    out,
    partial,
    lse,
    sinks,
    numbers,
    o_tiles,
    H: gl.constexpr,
    G: gl.constexpr,
    V: gl.constexpr,
    USE_SINKS: gl.constexpr,
):
    """Writes what `_attend` gives, of a block's rows from `first` on: results, or partials."""
    BV: gl.constexpr = o_tiles.shape[2]
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BV, 16])
    o_f = gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
    o_b = first + o_f
    m_f = o_b < count
    f_scale = 1.0 / gl.where(f_sum == 0.0, 1.0, f_sum)
    if USE_SINKS:
        if slot < 0:
            p_sink = sinks + i_h * G + o_b % G
            b_sink = gl.load(p_sink, mask=m_f, other=0.0).to(gl.float32)
            b_sink = b_sink * LOG2E
            f_top = gl.maximum(f_max, b_sink)
            f_ref = gl.where(f_top == float("-inf"), 0.0, f_top)
            f_old = gl.exp2(f_max - f_ref)
            f_all = f_sum * f_old + gl.exp2(b_sink - f_ref)
            f_scale = f_old / gl.where(f_all == 0.0, 1.0, f_all)
    b_out = b_out * f_scale[:, None]
    if slot >= 0:
        i_p = (slot + o_b // G).to(gl.int64) * (H * G) + i_h * G + o_b % G
        gl.store(lse + i_p, f_max + gl.log2(f_sum), mask=m_f)
        o_v = gl.arange(0, BV, layout=gl.SliceLayout(0, OUT))
        p_p = partial + i_p[:, None] * V + o_v[None, :]
        m_p = m_f[:, None] & (o_v < V)[None, :]
        gl.store(p_p, b_out, mask=m_p, eviction_policy="evict_last")
    else:
        # By way of shared memory, for lines to be written whole: Triton's own for changes of layout
        # would be the same for both groups.
        tile = o_tiles.index(GROUP)
        tile.store(b_out.to(o_tiles.dtype))
        barrier()
        o_x = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
        i_r = numbers.load(gl.SliceLayout(1, ROWS))
        o_x += first
        i_o = i_r.to(gl.int64) * (H * G) + i_h * G + o_x % G
        for part in gl.static_range(BV // 64):
            o_c = part * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, ROWS))
            m_x = (o_x < count)[:, None] & (o_c < V)[None, :]
            p_x = out + i_o[:, None] * V + o_c[None, :]
            gl.store(p_x, tile.slice(part * 64, 64, dim=1).load(ROWS), mask=m_x)


@gluon.jit
def _compute(
    GROUP: gl.constexpr,
    plan,
    out,
    partial,
    lse,
    sinks,
    qk_scale,
    softcap,
    W,
    queries,
    keys,
    values,
    exchange,
    my_turn,
    other_turn,
    claims,
    H: gl.constexpr,
    G: gl.constexpr,
    V: gl.constexpr,
    CHUNK: gl.constexpr,
    QUEUES: gl.constexpr,
    USE_SOFTCAP: gl.constexpr,
    USE_SINKS: gl.constexpr,
):
    """One of the two groups that compute."""
    CHUNKS: gl.constexpr = keys[0].shape[1] // CHUNK
    p_queues = plan + 2 * W + QUEUES
    p_chunks = plan + gl.load(plan + CHUNKS_AT)
    p_blocks = plan + gl.load(plan + BLOCKS_AT)
    advance = gl.load(plan + W) - gl.load(plan + ORIGIN)
    n = 0  # steps of this program so far
    done = 0  # blocks of this group
    split = 0  # blocks that the groups shared: phases of `room`, `sent`, `taken`
    turn = 0  # blocks of one group alone
    ticket, _ = _first_ticket(plan, H)
    while ticket >= 0:
        i_j = ticket // 2
        i_h = i_j % H
        p_queue = p_queues + i_j // H * QUEUE_COLUMNS
        p_end = p_queue + QUEUE_COLUMNS
        next_begin = gl.load(p_queue + QUEUE_CHUNK)
        next_row, next_end = gl.load(p_queue + QUEUE_ROW), gl.load(p_queue + QUEUE_END_ROW)
        next_paired = gl.load(p_queue + QUEUE_PAIRED)
        for i_b in range(gl.load(p_queue + QUEUE_BLOCK), gl.load(p_end + QUEUE_BLOCK)):
            row, begin, paired = next_row, next_begin, next_paired
            count = (next_end - row) * G
            p_chunk = p_chunks + begin * CHUNK_COLUMNS
            slot = gl.load(p_chunk + SLOT)
            next_begin, next_row, next_end, next_paired = _next_block(p_blocks, i_b)
            steps = (next_begin - begin) // CHUNKS
            wide = _is_wide(count)
            alone, mine = _whose(count, steps, turn, GROUP)
            # Parities tell a step from the one before it only, so each group knows of all steps
            # before its own that they have come.
            if alone:
                if mine:
                    for i in range(steps):
                        _wait(keys[1], n + i)
                        _wait(values[1], n + i)
                    barrier()
                    mbarrier.arrive(my_turn.index(0), count=1)
                else:
                    mbarrier.wait(other_turn.index(0), turn >> 1 & 1)
                turn += 1
            if mine:
                f_max, f_sum, b_out, split = _attend(
                    GROUP, p_chunk, n, steps, paired // CHUNKS, wide, alone, done, split,
                    advance, qk_scale, softcap, queries, keys, values, exchange,
                    G, CHUNK, USE_SOFTCAP,
                )  # fmt: skip
                if (GROUP == 0) | (wide > 0) | alone:
                    _write(
                        GROUP, f_max, f_sum, b_out, slot, i_h, wide * (64 * GROUP), count,
                        out, partial, lse, sinks, queries[1].index((done & 1) * 2), exchange[0],
                        H, G, V, USE_SINKS,
                    )  # fmt: skip
                done += 1
            n += steps
        ticket = _next_ticket(claims, ticket, 4)


@gluon.jit
def hopper_kernel(
    q,
    k_desc,
    v_desc,
    k_pieces,
    v_pieces,
    plan,
    out,
    partial,
    lse,
    sinks,
    qk_scale,
    softcap,
    W,
    SIZE,
    SPAN,
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
    QUEUES: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    USE_SOFTCAP: gl.constexpr,
    USE_SINKS: gl.constexpr,
):
    """Queues of all shapes; as `forward_kernel`, but for

    Args:
        k_desc, v_desc: of K and V as [any, K or V], in boxes of a chunk's rows and 64 columns.
        k_pieces, v_pieces: the same in boxes of fewer rows.
        SIZE: elements of the plan.
        SPAN: elements from q's first to its last.
        KP, KH, VP, VH: rows of these from a page, or a head, to the next.
    """
    tl.extra.cuda.gdc_launch_dependents()
    # While the barriers are made, what all warps are going to read first is on its way, and all of
    # the plan to the L2, where programs share it, and the queries of a decode step: a line of each
    # a thread.
    thread = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    line = gl.program_id(0) * 128 + thread
    _prefetch(plan + gl.minimum(line * 32, SIZE - 1))
    _prefetch(q + gl.minimum(line * 64, SPAN - 1))
    _prefetch(plan)
    _prefetch(plan + W)
    _prefetch(plan + 2 * W + QUEUES + gl.program_id(0) // H * QUEUE_COLUMNS)
    DTYPE: gl.constexpr = q.dtype.element_ty
    CHUNK: gl.constexpr = k_desc.block_type.shape[0]
    BK: gl.constexpr = (K + 63) // 64 * 64
    BV: gl.constexpr = (V + 63) // 64 * 64
    LAYOUT: gl.constexpr = k_desc.layout
    BAR: gl.constexpr = mbarrier.MBarrierLayout()
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_left = gl.allocate_shared_memory(DTYPE, [64, BK], LAYOUT)
    q_right = gl.allocate_shared_memory(DTYPE, [64, BK], LAYOUT)
    # Numbers and positions of rows, of two blocks.
    n_left = gl.allocate_shared_memory(gl.int32, [4, 64], PLAIN)
    n_right = gl.allocate_shared_memory(gl.int32, [4, 64], PLAIN)
    k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, BN, BK], LAYOUT)
    v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, BN, BV], LAYOUT)
    # Each group's results on their way out, or one's on their way to the other.
    o_tiles = gl.allocate_shared_memory(DTYPE, [2, 64, BV], LAYOUT)
    other_rows = gl.allocate_shared_memory(gl.float32, [2, 64], PLAIN)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BAR)
    # Once a program's first queries are on their way.
    asked = gl.allocate_shared_memory(gl.int64, [1, 1], BAR)
    l_full = gl.allocate_shared_memory(gl.int64, [1, 1], BAR)
    l_empty = gl.allocate_shared_memory(gl.int64, [1, 1], BAR)
    r_full = gl.allocate_shared_memory(gl.int64, [1, 1], BAR)
    r_empty = gl.allocate_shared_memory(gl.int64, [1, 1], BAR)
    room = gl.allocate_shared_memory(gl.int64, [1, 1], BAR)
    sent = gl.allocate_shared_memory(gl.int64, [1, 1], BAR)
    taken = gl.allocate_shared_memory(gl.int64, [1, 1], BAR)
    l_turn = gl.allocate_shared_memory(gl.int64, [1, 1], BAR)
    r_turn = gl.allocate_shared_memory(gl.int64, [1, 1], BAR)
    # The next ticket, once for each lane: if all read one address, ptxas keeps shared memory's own
    # in a register of each thread, and moves it to one that a warp shares three times a step.
    c_number = gl.allocate_shared_memory(gl.int32, [32], PLAIN)
    c_full = gl.allocate_shared_memory(gl.int64, [1, 1], BAR)
    c_empty = gl.allocate_shared_memory(gl.int64, [1, 1], BAR)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=BN // CHUNK)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=BN // CHUNK)
        mbarrier.init(v_empty.index(i), count=2)
    mbarrier.init(asked.index(0), count=1)
    mbarrier.init(l_full.index(0), count=1)
    mbarrier.init(l_empty.index(0), count=1)
    mbarrier.init(r_full.index(0), count=1)
    mbarrier.init(r_empty.index(0), count=1)
    mbarrier.init(room.index(0), count=1)
    mbarrier.init(sent.index(0), count=1)
    mbarrier.init(taken.index(0), count=1)
    mbarrier.init(l_turn.index(0), count=1)
    mbarrier.init(r_turn.index(0), count=1)
    mbarrier.init(c_full.index(0), count=1)
    mbarrier.init(c_empty.index(0), count=5)  # all parts but the one that claims
    fence_async_shared()
    left, right = (q_left, n_left, l_full, l_empty), (q_right, n_right, r_full, r_empty)
    keys, values = (k_tiles, k_full, k_empty), (v_tiles, v_full, v_empty)
    exchange, claims = (o_tiles, other_rows, room, sent, taken), (c_number, c_full, c_empty)
    gl.warp_specialize(
        [
            (
                _compute,
                (
                    0, plan, out, partial, lse, sinks, qk_scale, softcap, W,
                    left, keys, values, exchange, l_turn, r_turn, claims,
                    H, G, V, CHUNK, QUEUES, USE_SOFTCAP, USE_SINKS,
                ),
            ),
            (
                _compute,
                (
                    1, plan, out, partial, lse, sinks, qk_scale, softcap, W,
                    right, keys, values, exchange, r_turn, l_turn, claims,
                    H, G, V, CHUNK, QUEUES, USE_SOFTCAP, USE_SINKS,
                ),
            ),
            (
                _load_kv,
                (k_desc, k_pieces, keys, asked, claims, plan, W, H, P, KP, KH, QUEUES, True),
            ),
            (
                _load_kv,
                (v_desc, v_pieces, values, asked, claims, plan, W, H, P, VP, VH, QUEUES, False),
            ),
            (
                _load_q,
                (0, q, plan, W, sq_r, sq_h, left, asked, claims, H, G, K, BN // CHUNK, QUEUES),
            ),
            (
                _load_q,
                (1, q, plan, W, sq_r, sq_h, right, asked, claims, H, G, K, BN // CHUNK, QUEUES),
            ),
        ],
        [4, 1, 1, 1, 1],
        [REGISTERS, 24, 24, 40, 40],
    )  # fmt: skip
