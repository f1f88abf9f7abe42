"""Where `generate()` is taken over for a PATCache; other caches go the stock way."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import EosTokenCriteria, StoppingCriteriaList, utils

from pat_hf import adapters, rotary
from pat_hf.cache.compilation import compile_for
from pat_hf.cache.pat_cache import TOLD, PATCache
from pat_hf.graphs import Decoder
from pat_hf.prefill import prefill
from pat_hf.support import surely

_served: weakref.WeakKeyDictionary[PreTrainedModel, set[object]] = weakref.WeakKeyDictionary()
_lock = threading.RLock()
_PLAIN = TOLD | {"inputs_embeds"}  # arguments of a prefill whose tokens tell K and V


def install() -> None:
    """Lets `generate()` prefill a PATCache through `prefill` and run its steps through the cache.

    Raises:
        ImportError: if this version of Transformers has no such steps to take over.
    """
    ours = {
        "_prefill": _prefill,
        "_sample": _sample,
        "_assisted_decoding": _assisted_decoding,
        "generate": _generate,
    }
    stock = {name: getattr(GenerationMixin, name, None) for name in ours}
    expected = ["self", "input_ids", "generation_config", "model_kwargs", "is_first_iteration"]
    if None in stock.values() or list(inspect.signature(stock["_prefill"]).parameters) != expected:
        import transformers

        raise ImportError(
            f"pat_hf can't hook into generate() of transformers {transformers.__version__}; "
            "pip install 'transformers>=5.16,<5.24'."
        )
    if hasattr(stock["_prefill"], "_pat_hf"):
        return
    for name, function in ours.items():
        setattr(GenerationMixin, name, _around(stock[name], function))
    if check := getattr(utils, "DeferredStopCheck", None):  # from 5.17 on
        check.is_supported = staticmethod(_around(check.is_supported, _is_supported))
    if choose := getattr(PreTrainedModel, "_check_and_adjust_attn_implementation", None):
        setattr(PreTrainedModel, choose.__name__, _around(choose, _choose_attention))


def _around(stock: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """`ours`, which is given `stock` first, in its place."""

    @functools.wraps(stock)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return ours(stock, *args, **kwargs)

    replacement._pat_hf = True
    return replacement


def _choose_attention(
    stock: Callable[..., Any], model: PreTrainedModel, *args: Any, **kwargs: Any
) -> str:
    """What attention a model has: where it is made with ours, the kernels are compiled while its
    weights are loaded, from when PyTorch first uses a GPU."""
    name = stock(model, *args, **kwargs)
    if name == "pat" and kwargs.get("is_init_check") and torch.version.cuda:
        with suppress(Exception):  # a PATCache will have compiled what can't be told here
            config = model.config.get_text_config(decoder=True)
            if model.can_generate() and config.dtype:
                compile_for(config, config.dtype)
    return name


def _prefill(
    stock: Callable[..., Any],
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    is_first_iteration: bool = True,
) -> Any:
    cache = model_kwargs.get("past_key_values")
    if not isinstance(cache, PATCache):
        return stock(model, input_ids, generation_config, model_kwargs, is_first_iteration)
    if cache.own_loop:  # which may come by here alone
        cache.check(model)
    _refuse(model_kwargs)
    steps = max(0, generation_config.max_length - input_ids.shape[1] - 1)
    cache.arm(Decoder(model, cache.decode, steps, not generation_config.disable_compile))
    mask, embeds = (model_kwargs.get(x) for x in ("attention_mask", "inputs_embeds"))
    reason, opaque = _unshareable(model, cache, input_ids, model_kwargs)
    whole = embeds is not None or _whole(input_ids, mask, generation_config)
    if whole and reason is None:
        embeds = embeds if is_first_iteration else None
        chunk = generation_config.prefill_chunk_size
        out = prefill(model, cache, input_ids, mask, chunk, steps, embeds)
    else:  # for the requests that are stored, unless the prompts come whole
        if whole:
            positions = model_kwargs.get("position_ids")
            if cache.get_seq_length() and positions is not None and positions.ndim == 3:
                raise ValueError(
                    f"{type(model).__name__} numbers tokens by the images before them, and a loop "
                    "of one's own numbers these as if they came behind what this PATCache holds. "
                    "Call clear() on the cache first, or make a new one."
                )
            cache.share_nothing(reason, opaque)
        elif opaque:
            cache.opaque, cache.fallback = True, reason
        out = stock(model, input_ids, generation_config, model_kwargs, is_first_iteration)
    cache.stop_at(getattr(generation_config, "_stops", ()))
    cache.look_ahead()
    return out


def _sample(stock: Callable[..., Any], model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    names = "generation_config", "stopping_criteria", "logits_processor", "past_key_values"
    config, criteria, processors, cache = map(kwargs.get, names)
    if isinstance(cache, PATCache) and config and criteria:
        # `_prefill` is not given the criteria. A loop of one's own may go on behind the ends.
        config._stops = () if cache.own_loop else _stops(config, criteria, processors or ())
    return stock(model, *args, **kwargs)


def _assisted_decoding(
    stock: Callable[..., Any],
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    cache = kwargs.get("past_key_values")
    if isinstance(cache, PATCache) and len(input_ids) == 1:  # more are refused
        config, mask = kwargs["generation_config"], kwargs.get("attention_mask")
        if not _whole(input_ids, mask, config):
            raise ValueError(
                "Assisted decoding and prompt lookup look at the whole prompt, and were given "
                "only what is new in it. Pass all of its tokens."
            )
        own = inspect.signature(stock).parameters
        inputs = {name: x for name, x in kwargs.items() if name not in own}
        _refuse(inputs)
        drafted = config.prompt_lookup_num_tokens or config.num_assistant_tokens or 0
        steps = config.max_length - input_ids.shape[1] + drafted
        decoder = Decoder(model, "eager", steps)
        decoder.reason = "assisted decoding"
        cache.arm(decoder)
        reason, opaque = _unshareable(model, cache, input_ids, inputs)
        if reason is None and inputs.get("inputs_embeds") is not None:
            reason, opaque = "assisted decoding is fed embeddings with its first candidates", True
        if reason is None and rotary.regime(cache.rotaries, config.max_length):
            reason = "its rotary frequencies follow the length of the batch, candidates included"
            opaque = True
        ids, seen = input_ids[:, :-1], None if mask is None else mask[:, :-1]
        if reason is not None:
            cache.share_nothing(reason, opaque)
        elif ids.numel() and (seen is None or seen.any()):
            # The first step has no prefill before it. It is fed the whole prompt, which ends with
            # the one token that is not stored.
            prefill(model, cache, ids, seen, config.prefill_chunk_size, steps)
            cache.repeated = True
        else:
            cache.forget()
    return stock(model, input_ids, *args, **kwargs)


def _generate(stock: Callable[..., Any], model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, PATCache):
        return stock(model, *args, **kwargs)
    if kwargs.get("cache_implementation") == "paged":
        raise ValueError(
            "cache_implementation='paged' is continuous batching, which would not use this "
            "PATCache. Leave one of them out."
        )
    with cache.in_use():
        cache.check(model)
        # Text alone, as a processor says it. Elsewhere, 0 is a type of tokens like any other.
        kinds = "token_type_ids" if "gemma3" in model.config.model_type else "mm_token_type_ids"
        if not model.training and torch.is_tensor(kwargs.get(kinds)) and not kwargs[kinds].any():
            kwargs = {name: x for name, x in kwargs.items() if name != kinds}
        cache.own_loop = kwargs.get("custom_generate") is not None
        given = (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
        ids = next((x for x in given if x is not None), None)
        whole = ids is None or _whole(ids, kwargs.get("attention_mask"))
        if not (whole or cache.own_loop or cache.get_seq_length()):
            raise ValueError(
                "attention_mask covers more tokens than are given, and this PATCache holds none: "
                "it is new, or was emptied. Pass all tokens of the prompts."
            )
        cache.anew = whole and not cache.own_loop
        try:
            with serving(model):
                return stock(model, *args, **kwargs)
        finally:
            cache.disarm()


def _is_supported(
    stock: Callable[..., bool], device: torch.device, cache: Any, *args: Any, **kwargs: Any
) -> bool:
    # Replays are queued ahead of the device, and a PATCache can take a step back.
    ours = isinstance(cache, PATCache) and cache.defer_stops()
    return ours or stock(device, cache, *args, **kwargs)


def _stops(
    config: GenerationConfig, criteria: StoppingCriteriaList, processors: Iterable[object]
) -> Sequence[int]:
    """Ids after which nothing more is made of a request: nobody is given its scores."""
    if config.output_scores or config.output_logits or config.output_hidden_states:
        return ()
    # One of the user's may make one row's scores of another's.
    if any(not type(x).__module__.startswith("transformers.") for x in processors):
        return ()
    # A call's own criterion takes the place of the config's; one of a derived class may wait.
    return [i for x in criteria if type(x) is EosTokenCriteria for i in x.eos_token_id.tolist()]


@contextmanager
def serving(model: PreTrainedModel) -> Iterator[None]:
    """For its length, forwards of `model` on a PATCache go through the cache's `run`.

    Blocks may overlap, in several threads; the model is as before when the last one ends.
    """
    block = object()
    try:
        with _lock:
            blocks = _served.setdefault(model, set())
            blocks.add(block)
            if len(blocks) == 1:
                model.forward = _Switch(model)
        yield
    finally:
        surely(lambda: _leave(model, block))


def _leave(model: PreTrainedModel, block: object) -> None:
    with _lock:
        blocks = _served.setdefault(model, set())
        blocks.discard(block)
        if not blocks and isinstance(model.forward, _Switch):
            if model.forward.own is None:
                del model.forward
            else:
                model.forward = model.forward.own


class _Switch:
    """The model's forward, or the cache's `run` of it where there is a PATCache.

    An object: a copy of the model that is made meanwhile gets one for its own forward.
    """

    def __init__(self, model: PreTrainedModel):
        # Accelerate, for one, may have given the model a forward of its own. A copy of a model that
        # was served has a switch that nobody took away.
        forward, own = model.forward, vars(model).get("forward")
        if isinstance(forward, _Switch):
            forward, own = forward.forward, forward.own
        functools.update_wrapper(self, forward)
        self.forward, self.own = forward, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, PATCache):
            return cache.run(self.forward, args, kwargs)
        return self.forward(*args, **kwargs)


def _refuse(model_kwargs: dict[str, Any]) -> None:
    """Raises a ValueError for what no PATCache can give."""
    if model_kwargs.get("use_cache") is False:
        raise ValueError(
            "use_cache=False with a PATCache: the cache would not be used. Leave one of them out."
        )
    if model_kwargs.get("output_attentions"):
        raise ValueError(
            '"pat" never holds the attention weights. Load the model with '
            'attn_implementation="eager" for output_attentions=True.'
        )


def _unshareable(
    model: PreTrainedModel, cache: PATCache, input_ids: torch.Tensor, model_kwargs: dict[str, Any]
) -> tuple[str | None, bool]:
    """Why these prompts can't share, if so; and whether their tokens don't tell their K and V."""
    if reason := _opaque(model, cache, input_ids, model_kwargs):
        return reason, True
    if model_kwargs.get("output_hidden_states"):
        return "output_hidden_states asks for the states of all prompt tokens", False
    return None, False


def _opaque(
    model: PreTrainedModel, cache: PATCache, input_ids: torch.Tensor, model_kwargs: dict[str, Any]
) -> str | None:
    others = [
        name for name, x in model_kwargs.items() if name not in _PLAIN and not _says_nothing(x)
    ]
    if others:
        return f"{', '.join(others)} may make equal tokens differ"
    given, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    if given is None and mask is not None and not mask.all():
        return "the model's forward takes no position_ids, so that padding is numbered, too"
    if given is not None:
        if mask is None:
            usual = torch.arange(given.shape[-1], device=given.device).expand(given.shape[-2:])
            real = torch.ones_like(usual, dtype=torch.bool)
        else:
            usual, real = mask.long().cumsum(-1) - 1, mask.bool()
        # Some models number tokens several times over: in text, in time, in height, in width.
        if given.shape[-2:] != usual.shape or not (given == usual)[..., real].all():
            return "position_ids are not the tokens' numbers"
    if adapters.positional(cache.tuned):
        return "an adapter begins inside the prompts (aLoRA)"
    return _prepares(model, input_ids, model_kwargs)


def _prepares(
    model: PreTrainedModel, input_ids: torch.Tensor, model_kwargs: dict[str, Any]
) -> str | None:
    """What the model's own preparation changes, as PaliGemma's numbers of tokens."""
    if type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation:
        return None
    fed = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
    given, positions = model_kwargs.get("position_ids"), fed.get("position_ids")
    if given is not None and (positions is None or not torch.equal(positions, given)):
        return f"{type(model).__name__} has numbers of its own for tokens"
    known = _PLAIN | model_kwargs.keys()
    if added := [name for name, x in fed.items() if name not in known and not _says_nothing(x)]:
        return f"{type(model).__name__} adds {', '.join(added)}"
    return None


def _says_nothing(x: Any) -> bool:
    """Whether an argument of the forward, which a packed one is not given, is off or empty."""
    if x is None or x is False:
        return True
    return isinstance(x, (dict, list, tuple)) and not x


def _whole(
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
    generation_config: GenerationConfig | None = None,
) -> bool:
    """Whether the prompts come whole, and not only what is new in them."""
    if mask is not None:
        length = mask.shape[1]
    else:
        # Later versions of Transformers drop a mask of ones, and note how long it was.
        length = getattr(generation_config, "_mask_length", None) or 0
    return not length > input_ids.shape[1] > 0
