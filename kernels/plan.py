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

_TABLES = ("shapes", "lanes", "steps", "blocks", "rows", "slots", "merge_ptr")
_COLUMNS = {"shapes": 6, "blocks": 4}
_HEADER = 5 + 2 * len(_TABLES)
_STEP = 7  # columns of a step in front of its chunks
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


class Shape(NamedTuple):
    """Blocks of one size and what runs them.

    Attributes:
        rows: the most query rows of a block (m), a power of two. A query token takes `group` rows.
        tokens: KV tile (n), a power of two from 16; 0: a page.
        programs: of all KV heads together, that run side by side.
        least: tokens below which a run of KV is not cut in two.
    """

    rows: int
    tokens: int
    programs: int
    least: int


@dataclass(frozen=True)
class Machine:
    """What the blocks are cut for.

    Attributes:
        shapes: ascending by rows. A group wider than the last is a block of that shape.
        partial: what a byte of a partial costs, in bytes of K and V that are read once more.
    """

    shapes: tuple[Shape, ...]
    partial: int = 1

    @staticmethod
    def cpu() -> Machine:
        """cpu.py gathers by page and pads no more than it must, so tiles are pages."""
        return Machine(tuple(Shape(1 << i, 0, 1 << 30, 8192) for i in range(11)))

    @staticmethod
    def gpu(processors: int) -> Machine:
        """As many programs as `forward.tiles` has resident on `processors` multiprocessors.

        That is for 16-bit K and V of dims up to 128 on Hopper; elsewhere a program may have two
        lanes to run, or none. What is read once more tends to come from the L2, and a partial has
        a block to begin and end: on an H200, 3 was the best of 1, 1.5, 2 and 3.
        """
        return Machine(
            (
                Shape(16, 32, 4 * processors, 128),
                Shape(64, 64, 2 * processors, 256),
                Shape(128, 128, processors, 256),
            ),
            partial=3,
        )

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> Machine:
        """The machine behind a device."""
        if device.type != "cuda":
            return Machine.cpu()
        return Machine.gpu(torch.cuda.get_device_properties(device).multi_processor_count)


class Tables(NamedTuple):
    """The plan's tables, int32.

    A block is the attention of some query rows to a run of KV; a step is a tile of it, n tokens of
    one node in chunks of min(n, page size). A lane is the steps that a program runs one after
    another, for one KV head: those of whole blocks.

    Attributes:
        shapes: [S, 6], for each of the machine's: m, n, first block, end block, first lane, end
            lane. Blocks and lanes are sorted by shape.
        lanes: [L+1] lane l runs steps lanes[l]..lanes[l+1]-1.
        steps: [T, 7 + chunks] first position; tokens; tokens up to the furthest row's position and
            up to the hindmost row's, as planned, whether they are in the tile or not; the block's
            first row (into `rows`); where that row's partial goes, those of the others behind it,
            or -1: the block is its rows' only one; twice the number of rows, plus 1 in the first
            step of a block; and of each chunk, the page times the page size plus the slot of its
            first token.
        blocks: [B, 4] first row, end row (into `rows`), first step, end step.
        rows: [K] query rows, B * T of q [B, heads, T, dim] counted as b * T + t.
        slots: the partials of row r are slots[merge_ptr[r]:merge_ptr[r+1]].
        merge_ptr: [R+1], a row's range is empty if its only block is.
        positions: [R or more] of the query rows, far below 0 if they see nothing; what follows
            the first R is padding.
        page_size: tokens in a page.
    """

    shapes: np.ndarray
    lanes: np.ndarray
    steps: np.ndarray
    blocks: np.ndarray
    rows: np.ndarray
    slots: np.ndarray
    merge_ptr: np.ndarray
    positions: np.ndarray
    page_size: int


