"""Attention and storing, the same on every device: the custom ops `pat_hf::attention`, opaque to
torch.compile, and `pat_hf::store`, in whose place it has plain PyTorch."""

from __future__ import annotations

import functools

import torch

from pat_hf.kernels import cpu


def attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    plan_tensor: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    merge: bool = True,
) -> torch.Tensor:
    """Attention of query rows to the tokens on their paths in a prefix tree, kept in pages.

    Args:
        q: [B, query heads, T, key dim]; B * T query rows, the tokens of requests or of tree nodes.
        k_pages: [pages, KV heads, page size, key dim], in q's dtype.
        v_pages: [pages, KV heads, page size, value dim], in q's dtype.
        plan_tensor: int32 [1, 1, C, W], from `Plan.tensor`. It must be made for as many query rows,
            and for these heads and pages; on a GPU, where its values lie, that can't be looked at.
            Kernels count in it, so calls that may run at the same time need a copy each.
        scale: factor of the scores, positive.
        window: a row sees the last `window` positions, its own included; `None`: all.
        softcap: scores become softcap * tanh(score / softcap); positive.
        sinks: [query heads], a score each that takes part in the softmax's sum only.
        merge: whether there may be rows to merge. `False` spares a GPU the launch, and is for a
            tensor that holds only plans without, see `Plan.merges`: on a GPU, that can't be looked
            at either, and the rows of others would not be written.

    Returns:
        [B, T, query heads, value dim], contiguous, in q's dtype; zeros for rows that see nothing.

    Raises:
        ValueError: if shapes or dtypes don't go together, or a number is not positive; on a CPU, if
            `merge` is `False` and the plan has rows to merge.

    Example:
        >>> import numpy as np, torch
        >>> from pat_hf.kernels.ops import attention
        >>> from pat_hf.kernels.plan import Heads, Machine, Nodes, make_plan
        >>> # 20 shared tokens in pages 1 and 2; below them, 5 and 7 tokens in pages 3 and 4.
        >>> nodes = Nodes(
        ...     parent=np.array([-1, 0, 0]),
        ...     end=np.array([3, 2, 3]),
        ...     start=np.array([0, 20, 20]),
        ...     length=np.array([20, 5, 7]),
        ...     page_ptr=np.array([0, 2, 3, 4]),
        ...     pages=np.array([1, 2, 3, 4]),
        ... )
        >>> k_pages, v_pages = torch.randn(2, 5, 2, 16, 64).unbind()
        >>> heads = Heads(query=8, kv=2, key_dim=64, value_dim=64, itemsize=4)
        >>> plan = make_plan(
        ...     nodes,
        ...     node=np.array([1, 2]),
        ...     position=np.array([24, 26]),
        ...     heads=heads,
        ...     page_size=16,
        ...     machine=Machine.of(k_pages.device, heads),
        ... )
        >>> q = torch.randn(2, 8, 1, 64)
        >>> attention(q, k_pages, v_pages, plan.tensor(q.device), scale=64**-0.5).shape
        torch.Size([2, 1, 8, 64])
    """
    _check(q, k_pages, v_pages, plan_tensor, sinks)
    if not scale > 0:
        raise ValueError(f"scale={scale}: it must be positive. Negate q for a negative one.")
    if softcap is not None and not softcap > 0 or window is not None and window < 1:
        raise ValueError(
            f"softcap={softcap}, window={window}: each must be positive, or None for none."
        )
    return _attention(q, k_pages, v_pages, plan_tensor, sinks, scale, window, softcap, merge)


def compile_ahead(
    k_pages: torch.Tensor, v_pages: torch.Tensor, query_heads: int, softcap: float | None = None
) -> None:
    """Starts to compile, beside what the caller does, what `attention` and `store` run on such
    pages where there are no windows and no sinks. Their first calls wait for it.

    Args:
        k_pages, v_pages: see `attention`; how many pages there are doesn't matter.
        query_heads: of the q to come.
        softcap: see `attention`.
    """
    if backend(k_pages.device) == "triton":
        from pat_hf.kernels import forward, launch, store

        attended = forward.likely(k_pages, v_pages, query_heads, softcap)
        where = torch.empty(1, dtype=torch.int64, device=k_pages.device)
        k, v = k_pages[:, :, :1], v_pages[:, :, :1]
        launch.begin([*attended, store.store(k_pages, v_pages, k, v, where, where)])


