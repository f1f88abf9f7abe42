"""The prefix tree of a batch: who shares which tokens. Integers only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Node:
    """A span of tokens that all requests below it share.

    Attributes:
        tokens: ids known so far, int64 [<= length]; an open leaf's are told later by `label`.
        start: position of the first token, the sum of the lengths above.
        length: tokens in the span.
        parent: the node above; the root, which is empty, has none.
        children: the nodes below, by first token or, where unknown or taken, a negative key.
        requests: numbers of the requests that end here.
        open: a leaf of generated tokens, which its one request may lengthen.
        pages: page ids of the span, `None` before it is stored. Belongs to the `Storage`.
    """

    __slots__ = (
        "children", "key", "length", "open", "pages", "parent", "requests", "start", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        parent: Node | None,
        start: int,
        length: int,
        tokens: np.ndarray,
        open: bool = False,
    ):
        self.parent = parent
        self.start = start
        self.length = length
        self.tokens = tokens
        self.open = open
        self.key = 0
        self.children: dict[int, Node] = {}
        self.requests: set[int] = set()
        self.pages: list[int] | None = None

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.length

    def __repr__(self) -> str:
        return f"Node({self.start}:{self.end}, requests={sorted(self.requests)})"


class Storage(Protocol):
    """What follows the tree when it changes: the pages of its nodes."""

    def split(self, node: Node, at: int) -> list[int] | None:
        """The first `at` tokens of `node` go to a node above, whose pages are returned."""

    def fork(self, original: Node, copy: Node) -> None:
        """`copy` holds the same tokens as `original`, for another request to lengthen."""

    def trim(self, node: Node) -> None:
        """`node` now has `node.length` tokens; with none it has left the tree."""


class Preorder(NamedTuple):
    """The tree as arrays: parents first, every subtree contiguous, the root left out.

    nodes [N]; parent int32 [N], -1 for the topmost; end int32 [N]: the subtree of u is u..end[u]-1;
    start int64 [N]; index: row of a node.
    """

    nodes: list[Node]
    parent: np.ndarray
    end: np.ndarray
    start: np.ndarray
    index: dict[Node, int]


class PrefixTree:
    """A radix tree over token ids, shared at token granularity, with one surgery: `split`.

    Requests are numbered 0..len(tree)-1. They may be identical, a prefix of one another, or
    empty. Generated tokens go into open leaves, one for each request.

    Args:
        storage: told of every split, fork and removal.
    """

    def __init__(self, storage: Storage | None = None):
        self.root = Node(None, 0, 0, np.empty(0, np.int64))
        self.ends: list[Node] = []
        self.version = 0  # moves with the structure, not with the lengths of open leaves
        self._storage = storage
        self._keys = 0

    def __len__(self) -> int:
        return len(self.ends)

    def length(self, request: int) -> int:
        """Tokens of a request."""
        return self.ends[request].end

    def path(self, request: int) -> list[Node]:
        """Nodes of a request, from its first token's to its last's."""
        nodes, node = [], self.ends[request]
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def __iter__(self) -> Iterator[Node]:
        """Nodes without the root, parents first, every subtree contiguous."""
        stack = list(self.root.children.values())[::-1]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(list(node.children.values())[::-1])

    def copy(self, storage: Storage | None = None) -> PrefixTree:
        """A tree of the same requests and page ids that shares no node with this one."""
        tree = PrefixTree(storage)
        tree.version, tree._keys = self.version, self._keys
        twins = {self.root: tree.root}
        for node in self:
            twin = Node(twins[node.parent], node.start, node.length, node.tokens, node.open)
            twin.key, twin.requests = node.key, set(node.requests)
            twin.pages = None if node.pages is None else list(node.pages)
            twin.parent.children[twin.key] = twin
            twins[node] = twin
        tree.root.requests = set(self.root.requests)
        tree.ends = [twins[node] for node in self.ends]
        return tree

    def preorder(self) -> Preorder:
        """The tree as arrays, for a plan."""
        nodes = list(self)
        index = {node: row for row, node in enumerate(nodes)}
        parent = [index.get(node.parent, -1) for node in nodes]
        end = list(range(1, len(nodes) + 1))
        for row in range(len(nodes) - 1, -1, -1):
            if parent[row] >= 0:
                end[parent[row]] = max(end[parent[row]], end[row])
        return Preorder(
            nodes,
            np.array(parent, np.int32),
            np.array(end, np.int32),
            np.array([node.start for node in nodes], np.int64),
            index,
        )

    def insert(self, tokens: np.ndarray) -> int:
        """Adds a request, sharing every leading token that is there; returns its number.

        Args:
            tokens: int [any], none included.
        """
        tokens = np.asarray(tokens, np.int64)
        node = self.root
        while node.end < len(tokens):
            depth = node.end
            child = node.children.get(int(tokens[depth]))
            if child is None:
                child = Node(node, depth, len(tokens) - depth, tokens[depth:].copy())
                self._attach(child)
            else:
                shared = common_prefix(child.tokens, tokens[depth:])
                if shared < child.length:
                    child = self.split(child, shared)
            node = child
        node.open = False
        node.requests.add(len(self.ends))
        self.ends.append(node)
        self.version += 1
        return len(self.ends) - 1

    def append(self, request: int, count: int) -> Node:
        """Lengthens a request by `count` tokens, ids unknown; returns its open leaf.

        A request without an open leaf gets one, and its prompt's node stays as it is: so all
        requests begin their own tokens alike and fill their pages in step.
        """
        leaf = self.ends[request]
        if not leaf.open:
            leaf = Node(leaf, leaf.end, 0, np.empty(0, np.int64), open=True)
            self._attach(leaf)
            self._end(request, leaf)
            self.version += 1
        leaf.length += count
        return leaf

    def label(self, request: int, tokens: np.ndarray) -> None:
        """Tells the ids of a request's last tokens, as far as they were unknown; closes its leaf.

        Args:
            tokens: int [up to the request's length].
        """
        tokens = np.asarray(tokens, np.int64)
        begin = self.length(request) - len(tokens)
        for node in self.path(request):
            known = len(node.tokens)
            if known < node.length and node.start + known >= begin:
                self._detach(node)
                told = tokens[node.start + known - begin : node.end - begin]
                node.tokens = np.concatenate([node.tokens, told])
                self._attach(node)
        self.ends[request].open = False

    def split(self, node: Node, at: int) -> Node:
        """Cuts `node` after `at` tokens. It stays the lower part; the new upper one is returned.

        Raises:
            ValueError: unless 0 < at < node.length.
        """
        if not 0 < at < node.length:
            raise ValueError(f"{node} can be split at 1 to {node.length - 1}, not at {at}.")
        pages = self._storage.split(node, at) if self._storage is not None else None
        self._detach(node)
        upper = Node(node.parent, node.start, at, node.tokens[:at])
        upper.pages = pages
        self._attach(upper)
        node.parent, node.tokens = upper, node.tokens[at:]
        node.start, node.length = node.start + at, node.length - at
        self._attach(node)
        self.version += 1
        return upper

    def select(self, indices: Sequence[int], align: int = 1) -> None:
        """Makes `indices` the requests, in that order: reorders, forks and drops them.

        A forked open leaf becomes a shared node, cut down to a multiple of `align` tokens; the
        few behind the cut are copied for each request, so that forks leave no part-filled pages
        inside the tree.

        Args:
            indices: request numbers; one may come several times, or not at all.
            align: tokens in a page.

        Raises:
            IndexError: if a request doesn't exist; nothing has changed then.
        """
        unknown = sorted({i for i in indices if not 0 <= i < len(self)})
        if unknown:
            raise IndexError(f"No requests {unknown}: there are {len(self)}, counted from 0.")
        old, self.ends = self.ends, []
        for node in old:
            node.requests.clear()
        for request, i in enumerate(indices):
            node = old[i]
            if node.open and node.requests:
                node = self._fork(node, align)
            node.requests.add(request)
            self.ends.append(node)
        for node in old:
            self._prune(node)
        self.version += 1

    def truncate(self, request: int, count: int) -> None:
        """Takes the last `count` tokens from a request; other requests keep theirs.

        Raises:
            ValueError: if it has fewer tokens; nothing has changed then.
        """
        if count > self.length(request):
            raise ValueError(
                f"Request {request} has {self.length(request)} tokens; {count} can't be taken off."
            )
        while count > 0:
            node = self.ends[request]
            if node.requests == {request} and not node.children:
                cut = min(count, node.length)
                if cut == node.length:
                    self._end(request, node.parent)
                    self._prune(node)
                else:
                    node.length -= cut
                    node.tokens = node.tokens[: node.length]
                    if self._storage is not None:
                        self._storage.trim(node)
            else:
                cut = min(count, node.length)
                upper = node.parent if cut == node.length else self.split(node, node.length - cut)
                self._end(request, upper)
            count -= cut
            self.version += 1

    def _end(self, request: int, node: Node) -> None:
        self.ends[request].requests.discard(request)
        node.requests.add(request)
        self.ends[request] = node

    def _fork(self, leaf: Node, align: int) -> Node:
        cut = leaf.length // align * align
        if cut == leaf.length:
            leaf.open = False
            return leaf
        if cut:
            self.split(leaf, cut)
        copy = Node(leaf.parent, leaf.start, leaf.length, leaf.tokens, open=True)
        self._attach(copy)
        if self._storage is not None:
            self._storage.fork(leaf, copy)
        return copy

    def _prune(self, node: Node) -> None:
        while node.parent is not None and not node.requests and not node.children:
            self._detach(node)
            node.length = 0
            if self._storage is not None:
                self._storage.trim(node)
            node.parent, node = None, node.parent

    def _attach(self, node: Node) -> None:
        siblings = node.parent.children
        node.key = int(node.tokens[0]) if len(node.tokens) else -1
        if node.key < 0 or node.key in siblings:
            self._keys -= 1
            node.key = self._keys
        siblings[node.key] = node

    def _detach(self, node: Node) -> None:
        del node.parent.children[node.key]


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Leading tokens that two texts share; a and b: int [any]."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    at = int(differ.argmax()) if n else 0
    return at if n and differ[at] else n
