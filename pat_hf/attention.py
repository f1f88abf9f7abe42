"""Attention "pat" for Transformers: pages and a plan on a PATCache, dense K and V elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import (
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from pat_hf.kernels.ops import attention


def pat_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over pages where `attention_mask` is a plan (int32), over dense K and V otherwise.

    Args:
        query: [batch, query heads, tokens, key dim].
        key, value: with a plan, a layer's pages [pages, kv heads, page size, dim]; else
            [batch, kv heads, length, dim].
        attention_mask: what `pat_mask` returned; as with sdpa, it alone says whether there is a
            window.
        scaling: factor of the scores; key dim ** -0.5 if `None`.
        sliding_window: last positions that a query sees through a window, its own included; the
            model's if `None`.
        softcap: c in c * tanh(score / c), as Gemma 2 has it.
        s_aux: [query heads], attention sinks: a score each that takes part in the softmax only.

    Returns:
        [batch, tokens, query heads, value dim], and `None` for the weights.

    Raises:
        ValueError: if the weights are asked for, or the model adds a bias to the scores.
    """
    if attention_mask is None or attention_mask.dtype != torch.int32:
        if len(key) != len(query):
            raise ValueError(
                f"{type(module).__name__} makes its mask by itself, which PATCache does not "
                "support. Use DynamicCache for this model."
            )
        if s_aux is not None or softcap is not None:
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            options = scaling, softcap, s_aux, kwargs.get("dropout", 0.0)
            return _dense(query, key, value, attention_mask, *options), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    if kwargs.get("output_attentions"):
        raise ValueError(
            '"pat" never holds the attention weights. Load the model with '
            'attn_implementation="eager" for output_attentions=True.'
        )
    if kwargs.get("position_bias") is not None:
        raise ValueError(
            f"{type(module).__name__} adds a position bias to the scores, which PATCache does "
            "not support. Use DynamicCache for this model."
        )
    windowed = attention_mask.shape[1] > 1
    if windowed and sliding_window is None:
        sliding_window = module.config.sliding_window
    out = attention(
        query.to(key.dtype),  # they differ under autocast
        key,
        value,
        attention_mask[:, :1],
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window if windowed else None,
        softcap=softcap,
        sinks=s_aux,
    )
    return out, None


def _dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Attention over dense K and V with what sdpa lacks: a soft-cap, sinks.

    Args:
        query: [batch, query heads, tokens, dim].
        key, value: [batch, kv heads, length, dim].
        mask: [batch, 1, tokens, length], bool, `True` to attend, or to be added to the scores;
            `None` for plain causal.
        dropout: share of the weights that are left out.

    Returns:
        [batch, tokens, query heads, dim].
    """
    key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = scores.new_ones(scores.shape[2:], dtype=torch.bool)
        mask = mask.tril(key.shape[2] - query.shape[2])
    if mask.is_floating_point():
        scores = scores + mask
    else:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        sinks = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    weights = torch.nn.functional.dropout(weights, dropout)
    return (weights @ value).transpose(1, 2).contiguous()


def pat_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    local_size: int | None = None,
    config: PretrainedConfig | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The plan of a forward on a PATCache; the mask of sdpa without one.

    Args:
        kv_length: from a PATCache, an int that carries the cache.
        local_size: tokens in the window that the mask is for, or in its chunks.
        config: of the model.
        others: as Transformers passes them to every mask function.

    Returns:
        int32 [1, 1, ., .]; for a window the same memory twice, [1, 2, ., .].

    Raises:
        ValueError: if the mask is anything else than causal, with or without a window.
    """
    cache = getattr(kv_length, "cache", None)
    if cache is not None:
        usual = causal_mask_function
        if local_size is not None and local_size == getattr(config, "sliding_window", None):
            usual = sliding_window_causal_mask_function(local_size)
        if not _alike(mask_function, usual):
            raise ValueError(
                "This model changes the causal mask (chunks, bidirectional blocks or the like), "
                "which PATCache does not support. Use DynamicCache for this input."
            )
        windowed = local_size is not None
        plan = cache.begin(batch_size, q_length, attention_mask, torch.device(device), windowed)
        return plan.expand(-1, 2, -1, -1) if windowed else plan
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        device=device,
        local_size=local_size,
        config=config,
        **kwargs,
    )


def _alike(a: Any, b: Any) -> bool:
    """Whether two mask functions are made of the same parts."""
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(_alike, a, b))
    if not callable(a) or not callable(b):
        return a is b or (isinstance(a, int) and a == b)
    parts = [[cell.cell_contents for cell in x.__closure__ or ()] for x in (a, b)]
    return a.__code__ is b.__code__ and all(map(_alike, *parts))


def register() -> None:
    """Makes `attn_implementation="pat"` known to Transformers, with its mask function."""
    AttentionInterface.register("pat", pat_attention)
    AttentionMaskInterface.register("pat", pat_mask)
