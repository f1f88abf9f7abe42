"""What sharing saved, for people to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pat_hf.cache.prefix_tree import Node, PrefixTree


@dataclass(frozen=True)
class Report:
    """State of a PATCache; `print` it.

    Attributes:
        requests: requests in the batch.
        depth: nodes on the longest path of the prefix tree.
        tokens, dense_tokens: the batch's tokens as stored, and as a cache without sharing would
            store them.
        bytes_held: bytes of the batch's pages, in all layers.
        bytes_per_token: bytes of a token's K and V in all layers.
        read_tokens: tokens whose K and V a decode step reads.
        prompt_tokens, prefilled_tokens: tokens of prompts that could share, given since the last
            reset, and those of them that went through the model.
        found_tokens: distinct tokens of the prompts since then that were stored by earlier calls.
        kept_tokens, kept_bytes: what is stored beyond the batch and pinned prompts, tokens and
            bytes of their pages.
        keep_bytes: how many bytes that may be; `None` if nothing is kept.
        pinned_prompts: how many prompts are pinned.
        evicted_tokens: tokens that had to go since the last reset.
        backend: what computes attention.
        decoding: how the last `generate()` ran its decode steps; `None` if there was none.
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
    found_tokens: int
    kept_tokens: int
    kept_bytes: int
    keep_bytes: int | None
    pinned_prompts: int
    evicted_tokens: int
    backend: str
    decoding: str | None
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
        if self.decoding:
            rows.append(("decode steps", self.decoding))
        if self.found_tokens:
            distinct = self.found_tokens + self.prefilled_tokens
            rows.append(("reused", f"{self.found_tokens:,} of {distinct:,} distinct prompt tokens"))
        if self.keep_bytes is not None or self.pinned_prompts:
            rows.append(
                (
                    "kept",
                    f"{_count(self.kept_tokens, 'token')}, {_bytes(self.kept_bytes)} of "
                    f"{_bytes(self.keep_bytes or 0)}; {self.evicted_tokens:,} evicted; "
                    f"{_count(self.pinned_prompts, 'prompt')} pinned",
                )
            )
        if self.fallback:
            rows.append(("not shared", self.fallback))
        return "\n".join(f"{name:<14} {text}" for name, text in rows)


def draw(tree: PrefixTree) -> str:
    """A prefix tree as lines of text.

    Nodes whose sharing saves less than a hundredth of all tokens are left out: what lies in them
    counts with the next node that is drawn, or as the requests' own.
    """
    below: dict[Node, int] = {}
    live = tree.live()
    for node in live[::-1]:
        below[node] = len(node.requests)
        below[node] += sum(below.get(child, 0) for child in node.children.values())
    least = sum(node.length * requests for node, requests in below.items()) / 100
    top = Node(None, 0, 0, np.empty(0, np.int64))
    above = {root: top for root in tree.roots.values()}  # a node is drawn itself or under this
    children: dict[Node, list[tuple[Node, int]]] = {top: []}
    for node in live:
        parent = above[node.parent]
        above[node] = parent
        if (below[node] - 1) * node.length >= least:
            above[node] = node
            children[node] = []
            children[parent].append((node, node.end - parent.end))
    own: dict[Node, list[int]] = {}
    for end in tree.ends:
        own.setdefault(above[end], []).append(end.end - above[end].end)

    lines = [_count(len(tree), "request")]
    stack = [(top, 0, "")]
    while stack:
        node, length, indent = stack.pop()
        if node is not top:
            lines.append(f"{indent}{_count(length, 'token')} · {_count(below[node], 'request')}")
        indent = indent.replace("├─ ", "│  ").replace("└─ ", "   ")
        if lengths := own.get(node):
            mark = "├─ " if children[node] else "└─ "
            few, many = min(lengths), max(lengths)
            span = _count(many, "token") if few == many else f"{few:,} to {many:,} tokens"
            whose = f"{_count(len(lengths), 'request')}, {span}"
            lines.append(f"{indent}{mark}{whose} of {'its' if len(lengths) == 1 else 'their'} own")
        for i, (child, length) in enumerate(children[node][::-1]):
            stack.append((child, length, indent + ("├─ " if i else "└─ ")))
    return "\n".join(lines)


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
