"""PATCache: a Transformers cache that stores and reads every shared token once."""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.utils import logging

from pat_hf import adapters, rotary
from pat_hf.cache import archive
from pat_hf.cache.columns import Columns
from pat_hf.cache.compilation import compile_for
from pat_hf.cache.page_pool import PAGE_SIZE, SINK, HalfCopied, PagePool, PoolExhausted
from pat_hf.cache.prefix_tree import Node, PrefixTree, Preorder
from pat_hf.cache.report import Report, draw
from pat_hf.cache.step import KVLength, Step
from pat_hf.cache.store import Store
from pat_hf.cache.workspace import lease
from pat_hf.kernels.ops import backend
from pat_hf.kernels.plan import Machine, Nodes, OtherBlocks, Plan, make_plan
from pat_hf.norms import fused, rms_norms
from pat_hf.support import (
    checkpoints,
    drops_out,
    heads_of,
    modules,
    supported_config,
    unwrapped,
    windowed,
)

if TYPE_CHECKING:
    from pat_hf.graphs import Decoder

logger = logging.get_logger(__name__)

_MODES = ("auto", "eager", "captured", "compiled")
_AHEAD = 512  # new tokens of a request that pages are reserved for; longer answers add to them
# Arguments of a forward beside which ids and positions tell K and V.
TOLD = {
    "attention_mask",
    "input_ids",
    "logits_to_keep",
    "output_hidden_states",
    "past_key_values",
    "position_ids",
    "return_dict",
    "use_cache",
}
_BY_TOKEN = ("input_ids", "position_ids")  # arguments of a forward that name each of its tokens


