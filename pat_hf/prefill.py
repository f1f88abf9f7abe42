"""Tree prefill: the distinct tokens of a batch of prompts go through the model once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from pat_hf import adapters
from pat_hf.cache.page_pool import SINK
from pat_hf.cache.pat_cache import PATCache, Step

logger = logging.get_logger(__name__)

# What `_prefill` may be given beside the prompts without it mattering to a packed forward.
_PLAIN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


def prefill(
    model: PreTrainedModel,
    cache: PATCache,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    chunk: int | None = None,
    ahead: int = 0,
) -> CausalLMOutputWithPast:
    """Makes the prompts the batch of `cache`, computing only tokens that it doesn't hold.

    The tokens of all nodes are packed into rows of one sequence, each at its own position and
    each attending to its own prefix; those of different adapters into one each.

    Args:
        model: the model that `cache` is for.
        input_ids: int64 [batch, columns], padded on the left.
        attention_mask: [batch, columns] of 0 and 1; `None` if nothing is padding.
        chunk: tokens in a forward; the cache's `prefill_tokens` if `None`.
        ahead: tokens that each request is going to generate, to reserve pages for.

    Returns:
        Logits of each prompt's last token [batch, 1, vocabulary], and the cache.

    Raises:
        ValueError: if the prompts are padded anywhere but on the left, or empty, or the mask
            doesn't fit them.
        PoolExhausted: if they don't fit into `max_tokens`.
    """
    ids = input_ids.cpu().numpy()
    mask = _checked_mask(cache, ids, attention_mask)
    missing = set(cache.admit(ids, mask, ahead))
    order = cache.prefixes.preorder()

    token, position, node, page, slot = [], [], [], [], []
    row_of = {}  # the row whose logits continue the requests that end at a node
    rows = 0
    request_of = {cache.prefixes.root(r): r for r in range(len(cache.prefixes))}
    bounds: dict[int, int] = {}  # where the rows of a root begin: one of its requests
    size = cache.pool.page_size
    for index, each in enumerate(order.nodes):
        if each.start == 0:
            root = each.parent
        if each in missing:
            inside = np.arange(each.length)
            token.append(each.tokens)
            page.append(np.array(each.pages)[inside // size])
            slot.append(inside % size)
        elif each.requests:
            # All of this prompt is stored. Its last token goes through again for its logits.
            inside = np.array([each.length - 1])
            token.append(each.tokens[-1:])
            page.append(np.array([SINK]))
            slot.append(np.array([0]))
        else:
            continue
        bounds.setdefault(request_of[root], rows)
        position.append(each.start + inside)
        node.append(np.full(len(inside), index, np.int32))
        rows += len(inside)
        if each.requests:
            row_of[each] = rows - 1
    token, position, node, page, slot = map(np.concatenate, (token, position, node, page, slot))

    device = input_ids.device
    ends = np.array(list(row_of.values()))
    chunk = chunk or cache.prefill_tokens
    logits = []
    try:
        for first, stop, request in _parts(bounds, rows, chunk):
            part = slice(first, stop)
            plan = cache.plan(order, node[part], position[part], device, ahead=0)
            cache.announce(Step(plan, device, 1, stop - first, page[part], slot[part], columns=0))
            wanted = ends[(ends >= first) & (ends < stop)] - first
            with adapters.only(cache.tuned, request):
                logits.append(_logits(model, cache, token[part], position[part], wanted, device))
    except BaseException:
        cache.forget(missing)  # nodes without K and V must not be taken for stored ones
        raise
    finally:
        cache.announce(None)
    distinct = {end: i for i, end in enumerate(row_of)}
    request = torch.tensor([distinct[end] for end in cache.prefixes.ends], device=device)
    logits = torch.cat(logits)
    return CausalLMOutputWithPast(
        logits=logits.index_select(0, request.to(logits.device))[:, None],
        past_key_values=cache,
    )


def _parts(bounds: dict[int, int], rows: int, chunk: int) -> Iterator[tuple[int, int, int]]:
    """Rows of one forward each, from and to, and a request that has their adapter."""
    stops = [*bounds.values(), rows][1:]
    for (request, begin), stop in zip(bounds.items(), stops, strict=True):
        for first in range(begin, stop, chunk):
            yield first, min(first + chunk, stop), request


def _logits(
    model: PreTrainedModel,
    cache: PATCache,
    token: np.ndarray,
    position: np.ndarray,
    wanted: np.ndarray,
    device: torch.device,
) -> torch.Tensor:
    """One packed forward; logits [len(wanted), vocabulary] of the wanted rows."""
    inputs = {
        "input_ids": torch.from_numpy(token)[None].to(device),
        "position_ids": torch.from_numpy(position)[None].to(device),
    }
    keep = torch.from_numpy(wanted).to(device)
    few = model._supports_logits_to_keep()
    if few:
        # Not every model takes an empty choice.
        inputs["logits_to_keep"] = keep if len(wanted) else keep.new_zeros(1)
    out = model(**inputs, past_key_values=cache, use_cache=True, return_dict=True).logits[0]
    return out[: len(wanted)] if few else out[keep.to(out.device)]


def _checked_mask(
    cache: PATCache, ids: np.ndarray, attention_mask: torch.Tensor | None
) -> np.ndarray:
    """The mask as bool [batch, columns], once it is known to make sense."""
    if attention_mask is None:
        mask = np.ones(ids.shape, bool)
    elif tuple(attention_mask.shape) != ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} and input_ids {ids.shape}; "
            "they must be the same. Pass the tokenizer's output whole: generate(**inputs)."
        )
    else:
        values = attention_mask.cpu().numpy()
        if not np.isin(values, (0, 1)).all():
            raise ValueError(
                f"attention_mask holds {np.unique(values)[:5]}; only 1 (token) and 0 (padding) "
                "have a meaning here."
            )
        mask = values.astype(bool)
    if not mask.any(1).all():
        empty = np.flatnonzero(~mask.any(1)).tolist()
        raise ValueError(
            f"Prompts {empty} are empty: no token to continue. Give each at least one, the "
            "beginning-of-text token for instance."
        )
    if not mask[:, -1].all():
        rows = np.flatnonzero(~mask[:, -1]).tolist()
        raise ValueError(
            f"Prompts {rows} are padded on the right; generation continues their last column. "
            'Set tokenizer.padding_side = "left".'
        )
    # What an earlier call generated, the last token not yet fed, may be padded behind its end.
    new = mask.copy()
    if stored := cache.get_seq_length():
        new[:, : stored + 1] = True
    first = mask.argmax(1)
    holes = ~new & (np.arange(mask.shape[1]) > first[:, None])
    if holes.any():
        row, column = np.argwhere(holes)[0].tolist()
        raise ValueError(
            f"Prompt {row} has padding at column {column}, between its tokens. Padding belongs "
            'in front: tokenize the whole text with padding_side="left".'
        )
    return mask


def install() -> None:
    """Lets `generate()` prefill a PATCache through `prefill`; other caches go the stock way.

    Raises:
        ImportError: if this version of Transformers has no such step to take over.
    """
    stock = getattr(GenerationMixin, "_prefill", None)
    expected = ["self", "input_ids", "generation_config", "model_kwargs", "is_first_iteration"]
    if stock is None or list(inspect.signature(stock).parameters) != expected:
        import transformers

        raise ImportError(
            f"pat_hf can't hook into generate() of transformers {transformers.__version__}; "
            "pip install 'transformers>=5.16,<5.24'."
        )
    if getattr(stock, "_pat_hf", False):
        return

    @functools.wraps(stock)
    def _prefill(
        self: PreTrainedModel,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, PATCache):
            return stock(self, input_ids, generation_config, model_kwargs, is_first_iteration)
        cache.check(self)
        cache.watch(self)
        reason = _unshareable(input_ids, model_kwargs)
        if reason is None and adapters.positional(cache.tuned):
            reason = "an adapter begins inside the prompts (aLoRA)"
        if reason is not None:
            embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
            given = input_ids if embeds is None else embeds
            if mask is None or mask.shape[1] == given.shape[1]:
                cache.clear()  # the whole texts are given, not what follows the last call's
            # Whatever may make equal tokens differ, nothing is shared with these.
            cache.fallback, cache.opaque = reason, True
            logger.warning_once(f"pat_hf computes each prompt on its own: {reason}.")
            return stock(self, input_ids, generation_config, model_kwargs, is_first_iteration)
        return prefill(
            self,
            cache,
            input_ids,
            model_kwargs.get("attention_mask"),
            generation_config.prefill_chunk_size,
            max(0, generation_config.max_length - input_ids.shape[1]),
        )

    _prefill._pat_hf = True
    GenerationMixin._prefill = _prefill

    assist = GenerationMixin._assisted_decoding

    @functools.wraps(assist)
    def _assisted_decoding(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if isinstance(cache, PATCache):
            # It has no prefill of its own, and feeds the whole prompt behind what is there.
            cache.check(self)
            cache.watch(self)
            cache.clear()
        return assist(self, *args, **kwargs)

    GenerationMixin._assisted_decoding = _assisted_decoding


def _unshareable(input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> str | None:
    """Why these prompts can't be packed by their token ids, if so."""
    if model_kwargs.get("use_cache") is False:
        raise ValueError(
            "use_cache=False with a PATCache: the cache would not be used. Leave one of them out."
        )
    if model_kwargs.get("output_attentions"):
        raise ValueError(
            '"pat" never holds the attention weights. Load the model with '
            'attn_implementation="eager" for output_attentions=True.'
        )
    if model_kwargs.get("output_hidden_states"):
        return "output_hidden_states asks for the states of all prompt tokens"
    others = [name for name, x in model_kwargs.items() if name not in _PLAIN and x is not None]
    if tensors := [name for name in others if isinstance(model_kwargs[name], torch.Tensor)]:
        return f"{', '.join(tensors)} may make equal tokens differ"
    given, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    if given is not None:
        if mask is None:
            usual = torch.arange(given.shape[-1], device=given.device).expand_as(given)
            real = torch.ones_like(given, dtype=torch.bool)
        else:
            usual, real = mask.long().cumsum(-1) - 1, mask.bool()
        if given.shape != usual.shape or not torch.equal(given[real], usual[real]):
            return "position_ids are not the tokens' numbers"
    return None
