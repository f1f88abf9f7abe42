"""The page pool: where K and V of every node lie. Tensors and page numbers, no tokens."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch

from pat_hf.cache.memory import Layout, Memory
from pat_hf.cache.prefix_tree import Node
from pat_hf.kernels.ops import store

PAGE_SIZE = 32  # tokens in a page, if nothing else is said
SINK = 0  # the page that takes the writes of padding tokens; no plan reads it


class PoolExhausted(RuntimeError):
    """More pages were asked for than `max_tokens` allows. Nothing has been taken or changed.

    Attributes:
        missing: how many pages too many.
    """

    def __init__(self, message: str, missing: int = 0):
        super().__init__(message)
        self.missing = missing


class HalfCopied(torch.OutOfMemoryError):
    """The device's memory ran out while tokens were copied: some layers have them, others not."""


class Layer(NamedTuple):
    """Pages of one layer: keys [pages, kv heads, page size, key dim], values [.., value dim]."""

    keys: torch.Tensor
    values: torch.Tensor


class PagePool:
    """Fixed-size pages, the same numbers in every layer, counted by reference.

    A node's token t lies in page `node.pages[t // page_size]` at slot `t % page_size`; a node
    begins on a page of its own. Tensors are made at a layer's first `write`, on the device and
    with the heads, dims and dtype of what is written.

    Args:
        page_size: tokens in a page, a power of two from 16.
        max_tokens: limit of the pool, in tokens; `None` for the memory's own.
        memory: where the tensors are made; a new one if `None`.
    """

    def __init__(
        self,
        page_size: int = 32,
        max_tokens: int | None = None,
        memory: Memory | None = None,
    ):
        if not isinstance(page_size, Integral) or page_size < 16 or page_size & (page_size - 1):
            raise ValueError(f"page_size={page_size!r}: it must be a power of two from 16.")
        if max_tokens is not None and not isinstance(max_tokens, Integral):
            raise ValueError(f"max_tokens={max_tokens!r}: it must be a whole number, or None.")
        if max_tokens is not None and max_tokens < page_size:
            raise ValueError(f"max_tokens={max_tokens} is less than one page of {page_size}.")
        self.page_size = page_size
        self.limit = None if max_tokens is None else max_tokens // page_size
        self.layers: dict[int, Layer] = {}
        self._expected: dict[int, Layout] = {}
        self.memory = memory or Memory()
        self.references = np.ones(1, np.int32)  # the sink's
        self._free: list[int] = []

    @property
    def used(self) -> int:
        """Pages that hold tokens."""
        return len(self.references) - 1 - len(self._free)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's K and V in all layers seen so far."""
        return sum(tensor[0, :, 0].numel() * tensor.element_size() for tensor in self._tensors())

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the layers that are there or expected; `None` before there are any."""
        held = (layer.keys.dtype for layer in self.layers.values())
        expected = (dtype for _, dtype, _ in self._expected.values())
        return next(itertools.chain(held, expected), None)

    def places(self, pages: Sequence[int], tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where tokens of a node with these pages lie: page and slot of each, int64.

        Args:
            pages: the node's.
            tokens: int64 [any], counted from the node's first.
        """
        return np.array(pages, np.int64)[tokens // self.page_size], tokens % self.page_size

    def pages(self, tokens: int) -> int:
        """Pages that a node of `tokens` tokens takes."""
        return -(-tokens // self.page_size)

    def copy(self, memory: Memory | None = None) -> PagePool:
        """A pool with the same pages, numbers and counts, in memory of its own."""
        twin = PagePool(self.page_size, memory=memory)
        twin.limit, twin._free = self.limit, list(self._free)
        twin.references = self.references.copy()
        for index, layer in self.layers.items():
            twin.layers[index] = twin._layer(index, len(self.references), *layer)
            for target, source in zip(twin.layers[index], layer, strict=True):
                target.copy_(source)
        return twin

    def reserve(self, count: int) -> None:
        """Makes sure that `count` pages are free, enlarging every layer once.

        A pool in use grows by an eighth, if there is memory for it, which keeps copies of what it
        holds rare.

        Raises:
            PoolExhausted: if the limit doesn't allow it.
            torch.OutOfMemoryError: if the device doesn't; the pool is as before.
        """
        missing = count - len(self._free)
        if missing <= 0:
            return
        size = len(self.references) + missing
        if self.limit is not None and size - 1 > self.limit:
            raise PoolExhausted(
                f"{self.used} of {self.limit} pages of {self.page_size} tokens are in use and "
                f"{count} more are needed.",
                missing=size - 1 - self.limit,
            )
        ample = size
        if self.used:
            eighth = len(self.references) + len(self.references) // 8
            ample = max(size, eighth if self.limit is None else min(eighth, self.limit + 1))
        try:
            self._grow(ample)
        except torch.OutOfMemoryError:
            if ample == size:
                raise
            self._grow(size)

    def _grow(self, size: int) -> None:
        for index, layer in self.layers.items():
            self.layers[index] = self._layer(index, size, *layer)
        # Last: should memory run out above, the pages are as many as they were.
        held = len(self.references)
        self._free[:0] = range(size - 1, held - 1, -1)
        self.references = np.concatenate([self.references, np.zeros(size - held, np.int32)])

    def extend(self, nodes: Iterable[tuple[Node, int]]) -> None:
        """Gives nodes the pages for all their tokens, or none of them any.

        A part-filled page that another node holds too is copied before it is written.

        Args:
            nodes: each with the number of its tokens that are stored already.

        Raises:
            PoolExhausted: before anything has changed.
        """
        nodes = [(node, stored) for node, stored in nodes if node.length > stored]
        sharers = Counter()
        needed = 0
        for node, stored in nodes:
            held = node.pages or []
            needed += self.pages(node.length) - len(held)
            if stored % self.page_size:
                page = held[stored // self.page_size]
                needed += int(self.references[page]) - sharers[page] > 1
                sharers[page] += 1
        self.reserve(needed)
        copies: dict[int, int] = {}
        for node, stored in nodes:
            if node.pages is None:
                node.pages = []
            tail = stored // self.page_size
            if stored % self.page_size and self.references[node.pages[tail]] > 1:
                copy = self._take()
                copies[copy] = node.pages[tail]
                self._release([node.pages[tail]])
                node.pages[tail] = copy
            node.pages += [self._take() for _ in range(self.pages(node.length) - len(node.pages))]
        if copies:
            with _copying():
                for tensor in self._tensors():
                    source, target = (_index(list(x), tensor) for x in (copies.values(), copies))
                    tensor[target] = tensor[source]

    def write(
        self,
        index: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        pages: torch.Tensor,
        slots: torch.Tensor,
    ) -> Layer:
        """Stores a layer's K and V and returns its pages.

        Args:
            index: the layer's number.
            keys: [batch, kv heads, tokens, key dim].
            values: [batch, kv heads, tokens, value dim].
            pages, slots: int64 [batch * tokens], where each token goes.

        Raises:
            ValueError: if heads, dims, dtype or device aren't those of what the layer holds.
        """
        layer = self.layers.get(index)
        if layer is None:
            layer = self._layer(index, len(self.references), keys, values)
            self.layers[index] = layer
        for held, given in zip(layer, (keys, values), strict=True):
            if _kind(held) != _kind(given):
                raise ValueError(
                    f"Layer {index} holds {_kind(held)} (kv heads, dim, dtype, device) and was "
                    f"given {_kind(given)}. A cache serves one model in one dtype: make a new "
                    "PATCache, or call reset() on this one."
                )
        store(*layer, keys.detach(), values.detach(), pages, slots)
        return layer

    def _layer(self, index: int, size: int, keys: torch.Tensor, values: torch.Tensor) -> Layer:
        """`size` pages with the heads, dims, dtype and device of what is given."""
        shapes = [(x.shape[1], self.page_size, x.shape[3]) for x in (keys, values)]
        return Layer(*self.memory.resize(index, size, shapes, keys.dtype, keys.device))

    def expect(self, layouts: Mapping[int, Layout]) -> None:
        """Notes, by number, what layers are going to be like: `layer` makes them."""
        self._expected = dict(layouts)

    def layer(self, index: int) -> Layer:
        """A layer; an expected one is made when it is first asked for.

        Raises:
            KeyError: if it is neither there nor expected.
            torch.OutOfMemoryError: if the device has no memory for it.
        """
        if index not in self.layers:
            parts = self.memory.resize(index, len(self.references), *self._expected[index])
            self.layers[index] = Layer(*parts)
        return self.layers[index]

    @property
    def numbers(self) -> set[int]:
        """Numbers of the layers that are there or expected."""
        return self.layers.keys() | self._expected.keys()

    def split(self, node: Node, at: int) -> list[int] | None:
        """Takes the pages of the first `at` tokens off a node and returns them.

        The rest moves to the beginnings of its pages where the cut is inside a page.
        """
        if node.pages is None:
            return None
        held, whole, part = node.pages, *divmod(at, self.page_size)
        if part == 0:
            node.pages = held[whole:]
            return held[:whole]
        rest = held[whole + 1 :]
        own = [page for page in rest if self.references[page] == 1]
        count = self.pages(node.length - at) - len(own)
        self.reserve(count)
        self._release([page for page in rest if self.references[page] > 1])
        node.pages = own + [self._take() for _ in range(count)]
        inside = np.arange(node.length - at)
        source, target = self.places(held, inside + at), self.places(node.pages, inside)
        with _copying():
            for tensor in self._tensors():
                page, slot = (_index(x, tensor) for x in source)
                tokens = tensor[page, :, slot]
                page, slot = (_index(x, tensor) for x in target)
                tensor[page, :, slot] = tokens
        return held[: whole + 1]

    def fork(self, original: Node, copy: Node) -> None:
        """Lets `copy` hold the pages of `original` by reference."""
        if original.pages is not None:
            copy.pages = list(original.pages)
            self.references[copy.pages] += 1

    def trim(self, node: Node) -> None:
        """Gives back the pages behind the node's last token."""
        if node.pages is not None:
            keep = self.pages(node.length)
            self._release(node.pages[keep:])
            node.pages = node.pages[:keep]

    def drop(self, node: Node) -> None:
        """Gives back all pages of a node, as if it had never been stored."""
        self._release(node.pages or [])
        node.pages = None

    def check(self, nodes: Iterable[Node]) -> None:
        """Makes sure that every page is free or held, as often as it is counted.

        Args:
            nodes: all that have pages here.

        Raises:
            AssertionError: if not, with the pages that are wrong.
        """
        held = Counter(page for node in nodes for page in node.pages or ())
        held[SINK] += 1
        free = Counter(self._free)
        for page, references in enumerate(self.references.tolist()):
            if held[page] != references or free[page] != (references == 0):
                raise AssertionError(
                    f"Page {page} is held by {held[page]} nodes, counted {references} times and "
                    f"{free[page]} times among the free ones."
                )
        if unknown := (held.keys() | free.keys()) - set(range(len(self.references))):
            raise AssertionError(f"Pages {sorted(unknown)} don't exist.")

    def _take(self) -> int:
        page = self._free.pop()
        self.references[page] = 1
        return page

    def _release(self, pages: list[int]) -> None:
        for page in pages:
            self.references[page] -= 1
            if self.references[page] == 0:
                self._free.append(page)

    def _tensors(self) -> Iterator[torch.Tensor]:
        for layer in self.layers.values():
            yield from layer


@contextmanager
def _copying() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise HalfCopied(*error.args) from None


def _index(numbers: list[int] | np.ndarray, tensor: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(numbers, dtype=torch.int64, device=tensor.device)


def _kind(tensor: torch.Tensor) -> tuple[int, int, torch.dtype, torch.device]:
    return tensor.shape[1], tensor.shape[3], tensor.dtype, tensor.device