def _surgery(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of `PATCache` that changes tree and pages.

    What breaks off halfway, by Ctrl-C say, leaves neither to be relied on.
    """

    @functools.wraps(method)
    def whole(cache: PATCache, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(cache, *args, **kwargs)
        except (PoolExhausted, ValueError, torch.OutOfMemoryError) as error:
            cache._broken |= isinstance(error, HalfCopied)
            raise  # else all is as it was
        except BaseException:
            cache._broken = True
            raise

    return whole


class _Scaled(NamedTuple):
    """A family whose keys have other rotary frequencies than the model's usual ones."""

    family: Hashable
    regime: str


class PATCache(Cache):
    """K and V of a batch as a prefix tree: every distinct token is stored and read once.

    Give it to `model.generate(**inputs, past_key_values=PATCache(model))`. It holds the batch of
    the last call; a call that follows reuses all tokens that its prompts share with that batch,
    and with what `keep_bytes` lets the cache keep of the calls before.

    K and V are those of the weights that computed them. Where PyTorch counts a change in place, as
    of most optimizers, the cache is emptied; after any other change of weights call `reset()`.
    Requests of different PEFT adapters share nothing. One thread at a time.

    Args:
        model: a decoder-only model loaded with `attn_implementation="pat"`.
        keep_bytes: K and V of earlier batches, prompts and answers, that stay stored: at most so
            many bytes in all layers, whole pages counted, the least recently used go first.
            Pinned prompts come on top. `None` keeps nothing but them.
        page_size: tokens in a page, a power of two from 16.
        max_tokens: limit of stored tokens, whole pages counted; `None` for the memory's own.
        prefill_tokens: prompt tokens that go through the model at a time.
        decode: how `generate()` runs decode steps on a GPU: "captured" as a CUDA graph at once,
            "compiled" by torch.compile before that (about 30 s, 4 to 6 for another batch size),
            "eager", or "auto": by the steps ahead. The report says what was chosen.

    Raises:
        TypeError: if `model` is not a Transformers model.
        ValueError: if the model's attention can't be taken over; the message says why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        keep_bytes: int | None = None,
        *,
        page_size: int = PAGE_SIZE,
        max_tokens: int | None = None,
        prefill_tokens: int = 8192,
        decode: str = "auto",
    ):
        if not isinstance(prefill_tokens, Integral) or prefill_tokens < 1:
            raise ValueError(
                f"prefill_tokens={prefill_tokens!r}: it must be a whole number of at least 1."
            )
        if decode not in _MODES:
            raise ValueError(f"decode={decode!r}: it must be one of {', '.join(_MODES)}.")
        self.config = supported_config(model)
        self.dtype = model.dtype
        self._model = weakref.ref(unwrapped(model))
        super().__init__(layers=[])
        self.prefill_tokens = prefill_tokens
        self.decode = decode
        self._workspace = lease(self.model, self)
        self.store = Store(page_size, max_tokens, keep_bytes, self._workspace.memory)
        self._decoder: Decoder | None = None
        self._broken = False  # a change was broken off
        self._stored_in: torch.dtype | None = None  # by layers, where plans had guessed another
        self._tuned: list[weakref.ref[nn.Module]] = []  # layers with adapters
        self._adapters: dict[str, weakref.ref[nn.Parameter]] = {}  # a weight of each so far
        self.rotaries = rotary.scaled(self.model)  # their frequencies follow the batch's length
        self.own_loop = True  # forwards, if there are any, are not those of Transformers' loops
        self.anew = False  # prompts that come whole are about to be numbered from their beginning
        self._mode: tuple[bool, bool] | None = None  # of training: the model's, its adapters'
        self._drops_out = False  # in that mode
        self._user = threading.RLock()
        self._calls = 0  # that are under way, one inside the other
        self._weights: dict[int, tuple[weakref.ref[nn.Parameter], int]] = {}
        self._begin_batch()
        self._count_from_zero()
        device = self.model.device
        if device.type == "cuda":
            compile_for(self.config, self._layers_dtype(device), device, page_size)

    def _count_from_zero(self) -> None:
        self.prompted = 0  # prompt tokens given, padding left out
        self.prefilled = 0  # of these, tokens that went through the model
        self.found = 0  # and distinct ones that were stored before
        self.decoding: str | None = None  # how the last `generate()` ran its decode steps

    def _begin_batch(self) -> None:
        self.families: list[Hashable] = []  # of the requests
        self._regime: str | None = None  # of rotary frequencies, in which the prompts are stored
        self.opaque = False  # K and V of the requests are not told by their tokens
        self.fallback: str | None = None  # why prompts were computed request by request
        self.repeated = False  # the next forward begins with what is stored
        self._columns = Columns(np.ones((0, 0), bool))
        self.step: Step | None = None
        self._announced: Callable[[], Step] | None = None  # makes the step of a packed forward
        self._missing: list[Node] = []  # nodes that have pages, but no K and V yet
        self._room = 0  # steps until an open leaf needs a page
        self._norms: list[nn.Module] | None = None

    @property
    def prefixes(self) -> PrefixTree:
        """The requests as paths of a tree, and what is kept beside them."""
        return self.store.tree

    @property
    def pool(self) -> PagePool:
        """The pages of K and V."""
        return self.store.pool

    @property
    def norms(self) -> list[nn.Module]:
        """The model's RMS norms, looked up once a batch."""
        if self._norms is None:
            self._norms = rms_norms(self.model)
        return self._norms

    @property
    def keep_bytes(self) -> int | None:
        """The budget of what is kept beyond the batch."""
        return self.store.keep_bytes

    # What Transformers asks of a cache

    def __len__(self) -> int:
        return self.config.num_hidden_layers

    def __repr__(self) -> str:
        return (
            f"PATCache(requests={len(self.prefixes)}, length={self._columns.length}, "
            f"tokens={self.tokens:,} stored of {self.dense_tokens:,}, "
            f"pages={self.pool.used} x {self.pool.page_size}, layers={len(self)})"
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of a request, padding included: the length of `attention_mask` so far."""
        self._mend()
        return 0 if self.anew else self._columns.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset for the mask function; the length carries this cache to it."""
        return KVLength(self._columns.length + query_length, self), 0

    @property
    def batch_size(self) -> int:
        """Number of requests; -1 before there are any."""
        return len(self.prefixes) or -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_initialized(self) -> bool:
        return self._columns.length > 0

    @property
    def is_sliding(self) -> list[bool]:
        # All tokens are kept; the kernels apply the windows.
        return [False] * len(self)

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self)

    @torch.compiler.disable  # it would trace through the tree
    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new K and V and returns the layer's pages.

        Args:
            key_states: [batch, kv heads, tokens, key dim].
            value_states: [batch, kv heads, tokens, value dim].
            layer_idx: the layer's number.

        Returns:
            Pages of K and of V, [pages, kv heads, page size, dim], for the "pat" attention only.

        Raises:
            RuntimeError: if the forward was not announced by the "pat" mask function.
            ValueError: if heads, dims, dtype or device are not those of what is stored, or not
                such as the forward is planned for.
        """
        step = self.step
        if step is None or layer_idx in step.written or not step.asked:
            raise RuntimeError(
                "PATCache has no plan for this forward. It needs a model loaded with "
                f'attn_implementation="pat" (this one has {self.config._attn_implementation!r}) '
                "and a 2-D attention_mask of 0 and 1, or none; a 4-D mask, or one that a model "
                "makes by itself, can't be honoured."
            )
        kind = key_states.device.type
        if torch.is_autocast_enabled(kind):
            # As it would for sdpa; rotary embeddings may have left K in float32.
            dtype = torch.get_autocast_dtype(kind)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if layer_idx not in self.pool.layers:
            self._check_planned(step, key_states)
        layer = self.pool.write(
            layer_idx, key_states, value_states, *step.targets(key_states.device)
        )
        self._wrote([layer_idx])
        return layer.keys, layer.values

    @_surgery
    def _wrote(self, layers: Iterable[int]) -> None:
        """Notes the layers that have stored what the step computes."""
        if not self.step.written:
            self._columns.advance(self.step.columns, self.step.real)
        self.step.written.update(layers)

    def clear(self) -> None:
        """Forgets all requests, but keeps of them what `keep_bytes` and pins say.

        Raises:
            RuntimeError: in the middle of a call on this cache.
        """
        with self.in_use():
            self.forget()

    def forget(self) -> None:
        """What `clear` does, for a call itself."""
        self._withdraw()
        self._label()
        self._end_batch()

    @_surgery
    def _end_batch(self) -> None:
        self.store.select([])
        self._begin_batch()

    def reset(self) -> None:
        """Forgets everything, pins and counts included, and gives the memory back.

        Raises:
            RuntimeError: in the middle of a call on this cache.
        """
        with self.in_use():
            self._workspace.forget()
            self._empty()
            self._count_from_zero()

    def _empty(self, pins: dict[tuple[Hashable, bytes], np.ndarray] | None = None) -> None:
        self._broken = True  # until it is done
        self._weights = {}
        store = self.store.empty()
        if pins is not None:
            store.tree.pins = pins
        self.store = store
        self._begin_batch()
        self._broken = False

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens of every request.

        Args:
            tokens_to_remove: minus the number of tokens, or, as Transformers still allows, the
                length to keep if it is positive. Padding counts.

        Raises:
            PoolExhausted: if requests that share a page part and there is none for it; the cache
                holds no request then.
        """
        count = int(tokens_to_remove)
        count = -count if count <= 0 else max(0, self._columns.length - count)
        if self._decoder is not None and self._decoder.deferred:
            self._decoder.end_step(undone=count > 0)
        if count:
            self._cut(count)

    @_surgery
    def _cut(self, count: int) -> None:
        """Removes the last `count` tokens of every request."""
        self._withdraw()
        try:
            for request, tokens in enumerate(self._columns.cut(count).tolist()):
                self.store.truncate(request, tokens)
        except Exception:
            self._end_batch()  # some requests are shorter now, and others not
            raise
        self.step = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Makes requests `beam_idx` the batch; shared pages are passed on by reference.

        Args:
            beam_idx: int [any], each a request from 0, any number of times.

        Raises:
            ValueError: if one isn't in the batch.
        """
        indices, batch = beam_idx.tolist(), len(self.prefixes)
        if wrong := [i for i in indices if not 0 <= i < batch]:
            raise ValueError(f"beam_idx asks for requests {wrong}, and the batch has {batch}.")
        self._select(indices)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps requests `indices`, in that order.

        Args:
            indices: int [any], or bool [batch].

        Raises:
            IndexError: if one isn't in the batch.
        """
        batch, indices = len(self.prefixes), indices.cpu().numpy()
        try:
            kept = np.arange(batch)[indices].tolist()
        except IndexError:
            raise IndexError(
                f"indices asks for requests {indices.tolist()}, and the batch has {batch}."
            ) from None
        self._select(kept)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every request `repeats` times, by reference."""
        self._select([i for i in range(len(self.prefixes)) for _ in range(repeats)])

    @_surgery
    def _select(self, indices: Sequence[int]) -> None:
        self._withdraw()
        if not indices:
            return self._end_batch()
        self.store.select(indices)
        self._columns.select(indices)
        self.families = [self.families[i] for i in indices]
        self.step = None

    def __deepcopy__(self, memo: dict) -> PATCache:
        self._withdraw()
        twin = copy.copy(self)
        twin._workspace = lease(self.model, twin)
        twin.store = self.store.copy(twin._workspace.memory)
        twin._columns = self._columns.copy()
        twin.step, twin._decoder, twin.own_loop, twin.anew = None, None, True, False
        twin._user, twin._calls = threading.RLock(), 0
        twin._columns.resume()
        return twin

    # What the forward asks

    @_surgery
    def admit(self, input_ids: np.ndarray, mask: np.ndarray, ahead: int = 0) -> list[Node]:
        """Makes the prompts the batch; returns the nodes still to be computed.

        What the cache holds of them already is shared; of the rest it keeps what `keep_bytes` and
        pins say.

        Args:
            input_ids: int64 [requests, columns].
            mask: bool, the same shape; padding is `False`.
            ahead: tokens that each request is going to generate.

        Raises:
            PoolExhausted: if the prompts don't fit; the cache is as before.
        """
        families = self._families(len(input_ids))
        regime = rotary.regime(self.rotaries, int(mask.sum(1).max()))
        prompts = [
            (ids[real], family if regime is None else _Scaled(family, regime))
            for ids, real, family in zip(input_ids, mask, families, strict=True)
        ]
        self._withdraw()
        self._label()
        self.store.admit(prompts, ahead)
        nodes = self.prefixes.live()
        missing = [node for node in nodes if node.pages is None]
        try:
            pages = self.store.pages(missing)
            ahead = len(self.prefixes) * self.pool.pages(min(ahead, _AHEAD))
            if self.pool.limit is not None:  # nothing is evicted only for what may be generated
                ahead = max(0, min(ahead, self.pool.limit - self.pool.used - pages))
            self.store.with_room(lambda: self.pool.reserve(pages + ahead))
            if self._decoder is not None and not self.pool.layers:
                self._decoder.prepare(self._workspace, self.pool)
            self.pool.extend([(node, 0) for node in missing])
        except Exception:
            self._end_batch()  # the device's own memory ran out; no request may be without pages
            raise
        self._begin_batch()
        self.families, self._regime = families, regime
        self._columns, self._missing = Columns(mask.copy()), missing
        return missing

    def computed(self) -> None:
        """Says that the nodes which `admit` returned are stored."""
        computed = sum(node.length for node in self._missing)
        self.prefilled += computed
        self.found += self.tokens - computed
        self.prompted += self.dense_tokens
        self._missing = []

    def _families(self, batch: int) -> list[Hashable]:
        """What the adapters are that compute each row now."""
        families = adapters.families(self.tuned, batch)
        # Looked for once a call, and when the mode changes: steps ask, too.
        mode = self.model.training, any(layer.training for layer in self.tuned)
        if mode != self._mode:
            self._mode, self._drops_out = mode, any(mode) and drops_out(self.model)
        # K and V that were computed with dropout are nobody else's.
        return [("dropout", family) for family in families] if self._drops_out else families

    def _find_adapters(self) -> None:
        found = adapters.layers(self.model)
        if self._tuned and not found:
            self._restart("the model's adapters are gone, into its weights perhaps")
        self._tuned = [weakref.ref(layer) for layer in found]
        samples = adapters.samples(found)
        for name, known in self._adapters.items():
            if name in samples and known() is not samples[name]:
                self._restart(f"adapter {name!r} is another one than before")
                break
        self._adapters = self._adapters | {name: weakref.ref(x) for name, x in samples.items()}

    @property
    def tuned(self) -> list[nn.Module]:
        """The model's layers with PEFT adapters."""
        return [layer for ref in self._tuned if (layer := ref()) is not None]

    def share_nothing(self, reason: str, opaque: bool) -> None:
        """Forgets all requests, for new ones that are computed one by one.

        Args:
            reason: why.
            opaque: whether their tokens don't tell their K and V.
        """
        self.forget()
        self.fallback, self.opaque = reason, opaque
        logger.warning_once(f"pat_hf computes each prompt on its own: {reason}.")

    @_surgery
    def discard(self) -> None:
        """Forgets all requests, and what `admit` returned and wasn't computed."""
        for node in self._missing:
            self.pool.drop(node)
        self._end_batch()

    def arm(self, decoder: Decoder) -> None:
        """Prepares for the prefill of a `generate()` and its decode steps, which `decoder` runs."""
        self._decoder = decoder
        self._columns.stop_at(())

    def stop_at(self, ids: Sequence[int]) -> None:
        """Ends requests that are fed one of `ids` from now on, once their prompts are stored."""
        self._columns.stop_at(ids)

    def look_ahead(self) -> None:
        """Plans the first decode step, while the device computes the prompts.

        Until then every request has a token and a page for it, if need be, more than it is fed;
        `disarm` takes them back if the step never comes. So nothing is planned where pages are
        limited: others might have to go for them. Nor where keys follow the batch's length.
        """
        decoder = self._decoder
        ample = self.pool.limit is None and not self.rotaries
        if ample and self.known_loop and decoder.mode != "eager" and decoder.steps:
            self._next_step(len(self.prefixes), 1, None, decoder.device)

    def defer_stops(self) -> bool:
        """Whether `generate()` is to see a step late that all requests are finished.

        It calls `crop(0)` after each of its steps then, and `crop(-1)` after one too many.
        """
        if self._decoder is None or self._decoder.mode == "eager":
            return False
        if torch.get_default_device().type != "cpu":
            return False  # Transformers pins memory that it makes on the default device
        self._decoder.deferred = True
        return True

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """For its length, other calls are kept from this cache; not those of a `generate()` whose
        loop is the user's own.

        Raises:
            RuntimeError: if one has it.
        """
        if not self._user.acquire(blocking=False):
            raise RuntimeError(
                "This PATCache is in use by another thread's call. Give each thread a cache, or "
                "put a lock around the calls."
            )
        self._calls += 1
        try:
            if self._calls > 1 and not self.own_loop:
                raise RuntimeError(
                    "This PATCache is in use by the call that this one is made from. Give this "
                    "one a cache of its own, or wait for the other's end."
                )
            yield
        finally:
            self._calls -= 1
            self._user.release()

    def stored(self) -> None:
        """Says that a call is over: what it stored is of the weights as they are."""
        self._weights = {
            id(x): (weakref.ref(x), x._version)
            for module in modules(self.model)
            for x in module._parameters.values()
            if x is not None and not x.is_inference()
        }

    def _forget_stale(self) -> None:
        """Empties the cache if weights of the last call have been changed in place since, by an
        optimizer say, as far as PyTorch counts that."""
        held = ((ref(), version) for ref, version in self._weights.values())
        if any(x is not None and x._version != version for x, version in held):
            self._restart("the model's weights have been changed")

    def disarm(self) -> None:
        """The `generate()` is over: forwards are the model's own again."""
        self.repeated, self.own_loop, self.anew = False, True, False
        self.stored()
        self.decoding, self._decoder = self._decoder and str(self._decoder), None
        self._settle()
        if self.step is not None and not self.step.written:
            self._withdraw()  # what was planned for a step that didn't come
        self._columns.resume()
        self._room = 0  # the last step leaves out the requests that have ended

    def run(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """A forward of the model on this cache, by a graph where there is one for it.

        Notes the ids it is fed: only with them can generated tokens be shared with later prompts,
        and neither `update` nor the mask function is told them. Of a forward that breaks off,
        nothing stays: some layers may have stored its tokens and others not.
        """
        self.anew = False
        if self.repeated:
            kwargs = self._without_what_is_stored(kwargs)
        length, fed = self._columns.length, len(self._columns.fed)
        try:
            return self._run(forward, args, kwargs)
        except BaseException:
            if self._columns.length > length:
                self._cut(self._columns.length - length)
            else:
                self._withdraw()
                del self._columns.fed[fed:]
            raise

    def _without_what_is_stored(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        self.repeated = False
        if kwargs.get("output_hidden_states"):
            self.forget()  # MTP and DFlash draft from the states of the whole prompt
            return kwargs
        given = {x: kwargs[x] for x in _BY_TOKEN if kwargs.get(x) is not None}
        return kwargs | {name: x[..., self._columns.length :] for name, x in given.items()}

    @property
    def known_loop(self) -> bool:
        """Whether forwards are those of Transformers' own loops.

        These number tokens as we do, add no padding, and copy the logits that they are given.
        """
        return self._decoder is not None and not self.own_loop

    def _numbered_otherwise(
        self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> bool:
        """Whether new tokens are fed at other positions than their numbers in their requests."""
        if mask is not None and not (mask.ndim == 2 and mask.all()):
            return True  # it takes the padding's positions to tell
        batch, length = ids.shape
        stored = [self.prefixes.length(r) for r in range(len(self.prefixes))]
        if len(stored) != batch:  # there are none yet, or the batch is going to be refused
            stored = [0] * batch
        usual = np.array(stored)[:, None] + np.arange(length)
        if positions is None:  # models number columns then
            given = self._columns.length + np.arange(length)
        else:
            given = positions.cpu().numpy()
        return given.shape[-1] != length or not (given == usual).all()

    def _run(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        if self.step is None or not self.step.packed:
            # Loops of one's own may feed one buffer again and again, or views of all ids so far.
            # In another cache's `generate()`, nothing has looked at the weights and adapters.
            noted = ids if self._calls else None
            self._columns.fed.append(noted if noted is None or self.known_loop else noted.clone())
            if not (self.known_loop or self.opaque or ids is None):
                told = {name for name, x in kwargs.items() if x is not None} <= TOLD
                positions = kwargs.get("position_ids")
                self.opaque = not told or self._numbered_otherwise(ids, mask, positions)
            if self.families:
                self.opaque |= self._families(len(self.families)) != self.families
        decoder, step = self._decoder, self.step
        if decoder is not None and step is not None and step.packed:
            out = decoder.prefill(forward, self, kwargs)
            if out is not None:
                return out
        elif (
            decoder is not None
            and decoder.mode != "eager"
            and not args
            and ids is not None
            and ids.shape == (len(self.prefixes), 1)
            and kwargs.get("position_ids") is not None
            and (mask is None or mask.ndim == 2)
        ):
            self._next_step(*ids.shape, mask, ids.device)
            out = decoder.step(self._workspace, forward, self, kwargs)
            if out is not None:
                self._wrote(self.pool.layers)
                return out
        with fused(self.norms):
            try:
                return forward(*args, **kwargs)
            except OtherBlocks:
                if self.pool.layers:
                    raise
                # The forward has an autocast of its own, say: it is planned anew.
                if self.step is not None:
                    self.step = self._announced()
                return forward(*args, **kwargs)

    @_surgery
    def _label(self) -> None:
        """Tells the tree the ids of what was generated, so that later prompts can share it."""
        ids = self._columns.ids
        if self.opaque or ids is None:
            return
        real = self._columns.tokens()[:, self._columns.prompts :]
        for request, row in enumerate(ids.cpu().numpy()):
            self.prefixes.label(request, row[real[request]])
        try:
            for request in range(len(self.prefixes)):
                self.prefixes.merge(request)
        except HalfCopied:
            raise
        except (PoolExhausted, torch.OutOfMemoryError):
            pass  # equal answers are then stored once each

    @property
    def model(self) -> PreTrainedModel:
        """The model that this cache is for.

        Raises:
            ReferenceError: if nothing else refers to it any more.
        """
        model = self._model()
        if model is None:
            raise ReferenceError(
                "The model of this PATCache is gone, and its keys and values mean nothing to "
                "another. Keep the model for as long as the cache; a cache doesn't hold it."
            )
        return model

    def announce(self, make: Callable[[], Step] | None) -> None:
        """Says what the next forward is; `None` withdraws it. It may have to be planned twice."""
        self._announced = make
        self.step = make and make()

    def check(self, model: PreTrainedModel) -> None:
        """Makes sure that this cache is for `model`.

        Raises:
            ValueError: if it isn't, or the model's attention has been changed since.
        """
        if model is not self.model:
            raise ValueError(
                f"This PATCache was made for another model than this {type(model).__name__}, "
                "and one model's keys and values mean nothing to another. Make one for each: "
                "PATCache(model)."
            )
        supported_config(model)
        self._settle()
        adapters.refuse_virtual_tokens(model)
        self._refuse_checkpointing()
        self._forget_stale()
        self._find_adapters()
        self._mode = None
        if self.pool.layers and model.dtype != self.dtype:
            raise ValueError(
                f"This PATCache was filled in {self.dtype} and the model is now in {model.dtype}. "
                "Call reset() on the cache, or make a new one."
            )
        self.dtype = model.dtype

    def _refuse_checkpointing(self) -> None:
        if checkpoints(self.model):
            raise ValueError(
                "Gradient checkpointing takes the cache from the layers of a model in training "
                "mode. Call model.eval(), or model.gradient_checkpointing_disable(), before."
            )

    def check_gaps(self, mask: np.ndarray) -> None:
        """Makes sure that a mask has no padding that windows would count as tokens.

        Args:
            mask: bool [any, columns].

        Raises:
            ValueError: if there is padding behind a token and in front of another, and the model's
                layers have windows.
        """
        if not windowed(self.config):
            return
        column = np.arange(mask.shape[1])
        last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)
        gaps = ~mask & (column > mask.argmax(1)[:, None]) & (column < last[:, None])
        if gaps.any():
            raise ValueError(
                f"There is padding at column {np.argwhere(gaps)[0][1]}, between the tokens of a "
                f"prompt. {type(self.model).__name__} has windows, in which Transformers counts "
                "it. Give all prompts whole, padded on the left: what is stored of them is found."
            )

    @torch.compiler.disable
    def begin(
        self,
        batch: int,
        length: int,
        mask: torch.Tensor | None,
        device: torch.device,
        windowed: bool = False,
    ) -> torch.Tensor:
        """Plans a forward of `length` tokens for every request; several calls plan it once.

        Args:
            batch, length: shape of the forward's input.
            mask: bool [batch, columns + length] or `None`; its last columns tell new padding.
            device: where the plan goes.
            windowed: whether it is for layers with windows.

        Returns:
            The plan, int32 [1, 1, ., .].

        Raises:
            ValueError: if `batch` is not the number of requests, or `mask` not that of the tokens
                stored; its values are looked at when the plan is made anew. Or if the model's
                layers would leave the cache aside.
            PoolExhausted: if there is no page for the new tokens; the cache is as before.
        """
        step = self.step
        if step is not None and windowed in step.asked and not (step.packed or step.written):
            # Asked again by the same model, or behind a forward that broke off.
            if step.shape == (batch, length) and not self._is_for(step, mask):
                self._withdraw()
        step = self._next_step(batch, length, mask, device)
        step.asked.add(windowed)
        return step.plan(windowed)

    def _next_step(
        self, batch: int, length: int, mask: torch.Tensor | None, device: torch.device
    ) -> Step:
        step = self.step
        if step is not None and not step.written and step.shape == (batch, length):
            return step
        shape = (batch, self._columns.length + length)
        if mask is not None and tuple(mask.shape) != shape:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}; with {self._columns.length} "
                f"columns in the cache and {length} in this forward it must be {shape}."
            )
        if length == 1 and self._room > 0 and step is not None and step.shape == (batch, 1):
            if self.known_loop or mask is None or self._added(mask).all():
                return self._advance()
        self._refuse_checkpointing()
        self._withdraw()
        if len(self.prefixes) == 0 or self._columns.length == 0 and len(self.prefixes) != batch:
            self._begin_requests(batch)
        if batch != len(self.prefixes):
            raise ValueError(
                f"The forward has a batch of {batch} and the cache holds {len(self.prefixes)} "
                "requests. Select or repeat them with batch_select_indices, "
                "batch_repeat_interleave or reorder_cache, or call reset()."
            )
        if self._decoder is not None:
            self._columns.find_ends()
        new = np.ones((batch, length), bool) if mask is None else self._added(mask)
        return self._plan_growth(new, device)

    @_surgery
    def _begin_requests(self, batch: int) -> None:
        """Makes requests of no tokens the batch; a forward that failed may have left others."""
        self.store.select([])
        self.families = self._families(batch)
        for family in self.families:
            self.prefixes.insert(np.empty(0, np.int64), family)
        self._columns.begin(batch)

    def _is_for(self, step: Step, mask: torch.Tensor | None) -> bool:
        """Whether a forward with this mask stores what `step` does."""
        if mask is None:
            return step.real is None
        if tuple(mask.shape) != (len(mask), self._columns.length + step.columns):
            return False  # and refused then
        new = self._added(mask)
        if step.real is None:
            return bool(new.all())
        return np.array_equal(new & self._columns.alive[:, None], step.real)

    def _added(self, mask: torch.Tensor) -> np.ndarray:
        """The mask's new columns, the others being as they were."""
        mask = mask.cpu().numpy().astype(bool)
        return self._columns.added(mask, ended_too=self._decoder is not None)

    @_surgery
    def _advance(self) -> Step:
        for request in self.step.grown:
            self.prefixes.append(request, 1)
        self._room -= 1
        self.step.advance()
        return self.step

    def _mend(self) -> None:
        """Empties what was interrupted in a change; a prefill may be under way, whose hooks ask."""
        if self._broken:
            self._restart("a call was interrupted in a change")

    def _restart(self, why: str) -> None:
        """Empties the cache; what is pinned will be when it is computed again."""
        if self.pool.used or self._broken:
            logger.warning(f"pat_hf: {why}, so the PATCache is empty.")
        self._empty(self.prefixes.pins)

    def _settle(self) -> None:
        """Clears away what a call left that was interrupted."""
        self._mend()
        if self._missing:
            self.discard()

    @_surgery
    def _withdraw(self) -> None:
        """Takes back what was planned for a forward that stored nothing."""
        self._settle()
        step, self.step = self.step, None
        if step is None or step.written or step.packed:
            return
        for request, grown in step.grown.items():
            self.prefixes.truncate(request, grown)

    @_surgery
    def _plan_growth(self, real: np.ndarray, device: torch.device) -> Step:
        batch, length = real.shape
        padded = not real.all()
        real = real & self._columns.alive[:, None]
        if windowed(self.config):
            self.check_gaps(np.concatenate([self._columns.tokens(), real], 1)[real.any(1)])
        grown = {r: n for r, n in enumerate(real.sum(1).tolist()) if n}
        position = np.array([self.prefixes.length(r) for r in range(batch)])[:, None]
        position = position + np.cumsum(real, 1) - 1
        leaves = {r: self.prefixes.append(r, n) for r, n in grown.items()}
        try:
            extended = [(leaf, leaf.length - grown[r]) for r, leaf in leaves.items()]
            self.store.with_room(lambda: self.pool.extend(extended))
            self.step = self._load_step(leaves, grown, real, position, padded, device)
        except Exception as error:
            for request, count in grown.items():
                self.prefixes.truncate(request, count)
            if not isinstance(error, PoolExhausted):
                raise
            raise PoolExhausted(
                f"{error} {self.store.holdings()} Raise max_tokens, generate fewer tokens or "
                "requests, or free some with batch_select_indices or reset()."
            ) from None
        return self.step

    def _load_step(
        self,
        leaves: dict[int, Node],
        grown: dict[int, int],
        real: np.ndarray,
        position: np.ndarray,
        padded: bool,
        device: torch.device,
    ) -> Step:
        """The step that computes and stores what leaves have grown by."""
        (batch, length), ends = real.shape, list(leaves.values())
        size = self.pool.page_size
        order = self.prefixes.preorder()
        node = np.full((batch, length), -1, np.int32)
        pages = np.full((batch, length), SINK)
        slots = np.zeros((batch, length), np.int64)
        which = np.repeat(np.arange(len(ends)), list(grown.values()))  # of each token, its leaf
        held = np.concatenate([leaf.pages for leaf in ends] or [[]]).astype(np.int64)
        begin = np.cumsum([0, *(len(leaf.pages) for leaf in ends)])[which]
        inside = position[real] - np.array([leaf.start for leaf in ends], np.int64)[which]
        node[real] = np.array([order.index[leaf] for leaf in ends], np.int32)[which]
        pages[real] = held[begin + inside // size]
        slots[real] = inside % size
        room = min((len(leaf.pages) * size - leaf.length for leaf in ends), default=size - 1)
        # A pad has no leaf to advance; the next step plans anew.
        self._room = room if length == 1 and len(ends) == self._columns.alive.sum() else 0
        longest = self._columns.longest + length + self._room
        self.opaque |= rotary.regime(self.rotaries, longest) != self._regime
        plans = self.plans(order, node.ravel(), position.ravel(), device)
        step = None
        if length == 1:
            step = self._workspace.steps.get((device, batch))
        if step is None or not step.fits(plans):
            capacities = [plan.shape for plan in plans]
            if length == 1 and self._decoder is not None and self._decoder.mode != "eager":
                # As large as it gets in this call, and some more for forks and other prompts.
                more = self.pool.pages(self._decoder.steps)
                last = self.plans(order, node.ravel(), position.ravel(), device, more=more)
                capacities = [
                    tuple(
                        1 << (max(sizes) * 9 // 8).bit_length()
                        for sizes in zip(plan.shape, later.shape, strict=True)
                    )
                    for plan, later in zip(plans, last, strict=True)
                ]
            step = Step(device, batch, length, capacities)
            if length == 1:
                self._workspace.steps[device, batch] = step
        return step.load(
            plans,
            pages.ravel(),
            slots.ravel(),
            columns=length,
            real=real if padded else None,
            grown=grown,
        )

    def plans(
        self,
        order: Preorder,
        node: np.ndarray,
        position: np.ndarray,
        device: torch.device,
        ahead: int | None = None,
        more: int = 0,
    ) -> list[Plan]:
        """Plans query rows over the tree.

        Args:
            order: the tree.
            node: int [rows], where in `order` each row ends; -1 for padding.
            position: int [rows].
            device: what the plan is for.
            ahead: by how much the positions will be advanced; `None`: to the ends of the nodes.
            more: pages that open leaves are to be planned with beyond their own.

        Returns:
            The plan, for pages of this cache on that device; and if there are layers with windows,
            theirs.
        """
        size = self.pool.page_size
        counts = [len(n.pages) + more * n.open for n in order.nodes]
        # An open leaf may be read to the end of its pages: positions bound what is there.
        length = [
            count * size if n.open else n.length
            for n, count in zip(order.nodes, counts, strict=True)
        ]
        nodes = Nodes(
            order.parent,
            order.end,
            order.start,
            np.array(length, np.int32),
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            np.array(
                [page for n in order.nodes for page in (*n.pages, *[SINK] * (more * n.open))],
                np.int32,
            ),
        )
        heads = heads_of(self.config, self._layers_dtype(device))
        machine = Machine.of(device, heads)
        windows = [None, self.config.sliding_window] if windowed(self.config) else [None]
        return [
            make_plan(nodes, node, position, heads, size, machine, ahead, window)
            for window in windows
        ]

    def _layers_dtype(self, device: torch.device) -> torch.dtype:
        """What layers store; a guess, before they have stored anything."""
        if self.pool.dtype is not None:
            return self.pool.dtype
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self._stored_in or self.model.dtype

    def _check_planned(self, step: Step, keys: torch.Tensor) -> None:
        """Makes sure that a step is planned for a layer that stores such keys, its first ones."""
        try:
            step.check(keys)
        except OtherBlocks:
            if not self.pool.layers:
                self._stored_in = keys.dtype
            if not step.packed:
                self._withdraw()
            raise

    # What a user asks

    @property
    def tokens(self) -> int:
        """Distinct tokens of the batch: each is stored once."""
        return sum(node.length for node in self.prefixes.live())

    @property
    def dense_tokens(self) -> int:
        """Tokens that a cache without sharing would store."""
        return sum(self.prefixes.length(r) for r in range(len(self.prefixes)))

    def report(self) -> Report:
        """What sharing saved: tokens, bytes, traffic of a decode step, and the backend."""
        self._mend()
        per_token = self.pool.bytes_per_token
        live, idle = self.prefixes.live(), self.prefixes.idle()
        read = 0
        if len(self.prefixes) and self.pool.layers:
            order = self.prefixes.preorder()
            ends = [node for node in self.prefixes.ends if node.parent is not None]
            node = np.array([order.index[end] for end in ends], np.int32)
            position = np.array([end.end - 1 for end in ends], np.int32)
            read = self.plans(order, node, position, self.device)[0].kv_tokens
        return Report(
            requests=len(self.prefixes),
            depth=max((len(self.prefixes.path(r)) for r in range(len(self.prefixes))), default=0),
            tokens=self.tokens,
            dense_tokens=self.dense_tokens,
            bytes_held=len({page for n in live for page in n.pages or ()}) * self.store.page_bytes,
            bytes_per_token=per_token,
            read_tokens=read,
            prompt_tokens=self.prompted,
            prefilled_tokens=self.prefilled,
            found_tokens=self.found,
            kept_tokens=sum(node.length for node in idle),
            kept_bytes=self.store.pages(idle) * self.store.page_bytes,
            keep_bytes=self.keep_bytes,
            pinned_prompts=len(self.prefixes.pins),
            evicted_tokens=self.store.evicted,
            backend=backend(self.device),
            decoding=self.decoding,
            fallback=self.fallback,
        )

    def tree(self) -> str:
        """The prefix tree, drawn for a terminal; alike leaves share a line."""
        self._mend()
        return draw(self.prefixes)

    @property
    def device(self) -> torch.device:
        """Where the first layer's pages are."""
        layers = self.pool.layers
        return layers[min(layers)].keys.device if layers else torch.device("cpu")

    # What is kept beyond the batch

    def pin(self, input_ids: torch.Tensor | np.ndarray | Sequence[int]) -> None:
        """Keeps a prompt until it is unpinned, beside `keep_bytes` and whatever that is.

        One that isn't stored yet, or not whole, is kept from when it is. The adapter that is
        active now is meant, and batches at the model's usual rotary frequencies.

        Args:
            input_ids: int [any], one prompt without padding.

        Raises:
            ValueError: if `input_ids` is anything else.
        """
        self.prefixes.pin(*self._prompt(input_ids))

    @_surgery
    def unpin(self, input_ids: torch.Tensor | np.ndarray | Sequence[int]) -> None:
        """Undoes `pin`; the prompt stays as long as others do.

        Raises:
            ValueError: if exactly this prompt isn't pinned.
        """
        tokens, family = self._prompt(input_ids)
        try:
            self.prefixes.unpin(tokens, family)
        except KeyError:
            raise ValueError(
                f"This prompt of {len(tokens)} tokens is not pinned; {len(self.prefixes.pins)} "
                "others are. Give the same ids as to pin(), under the same adapter."
            ) from None
        self.store.trim()

    @_surgery
    def drop(self, input_ids: torch.Tensor | np.ndarray | Sequence[int]) -> int:
        """Removes a prompt and its answers, but nothing that another kept prompt needs.

        Args:
            input_ids: int [any], one prompt without padding.

        Returns:
            How many tokens were removed; 0 if nothing was stored of this prompt alone.

        Raises:
            ValueError: if the prompt is pinned, or is one of the batch of the last call.
        """
        tokens, family = self._prompt(input_ids)
        if (family, tokens.tobytes()) in self.prefixes.pins:
            raise ValueError(f"This prompt of {len(tokens)} tokens is pinned: unpin() it first.")
        scaled = [x for x in self.prefixes.roots if isinstance(x, _Scaled) and x.family == family]
        for each in (family, *scaled):
            nodes, found = self.prefixes.match(tokens, each)
            whole = nodes and nodes[-1].end == found == len(tokens)
            if whole and nodes[-1] in self.prefixes.live():
                raise ValueError(
                    f"This prompt of {len(tokens)} tokens is in use by the batch of the last call: "
                    "clear() it first."
                )
        return sum(self.prefixes.drop(tokens, each) for each in (family, *scaled))

    def _prompt(
        self, input_ids: torch.Tensor | np.ndarray | Sequence[int]
    ) -> tuple[np.ndarray, Hashable]:
        tokens = token_ids(input_ids, "A prompt")
        self._mend()
        self._find_adapters()
        return tokens, self._families(1)[0]

    def save(self, path: str | Path) -> None:
        """Writes all that is stored, the batch of the last call included, for `load`.

        Prompts and answers of adapters are left out, and so are pins, and batches so long that
        the model's rotary frequencies follow their length (longrope, dynamic NTK).

        Args:
            path: a file, safetensors.

        Raises:
            OSError: if it can't be written; what was there before stays.
        """
        self._forget_stale()
        self._withdraw()
        self._label()
        archive.write(path, self.prefixes, self.pool, archive.fingerprint(self.model))

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel, **options: Any) -> PATCache:
        """A cache that keeps what another one saved.

        Args:
            path: what `save` wrote.
            model: the same model, on any device.
            options: for `PATCache`; `keep_bytes` is what is loaded takes, unless it is given.

        Raises:
            ValueError: if the file isn't what `save` writes or is damaged, or another model's;
                the message says what differs.
            PoolExhausted: if `max_tokens` doesn't allow what the file holds.
        """
        cache = cls(model, **options)
        try:
            archive.read(path, cache.prefixes, cache.pool, cache.model)
            cache.stored()
        except PoolExhausted as error:
            raise PoolExhausted(
                f"{path} doesn't fit into max_tokens={options['max_tokens']}: {error} Give at "
                f"least {(cache.pool.limit + error.missing) * cache.pool.page_size}.",
                error.missing,
            ) from None
        if cache.keep_bytes is None:
            cache.store.keep_bytes = cache.store.pages(cache.prefixes) * cache.store.page_bytes
        cache.store.trim()
        return cache


def token_ids(
    given: torch.Tensor | np.ndarray | Sequence[int], what: str, vocabulary: int | None = None
) -> np.ndarray:
    """Token ids of one text, int64 [any], at least one.

    Args:
        given: them.
        what: they are, for the error.
        vocabulary: how many ids there are; `None`: any is one.

    Raises:
        ValueError: if they are anything else.
    """
    if isinstance(given, str):
        raise ValueError(f"{what} must be token ids, and the text {given!r} was given: encode it.")
    ids = np.asarray(given.cpu() if isinstance(given, torch.Tensor) else given)
    if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{what} must be a list of one token id or more, and {ids.dtype} {list(ids.shape)} was "
            "given. Take a row of the tokenizer's output, without its padding: input_ids[0]; for a "
            "text of no tokens, the beginning-of-text token."
        )
    if ids.min() < 0 or vocabulary is not None and ids.max() >= vocabulary:
        known = "at least 0" if vocabulary is None else f"0 to {vocabulary - 1}"
        raise ValueError(
            f"{what} has ids from {ids.min()} to {ids.max()}, and the model's are {known}. "
            "Encode it with the model's own tokenizer."
        )
    return ids.astype(np.int64)
