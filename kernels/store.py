"""New K and V into their pages, on a GPU: one launch for both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pat_hf.kernels.forward import by_rows
from pat_hf.kernels.launch import Launch


# The slots of an odd number of tokens are not aligned, which is no reason to compile again.
@triton.jit(do_not_specialize_on_alignment=("pages", "slots"))
def store_kernel(
    k_pages,
    v_pages,
    k,
    v,
    pages,
    slots,
    sk_r,
    sk_h,
    sv_r,
    sv_h,
    sk_p,
    sv_p,
    P: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """One program: BH heads of one token.

    Args:
        k_pages, v_pages: [pages, H, P, K or V]; pages by stride, contiguous inside.
        k, v: [B * T, H, K or V] by strides, the last one 1.
        pages, slots: int64 [B * T].
    """
    i_r = tl.program_id(0).to(tl.int64)
    o_h = (tl.program_id(1) * BH + tl.arange(0, BH)).to(tl.int64)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    page = tl.load(pages + i_r)
    slot = tl.load(slots + i_r)
    m_h = (o_h < H)[:, None]
    m_k = m_h & (o_k < K)[None, :]
    m_v = m_h & (o_v < V)[None, :]
    # [BH, BK], [BH, BV]
    b_k = tl.load(k + i_r * sk_r + o_h[:, None] * sk_h + o_k[None, :], mask=m_k)
    b_v = tl.load(v + i_r * sv_r + o_h[:, None] * sv_h + o_v[None, :], mask=m_v)
    p_h = (o_h * P + slot)[:, None]
    tl.store(k_pages + page * sk_p + p_h * K + o_k[None, :], b_k, mask=m_k)
    tl.store(v_pages + page * sv_p + p_h * V + o_v[None, :], b_v, mask=m_v)


def store(
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
) -> Launch:
    """The launch of `pat_hf.kernels.ops.store`, on a GPU, or under Triton's interpreter."""
    (k, k_stride), (v, v_stride) = by_rows(k), by_rows(v)
    batch, heads, length, key_dim = k.shape
    value_dim = v.shape[-1]
    block_k, block_v = triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim)
    some = min(triton.next_power_of_2(heads), max(2048 // max(block_k, block_v), 1))
    strides = k_stride, k.stride(1), v_stride, v.stride(1), k_pages.stride(0), v_pages.stride(0)
    constants = dict(
        P=k_pages.shape[2], H=heads, K=key_dim, V=value_dim, BH=some, BK=block_k, BV=block_v
    )
    grid = batch * length, triton.cdiv(heads, some)
    return Launch(store_kernel, grid, (k_pages, v_pages, k, v, pages, slots, *strides), constants)
