"""Which models a PATCache can be for, and what it has to know of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _modules
from torch.nn.modules.dropout import _DropoutNd
from transformers import PretrainedConfig, PreTrainedModel

from pat_hf.kernels.plan import Heads


def supported_config(model: PreTrainedModel) -> PretrainedConfig:
    """The text decoder's config.

    Raises:
        TypeError: if `model` is not a Transformers model.
        ValueError: if its attention can't be taken over; the message says why.
    """
    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"PATCache takes the model it is for, as in PATCache(model), not a "
            f"{type(model).__name__}."
        )
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    others = set(getattr(config, "layer_types", None) or ())
    others -= {"full_attention", "sliding_attention"}
    if model._is_stateful and not others:
        others = {"recurrence"}
    shapes = {
        (layer.num_key_value_groups, getattr(layer, "head_dim", None))
        for layer in modules(model)
        if "num_key_value_groups" in vars(layer) and layer.config is config
    }
    if model.config.is_encoder_decoder:
        reason = "it is an encoder-decoder model"
    elif others:
        kinds = ", ".join(sorted(others))
        reason = f"it has layers of other kinds than full and sliding attention ({kinds})"
    elif not model._supports_attention_backend:
        reason = "it computes attention in code of its own, which can't be replaced"
    elif any(getattr(config, x, None) for x in ("add_cross_attention", "cross_attention_layers")):
        reason = "it has cross-attention"
    elif getattr(config, "keep_window_size", None):
        reason = "its mask follows from the values (dynamic mask attention)"
    elif len(shapes) > 1:
        reason = "its layers have heads of different numbers or dims"
    elif getattr(config, "is_causal", True) is False:
        reason = "its attention is not causal"
    elif config._attn_implementation != "pat":
        raise ValueError(
            f"PATCache needs the attention that reads its pages, and {name} has "
            f"attn_implementation={config._attn_implementation!r}. Load it with "
            'attn_implementation="pat", or call model.set_attn_implementation("pat").'
        )
    else:
        return config
    raise ValueError(
        f"PATCache can't hold {name}'s keys and values: {reason}. Use DynamicCache for this model."
    )


def modules(model: nn.Module) -> Iterator[nn.Module]:
    """What `model.modules()` yields, in its order, in half the time: every call looks."""
    found: set[nn.Module] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found.add(module)
            yield module
            waiting.extend(reversed(module._modules.values()))


def is_compiled(module: nn.Module) -> bool:
    """Whether its user has it go through torch.compile."""
    forward = vars(module).get("forward")
    forward = getattr(forward, "own", forward)  # while we serve it
    return module._compiled_call_impl is not None or hasattr(forward, "_torchdynamo_orig_callable")


def checkpoints(model: PreTrainedModel) -> bool:
    """Whether gradient checkpointing takes the cache from its layers, as in training mode."""
    return model.training and any(vars(x).get("gradient_checkpointing") for x in modules(model))


def drops_out(model: nn.Module) -> bool:
    """Whether a part of the model that is in training mode has dropout."""
    for module in modules(model):
        held = vars(module)
        rates = [held.get("p")] if isinstance(module, _DropoutNd) else []
        rates += [x for name, x in held.items() if "dropout" in name]
        if module.training and any(isinstance(x, float) and x > 0 for x in rates):
            return True
    return False


def has_hooks(module: nn.Module) -> bool:
    """Whether its user has something run with its forwards, or with all modules'."""
    for hook in (
        *_modules._global_forward_hooks.values(),
        *_modules._global_forward_pre_hooks.values(),
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
    ):
        # Ours are a prefill's.
        source = getattr(hook, "__module__", None) or ""
        if not (captures_outputs(hook) or source.startswith("pat_hf.")):
            return True
    return False


@contextmanager
def hooked(
    module: nn.Module,
    before: Callable[[tuple, dict[str, Any]], tuple[tuple, dict[str, Any]] | None],
    after: Callable[[Any], Any],
) -> Iterator[None]:
    """For its length, changes what `module` is given and what it gives in this thread.

    Args:
        before: takes its arguments; gives others, or `None`.
        after: takes its output; gives another, or `None`.
    """
    thread = threading.get_ident()

    # PyTorch may forget that a hook takes kwargs when another thread removes one of its own.
    def on_entry(module: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> Any:
        return before(args, kwargs) if threading.get_ident() == thread else None

    def on_exit(module: nn.Module, args: tuple, out: Any) -> Any:
        return after(out) if threading.get_ident() == thread else None

    with (
        module.register_forward_pre_hook(on_entry, with_kwargs=True),
        module.register_forward_hook(on_exit),
    ):
        yield


def surely(restore: Callable[[], None]) -> None:
    """Calls what puts things back, once more if Ctrl-C comes meanwhile: it may do things twice."""
    try:
        restore()
    except KeyboardInterrupt:
        restore()
        raise


def captures_outputs(hook: Callable[..., Any]) -> bool:
    """Whether a hook is Transformers' own: it notes hidden states, say, where they are asked for.

    They stay once they have been asked for.
    """
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def windowed(config: PretrainedConfig) -> bool:
    """Whether there are layers with windows."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    return "sliding_attention" in kinds if kinds else window is not None


def latent(config: PretrainedConfig) -> bool:
    """Whether layers store latents that K and V are expanded from."""
    return bool(getattr(config, "kv_lora_rank", None))


def heads_of(config: PretrainedConfig, dtype: torch.dtype) -> Heads:
    """The heads of its layers, with K and V in `dtype`."""
    query = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or query
    dim = getattr(config, "head_dim", None) or config.hidden_size // query
    # Where K and V differ; those that latents are expanded to.
    key, value = (getattr(config, x, None) or dim for x in ("qk_head_dim", "v_head_dim"))
    return Heads(query, kv, key, value, dtype.itemsize)


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The model inside the wrappers of torch.compile and PEFT."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model
