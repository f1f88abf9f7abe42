"""The scheduler: a prefix tree and query rows to thread blocks, as flat int32 tables.

Pack (PAT, arXiv 2511.22333, section 5, counted in bytes), cut into query tiles, cut along KV.
NumPy only, by level of the tree: no Python loop over nodes, rows or tiles.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

_TABLES = ("shapes", "blocks", "rows", "slots", "tiles", "pages", "merge_ptr")
_COLUMNS = {"shapes": 4, "blocks": 4, "tiles": 3}
_HEADER = 3 + 2 * len(_TABLES)  # rows, partials, page size; offset and size of each table
_ALIGN = 64
_NOWHERE = -(1 << 30)


class Nodes(NamedTuple):
    """A prefix tree in preorder: parents first, every subtree contiguous.

    Attributes:
        parent: int32 [N], -1 for a root.
        end: int32 [N], the subtree of u is nodes u..end[u]-1.
        start: int64 [N], position of the first token: the parent's start + length.
        length: int32 [N], tokens that may be read; for a leaf that grows, all that its pages hold.
        page_ptr: int32 [N+1], u's pages are pages[page_ptr[u]:page_ptr[u+1]].
        pages: int32, token t of a node lies in its page t // page size at slot t % page size.
    """

    parent: np.ndarray
    end: np.ndarray
    start: np.ndarray
    length: np.ndarray
    page_ptr: np.ndarray
    pages: np.ndarray


class Heads(NamedTuple):
    """Number of query and KV heads, their dimensions, bytes of a stored element."""

    query: int
    kv: int
    key_dim: int
    value_dim: int
    itemsize: int

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.query // self.kv

    @property
    def token_bytes(self) -> int:
        """K and V of a token, for one KV head."""
        return (self.key_dim + self.value_dim) * self.itemsize

    @property
    def partial_bytes(self) -> int:
        """One more partial of a query, for one KV head: fp32, written and read once."""
        return 2 * self.group * (self.value_dim + 1) * 4


@dataclass(frozen=True)
class Machine:
    """What the tiles are cut for.

    Attributes:
        min_rows, max_rows: smallest and largest query tile m, powers of two. A query token takes
            `group` rows of it; a group wider than `max_rows` is a tile of its own.
        tokens: KV tiles n, ascending powers of two; those smaller than a page are not used.
        min_split: tokens below which a run of KV is not cut in two.
        workers: blocks, counted for each KV head, among which the KV is divided.
    """

    min_rows: int
    max_rows: int
    tokens: tuple[int, ...]
    min_split: int
    workers: int

    @staticmethod
    def cpu() -> Machine:
        """cpu.py gathers by page and pads no more than it must, so tiles are pages."""
        return Machine(1, 1024, (1,), min_split=8192, workers=1 << 30)

    @staticmethod
    def gpu(processors: int) -> Machine:
        """Two waves of blocks over `processors` streaming multiprocessors."""
        return Machine(16, 128, (32, 64), min_split=256, workers=2 * processors)

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> Machine:
        """The machine behind a device."""
        if device.type != "cuda":
            return Machine.cpu()
        return Machine.gpu(torch.cuda.get_device_properties(device).multi_processor_count)


class Tables(NamedTuple):
    """The plan's tables, int32.

    Attributes:
        shapes: [S, 4] m, n, first block, end block. Blocks are sorted by shape.
        blocks: [B, 4] first row, end row (into `rows`), first tile, end tile. Within a shape those
            of most tiles come first.
        rows: [K] query rows, B * T of q [B, heads, T, dim] counted as b * T + t.
        slots: [K] where the partial of a row goes; -1: the block is the row's only one.
        tiles: [T, 3] first page (into `pages`), first position, end position.
        pages: page numbers.
        merge_ptr: [R+1] the partials of row r are slots merge_ptr[r]..merge_ptr[r+1]-1.
        positions: [R or more] of the query rows, far below 0 if they see nothing; what follows
            the first R is padding.
        page_size: tokens in a page.
    """

    shapes: np.ndarray
    blocks: np.ndarray
    rows: np.ndarray
    slots: np.ndarray
    tiles: np.ndarray
    pages: np.ndarray
    merge_ptr: np.ndarray
    positions: np.ndarray
    page_size: int


@dataclass(frozen=True, eq=False)
class Plan:
    """What every layer of a forward does, made once.

    As a tensor it is int32 [1, 1, C, W]: row 0 is the header, row 1 the positions, the other rows
    hold the tables one after another. W is at least the number of query rows and of partials, so a
    launcher sizes its workspace from the shape, without waiting for the device. The header:

        0, 1, 2             query rows, partials, page size
        3 + 2 i, 4 + 2 i    offset in the tensor and size, in elements, of table i of
                            shapes, blocks, rows, slots, tiles, pages, merge_ptr
    """

    tables: Tables

    @property
    def partials(self) -> int:
        """Results that wait for the merge; each is one query token's, in all its heads."""
        return int(self.tables.merge_ptr[-1])

    @property
    def kv_tokens(self) -> int:
        """Tokens whose K and V each KV head reads, at the positions planned for; re-reads count."""
        tables, blocks = self.tables, self.tables.blocks
        if not len(blocks):
            return 0
        last = np.maximum.reduceat(tables.positions[tables.rows], blocks[:, 0])
        begin, end = tables.tiles[blocks[:, 2], 1], tables.tiles[blocks[:, 3] - 1, 2]
        return int(np.maximum(np.minimum(end, last + 1) - begin, 0).sum())

    @functools.cached_property
    def shape(self) -> tuple[int, int]:
        """The smallest (C, W) that holds the plan."""
        width = -(-self._width // _ALIGN) * _ALIGN
        return 2 + -(-self._size // width), width

    @property
    def _width(self) -> int:
        return max(len(self.tables.positions), self.partials, _HEADER)

    @property
    def _size(self) -> int:
        return sum(getattr(self.tables, name).size for name in _TABLES)

    def tensor(
        self, device: torch.device | str, capacity: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """The plan as one tensor.

        Args:
            device: where to.
            capacity: (C, W) of the tensor, to overwrite another plan's; the smallest if `None`.

        Returns:
            int32 [1, 1, C, W].

        Raises:
            ValueError: if the plan doesn't fit `capacity`.
        """
        height, width = capacity or self.shape
        if width < self._width or (height - 2) * width < self._size:
            raise ValueError(
                f"This plan needs W >= {self._width} and (C - 2) * W >= {self._size}; capacity "
                f"(C, W) = ({height}, {width}) is too small. Take a larger one; the plan's own is "
                f"{self.shape}."
            )
        flat = np.zeros(height * width, np.int32)
        positions = self.tables.positions
        flat[:3] = len(positions), self.partials, self.tables.page_size
        flat[width : width + len(positions)] = positions
        offset = 2 * width
        for i, name in enumerate(_TABLES):
            table = getattr(self.tables, name)
            flat[3 + 2 * i : 5 + 2 * i] = offset, table.size
            flat[offset : offset + table.size] = table.ravel()
            offset += table.size
        return torch.from_numpy(flat.reshape(1, 1, height, width)).to(device)

    @staticmethod
    def read(tensor: torch.Tensor) -> Tables:
        """The tables in a plan tensor: views of it on the CPU, copies from another device."""
        width = tensor.shape[-1]
        flat = tensor.cpu().numpy().reshape(-1)
        header = flat[:_HEADER].tolist()
        tables = []
        for i, name in enumerate(_TABLES):
            offset, size = header[3 + 2 * i], header[4 + 2 * i]
            table = flat[offset : offset + size]
            tables.append(table.reshape(-1, _COLUMNS[name]) if name in _COLUMNS else table)
        return Tables(*tables, flat[width : width + header[0]], header[2])

    @staticmethod
    def positions(tensor: torch.Tensor) -> torch.Tensor:
        """The positions in a plan tensor, a view [W]: one for each query row, then padding.

        They may be advanced in place, on the device, until one reaches the end of its node.
        """
        return tensor[0, 0, 1]


def make_plan(
    nodes: Nodes,
    node: np.ndarray,
    position: np.ndarray,
    heads: Heads,
    page_size: int,
    machine: Machine,
    ahead: int | None = None,
) -> Plan:
    """Plans the attention of query rows over a prefix tree.

    A row attends to every token on the path from its root to `node` at a position up to its own.

    Args:
        nodes: the tree.
        node: int [R], the deepest node that a row may see; -1: it sees nothing, and gets zeros.
        position: int [R], the row's own.
        heads: the layer's heads.
        page_size: tokens in a page, a power of two from 16.
        machine: what to cut tiles for.
        ahead: how far `Plan.positions` is going to be advanced; `None`: as far as the rows' nodes
            are long. 0 spares a prefill the reading of what its rows never see.

    Raises:
        ValueError: if the arguments contradict each other.
    """
    node, position = np.asarray(node), np.asarray(position)
    _check(nodes, node, position, heads, page_size)
    forest = _compress(nodes, node, position)
    merged, link = _pack(forest, heads, machine)
    packs = _runs(nodes, forest, merged, link, page_size, machine)
    queries = _query_tiles(nodes, forest, packs, position, heads, machine, ahead)
    position = np.where(node < 0, _NOWHERE, position)
    return Plan(_tables(nodes, packs, queries, position, page_size, heads, machine))


class _Forest(NamedTuple):
    """The tree without nodes that no row sees, every chain of them shortened to one.

    The members of a chain are seen by the same rows. Chains are ordered by depth, those of one
    parent side by side.
    """

    alive: np.ndarray  # [A] nodes that are seen, in preorder
    first: np.ndarray  # [C] chain c is alive[first[c]:first[c] + members[c]]
    members: np.ndarray  # [C]
    levels: np.ndarray  # [D+1] chains of depth d are levels[d]..levels[d+1]-1
    parent: np.ndarray  # [C], -1 for a root
    tokens: np.ndarray  # [C]
    queries: np.ndarray  # [C] rows at or below
    own: np.ndarray  # [C] rows that end here
    furthest: np.ndarray  # [C] the largest position of those
    rows: np.ndarray  # [L] rows that see anything, by node
    chain: np.ndarray  # [L] where they end


def _compress(nodes: Nodes, node: np.ndarray, position: np.ndarray) -> _Forest:
    count = len(nodes.parent)
    own = np.bincount(node + 1, minlength=count + 1)
    rows = _stable_argsort(node + 1, count)[own[0] :]
    before = _offsets(own[1:])
    queries = before[nodes.end] - before[:-1]
    alive = np.flatnonzero(queries)
    queries, parent = queries[alive], nodes.parent[alive]
    # An only child that all rows of its parent pass through follows it in the preorder.
    begins = parent < 0
    begins[1:] |= (queries[1:] != queries[:-1]) | (parent[1:] != alive[:-1])
    first = np.flatnonzero(begins)
    top = alive[first]
    chains = len(first)
    members = np.empty(chains, np.int64)
    members[:-1] = first[1:] - first[:-1]
    members[-1:] = len(alive) - first[-1:]
    # Chains above a chain: those begun before it less those whose subtree is over.
    over = np.bincount(np.searchsorted(top, nodes.end[top]), minlength=chains + 1)
    depth = np.arange(chains) - np.cumsum(over)[:-1]
    order = _stable_argsort(depth, chains)
    rank = np.empty(chains + 1, np.int64)
    rank[order] = np.arange(chains)
    rank[-1] = -1
    above = np.full(count + 1, -1)
    above[alive[first + members - 1]] = np.arange(chains)

    own = own[1:][alive[first + members - 1]]
    ending = np.flatnonzero(own)
    furthest = np.full(chains, np.iinfo(np.int64).max)
    tokens = np.zeros(chains, np.int64)
    if chains:
        furthest[ending] = np.maximum.reduceat(position[rows], _offsets(own[ending])[:-1])
        tokens = np.add.reduceat(nodes.length[alive], first, dtype=np.int64)
    return _Forest(
        alive,
        first[order],
        members[order],
        _offsets(np.bincount(depth)),
        rank[above[nodes.parent[top]]][order],
        tokens[order],
        queries[first][order],
        own[order],
        furthest[order],
        rows,
        np.repeat(rank[:-1], own),
    )


def _pack(forest: _Forest, heads: Heads, machine: Machine) -> tuple[np.ndarray, np.ndarray]:
    """Which chains read their parent's run in front of their own, by PAT's profit model.

    To merge a child of s queries saves a partial for each of them, and reads the parent's run
    once more; not if they fill query tiles exactly, for then the parent has as many fewer. A
    parent whose rows all leave with its children is not read for itself.

    Returns:
        merged: bool [C].
        link: int64 [C], the chain whose run the rows attend to in another pack; -1: none.
    """
    merged = np.zeros(len(forest.parent), bool)
    link = forest.parent.copy()
    run = forest.tokens * heads.token_bytes  # bytes carried
    room = _query_tile(heads, machine)
    tiles = -(-forest.queries // room)
    more = forest.queries % room > 0
    saved = forest.queries * heads.partial_bytes
    for begin, end in zip(forest.levels[1:-1], forest.levels[2:], strict=True):
        level = slice(begin, end)
        parent = forest.parent[level]
        read = run[parent]
        joins = saved[level] >= read * more[level]
        if not joins.all():
            families = _starts(parent)
            rest = np.add.reduceat((tiles[level] * read - saved[level]) * ~joins, families)
            left = np.add.reduceat(forest.queries[level] * ~joins, families)
            head = parent[families]
            dissolves = (forest.own[head] == 0) & (rest <= -(-left // room) * run[head])
            joins |= np.repeat(dissolves, np.diff(families, append=len(parent)))
        merged[level] = joins
        run[level] += read * joins
        link[level] = np.where(joins, link[parent], parent)
    return merged, link


class _Packs(NamedTuple):
    """Runs of KV that some rows read together."""

    chain: np.ndarray  # [P] the run's last
    entry: np.ndarray  # [P+1] the pack's rows are rows[entry[p]:entry[p+1]]
    rows: np.ndarray
    log_tokens: np.ndarray  # [P] log2 of n
    tile: np.ndarray  # [P+1] the pack's tiles are tiles[tile[p]:tile[p+1]]
    bottom: np.ndarray  # [P] the run's last node
    last: np.ndarray  # [P] tiles of the run that lie in it
    tiles: np.ndarray  # [T, 3]


def _runs(
    nodes: Nodes,
    forest: _Forest,
    merged: np.ndarray,
    link: np.ndarray,
    page_size: int,
    machine: Machine,
) -> _Packs:
    chain, row = _climb(forest.chain, link)
    count = np.bincount(chain, minlength=len(link))
    row = row[_stable_argsort(chain, len(link))]
    packs = np.flatnonzero(count)
    chain, pack = _climb(packs, np.where(merged, forest.parent, -1))
    # A run is read from its top.
    chain, pack = chain[::-1], pack[::-1]
    order = _stable_argsort(pack, len(packs))
    chain, pack = chain[order], pack[order]
    owner, index = _expand(forest.members[chain])
    member = forest.alive[forest.first[chain][owner] + index]
    pack = pack[owner]

    length = nodes.length[member].astype(np.int64)
    log_tokens = _log_kv_tiles(length, pack, len(packs), page_size, machine)
    per_member = -(-length >> log_tokens[pack])  # ceiling
    owner, index = _expand(per_member)
    start = nodes.start[member]
    step = index << log_tokens[pack][owner]
    tiles = np.empty((len(index), 3), np.int32)
    tiles[:, 0] = nodes.page_ptr[member][owner] + step // page_size
    tiles[:, 1] = begin = start[owner] + step
    size = 1 << log_tokens[pack]
    tiles[:, 2] = np.minimum(begin + size[owner], (start + length)[owner])
    begin = _starts(pack)
    end = np.append(begin[1:], len(pack)) - 1 if len(pack) else begin
    return _Packs(
        packs,
        _offsets(count[packs]),
        forest.rows[row],
        log_tokens,
        _offsets(np.add.reduceat(per_member, begin) if len(pack) else begin),
        member[end],
        per_member[end],
        tiles,
    )


def _log_kv_tiles(
    length: np.ndarray, pack: np.ndarray, packs: int, page_size: int, machine: Machine
) -> np.ndarray:
    """log2 of each pack's n: the largest tile that pads its nodes by an eighth at most."""
    chosen = np.full(packs, page_size.bit_length() - 1)
    sizes = [n for n in machine.tokens if n > page_size]
    if sizes:
        most = np.bincount(pack, -(-length // page_size) * page_size, packs) * 1.125
        for n in sizes:
            padded = np.bincount(pack, -(-length // n) * n, packs)
            chosen[padded <= most] = n.bit_length() - 1
    return chosen


class _Queries(NamedTuple):
    """Query tiles; all of a pack's are alike but the last."""

    pack: np.ndarray  # [Q]
    entry: np.ndarray  # [Q] first of the tile's rows
    rows: np.ndarray  # [Q] how many
    kv_tiles: np.ndarray  # [Q] tiles from the front of the run that the rows can see


def _query_tiles(
    nodes: Nodes,
    forest: _Forest,
    packs: _Packs,
    position: np.ndarray,
    heads: Heads,
    machine: Machine,
    ahead: int | None,
) -> _Queries:
    room = _query_tile(heads, machine)
    rows = packs.entry[1:] - packs.entry[:-1]
    pack, index = _expand(-(-rows // room))
    entry = packs.entry[pack] + index * room
    rows = np.minimum(rows[pack] - index * room, room)
    kv_tiles = (packs.tile[1:] - packs.tile[:-1])[pack]
    if not len(pack):
        return _Queries(pack, entry, rows, kv_tiles)

    # Rows that end in the run's last node see a part of it, and more of it as they advance.
    start = nodes.start[packs.bottom]
    end = start + nodes.length[packs.bottom]
    advance = np.maximum(end - 1 - forest.furthest[packs.chain], 0)
    if ahead is not None:
        advance = np.minimum(advance, ahead)
    last = np.maximum.reduceat(position[packs.rows], entry)
    seen = np.maximum(last + (advance - start + 1)[pack], 0)
    seen = -(-seen >> packs.log_tokens[pack])  # ceiling
    kv_tiles -= np.maximum(packs.last[pack] - seen, 0)
    return _Queries(pack, entry, rows, kv_tiles)


def _tables(
    nodes: Nodes,
    packs: _Packs,
    queries: _Queries,
    position: np.ndarray,
    page_size: int,
    heads: Heads,
    machine: Machine,
) -> Tables:
    log_tokens = packs.log_tokens[queries.pack]
    log_rows = np.maximum(_log2_ceil(queries.rows * heads.group), _log2_ceil(machine.min_rows))
    tokens = queries.kv_tiles << log_tokens
    share = max(machine.min_split, -(-int(tokens.sum()) // max(machine.workers // heads.kv, 1)))
    splits = np.minimum(-(-tokens // share), queries.kv_tiles)
    tile, part = _expand(splits)
    kv_tiles, splits = queries.kv_tiles[tile], splits[tile]
    begin, end = part * kv_tiles // splits, (part + 1) * kv_tiles // splits

    # Sorted by shape, then from the most tiles to the fewest.
    shape = (log_rows << 5 | log_tokens)[tile]
    most = int(kv_tiles.max(initial=0))
    order = _stable_argsort(most - (end - begin), most + 1)
    order = order[_stable_argsort(shape[order], 1 << 10)]
    tile, shape = tile[order], shape[order]
    base = packs.tile[queries.pack[tile]]
    counts = queries.rows[tile]
    blocks = np.empty((len(tile), 4), np.int32)
    blocks[:, 1] = np.cumsum(counts)
    blocks[:, 0] = blocks[:, 1] - counts
    blocks[:, 2] = base + begin[order]
    blocks[:, 3] = base + end[order]

    owner, index = _expand(counts)
    rows = packs.rows[queries.entry[tile][owner] + index]
    partials = np.bincount(rows, minlength=len(position))
    partials[partials == 1] = 0
    slots = np.full(len(rows), -1, np.int32)
    shared = np.flatnonzero(partials[rows])
    slots[shared[_stable_argsort(rows[shared], len(position))]] = np.arange(len(shared))

    begin = _starts(shape)
    shapes = np.empty((len(begin), 4), np.int32)
    shapes[:, 0] = 1 << (shape[begin] >> 5)
    shapes[:, 1] = 1 << (shape[begin] & 31)
    shapes[:, 2] = begin
    shapes[:-1, 3] = begin[1:]
    shapes[-1:, 3] = len(shape)
    return Tables(
        shapes,
        blocks,
        rows.astype(np.int32),
        slots,
        packs.tiles,
        np.asarray(nodes.pages, np.int32),
        _offsets(partials).astype(np.int32),
        position.astype(np.int32),
        page_size,
    )


def _check(
    nodes: Nodes, node: np.ndarray, position: np.ndarray, heads: Heads, page_size: int
) -> None:
    if page_size < 16 or page_size & (page_size - 1):
        raise ValueError(f"page_size={page_size}: it must be a power of two from 16.")
    if heads.kv < 1 or heads.query % heads.kv:
        raise ValueError(
            f"{heads.query} query heads don't divide among {heads.kv} KV heads; every KV head "
            "needs as many."
        )
    if node.ndim != 1 or node.shape != position.shape:
        raise ValueError(
            f"node {node.shape} and position {position.shape} must both be [R], one of each for "
            "every query row."
        )
    count = len(nodes.parent)
    if len(node) and not (-1 <= node.min() and node.max() < count):
        raise ValueError(
            f"node runs from {node.min()} to {node.max()}; there are nodes 0 to {count - 1}, and "
            "-1 for a row that sees nothing."
        )


def _query_tile(heads: Heads, machine: Machine) -> int:
    """Query tokens in the largest query tile."""
    return max(machine.max_rows // heads.group, 1)


def _offsets(counts: np.ndarray) -> np.ndarray:
    """[n+1]: 0, counts[0], counts[0] + counts[1], .."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _expand(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """0 counts[0] times, 1 counts[1] times, ..; and beside it 0, 1, .. for each of them."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]


def _starts(values: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin."""
    begins = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=begins[1:])
    return np.flatnonzero(begins)


def _climb(at: np.ndarray, above: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All that lies on the way up from each of `at`, itself included; and which of `at` it was."""
    item = np.arange(len(at))
    met, items = [at], [item]
    while len(at):
        at = above[at]
        on = np.flatnonzero(at >= 0)
        at, item = at[on], item[on]
        met.append(at)
        items.append(item)
    return np.concatenate(met), np.concatenate(items)


def _stable_argsort(keys: np.ndarray, below: int) -> np.ndarray:
    # NumPy sorts 16 bits by radix, wider ones by merging.
    return np.argsort(keys.astype(np.uint16) if below < 1 << 16 else keys, kind="stable")


def _log2_ceil(x: np.ndarray | int) -> np.ndarray:
    return np.frexp(np.asarray(x) - 1)[1]
