"""The partials of a row become its output, by log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl

from pat_hf.kernels.constants import LOG2E, MERGE_PTR_AT, MERGE_ROWS_AT, MERGE_ROWS_SIZE, SLOTS_AT


@triton.jit
def _slots(p_slots, i_s, end, N: tl.constexpr):
    """Entries i_s..i_s+N-1 of the list of slots; -1 from `end` on."""
    slots = ()
    for i in tl.static_range(N):
        slots = slots + (tl.load(p_slots + i_s + i, mask=i_s + i < end, other=-1),)
    return slots


@triton.jit
def _load(partial, lse, slot, o_h, o_v, HQ: tl.constexpr, V: tl.constexpr):
    """A partial [BH, BV] and its log-sum-exp [BH]; nothing if the slot is -1."""
    o_s = tl.zeros_like(o_h) + slot
    o_p = o_s.to(tl.int64) * HQ + o_h
    m_h = (o_h < HQ) & (o_s >= 0)
    b_lse = tl.load(lse + o_p, mask=m_h, other=float("-inf"))
    m_p = m_h[:, None] & (o_v < V)[None, :]
    p_p = partial + o_p[:, None] * V + o_v[None, :]
    return tl.load(p_p, mask=m_p, other=0.0, eviction_policy="evict_first"), b_lse


@triton.jit
def merge_kernel(
    plan,
    partial,
    lse,
    out,
    sinks,
    HQ: tl.constexpr,
    V: tl.constexpr,
    N: tl.constexpr,
    BH: tl.constexpr,
    BV: tl.constexpr,
    USE_SINKS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One program: BH heads of one of the rows to merge, as many as there may be.

    Args:
        plan: int32 [C, W], see `Plan`.
        partial: fp32 [slots, HQ, V]; lse: fp32 [slots, HQ], in base 2.
        out: [rows, HQ, V]; rows that one block wrote are left alone.
        N: partials whose loads are in flight together.
    """
    i_m = tl.program_id(0)
    if i_m < tl.load(plan + MERGE_ROWS_SIZE):
        o_h = tl.program_id(1) * BH + tl.arange(0, BH)
        o_v = tl.arange(0, BV)
        m_h = o_h < HQ
        i_r = tl.load(plan + tl.load(plan + MERGE_ROWS_AT) + i_m).to(tl.int64)
        p_ptr = plan + tl.load(plan + MERGE_PTR_AT) + i_m
        p_slots = plan + tl.load(plan + SLOTS_AT)
        begin, end = tl.load(p_ptr), tl.load(p_ptr + 1)
        slots = _slots(p_slots, begin, end, N)
        if USE_PDL:
            tl.extra.cuda.gdc_wait()
        b_max = tl.full([BH], float("-inf"), tl.float32)
        b_sum = tl.zeros([BH], tl.float32)
        if USE_SINKS:
            b_max = tl.load(sinks + o_h, mask=m_h, other=0.0).to(tl.float32) * LOG2E
            b_sum += 1.0
        b_out = tl.zeros([BH, BV], tl.float32)
        for i_s in range(begin, end, N):
            parts = ()
            tops = ()
            b_new = b_max
            for i in tl.static_range(N):
                b_p, b_lse = _load(partial, lse, slots[i], o_h, o_v, HQ, V)
                parts = parts + (b_p,)
                tops = tops + (b_lse,)
            slots = _slots(p_slots, i_s + N, end, N)
            for i in tl.static_range(N):
                b_new = tl.maximum(b_new, tops[i])
            b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_old = tl.exp2(b_max - b_ref)
            b_sum = b_sum * b_old
            b_out = b_out * b_old[:, None]
            for i in tl.static_range(N):
                b_w = tl.exp2(tops[i] - b_ref)
                b_sum += b_w
                b_out += parts[i] * b_w[:, None]
            b_max = b_new
        b_out = b_out / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
        p_out = out + (i_r * HQ + o_h[:, None]) * V + o_v[None, :]
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_h[:, None] & (o_v < V)[None, :])
    elif USE_PDL:
        # Whoever waits for this kernel waits for the one before it, too; one program is enough.
        if i_m == 0:
            tl.extra.cuda.gdc_wait()
