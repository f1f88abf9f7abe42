"""What sharing saved, for people to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pat_hf.cache.prefix_tree import Node, PrefixTree


@dataclass(frozen=True)
class Report:
    """State of a PATCache; `print` it.

    Attributes:
        requests: requests in the batch.
        depth: nodes on the longest path of the prefix tree.
        tokens, dense_tokens: tokens stored, and those that a cache without sharing would store.
        bytes_held: bytes of the pages in use, in all layers.
        bytes_per_token: bytes of a token's K and V in all layers.
        read_tokens: tokens whose K and V a decode step reads.
        prompt_tokens, prefilled_tokens: prompt tokens given since the last reset, and those that
            went through the model.
        backend: what computes attention.
        fallback: why prompts were not shared, if they were not.
    """

    requests: int
    depth: int
    tokens: int
    dense_tokens: int
    bytes_held: int
    bytes_per_token: int
    read_tokens: int
    prompt_tokens: int
    prefilled_tokens: int
    backend: str
    fallback: str | None

    @property
    def bytes_saved(self) -> int:
        """Bytes that a cache without sharing would hold beyond this one's."""
        return self.dense_tokens * self.bytes_per_token - self.bytes_held

    @property
    def bytes_read(self) -> int:
        """Bytes of K and V that a decode step reads."""
        return self.read_tokens * self.bytes_per_token

    @property
    def bytes_read_saved(self) -> int:
        """Bytes that a decode step without sharing would read beyond this one's."""
        return self.dense_tokens * self.bytes_per_token - self.bytes_read

    @property
    def prefill_saved(self) -> int:
        """Prompt tokens that did not have to go through the model."""
        return self.prompt_tokens - self.prefilled_tokens

    def __str__(self) -> str:
        dense = self.dense_tokens * self.bytes_per_token
        rows = [
            ("requests", f"{self.requests:,}, prefix tree {self.depth} deep"),
            ("prefill", _saving(self.prefilled_tokens, self.prompt_tokens, "{:,} tokens".format)),
            ("stored tokens", _saving(self.tokens, self.dense_tokens, "{:,}".format)),
            ("stored bytes", _saving(self.bytes_held, dense, _bytes)),
            ("read per step", _saving(self.bytes_read, dense, _bytes)),
            ("backend", self.backend),
        ]
        if self.fallback:
            rows.append(("not shared", self.fallback))
        return "\n".join(f"{name:<14} {text}" for name, text in rows)


def draw(tree: PrefixTree) -> str:
    """A prefix tree as lines of text; the leaves under one node share a line."""
    below: dict[Node, int] = {}
    for node in list(tree)[::-1]:
        below[node] = len(node.requests) + sum(below[child] for child in node.children.values())
    lines = [_count(len(tree), "request")]
    stack = [(entry, "") for entry in _entries(tree.root)[::-1]]
    while stack:
        (nodes, last), indent = stack.pop()
        lengths = sorted(node.length for node in nodes)
        tokens = (
            f"{lengths[0]:,}" if lengths[0] == lengths[-1] else f"{lengths[0]:,}-{lengths[-1]:,}"
        )
        requests = _count(sum(below[node] for node in nodes), "request")
        head = f"{len(nodes)} x " if len(nodes) > 1 else ""
        lines.append(f"{indent}{'└─' if last else '├─'} {head}{tokens} tokens · {requests}")
        if len(nodes) == 1:
            indent += "   " if last else "│  "
            stack += [(entry, indent) for entry in _entries(nodes[0])[::-1]]
    return "\n".join(lines)


def _entries(node: Node) -> list[tuple[list[Node], bool]]:
    """The lines under a node: an inner child each, the leaves together; and which is the last."""
    children = list(node.children.values())
    groups = [[child] for child in children if child.children]
    if leaves := [child for child in children if not child.children]:
        groups.append(leaves)
    return [(group, i == len(groups) - 1) for i, group in enumerate(groups)]


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("s" if n != 1 else "")


def _saving(ours: int, dense: int, form: Callable[[int], str]) -> str:
    ratio = f", {dense / ours:.1f}x less" if 0 < ours < dense else ""
    return f"{form(ours)} of {form(dense)}{ratio}"


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"
