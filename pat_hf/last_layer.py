"""A prefill's last decoder layer: of most tokens, only K and V are needed from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from pat_hf.cache.pat_cache import PATCache
from pat_hf.cache.step import Step
from pat_hf.layers import Pages
from pat_hf.norms import fused
from pat_hf.support import has_hooks, hooked, is_compiled, modules

LEAST = 1024  # tokens that are to be spared: another plan takes the host milliseconds


class _Stored(BaseException):
    """K and V are stored, which was all that was wanted. No model's own handler is to have it."""


class _Unknown(Exception):
    """It can't be told what an argument has of each token."""


@contextmanager
def only_wanted(
    cache: PATCache,
    rows: torch.Tensor,
    count: int,
    make_step: Callable[[], Step],
) -> Iterator[None]:
    """For its length, a packed forward's last layer computes K and V of all tokens, and no more but
    for some of them. What it gives for the others is zeros.

    It makes no difference where the layer can't be told, is given more than what decoder layers
    usually are, or where hooks would see it.

    Args:
        rows: int64 [any], the tokens, ascending.
        count: tokens in the forward.
        make_step: gives the step of a forward of these tokens alone, which are stored already.
    """
    layer = _last(cache) if count - len(rows) >= max(LEAST, len(rows)) else None
    if layer is None:
        yield
        return
    announced, shortened = cache.step, False

    def before(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        nonlocal shortened
        if cache.step is not announced:  # an interrupt has left the hooks
            return None
        step = make_step()
        try:
            few = tree_map(lambda x: _of_rows(x, rows, count, cache, step), (args, kwargs))
        except _Unknown:
            return None
        args, kwargs = tree_map(_until_stored, (args, kwargs))
        try:
            with fused(cache.norms):
                type(layer).forward(layer, *args, **kwargs)
        except _Stored:
            shortened = True
            return few
        return None

    def after(out: Any) -> Any:
        if cache.step is not announced or not shortened:
            return None
        if torch.is_tensor(out):
            return _spread(out, rows, count)
        return (_spread(out[0], rows, count), *out[1:])

    with hooked(layer, before, after):
        yield


def _last(cache: PATCache) -> nn.Module | None:
    """The last decoder layer; `None` if it can't be told, or all that it gives may be seen."""
    if getattr(cache.config, "num_kv_shared_layers", None):
        return None  # it has no K and V of its own
    decoder = cache.model.get_decoder()
    for layers in decoder.children():
        if isinstance(layers, nn.ModuleList) and len(layers) == len(cache):
            break
    else:
        return None
    layer = layers[-1]
    if not isinstance(layer, GradientCheckpointingLayer):
        return None
    behind = (*cache.model.children(), decoder, *decoder.children())
    seen = [x for x in (*modules(layer), *behind) if x is not cache.model]
    if "_hf_hook" in vars(cache.model) or any("forward" in vars(x) for x in seen):
        return None
    return None if any(has_hooks(x) or is_compiled(x) for x in (cache.model, *seen)) else layer


def _until_stored(x: Any) -> Any:
    """An argument of the layer; a cache with which it ends once it has stored K and V."""
    if not isinstance(x, Cache):
        return x

    def update(*args: Any, **kwargs: Any) -> None:
        x.update(*args, **kwargs)
        raise _Stored

    twin = copy.copy(x)
    twin.update = update
    return twin


def _of_rows(x: Any, rows: torch.Tensor, count: int, cache: PATCache, step: Step) -> Any:
    """What an argument of the layer is for some of its tokens."""
    if isinstance(x, Cache):
        return Pages(cache.pool, step)
    if not torch.is_tensor(x):
        return x
    if x.dtype == torch.int32 and x.ndim == 4:  # the plan; of a window, if it is there twice
        windowed = x.shape[1] > 1
        return step.plan(windowed).expand(-1, 1 + windowed, -1, -1)
    dim = -2 if x.is_floating_point() or x.is_complex() else -1
    if x.ndim < -dim or x.shape[dim] != count:
        raise _Unknown
    return x.index_select(dim, rows)


def _spread(x: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """A layer's output [.., some tokens, dim] among zeros for the others."""
    return x.new_zeros(*x.shape[:-2], count, x.shape[-1]).index_copy_(-2, rows, x)
