"""The partials of a row become its output, by log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl

UNSEEING = -(1 << 29)  # positions below this are of rows that see nothing


@triton.jit
def merge_kernel(
    plan,
    partial,
    lse,
    out,
    sinks,
    W,
    HQ: tl.constexpr,
    V: tl.constexpr,
    BH: tl.constexpr,
    BV: tl.constexpr,
    BS: tl.constexpr,
    USE_SINKS: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One program: BH heads of one query row.

    Args:
        plan: int32 [C, W], see `Plan`.
        partial: fp32 [slots, HQ, V]; lse: fp32 [slots, HQ], in base 2.
        out: [rows, HQ, V]; rows that one block wrote are left alone.
    """
    i_r = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    o_v = tl.arange(0, BV)
    m_h = o_h < HQ
    m_o = m_h[:, None] & (o_v < V)[None, :]
    p_out = out + i_r * HQ * V + o_h[:, None] * V + o_v[None, :]

    ptr = plan + tl.load(plan + 15)
    begin = tl.load(ptr + i_r)
    end = tl.load(ptr + i_r + 1)
    position = tl.load(plan + W + i_r)
    if USE_PDL:
        tl.extra.cuda.gdc_wait()
    if begin < end:
        b_max = tl.full([BH], float("-inf"), tl.float32)
        b_sum = tl.zeros([BH], tl.float32)
        if USE_SINKS:
            b_max = tl.load(sinks + o_h, mask=m_h, other=0.0).to(tl.float32) * 1.4426950408889634
            b_sum += 1.0
        b_out = tl.zeros([BH, BV], tl.float32)
        for i_s in range(begin, end, BS):
            o_s = i_s + tl.arange(0, BS).to(tl.int64)
            m_s = o_s < end
            # [BS, BH]
            b_lse = tl.load(
                lse + o_s[:, None] * HQ + o_h[None, :],
                mask=m_s[:, None] & m_h[None, :],
                other=float("-inf"),
            )
            # [BS, BH, BV]
            b_part = tl.load(
                partial + (o_s[:, None, None] * HQ + o_h[None, :, None]) * V + o_v[None, None, :],
                mask=m_s[:, None, None] & m_o[None, :, :],
                other=0.0,
            )
            b_new = tl.maximum(b_max, tl.max(b_lse, 0))
            b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_old = tl.exp2(b_max - b_ref)
            b_w = tl.exp2(b_lse - b_ref[None, :])
            b_sum = b_sum * b_old + tl.sum(b_w, 0)
            b_out = b_out * b_old[:, None] + tl.sum(b_part * b_w[:, :, None], 0)
            b_max = b_new
        b_out = b_out / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_o)
    elif position < -(1 << 29):
        tl.store(p_out, tl.zeros([BH, BV], out.dtype.element_ty), mask=m_o)
