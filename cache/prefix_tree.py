"""The prefix tree of a batch and of what is kept beyond it. Integers only."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence, Set
from typing import NamedTuple, Protocol

import numpy as np


class Node:
    """A span of tokens that all requests below it share.

    Attributes:
        tokens: ids known so far, int64 [<= length]; an open leaf's are told later by `label`.
        start: position of the first token, the sum of the lengths above.
        length: tokens in the span.
        parent: the node above; a root, which is empty, has none.
        children: the nodes below, by first token or, where unknown or taken, a negative key.
        requests: numbers of the requests that end here.
        open: a leaf of generated tokens, which its one request may lengthen.
        ended: a prompt has ended here, be its request gone or not.
        used: when a prompt last passed through, by the tree's clock.
        pages: page ids of the span, `None` before it is stored. Belongs to the `Storage`.
    """

    __slots__ = (
        "children", "ended", "key", "length", "open", "pages", "parent", "requests", "start",
        "tokens", "used",
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
        self.ended = False
        self.used = 0
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
    """The batch's tree as arrays: parents first, every subtree contiguous, roots left out.

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
    empty. Generated tokens go into open leaves, one for each request. Requests of different
    families share nothing, whatever their tokens: each family has a root of its own.

    Nodes that no request and no pin holds are idle. `select` leaves them if it is told to keep
    them, and `evict` removes them.

    Args:
        storage: told of every split, fork and removal.
    """

    def __init__(self, storage: Storage | None = None):
        self.roots: dict[Hashable, Node] = {}
        self.ends: list[Node] = []
        self.pins: dict[tuple[Hashable, bytes], np.ndarray] = {}
        self.clock = 0  # prompts inserted so far
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

    def root(self, request: int) -> Node:
        """The empty node above a request's first, that of its family."""
        node = self.ends[request]
        while node.parent is not None:
            node = node.parent
        return node

    def __iter__(self) -> Iterator[Node]:
        """All nodes without the roots, parents first, every subtree contiguous."""
        for root in self.roots.values():
            yield from _below(root)

    def live(self) -> list[Node]:
        """Nodes that requests pass through, in the same order."""
        held = _ancestry(self.ends)
        return [
            node
            for root in self.roots.values()
            for node in _below(root, stop=lambda node: node not in held)
        ]

    def idle(self) -> list[Node]:
        """Nodes that no request passes through, and no pinned prompt, in the same order."""
        held = self._held()
        return [node for node in self if node not in held]

    def copy(self, storage: Storage | None = None) -> PrefixTree:
        """A tree of the same requests, pins and page ids that shares no node with this one."""
        tree = PrefixTree(storage)
        tree._keys, tree.clock = self._keys, self.clock
        tree.pins = dict(self.pins)
        twins = {root: tree._root(family) for family, root in self.roots.items()}
        for root, twin in twins.items():
            twin.requests = set(root.requests)
        for node in self:
            twin = Node(twins[node.parent], node.start, node.length, node.tokens, node.open)
            twin.key, twin.requests = node.key, set(node.requests)
            twin.ended, twin.used = node.ended, node.used
            twin.pages = None if node.pages is None else list(node.pages)
            twin.parent.children[twin.key] = twin
            twins[node] = twin
        tree.ends = [twins[node] for node in self.ends]
        return tree

    def preorder(self) -> Preorder:
        """What requests see of the tree as arrays, for a plan."""
        nodes = self.live()
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

    def match(self, tokens: np.ndarray, family: Hashable = None) -> tuple[list[Node], int]:
        """Nodes that hold the leading tokens, and how many they hold; the last may go on."""
        nodes: list[Node] = []
        found = 0
        node = self.roots.get(family)
        while node is not None and found == node.end and found < len(tokens):
            node = node.children.get(int(tokens[found]))
            if node is not None:
                nodes.append(node)
                found += common_prefix(node.tokens, tokens[found:])
        return nodes, found

    def insert(self, tokens: np.ndarray, family: Hashable = None) -> int:
        """Adds a request, sharing every leading token that is there; returns its number.

        Args:
            tokens: int [any], none included.
            family: requests share with those of the same only.
        """
        tokens = np.asarray(tokens, np.int64)
        self.clock += 1
        node = self._root(family)
        while node.end < len(tokens):
            depth = node.end
            child = node.children.get(int(tokens[depth]))
            if child is None:
                child = self.grow(node, tokens[depth:].copy())
            else:
                shared = common_prefix(child.tokens, tokens[depth:])
                if shared < child.length:
                    # Should the storage find no room, the child is the last to be evicted for it.
                    lower, used, child.used = child, child.used, self.clock
                    child = self.split(child, shared)
                    lower.used = used
            child.used = self.clock
            node = child
        node.open, node.ended = False, True
        node.requests.add(len(self.ends))
        self.ends.append(node)
        return len(self.ends) - 1

    def grow(self, parent: Node | None, tokens: np.ndarray) -> Node:
        """A new node below `parent`, or at the top of the family `None`."""
        parent = self._root(None) if parent is None else parent
        node = Node(parent, parent.end, len(tokens), tokens)
        self._attach(node)
        return node

    def append(self, request: int, count: int) -> Node:
        """Lengthens a request by `count` tokens, ids unknown; returns its open leaf.

        A request without an open leaf gets one, and its prompt's node stays as it is: so all
        requests begin their own tokens alike and fill their pages in step.
        """
        leaf = self.ends[request]
        if not leaf.open:
            leaf = Node(leaf, leaf.end, 0, np.empty(0, np.int64), open=True)
            leaf.used = self.clock
            self._attach(leaf)
            self._end(request, leaf)
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

    def merge(self, request: int) -> None:
        """Lets a request share what its ids, told late by `label`, show to be another's too."""
        todo = self.path(request)
        while todo:
            node = todo.pop(0)
            gone = node.parent is None  # as somebody's twin: children are listed twice
            if gone or node.key >= 0 or len(node.tokens) < node.length:
                continue
            other = node.parent.children.get(int(node.tokens[0]))
            if other is None:  # what had its place has gone
                self._detach(node)
                self._attach(node)
                continue
            if other.open or len(other.tokens) < other.length:
                continue
            shared = common_prefix(node.tokens, other.tokens)
            upper = other if shared == other.length else self.split(other, shared)
            twin = node if shared == node.length else self.split(node, shared)
            for end in list(twin.requests):
                self._end(end, upper)
            upper.ended |= twin.ended
            upper.used = max(upper.used, twin.used)
            for child in list(twin.children.values()):
                self._detach(child)
                child.parent = upper
                self._attach(child)
                todo.append(child)
            self._remove(twin)

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
        upper.pages, upper.used = pages, node.used
        self._attach(upper)
        node.parent, node.tokens = upper, node.tokens[at:]
        node.start, node.length = node.start + at, node.length - at
        self._attach(node)
        return upper

    def select(self, indices: Sequence[int], align: int = 1, keep: bool = False) -> None:
        """Makes `indices` the requests, in that order: reorders, forks and drops them.

        A forked open leaf becomes a shared node, cut down to a multiple of `align` tokens; the
        few behind the cut are copied for each request, so that forks leave no part-filled pages
        inside the tree.

        Args:
            indices: request numbers; one may come several times, or not at all.
            align: tokens in a page.
            keep: leave nodes that no request needs any more, if they are stored and can be found
                again: all their ids known, no other in their place. Pinned prompts always stay.

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
        pinned = self._held() if self.pins else set()
        for node in old:
            self._prune(node, keep, pinned)

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

    def pin(self, tokens: np.ndarray, family: Hashable = None) -> None:
        """Holds a prompt, stored already or later on, as a request would; once is enough.

        Args:
            tokens: int64 [any].
        """
        self.pins[family, tokens.tobytes()] = tokens

    def unpin(self, tokens: np.ndarray, family: Hashable = None) -> None:
        """Undoes `pin`.

        Raises:
            KeyError: if the prompt isn't pinned.
        """
        del self.pins[family, tokens.tobytes()]

    def cut(self) -> None:
        """Splits nodes where a pinned prompt ends inside them, so that it holds no more."""
        for (family, _), tokens in self.pins.items():
            nodes, found = self.match(tokens, family)
            if nodes and found < nodes[-1].end:
                self.split(nodes[-1], found - nodes[-1].start)

    def evict(self) -> Iterator[int]:
        """Removes an idle leaf at every step, the least recently used first; yields its tokens."""
        idle = {node: i for i, node in enumerate(self.idle())}
        leaves = [(node.used, -i, node) for node, i in idle.items() if not node.children]
        heapq.heapify(leaves)
        while leaves:
            node = heapq.heappop(leaves)[2]
            parent, length = node.parent, node.length
            self._remove(node)
            if parent in idle and not parent.children:
                heapq.heappush(leaves, (parent.used, -idle[parent], parent))
            yield length

    def drop(self, tokens: np.ndarray, family: Hashable = None) -> int:
        """Removes a prompt and what was generated after it; returns how many tokens that were.

        What another prompt, a request or a pin needs stays: of the prompt the tokens that they
        share, and of what follows it the prompts that go on from there.
        """
        nodes, found = self.match(tokens, family)
        nodes = [node for node in nodes if node.end <= found]
        if not nodes:
            return 0
        held = self._held()
        if nodes[-1].end == len(tokens):
            nodes[-1].ended = False
            # What lies below another prompt's end is that prompt's.
            nodes += _below(nodes[-1], stop=lambda node: node.ended)
        dropped = 0
        for node in nodes[::-1]:
            if not node.children and not node.ended and node not in held:
                dropped += node.length
                self._remove(node)
        return dropped

    def _held(self) -> set[Node]:
        pinned = [self.match(tokens, family)[0][-1:] for (family, _), tokens in self.pins.items()]
        return _ancestry([*self.ends, *(node for last in pinned for node in last)])

    def _root(self, family: Hashable) -> Node:
        if family not in self.roots:
            self.roots[family] = Node(None, 0, 0, np.empty(0, np.int64))
        return self.roots[family]

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
        copy.used = leaf.used
        self._attach(copy)
        if self._storage is not None:
            self._storage.fork(leaf, copy)
        return copy

    def _prune(self, node: Node, keep: bool = False, pinned: Set[Node] = frozenset()) -> None:
        while node.parent is not None and not node.requests and not node.children:
            found_again = node.key >= 0 and len(node.tokens) == node.length
            if (keep or node in pinned) and found_again and node.pages is not None:
                break
            parent = node.parent
            self._remove(node)
            node = parent

    def _remove(self, node: Node) -> None:
        self._detach(node)
        node.length = 0
        if self._storage is not None:
            self._storage.trim(node)
        node.parent = None

    def _attach(self, node: Node) -> None:
        siblings = node.parent.children
        node.key = int(node.tokens[0]) if len(node.tokens) else -1
        if node.key < 0 or node.key in siblings:
            self._keys -= 1
            node.key = self._keys
        siblings[node.key] = node

    def _detach(self, node: Node) -> None:
        del node.parent.children[node.key]


def _ancestry(ends: Iterable[Node]) -> set[Node]:
    """These nodes and all above them, roots left out."""
    held: set[Node] = set()
    for node in ends:
        while node.parent is not None and node not in held:
            held.add(node)
            node = node.parent
    return held


def _below(node: Node, stop: Callable[[Node], bool] = lambda node: False) -> Iterator[Node]:
    """The nodes below, parents first, every subtree contiguous; nothing from where it stops."""
    stack = list(node.children.values())[::-1]
    while stack:
        node = stack.pop()
        if not stop(node):
            yield node
            stack.extend(list(node.children.values())[::-1])


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Leading tokens that two texts share; a and b: int [any]."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    at = int(differ.argmax()) if n else 0
    return at if n and differ[at] else n
