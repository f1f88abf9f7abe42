"""PATCache for code that calls `generate()` deep inside something else."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

from transformers import GenerationMixin, PreTrainedModel

from pat_hf.cache.pat_cache import PATCache
from pat_hf.support import unwrapped

_lock = threading.RLock()


class _Enabled(NamedTuple):
    """What an enabled model was given, and what it was before."""

    options: dict[str, Any]
    attention: str
    generate: Callable[..., Any] | None  # of its own, not its class's
    blocks: set[object]  # `enabled` for the length of these; none: until it is disabled


def enable(model: PreTrainedModel, **options: Any) -> None:
    """Gives every `model.generate()` that brings no cache of its own a fresh PATCache.

    Trainers and evaluation harnesses that call `generate()` themselves need no change. Does
    nothing if the model is enabled already. A deep copy of the model is enabled likewise.

    Args:
        model: a decoder-only model, with any attention implementation; it is switched to "pat".
        options: for `PATCache`; not `keep_bytes`.

    Raises:
        TypeError: if `model` is not a Transformers model.
        ValueError: if the model's attention can't be taken over, or it is enabled with other
            options than are given; the model is as before.
    """
    if not isinstance(unwrapped(model), PreTrainedModel):
        raise TypeError(f"enable() takes a Transformers model, not a {type(model).__name__}.")
    if options.get("keep_bytes") is not None:
        raise ValueError(
            "keep_bytes: enable() makes a cache for each call, since weights may change between "
            "two, so nothing is kept. Give generate() one PATCache(model, keep_bytes=...) instead."
        )
    if state := _state(model):
        if options and options != state.options:
            raise ValueError(
                f"This {type(model).__name__} is enabled with {state.options} already, and was "
                f"to be with {options}. Call disable() before."
            )
        model = _inner(model)
        own = getattr(model.generate, "__func__", None)
        if own is type(model).generate:  # as it comes back from a file
            model.generate = MethodType(_generate, model)
        return
    model = _inner(model)
    attention = model.config._attn_implementation
    model.set_attn_implementation("pat")
    try:
        PATCache(model, **options)
    except BaseException:
        model.set_attn_implementation(attention)
        raise
    model._pat_hf = _Enabled(options, attention, vars(model).get("generate"), set())
    # A bound method: a copy of the model gets one that is bound to the copy.
    model.generate = MethodType(_generate, model)


def disable(model: PreTrainedModel) -> None:
    """Undoes `enable`, without a trace; does nothing if the model isn't enabled."""
    model = _inner(model)
    if state := _state(model):
        del model.generate, model._pat_hf
        if state.generate is not None:
            model.generate = state.generate
        model.set_attn_implementation(state.attention)


@contextmanager
def enabled(model: PreTrainedModel, **options: Any) -> Iterator[PreTrainedModel]:
    """`enable` for the length of a `with` block; leaves a model that was enabled before so.

    Blocks may overlap, in several threads; the model is as before when the last one ends.

        with pat_hf.enabled(model):
            trainer.train()

    Args:
        model, options: as for `enable`.

    Raises:
        TypeError, ValueError: as `enable`.
    """
    block = object()
    with _lock:
        before = _state(model)
        enable(model, **options)
        if not before or before.blocks:
            _state(model).blocks.add(block)
    try:
        yield model
    finally:
        with _lock:
            state = _state(model)
            if state and block in state.blocks:
                state.blocks.remove(block)
                if not state.blocks:
                    disable(model)


def _inner(model: PreTrainedModel) -> PreTrainedModel:
    """The model inside torch.compile's wrapper, which hands on what it is given, but not all."""
    return getattr(model, "_orig_mod", model)


def _state(model: PreTrainedModel) -> _Enabled | None:
    return getattr(_inner(model), "__dict__", {}).get("_pat_hf")


@functools.wraps(GenerationMixin.generate)
def _generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    state = _state(model)
    generate = state.generate or MethodType(type(model).generate, model)
    # What `generate` itself would refuse together with a cache, or not use one for.
    given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    configs = given, model.generation_config
    for name, usual in (("use_cache", True), ("cache_implementation", "hybrid")):  # i.e. any
        asked = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
        if next((x for x in asked if x is not None), usual) != usual:
            return generate(*args, **kwargs)
    if kwargs.get("past_key_values") is None:
        kwargs["past_key_values"] = PATCache(model, **state.options)
    return generate(*args, **kwargs)
