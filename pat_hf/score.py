"""Log-likelihoods of continuations: contexts and all that they share are computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from pat_hf import adapters, rotary
from pat_hf.cache.page_pool import PoolExhausted
from pat_hf.cache.pat_cache import PATCache, token_ids
from pat_hf.cache.prefix_tree import Node, common_prefix
from pat_hf.hooks import serving
from pat_hf.prefill import packed
from pat_hf.support import modules, unwrapped

_LOGITS = 1 << 26  # held at a time, in float32


class Scores(NamedTuple):
    """What an evaluation harness asks of every pair.

    Attributes:
        logprobs: float32 [pairs], log-probability of the continuation after its context.
        greedy: bool [pairs], whether greedy decoding would have given it.
    """

    logprobs: torch.Tensor
    greedy: torch.Tensor


class _Pair(NamedTuple):
    tokens: np.ndarray  # int64, all but the last: nothing follows that one
    targets: np.ndarray  # int64, the continuation


@torch.no_grad()
def loglikelihoods(
    model: PreTrainedModel,
    contexts: Sequence[Sequence[int] | torch.Tensor],
    continuations: Sequence[Sequence[int] | torch.Tensor],
    cache: PATCache | None = None,
) -> Scores:
    """How likely `model` finds each continuation after its context.

    Every distinct token goes through the model once, whichever pairs it is in and in whichever
    order they come; large sets go in parts of about `cache.prefill_tokens` distinct tokens, and
    tokens that are scored in two parts, too.

    Args:
        model: a decoder-only model loaded with `attn_implementation="pat"`.
        contexts, continuations: token ids of each pair, at least one each: a text without a
            context follows the beginning-of-text token. Repeat a context for each of its
            continuations.
        cache: for its options, and for what it holds already; `None` for a new one.

    Returns:
        Sums of log-probabilities, and whether each token is the most likely one; on the CPU.

    Raises:
        ValueError: if the lists differ in length, or one of the pairs lacks tokens, or has some
            that the model doesn't know. Or if an adapter adds virtual tokens or begins inside the
            prompts, or the model numbers tokens by its padding token.
        PoolExhausted: if a single pair doesn't fit into the cache's `max_tokens`.
    """
    _refuse(model)
    model = unwrapped(model)
    cache = PATCache(model) if cache is None else cache
    with cache.in_use():
        return _scores(model, cache, contexts, continuations)


def _refuse(model: PreTrainedModel) -> None:
    adapters.refuse_virtual_tokens(model)
    adapter = getattr(model, "active_peft_config", None)
    acts = not getattr(model, "_adapters_disabled", False)
    if acts and getattr(adapter, "alora_invocation_tokens", None):
        raise ValueError(
            "An aLoRA adapter begins inside the prompts, which loglikelihoods() does not support. "
            "Score with the model's own forward."
        )
    if any(hasattr(x, "create_position_ids_from_input_ids") for x in modules(unwrapped(model))):
        raise ValueError(
            f"{type(model).__name__} numbers tokens by its padding token, which loglikelihoods() "
            "does not support. Score with the model's own forward."
        )


def _scores(
    model: PreTrainedModel, cache: PATCache, contexts: Sequence, continuations: Sequence
) -> Scores:
    cache.check(model)
    pairs = _pairs(contexts, continuations, cache.config.vocab_size)
    # Big-endian bytes sort as the ids do: what shares a prefix comes together.
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].tokens.astype(">i8").tobytes())
    # A pair is scored with the rotary frequencies that it has alone; dynamic ones only grow.
    regimes: dict[str | None, list[int]] = {}
    for i in order:
        regime = rotary.regime(cache.rotaries, len(pairs[i].tokens), remembered=False)
        regimes.setdefault(regime, []).append(i)
    scores = _unfilled(len(pairs))
    try:
        with serving(model):
            for alike in sorted(regimes.values(), key=lambda group: len(pairs[group[0]].tokens)):
                for group in _groups(pairs, alike, cache.prefill_tokens):
                    _score(model, cache, pairs, group, scores)
    finally:
        cache.stored()
    return scores


def _pairs(contexts: Sequence, continuations: Sequence, vocabulary: int) -> list[_Pair]:
    if len(contexts) != len(continuations):
        raise ValueError(
            f"{len(contexts)} contexts and {len(continuations)} continuations: they are pairs. "
            "Repeat a context for each of its continuations."
        )
    pairs = []
    for i, each in enumerate(zip(contexts, continuations, strict=True)):
        context, targets = (
            token_ids(x, f"{name} {i}", vocabulary)
            for x, name in zip(each, ("Context", "Continuation"), strict=True)
        )
        pairs.append(_Pair(np.concatenate([context, targets[:-1]]), targets))
    return pairs


def _unfilled(count: int) -> Scores:
    """For `count` scores."""
    dtypes = torch.float32, torch.bool
    return Scores(*(torch.empty(count, dtype=dtype, device="cpu") for dtype in dtypes))


def _groups(pairs: list[_Pair], order: list[int], most: int) -> Iterator[list[int]]:
    """Neighbours that have up to `most` distinct tokens together, beyond the group before."""
    group, count, before = [], 0, np.empty(0, np.int64)
    for i in order:
        tokens = pairs[i].tokens
        new = len(tokens) - common_prefix(before, tokens)
        if group and count + new > most:
            yield group
            group, count = [], 0
        group.append(i)
        count, before = count + new, tokens
    if group:
        yield group


def _score(
    model: PreTrainedModel,
    cache: PATCache,
    pairs: list[_Pair],
    group: list[int],
    scores: Scores,
) -> None:
    """Fills in the scores of a group."""
    lengths = np.array([len(pairs[i].tokens) for i in group])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = np.concatenate([pairs[i].tokens for i in group])
    try:
        missing = cache.admit(ids, mask)
    except PoolExhausted:
        if len(group) == 1 and not len(cache.prefixes):
            raise
        if len(group) == 1:
            cache.batch_select_indices(torch.arange(0))  # what it holds is in the way
        half = len(group) // 2
        for part in filter(None, (group[:half], group[half:])):
            _score(model, cache, pairs, part, scores)
        return

    tree = cache.prefixes.preorder()
    wanted, row = _wanted(cache, tree.nodes, [len(pairs[i].targets) for i in group])
    target = torch.from_numpy(np.concatenate([pairs[i].targets for i in group]))
    by_row = np.argsort(row, kind="stable")
    row = row[by_row]
    values, hits = _unfilled(len(row))
    done = first = 0
    most = max(1, _LOGITS // cache.config.vocab_size)
    for logits in packed(model, cache, tree, missing, wanted, most=most):
        last = int(np.searchsorted(row, done + len(logits)))
        here = torch.from_numpy(by_row[first:last])
        rows = torch.from_numpy(row[first:last] - done).to(logits.device)
        asked = target[here].to(logits.device)
        logits = logits.float()
        hits[here] = (logits.argmax(-1)[rows] == asked).cpu()
        values[here] = (logits[rows, asked] - logits.logsumexp(-1)[rows]).cpu()
        done, first = done + len(logits), last
    at = 0
    for i in group:
        part = slice(at, at + len(pairs[i].targets))
        scores.logprobs[i], scores.greedy[i] = values[part].double().sum(), hits[part].all()
        at = part.stop


def _wanted(
    cache: PATCache, nodes: list[Node], counts: list[int]
) -> tuple[dict[Node, np.ndarray], np.ndarray]:
    """The tokens whose logits are wanted: each request's last `counts`.

    Returns:
        Their numbers in their nodes, ascending; and for all requests, one after the other, which
        of them in the order of the tree each target is scored with, int64 [sum of counts].
    """
    spans = []  # (node, first, end) inside it
    for request, count in enumerate(counts):
        begin = cache.prefixes.length(request) - count
        for node in cache.prefixes.path(request):
            if node.end > begin:
                spans.append((node, max(begin - node.start, 0), node.length))
    asked: dict[Node, np.ndarray] = {}
    for node, first, end in spans:
        asked.setdefault(node, np.zeros(node.length, bool))[first:end] = True
    number, total = {}, 0
    for node in nodes:
        if node in asked:
            number[node] = total + np.cumsum(asked[node]) - 1
            total = int(number[node][-1]) + 1
    rows = np.concatenate([number[node][first:end] for node, first, end in spans])
    return {node: np.flatnonzero(which) for node, which in asked.items()}, rows
