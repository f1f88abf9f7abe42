"""Which adapter computes a row: PEFT's layers inside a model, without importing PEFT."""

from __future__ import annotations

import functools
import sys
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from pat_hf.support import modules, unwrapped

BASE = "__base__"  # PEFT's name for no adapter
WRAPPERS = ("base_layer", "original_module")  # and for what an adapter was put around


def layers(model: nn.Module) -> list[nn.Module]:
    """The model's layers that hold adapters; none where PEFT isn't used."""
    if "peft" not in sys.modules:
        return []
    # A property in PEFT's layers; Transformers' models have a method of that name.
    return [
        module
        for module in modules(model)
        if isinstance(getattr(type(module), "disable_adapters", None), property)
    ]


def weights(model: nn.Module) -> set[str]:
    """What the parts of `layers` that hold adapters' weights are called."""
    return {name for x in layers(model) for name in (*x.adapter_layer_names, *x.other_param_names)}


def samples(tuned: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """One weight of each adapter, by its name: the same for as long as the adapter is.

    Args:
        tuned: from `layers`.
    """
    found: dict[str, nn.Parameter] = {}
    for layer in tuned:
        for kind in layer.adapter_layer_names:
            parts = getattr(getattr(layer, kind, None), "items", list)
            for name, part in parts():
                weights = part.parameters() if isinstance(part, nn.Module) else [part]
                # What is offloaded is made anew for each forward.
                kept = (x for x in weights if isinstance(x, nn.Parameter) and not x.is_meta)
                if name not in found and (weight := next(kept, None)) is not None:
                    found[name] = weight
    return found


def families(tuned: Sequence[nn.Module], batch: int) -> list[Hashable]:
    """What tells rows apart whose equal tokens have different K and V; `None`: no adapter.

    Args:
        tuned: from `layers`.
        batch: number of rows.

    Raises:
        ValueError: if a mixed batch names adapters for another number of rows.
    """
    if not tuned:
        return [None] * batch
    states = []
    for layer in tuned:
        names = _given(layer, "adapter_names")
        if names is not None and len(names) != batch:
            raise ValueError(
                f"adapter_names has {len(names)} names and the batch {batch} rows. Where "
                "num_return_sequences makes rows, repeat the prompts and names yourself instead. "
                "If this call named none, PEFT still has hooks on the model from one that failed: "
                "take these forward pre-hooks off the adapters' layers, or load the model anew."
            )
        known = {name: _state(layer, name) for name in set(names or [None])}
        states.append([known[name] for name in names or [None] * batch])
    rows = zip(*states, strict=True)
    return [row if any(row) else None for row in rows]


def positional(tuned: Sequence[nn.Module]) -> bool:
    """Whether adapters begin inside the prompts (aLoRA), so that tokens don't tell their K."""
    return any(_given(layer, "alora_offsets") is not None for layer in tuned)


def refuse_virtual_tokens(model: nn.Module) -> None:
    """Makes sure that no tokens unknown to `generate` are put before the prompts, or their keys.

    Args:
        model: a PEFT model, or one that is inside and may be running under it.

    Raises:
        ValueError: if its adapter puts some there, as in prompt tuning, or its layers have some of
            their own (LLaMA-Adapter).
    """
    # A PEFT model puts a method of its own into the one inside for the length of `generate()`.
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    wrapper = getattr(prepare, "__self__", None)
    config = getattr(wrapper, "active_peft_config", None)
    kind = config.peft_type.value if getattr(config, "is_prompt_learning", False) else None
    if "peft" in sys.modules and any(
        hasattr(x, "adaption_prompt") for x in modules(unwrapped(model))
    ):
        kind = "ADAPTION_PROMPT"
    if kind is not None:
        raise ValueError(
            f"PEFT's {kind} puts virtual tokens before the prompts, which PATCache does not "
            "support. Use DynamicCache for this adapter."
        )


@contextmanager
def only(tuned: Sequence[nn.Module], row: int) -> Iterator[None]:
    """Lets a forward of one row compute with the adapter of row `row` of a mixed batch."""

    def choose(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"adapter_names": [kwargs["adapter_names"][row]]}

    with ExitStack() as stack:
        for layer in tuned:
            if _given(layer, "adapter_names") is not None:
                # After PEFT's own hook, which puts the whole batch's names there.
                handle = layer.register_forward_pre_hook(choose, with_kwargs=True)
                stack.callback(handle.remove)
        yield


def _given(layer: nn.Module, name: str) -> Any:
    """What PEFT's hooks are going to pass to the layer as `name`."""
    given = None
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, functools.partial):
            given = hook.keywords.get(name, given)
    return given


def _state(layer: nn.Module, name: str | None) -> Hashable:
    """The adapters that act in a layer, with their factors and those merged into its weights."""
    if layer.disable_adapters:
        return ()
    names = [name] if name is not None else list(layer.active_adapters)
    factors = vars(layer).get("scaling", {})  # of LoRA
    acting = tuple((name, factors.get(name)) for name in names if name != BASE)
    merged = tuple(getattr(layer, "merged_adapters", ()))
    return ("merged", *merged) if merged else acting