@dataclass(frozen=True, eq=False)
class Plan:
    """What every layer of a forward does, made once.

    As a tensor it is int32 [1, 1, C, W]: row 0 is the header, row 1 the positions, the other rows
    hold the tables one after another, shapes first. W is at least the number of query rows and of
    partials, so a launcher sizes its workspace from the shape, without waiting for the device. The
    header:

        0, 1, 2             query rows, partials, page size
        3                   the position of row 0 as planned: how far all have advanced since
        4                   columns of `steps`
        5 + 2 i, 6 + 2 i    offset in the tensor and size, in elements, of table i of
                            shapes, lanes, steps, blocks, rows, slots, merge_ptr
    """

    tables: Tables

    @property
    def partials(self) -> int:
        """Results that wait for the merge; each is one query token's, in all its heads."""
        return int(self.tables.merge_ptr[-1])

    @property
    def kv_tokens(self) -> int:
        """Tokens whose K and V each KV head reads, at the positions planned for; re-reads count."""
        steps = self.tables.steps
        return int(np.clip(steps[:, 2], 0, steps[:, 1]).sum())

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
        return sum(_aligned(getattr(self.tables, name).size) for name in _TABLES)

    def tensor(self, device: torch.device | str) -> torch.Tensor:
        """The plan as the smallest tensor that holds it.

        Returns:
            int32 [1, 1, C, W].

        Raises:
            ValueError: if the plan was made for another machine than the GPU it is sent to.
        """
        self._check_machine(torch.device(device))
        height, width = self.shape
        elements = self.elements(self.shape)
        whole = torch.nn.functional.pad(elements, (0, height * width - len(elements)))
        return whole.view(1, 1, height, width).to(device)

    def fits(self, capacity: tuple[int, int]) -> bool:
        """Whether a tensor of (C, W) holds the plan."""
        height, width = capacity
        return width >= self._width and (height - 2) * width >= self._size

    def elements(self, capacity: tuple[int, int]) -> torch.Tensor:
        """What to overwrite a tensor with, that it is this plan's.

        Args:
            capacity: (C, W) of the tensor.

        Returns:
            int32 [any], on the CPU: its first elements. Those behind them are never read.

        Raises:
            ValueError: if the plan doesn't fit.
        """
        if not self.fits(capacity):
            raise ValueError(
                f"This plan needs W >= {self._width} and (C - 2) * W >= {self._size}; capacity "
                f"(C, W) = {tuple(capacity)} is too small. Take a larger one; the plan's own is "
                f"{self.shape}."
            )
        width = capacity[1]
        flat = np.zeros(2 * width + self._size, np.int32)
        positions = self.tables.positions
        flat[:3] = len(positions), self.partials, self.tables.page_size
        flat[3] = positions[0] if len(positions) else 0
        flat[4] = self.tables.steps.shape[1]
        flat[width : width + len(positions)] = positions
        offset = 2 * width
        for i, name in enumerate(_TABLES):
            table = getattr(self.tables, name)
            flat[5 + 2 * i : 7 + 2 * i] = offset, table.size
            flat[offset : offset + table.size] = table.ravel()
            offset += _aligned(table.size)
        return torch.from_numpy(flat)

    def _check_machine(self, device: torch.device) -> None:
        if device.type != "cuda":
            return  # cpu.py runs any plan
        made = [tuple(shape) for shape in self.tables.shapes[:, :2].tolist()]
        runs = [(shape.rows, shape.tokens) for shape in Machine.of(device).shapes]
        if made != runs:
            raise ValueError(
                f"This plan has blocks of (rows, tokens) {made}, and the kernels on {device} run "
                f"{runs}. Make it for that machine: make_plan(.., machine=Machine.of(device))."
            )

    @staticmethod
    def read(tensor: torch.Tensor) -> Tables:
        """The tables in a plan tensor: views of it on the CPU, copies from another device."""
        width = tensor.shape[-1]
        flat = tensor.cpu().numpy().reshape(-1)
        header = flat[:_HEADER].tolist()
        columns, tables = {**_COLUMNS, "steps": header[4]}, []
        for i, name in enumerate(_TABLES):
            offset, size = header[5 + 2 * i], header[6 + 2 * i]
            table = flat[offset : offset + size]
            tables.append(table.reshape(-1, columns[name]) if name in columns else table)
        return Tables(*tables, flat[width : width + header[0]], header[2])

    @staticmethod
    def positions(tensor: torch.Tensor) -> torch.Tensor:
        """The positions in a plan tensor, a view [W]: one for each query row, then padding.

        They may be advanced in place, on the device, all alike, until one reaches the end of its
        node.
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
    packs = _runs(forest, merged, link)
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
    saved = forest.queries * (heads.partial_bytes * machine.partial)
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
    member: np.ndarray  # [P+1] the run's nodes are members[member[p]:member[p+1]]
    members: np.ndarray


def _runs(forest: _Forest, merged: np.ndarray, link: np.ndarray) -> _Packs:
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
    return _Packs(
        packs,
        _offsets(count[packs]),
        forest.rows[row],
        _offsets(np.bincount(pack[owner], minlength=len(packs))),
        forest.alive[forest.first[chain][owner] + index],
    )


class _Queries(NamedTuple):
    """Query tiles, sorted by shape; all of a pack's are alike but the last."""

    pack: np.ndarray  # [Q]
    entry: np.ndarray  # [Q] first of the tile's rows
    rows: np.ndarray  # [Q] how many
    shape: np.ndarray  # [Q] of the machine's
    seen: np.ndarray  # [Q] tokens of the run's last node that the rows can see


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
    most = [shape.rows for shape in machine.shapes]
    shape = np.searchsorted(most[:-1], rows * heads.group)

    # Rows that end in the run's last node see a part of it, and more of it as they advance.
    bottom = packs.members[packs.member[1:] - 1]
    start, length = nodes.start[bottom], nodes.length[bottom]
    advance = np.maximum(start + length - 1 - forest.furthest[packs.chain], 0)
    if ahead is not None:
        advance = np.minimum(advance, ahead)
    last = np.maximum.reduceat(position[packs.rows], entry) if len(entry) else entry
    seen = np.clip(last + (advance + 1 - start)[pack], 1, length[pack])
    order = _stable_argsort(shape, len(most))
    return _Queries(*(x[order] for x in (pack, entry, rows, shape, seen)))


