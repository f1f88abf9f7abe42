"""Tree prefill: the distinct tokens of a batch of prompts go through the model once."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from pat_hf import adapters, rotary
from pat_hf.cache.page_pool import SINK
from pat_hf.cache.pat_cache import PATCache
from pat_hf.cache.prefix_tree import Node, Preorder
from pat_hf.cache.step import Step, staged
from pat_hf.last_layer import only_wanted


def prefill(
    model: PreTrainedModel,
    cache: PATCache,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    chunk: int | None = None,
    ahead: int = 0,
    inputs_embeds: torch.Tensor | None = None,
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
        inputs_embeds: [batch, columns, hidden size], in place of `input_ids`; what is equal to the
            bit is the same token.

    Returns:
        Logits of each prompt's last token [batch, 1, vocabulary], and the cache.

    Raises:
        ValueError: if the prompts are padded anywhere but on the left, or empty, or none, or the
            mask doesn't fit them.
        PoolExhausted: if they don't fit into `max_tokens`.
    """
    feed = None
    if inputs_embeds is None:
        ids = input_ids.cpu().numpy()
    else:
        ids, feed = _numbered(inputs_embeds)
    mask = _checked_mask(cache, ids, attention_mask)
    missing = cache.admit(ids, mask, ahead)
    last = {end: np.array([end.length - 1]) for end in cache.prefixes.ends}
    order = cache.prefixes.preorder()
    logits = torch.cat(list(packed(model, cache, order, missing, last, feed, chunk=chunk)))
    row_of = {end: row for row, end in enumerate(node for node in order.nodes if node in last)}
    # What `generate()` does next is queued before the device is through, so this must not wait.
    rows = _moved(np.array([row_of[end] for end in cache.prefixes.ends]), logits.device)
    return CausalLMOutputWithPast(
        logits=logits.index_select(0, rows)[:, None], past_key_values=cache
    )


def packed(
    model: PreTrainedModel,
    cache: PATCache,
    order: Preorder,
    missing: Iterable[Node],
    wanted: Mapping[Node, np.ndarray],
    feed: Callable[[np.ndarray], torch.Tensor] | None = None,
    *,
    chunk: int | None = None,
    most: int | None = None,
) -> Iterator[torch.Tensor]:
    """Computes tokens of the tree, and the logits of some of them, a chunk at a time.

    Args:
        order: the tree.
        missing: nodes to compute and store.
        wanted: nodes with the tokens, counted from the node's first and ascending, whose logits
            are wanted. Those that are stored already go through the model again.
        feed: gives the embeddings [any, hidden size] of ids; `None`: the model does.
        chunk: tokens in a forward; the cache's `prefill_tokens` if `None`.
        most: logits in a forward; `None`: any number.

    Yields:
        Logits [any, vocabulary] of the wanted tokens, in the order of the tree.
    """
    missing = set(missing)
    rows, ends, stops = _rows(cache, order, missing, wanted)
    count = rows.shape[1]
    device = _input_device(model)
    chunk = chunk or cache.prefill_tokens
    most = most or count
    if not model._supports_logits_to_keep():
        chunk = min(chunk, most)  # there will be logits for every token
    longest = max(node.end for node in order.nodes)
    first = done = 0
    try:
        while first < count:
            request, stop = next((r, b) for r, b in stops if b > first)
            stop = first + _even(stop - first, chunk)
            if done + most < len(ends):
                stop = min(stop, int(ends[done + most]))
            token, position, *_ = these = rows[:, first:stop]
            step_of = functools.partial(_step, cache, order, device, these)
            cache.announce(step_of)
            here = ends[done : np.searchsorted(ends, stop)] - first
            inputs = {"position_ids": _moved(position, device)[None]}
            if feed is None:
                inputs["input_ids"] = _moved(token, device)[None]
            else:
                inputs["inputs_embeds"] = feed(token)[None].to(device)
            with adapters.only(cache.tuned, request), rotary.of_length(cache.rotaries, longest):
                logits = _logits(model, cache, inputs, here, step_of)
            yield logits
            first, done = stop, done + len(here)
        cache.computed()
    finally:
        cache.announce(None)


