"""Stored prompts and answers: a prefix tree and its pages, within a limit and a budget."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from numbers import Real
from typing import TypeVar

import numpy as np

from pat_hf.cache.memory import Memory
from pat_hf.cache.page_pool import PagePool, PoolExhausted
from pat_hf.cache.prefix_tree import Node, PrefixTree

_T = TypeVar("_T")


class Store:
    """The requests of a batch, and what is kept beyond it.

    Args:
        page_size: tokens in a page, a power of two from 16.
        max_tokens: limit of stored tokens, whole pages counted; `None` for the memory's own.
        keep_bytes: budget of what no request needs, pins aside; `None` keeps nothing else.
        memory: where the pages are.

    Attributes:
        tree, pool: tokens and pages.
        keep_bytes: as given.
        evicted: tokens that had to go.
    """

    def __init__(
        self, page_size: int, max_tokens: int | None, keep_bytes: int | None, memory: Memory
    ):
        if keep_bytes is not None and not (isinstance(keep_bytes, Real) and keep_bytes >= 0):
            raise ValueError(
                f"keep_bytes={keep_bytes!r}: it must be a number of bytes, 2_000_000_000 say, or "
                "None."
            )
        self.keep_bytes = keep_bytes
        self.pool = PagePool(page_size, max_tokens, memory)
        self.tree = PrefixTree(self.pool)
        self.evicted = 0

    def empty(self) -> Store:
        """A store like this one, with nothing in it, on the same memory, which is given back."""
        self.pool.memory.release()
        limit = self.pool.limit
        tokens = None if limit is None else limit * self.pool.page_size
        return Store(self.pool.page_size, tokens, self.keep_bytes, self.pool.memory)

    def copy(self, memory: Memory) -> Store:
        """A store of the same tokens and pages, in memory of its own."""
        twin = Store(self.pool.page_size, None, self.keep_bytes, memory)
        twin.pool = self.pool.copy(memory)
        twin.tree = self.tree.copy(twin.pool)
        twin.evicted = self.evicted
        return twin

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in all layers."""
        return self.pool.page_size * self.pool.bytes_per_token

    def pages(self, nodes: Iterable[Node]) -> int:
        """Pages that nodes take."""
        return sum(self.pool.pages(node.length) for node in nodes)

    def admit(self, prompts: Sequence[tuple[np.ndarray, Hashable]], ahead: int) -> None:
        """Makes prompts the requests; their nodes may have no pages yet.

        Args:
            prompts: ids, int64 [any], and the family of each.
            ahead: tokens that each request is going to generate.

        Raises:
            PoolExhausted: if the prompts don't fit beside what is pinned; nothing has changed.
        """
        least = self._least_pages(prompts)
        try:
            self._share(prompts)
            pages = self.pages(self.tree) - self.pages(self.tree.idle())
        except PoolExhausted:
            pages = None
        room = len(prompts) * self.pool.pages(ahead)
        if pages is None or pages > least and pages + room > self.pool.limit:
            # What is stored cuts the prompts into more nodes, and so pages, than there is room for.
            self.select([])
            self.evicted += sum(self.tree.evict())
            self._share(prompts)
        self.trim()

    def select(self, indices: Sequence[int]) -> None:
        """Makes `indices` the requests, in that order; the others are kept within the budget."""
        keep = self.keep_bytes is not None
        self.tree.select(indices, self.pool.page_size, keep)
        if keep:
            self.trim()

    def truncate(self, request: int, count: int) -> None:
        """Takes the last `count` tokens from a request."""
        length = self.tree.length(request) - count
        # Again and again from where it is: room may be found only after a part is done.
        self.with_room(lambda: self.tree.truncate(request, self.tree.length(request) - length))

    def with_room(self, act: Callable[[], _T]) -> _T:
        """`act()`, for which idle nodes are evicted if it finds too few pages."""
        while True:
            try:
                return act()
            except PoolExhausted as error:
                enough = self.pool.used - error.missing
                for tokens in self.tree.evict():
                    self.evicted += tokens
                    if self.pool.used <= enough:
                        break
                else:
                    raise

    def trim(self) -> None:
        """Evicts what is over the budget."""
        pages, evictions = self.pages(self.tree.idle()), self.tree.evict()
        while pages * self.page_bytes > (self.keep_bytes or 0):
            tokens = next(evictions)
            pages -= self.pool.pages(tokens)
            self.evicted += tokens

    def holdings(self) -> str:
        """What is stored, for people."""
        live, idle = self.tree.live(), self.pages(self.tree.idle())
        prompts = self.pages(n for n in live if not n.open)
        generated = self.pages(n for n in live if n.open)
        pinned = self.pages(self.tree) - idle - prompts - generated
        kept = f", {idle} kept and {pinned} pinned of earlier calls" if idle or pinned else ""
        return (
            f"The cache holds {len(self.tree)} requests: {prompts} pages of prompts and "
            f"{generated} of generated tokens{kept}."
        )

    def _share(self, prompts: Iterable[tuple[np.ndarray, Hashable]]) -> None:
        """Makes prompts the requests, and leaves all else that can be found again idle."""
        first = len(self.tree)
        try:
            for prompt in prompts:
                self.with_room(lambda prompt=prompt: self.tree.insert(*prompt))
            self.with_room(self.tree.cut)
        except Exception:
            self.tree.select(range(first), keep=True)  # a split found no pages
            raise
        self.tree.select(range(first, len(self.tree)), keep=True)

    def _least_pages(self, prompts: Iterable[tuple[np.ndarray, Hashable]]) -> float:
        """Pages that the prompts take with nothing but pins beside them; infinite without a limit.

        Raises:
            PoolExhausted: if that is more than the limit.
        """
        if self.pool.limit is None:
            return np.inf
        alone = self.tree.copy()
        alone.cut()
        alone.select([])
        sum(alone.evict())
        pinned = self.pages(alone)
        for prompt in prompts:
            alone.insert(*prompt)
        pages = self.pages(alone)
        if pages > self.pool.limit:
            beside = f" with the {pinned} that are pinned" if pinned else ""
            raise PoolExhausted(
                f"The prompts take {pages} pages of {self.pool.page_size} tokens{beside}, and "
                f"max_tokens allows {self.pool.limit}. Raise max_tokens to "
                f"{pages * self.pool.page_size:,} or more, or give fewer or shorter prompts. "
                f"{self.holdings()}"
            )
        return pages