def _tables(
    nodes: Nodes,
    packs: _Packs,
    queries: _Queries,
    position: np.ndarray,
    page_size: int,
    heads: Heads,
    machine: Machine,
) -> Tables:
    # The nodes of the query tiles' runs, and the steps in each.
    counts = (packs.member[1:] - packs.member[:-1])[queries.pack]
    tile, index = _expand(counts)
    member = packs.members[packs.member[queries.pack][tile] + index]
    length = nodes.length[member]
    bottom = np.cumsum(counts) - 1
    seen = length.copy()
    seen[bottom] = queries.seen
    sizes = np.array([shape.tokens or page_size for shape in machine.shapes])
    tokens = sizes[queries.shape][tile]
    counts = -(-seen // tokens)
    upto = _offsets(counts)
    tile_ptr = np.append(0, upto[bottom + 1])
    lengths = tile_ptr[1:] - tile_ptr[:-1]

    chunks = max(int(sizes.max()) // page_size, 1)
    steps = np.empty((upto[-1], _STEP + chunks), np.int32)
    start, begin, size, length, first = (
        np.repeat(x.astype(np.int32), counts)
        for x in (nodes.start[member], upto[:-1] * tokens, tokens, length, nodes.page_ptr[member])
    )
    begin = np.arange(len(steps), dtype=np.int32) * size - begin
    where = start + begin
    steps[:, 0] = where
    steps[:, 1] = np.minimum(size, length - begin)
    shift = page_size.bit_length() - 1
    for chunk in range(chunks):
        token = np.minimum(begin + (chunk << shift), length - 1) if chunk else begin
        page = np.asarray(nodes.pages, np.int32)[first + (token >> shift)]
        steps[:, _STEP + chunk] = (page << shift) + (token & (page_size - 1))

    # Lanes are cut from the steps of a shape, blocks from the query tiles where lanes end.
    bounds = np.searchsorted(queries.shape, np.arange(len(machine.shapes) + 1))
    cut = np.zeros(len(steps) + 1, bool)
    for shape, n, a, b in zip(machine.shapes, sizes.tolist(), bounds, bounds[1:], strict=False):
        if a < b:
            programs = max(shape.programs // heads.kv, 1)
            cut[tile_ptr[a] + _cuts(lengths[a:b], programs, shape.least // n)] = True
    lanes = np.flatnonzero(cut[:-1])
    cut[tile_ptr] = True
    begin = np.flatnonzero(cut[:-1])
    end = np.append(begin[1:], len(steps))[: len(begin)]
    tile = np.searchsorted(tile_ptr, begin, side="right") - 1
    counts = queries.rows[tile]
    blocks = np.empty((len(begin), 4), np.int32)
    blocks[:, 1] = np.cumsum(counts)
    blocks[:, 0] = blocks[:, 1] - counts
    blocks[:, 2] = begin
    blocks[:, 3] = end
    owner, index = _expand(counts)
    rows = packs.rows[queries.entry[tile][owner] + index]
    slots = partials = np.zeros(0, np.int64)
    if len(rows):
        # A block is final if it is its rows' only one.
        single = np.bincount(rows)[rows] == 1
        partial = ~np.logical_and.reduceat(single, blocks[:, 0])
        split = np.repeat(partial, counts)
        slots = _stable_argsort(rows[split], len(position))
        partials = rows[split]
        lengths = end - begin
        for column, x in (
            (2, np.maximum.reduceat(position[rows], blocks[:, 0]) + 1),
            (3, np.minimum.reduceat(position[rows], blocks[:, 0]) + 1),
            (4, blocks[:, 0]),
            (5, np.where(partial, np.cumsum(partial * counts) - counts, -1)),
            (6, counts * 2),
        ):
            x = np.repeat(x.astype(np.int32), lengths)
            steps[:, column] = x - where if column < 4 else x
        steps[begin, 6] += 1

    shapes = np.empty((len(machine.shapes), 6), np.int32)
    shapes[:, 0] = [shape.rows for shape in machine.shapes]
    shapes[:, 1] = sizes
    bounds = tile_ptr[bounds]
    for column, starts in ((2, begin), (4, lanes)):
        at = np.searchsorted(starts, bounds)
        shapes[:, column], shapes[:, column + 1] = at[:-1], at[1:]
    return Tables(
        shapes,
        np.append(lanes, len(steps)).astype(np.int32),
        steps,
        blocks,
        rows.astype(np.int32),
        slots.astype(np.int32),
        _offsets(np.bincount(partials, minlength=len(position))).astype(np.int32),
        position.astype(np.int32),
        page_size,
    )


def _cuts(lengths: np.ndarray, lanes: int, least: int) -> np.ndarray:
    """Cuts query tiles of so many steps, laid end to end, into at most `lanes` even lanes.

    A cut may fall inside a tile if it leaves `least` steps on both sides. To begin a tile counts
    as a step.

    Returns:
        int64, where the lanes begin, in steps; the last may be the end, and some of them equal.
    """
    ends = np.cumsum(lengths + 1)
    total = int(ends[-1])
    lanes = min(lanes, total)
    cut = np.arange(lanes) * total // lanes
    tile = np.searchsorted(ends, cut, side="right")
    length = lengths[tile]
    begin = ends[tile] - length - 1
    inside = np.minimum(cut - begin, length)
    if total < lanes * least:  # to cut there at every lane's end would be to cut too often
        pieces = np.maximum(length // least, 1)
        inside = (2 * inside * pieces + length) // (2 * length) * length // pieces
    front = 2 * inside < length
    inside[front & (inside < least)] = 0
    back = ~front & (length - inside < least)
    inside[back] = length[back]
    return begin - tile + inside


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
    return max(machine.shapes[-1].rows // heads.group, 1)


def _aligned(size: int) -> int:
    """Elements that a table takes: whole sectors of 32 bytes, for a step to lie in one."""
    return -(-size // 8) * 8


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