def store(
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Writes new K and V into their pages.

    Args:
        k_pages: [pages, KV heads, page size, key dim], contiguous within a page.
        v_pages: [pages, KV heads, page size, value dim], likewise.
        k: [B, KV heads, T, key dim], in the dtype of the pages.
        v: [B, KV heads, T, value dim], likewise.
        pages, slots: int64 [B * T], where token b * T + t goes.
    """
    # What is compiled stores by the kernel that computes k and v.
    if torch.compiler.is_dynamo_compiling():  # in this thread
        _put(k_pages, k, pages, slots)
        _put(v_pages, v, pages, slots)
    else:
        _store(k_pages, v_pages, k, v, pages, slots)


def backend(device: torch.device | str) -> str:
    """What computes attention on a device: "triton" or "torch"."""
    return "triton" if torch.device(device).type == "cuda" and _has_triton() else "torch"


# On a GPU, the plan is written to, but is as before in the end: nobody has to know.
# Without the tag, the compiler would copy pages that it has written to: it takes them for dense.
@torch.library.custom_op("pat_hf::attention", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    plan: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    merge: bool,
) -> torch.Tensor:
    options = dict(scale=scale, window=window, softcap=softcap, sinks=sinks, merge=merge)
    if backend(q.device) == "triton":
        from pat_hf.kernels import forward

        with torch.cuda.device_of(q):  # Triton launches on the current device
            return forward.forward(q, k_pages, v_pages, plan, **options)
    with torch.autocast(q.device.type, enabled=False):  # it would round partial sums
        return cpu.attention(q, k_pages, v_pages, plan, **options)


@_attention.register_fake
def _(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    plan: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    merge: bool,
) -> torch.Tensor:
    batch, heads, length, _ = q.shape
    return q.new_empty(batch, length, heads, v_pages.shape[-1])


@torch.library.custom_op("pat_hf::store", mutates_args=("k_pages", "v_pages"))
def _store(
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    if backend(k.device) == "triton":
        from pat_hf.kernels import launch, store

        with torch.cuda.device_of(k):  # Triton launches on the current device
            launch.run([store.store(k_pages, v_pages, k, v, pages, slots)])
    else:
        _put(k_pages, k, pages, slots)
        _put(v_pages, v, pages, slots)


def _put(held: torch.Tensor, new: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor) -> None:
    held[pages, :, slots] = new.transpose(1, 2).flatten(0, 1)


@functools.cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _check(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    plan: torch.Tensor,
    sinks: torch.Tensor | None,
) -> None:
    # Run for every layer and step: nothing is put into words before it has failed.
    if not q.ndim == k_pages.ndim == v_pages.ndim == 4:
        wrong = (
            "expected q [B, query heads, T, key dim] and pages [pages, KV heads, page size, dim]."
        )
    elif k_pages.shape[:3] != v_pages.shape[:3]:
        wrong = (
            "K and V must have the same pages, KV heads and page size. Allocate both pools alike; "
            "only the last dimension may differ."
        )
    elif q.shape[3] != k_pages.shape[3]:
        wrong = (
            f"q has key dim {q.shape[3]} and the pool {k_pages.shape[3]}. Use a pool made for this "
            "layer."
        )
    elif q.shape[1] % k_pages.shape[1]:
        wrong = (
            f"{q.shape[1]} query heads don't divide among {k_pages.shape[1]} KV heads; every KV "
            "head needs as many."
        )
    else:
        wrong = None
    if wrong:
        raise ValueError(
            f"q {list(q.shape)}, k_pages {list(k_pages.shape)}, v_pages {list(v_pages.shape)}: "
            f"{wrong}"
        )
    if not q.dtype == k_pages.dtype == v_pages.dtype:
        raise ValueError(
            f"q is {q.dtype}, k_pages {k_pages.dtype}, v_pages {v_pages.dtype}; they must be the "
            "same. Cast q, or store the pages in its dtype."
        )
    if plan.dtype != torch.int32 or plan.ndim != 4 or plan.shape[:2] != (1, 1):
        raise ValueError(
            f"The plan is {plan.dtype} {list(plan.shape)}; Plan.tensor makes int32 [1, 1, C, W]."
        )
    if plan.shape[3] < q.shape[0] * q.shape[2]:
        raise ValueError(
            f"q has {q.shape[0]} x {q.shape[2]} query rows and the plan, {list(plan.shape)}, at "
            f"most {plan.shape[3]}. Make a plan for this batch."
        )
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks {list(sinks.shape)}: one for each of {q.shape[1]} query heads.")
    given = [x for x in (q, k_pages, v_pages, plan, sinks) if x is not None]
    if any(x.device != q.device for x in given):
        devices = sorted({str(x.device) for x in given})
        raise ValueError(f"The arguments are on {', '.join(devices)}; move them to one.")