def _even(count: int, most: int) -> int:
    """The first of as few forwards of at most `most` tokens as there can be, all about even.

    The device waits for the first one's plan, which takes the longer the more tokens it has.
    """
    even = -(-count // -(-count // most))
    return min(-(-even // 128) * 128, most, count)


def _rows(
    cache: PATCache, order: Preorder, missing: set[Node], wanted: Mapping[Node, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """What `packed` has to compute, as rows of one sequence in the order of the tree.

    Returns:
        Of each row its id, position and node, and the page and slot that it goes to: int64
        [5, rows]. The rows whose logits are wanted, int64, ascending. For each adapter a request
        that has it, and where its rows end.
    """
    rows, ends, count = [np.empty((5, 0), np.int64)], [np.empty(0, np.int64)], 0
    request_of = {cache.prefixes.root(r): r for r in range(len(cache.prefixes))}
    bounds: dict[int, int] = {}  # a request of each root: where the root's rows end
    for index, node in enumerate(order.nodes):
        if node.start == 0:
            root = node.parent
        if node in missing:
            inside = np.arange(node.length)
            places = cache.pool.places(node.pages, inside)
            ends.append(count + wanted.get(node, inside[:0]))
        elif node in wanted:
            inside = wanted[node]
            places = np.full_like(inside, SINK), np.zeros_like(inside)
            ends.append(count + np.arange(len(inside)))
        else:
            continue
        number = np.full_like(inside, index)
        rows.append(np.stack([node.tokens[inside], node.start + inside, number, *places]))
        count += len(inside)
        bounds[request_of[root]] = count
    return np.concatenate(rows, 1), np.concatenate(ends), list(bounds.items())


def _step(
    cache: PATCache,
    order: Preorder,
    device: torch.device,
    rows: np.ndarray,
    some: np.ndarray | slice = slice(None),
) -> Step:
    """The step of a forward of rows that `_rows` gives, or of some of them."""
    _, position, node, page, slot = rows[:, some]
    plans = cache.plans(order, node, position, device, ahead=0)
    step = Step(device, 1, len(node), [plan.shape for plan in plans])
    return step.load(plans, page, slot, columns=0)


def _moved(source: np.ndarray, device: torch.device) -> torch.Tensor:
    return staged(torch.from_numpy(source), device).to(device, non_blocking=True)


def _input_device(model: PreTrainedModel) -> torch.device:
    """Where the first layer computes, which with accelerate's offloading is not where it lies."""
    embeddings = model.get_input_embeddings()
    device = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return torch.device(next(embeddings.parameters()).device if device is None else device)


def _numbered(embeds: torch.Tensor) -> tuple[np.ndarray, Callable[[np.ndarray], torch.Tensor]]:
    """Embeddings [batch, columns, hidden size] as ids that no token has, and what turns them back.

    An id is 62 bits of a hash: the same in every call.
    """
    rows = embeds.detach().flatten(0, 1)
    raw = rows.contiguous().view(torch.uint8).cpu().numpy()
    digests = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in raw)
    ids = (np.frombuffer(digests, np.uint64) >> np.uint64(2)).astype(np.int64) | (1 << 62)
    distinct, first = np.unique(ids, return_index=True)

    def feed(asked: np.ndarray) -> torch.Tensor:
        return rows[torch.from_numpy(first[np.searchsorted(distinct, asked)]).to(rows.device)]

    return ids.reshape(embeds.shape[:2]), feed


def _logits(
    model: PreTrainedModel,
    cache: PATCache,
    inputs: dict[str, torch.Tensor],
    wanted: np.ndarray,
    step_of: Callable[[np.ndarray], Step],
) -> torch.Tensor:
    """One packed forward; logits [len(wanted), vocabulary] of the wanted rows."""
    # Not every model takes an empty choice.
    keep = wanted if len(wanted) else np.zeros(1, np.int64)
    positions = inputs["position_ids"]
    rows = _moved(keep, positions.device)
    few = model._supports_logits_to_keep()
    if few:
        # accelerate would move a tensor to the first layer's device, and the hidden states that it
        # picks from are on the last one's.
        inputs["logits_to_keep"] = keep if hasattr(model, "_hf_hook") else rows
    with only_wanted(cache, rows, positions.shape[-1], lambda: step_of(keep)):
        out = model(**inputs, past_key_values=cache, use_cache=True, return_dict=True).logits[0]
    return out[: len(wanted)] if few else out[wanted]


def _checked_mask(
    cache: PATCache, ids: np.ndarray, attention_mask: torch.Tensor | None
) -> np.ndarray:
    """The mask as bool [batch, columns], once it is known to make sense."""
    if not len(ids):
        raise ValueError(f"input_ids has shape {ids.shape}: no prompts. Give one or more.")
    if attention_mask is not None and tuple(attention_mask.shape) != ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} and input_ids {ids.shape}; "
            "they must be the same. Pass the tokenizer's output whole: generate(**inputs)."
        )
    if attention_mask is None or (attention_mask == 1).all():  # sooner told than copied
        mask = np.ones(ids.shape, bool)
    else:
        values = attention_mask.cpu().numpy()
        if not ((values == 0) | (values == 1)).all():
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
    cache.check_gaps(mask)
    return mask
