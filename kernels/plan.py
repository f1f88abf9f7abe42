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
        return Machine(16, 128, (32, 64, 128), min_split=256, workers=2 * processors)

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
        positions: [R or more] of the query rows; what follows the first R is padding.
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
    forest = _compress(nodes, node)
    merged, link = _pack(forest, heads, machine)
    packs = _runs(nodes, forest, merged, link, page_size, machine)
    queries = _query_tiles(nodes, forest, packs, position, heads, machine, ahead)
    return Plan(_tables(nodes, packs, queries, position, page_size, heads, machine))


class _Forest(NamedTuple):
    """The tree without nodes that no row sees, every chain of them shortened to one.

    The members of a chain are seen by the same rows. Chains are in preorder.
    """

    alive: np.ndarray  # [A] nodes that are seen, in preorder
    first: np.ndarray  # [C+1] chain c is alive[first[c]:first[c+1]]
    parent: np.ndarray  # [C]
    depth: np.ndarray  # [C]
    tokens: np.ndarray  # [C]
    queries: np.ndarray  # [C] rows at or below
    own: np.ndarray  # [C] rows that end here
    rows: np.ndarray  # [L] rows that see anything, by chain
    chain: np.ndarray  # [L] where they end


def _compress(nodes: Nodes, node: np.ndarray) -> _Forest:
    count = len(nodes.parent)
    own = np.bincount(node + 1, minlength=count + 1)
    rows = np.argsort(node, kind="stable")[own[0] :]
    own = own[1:]
    before = _offsets(own)
    queries = before[nodes.end] - before[:-1]
    alive = np.flatnonzero(queries)
    parent = nodes.parent[alive]
    # An only child that all rows of its parent pass through follows it in the preorder.
    begins = (parent < 0) | (queries[alive] != queries[parent])
    first = np.append(np.flatnonzero(begins), len(alive))
    top = alive[first[:-1]]
    chain_of = np.empty(count, np.int64)
    chain_of[alive] = np.cumsum(begins) - 1
    parent = nodes.parent[top]
    parent = np.where(parent < 0, -1, chain_of[parent])
    # Chains above c: those begun minus those whose subtree is over.
    over = np.bincount(np.searchsorted(top, nodes.end[top]), minlength=len(top) + 1)
    depth = np.arange(len(top)) - np.cumsum(over)[:-1]
    own = own[alive[first[1:] - 1]]
    return _Forest(
        alive,
        first,
        parent,
        depth,
        np.add.reduceat(nodes.length[alive], first[:-1], dtype=np.int64) if len(top) else top,
        queries[top],
        own,
        rows,
        np.repeat(np.arange(len(top)), own),
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
    link = forest.parent.astype(np.int64)
    run = forest.tokens * heads.token_bytes  # bytes carried
    room = _query_tile(heads, machine)
    queries, parent = forest.queries, forest.parent
    tiles = -(-queries // room)
    more = queries % room > 0
    saved = queries * heads.partial_bytes
    order = np.argsort(forest.depth, kind="stable")
    bounds = _offsets(np.bincount(forest.depth))
    for begin, end in zip(bounds[1:-1], bounds[2:], strict=True):
        child = order[begin:end]
        above = parent[child]
        read = run[above]
        joins = saved[child] >= read * more[child]
        families = np.flatnonzero(np.diff(above, prepend=-1))
        rest = np.where(joins, 0, tiles[child] * read - saved[child])
        left = np.where(joins, 0, queries[child])
        top = above[families]
        remains = -(-np.add.reduceat(left, families) // room) * run[top]
        dissolves = (forest.own[top] == 0) & (np.add.reduceat(rest, families) <= remains)
        joins |= np.repeat(dissolves, np.diff(families, append=len(child)))
        child, above = child[joins], above[joins]
        merged[child] = True
        run[child] += run[above]
        link[child] = link[above]
    return merged, link


class _Packs(NamedTuple):
    """Runs of KV that some rows read together."""

    bottom: np.ndarray  # [P] the run's last node
    entry: np.ndarray  # [P+1] the pack's rows are rows[entry[p]:entry[p+1]]
    rows: np.ndarray
    log_tokens: np.ndarray  # [P] log2 of n
    tile: np.ndarray  # [P+1] the pack's tiles are tiles[tile[p]:tile[p+1]]
    last: np.ndarray  # [P] of these, tiles in the last node
    tiles: np.ndarray  # [T, 3]


def _runs(
    nodes: Nodes,
    forest: _Forest,
    merged: np.ndarray,
    link: np.ndarray,
    page_size: int,
    machine: Machine,
) -> _Packs:
    live = max(len(forest.rows), 1)
    rank, chain, keys = np.arange(len(forest.rows)), forest.chain, []
    while len(chain):
        keys.append(chain * live + rank)
        chain = link[chain]
        on = chain >= 0
        chain, rank = chain[on], rank[on]
    chain, rank = np.divmod(np.sort(np.concatenate(keys or [rank])), live)
    count = np.bincount(chain, minlength=len(forest.parent))
    bottoms = np.flatnonzero(count)

    chains = max(len(forest.parent), 1)
    pack, chain, keys = np.arange(len(bottoms)), bottoms, []
    while len(chain):
        keys.append(pack * chains + chain)
        on = merged[chain]
        pack, chain = pack[on], forest.parent[chain[on]]
    pack, chain = np.divmod(np.sort(np.concatenate(keys or [pack])), chains)
    size = np.diff(forest.first)[chain]
    member = forest.alive[_ranges(forest.first[chain], size)]
    pack = np.repeat(pack, size)

    length = nodes.length[member].astype(np.int64)
    log_tokens = _log_kv_tiles(length, pack, len(bottoms), page_size, machine)
    per_member = -(-length >> log_tokens[pack])  # ceiling
    per_pack = np.bincount(pack, per_member, len(bottoms)).astype(np.int64)
    index = _ranges(np.zeros(len(member), np.int64), per_member)
    member_of = np.repeat(np.arange(len(member)), per_member)
    owner = member[member_of]
    step = index << log_tokens[pack][member_of]
    tiles = np.empty((len(index), 3), np.int32)
    tiles[:, 0] = nodes.page_ptr[owner] + step // page_size
    tiles[:, 1] = first = nodes.start[owner] + step
    tiles[:, 2] = np.minimum(
        first + (1 << log_tokens[pack][member_of]), (nodes.start + nodes.length)[owner]
    )
    ends = np.flatnonzero(np.diff(pack, append=-1))
    return _Packs(
        member[ends],
        _offsets(count[bottoms]),
        forest.rows[rank],
        log_tokens,
        _offsets(per_pack),
        per_member[ends],
        tiles,
    )


def _log_kv_tiles(
    length: np.ndarray, pack: np.ndarray, packs: int, page_size: int, machine: Machine
) -> np.ndarray:
    """log2 of each pack's n: the largest tile that pads its nodes by an eighth at most."""
    sizes = [n for n in machine.tokens if n > page_size]
    chosen = np.full(packs, page_size.bit_length() - 1)
    if not sizes:
        return chosen
    least = np.bincount(pack, -(-length // page_size) * page_size, packs)
    for n in sizes:
        padded = np.bincount(pack, -(-length // n) * n, packs)
        chosen[padded <= least * 1.125] = n.bit_length() - 1
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
    rows = np.diff(packs.entry)
    per_pack = -(-rows // room)
    pack = np.repeat(np.arange(len(rows)), per_pack)
    offset = _ranges(np.zeros(len(rows), np.int64), per_pack) * room
    entry = packs.entry[pack] + offset
    if not len(pack):
        return _Queries(pack, entry, entry, entry)

    # Rows that end in the run's last node see a part of it, and more of it as they advance.
    end = (nodes.start + nodes.length)[packs.bottom]
    ending = np.flatnonzero(forest.own)
    furthest = np.full(len(nodes.parent), np.iinfo(np.int64).max)
    furthest[forest.alive[forest.first[1:][ending] - 1]] = np.maximum.reduceat(
        position[forest.rows], _offsets(forest.own[ending])[:-1]
    )
    advance = np.maximum(end - furthest[packs.bottom] - 1, 0)
    if ahead is not None:
        advance = np.minimum(advance, ahead)
    last = np.maximum.reduceat(position[packs.rows], entry).astype(np.int64) + advance[pack]
    seen = last + 1 - nodes.start[packs.bottom][pack]
    seen = -(-np.maximum(seen, 0) >> packs.log_tokens[pack])  # ceiling
    own = packs.last[pack]
    kv_tiles = np.diff(packs.tile)[pack] - own + np.minimum(seen, own)
    return _Queries(pack, entry, np.minimum(room, rows[pack] - offset), kv_tiles)


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
    tokens = queries.kv_tiles << log_tokens
    share = max(machine.min_split, -(-int(tokens.sum()) // max(machine.workers // heads.kv, 1)))
    splits = np.minimum(-(-tokens // share), queries.kv_tiles)
    tile = np.repeat(np.arange(len(splits)), splits)
    part = _ranges(np.zeros(len(splits), np.int64), splits)
    kv_tiles, splits = queries.kv_tiles[tile], splits[tile]
    base = packs.tile[queries.pack][tile]
    begin, end = base + part * kv_tiles // splits, base + (part + 1) * kv_tiles // splits

    log_rows = np.maximum(_log2_ceil(queries.rows * heads.group), _log2_ceil(machine.min_rows))
    shape = (log_rows << 8 | log_tokens)[tile]
    order = np.lexsort((begin - end, shape))
    tile, shape = tile[order], shape[order]
    rows = queries.rows[tile]
    blocks = np.empty((len(tile), 4), np.int32)
    blocks[:, 1] = np.cumsum(rows)
    blocks[:, 0] = blocks[:, 1] - rows
    blocks[:, 2] = begin[order]
    blocks[:, 3] = end[order]

    rows = packs.rows[_ranges(queries.entry[tile], rows)]
    partials = np.bincount(rows, minlength=len(position))
    partials[partials == 1] = 0
    merge_ptr = _offsets(partials)
    slots = np.full(len(rows), -1, np.int32)
    shared = np.flatnonzero(partials[rows])
    slots[shared[np.argsort(rows[shared], kind="stable")]] = np.arange(len(shared))

    bounds = np.append(np.flatnonzero(np.diff(shape, prepend=-1)), len(shape))
    kinds = shape[bounds[:-1]]
    shapes = np.stack([1 << (kinds >> 8), 1 << (kinds & 255), bounds[:-1], bounds[1:]], 1)
    return Tables(
        shapes.astype(np.int32),
        blocks,
        rows.astype(np.int32),
        slots,
        packs.tiles,
        np.asarray(nodes.pages, np.int32),
        merge_ptr.astype(np.int32),
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


def _ranges(begin: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """begin[0], begin[0] + 1, .. (counts[0] of them), begin[1], .."""
    offsets = _offsets(counts)
    return np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], counts)


def _log2_ceil(x: np.ndarray | int) -> np.ndarray:
    return np.frexp(np.asarray(x) - 1)[1]
