"""The scheduler: a prefix tree and query rows to thread blocks, as flat int32 tables.

Pack: the tree is cut into packs by what its reading, its products and its partials cost (PAT, arXiv
2511.22333, section 5, puts nodes together along a path only; here also across siblings). Then packs
are cut into query tiles, where least is seen on both sides, and those along KV. NumPy only, by
level of the tree: no Python loop over nodes or rows.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

TABLES = ("shapes", "queues", "chunks", "blocks", "rows", "slots", "merge_rows", "merge_ptr")
COLUMNS = {"shapes": 6, "queues": 5, "chunks": 9, "blocks": 5}
HEADER = 5 + 2 * len(TABLES)
_ALIGN = 64
_CHUNK = 32  # tokens; more waste more of a tile where nodes are short
_CLAIMED = 0.2  # of the steps are in queues to claim: the memory serves some programs faster
_NOWHERE, _FAR = -(1 << 30), 1 << 30


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
        cost: of a token in a block, to read it from memory once = 1.
        start: tokens that a block costs beside its own.
    """

    rows: int
    tokens: int
    programs: int
    least: int
    cost: float
    start: int


@dataclass(frozen=True)
class Machine:
    """What the blocks are cut for.

    Attributes:
        shapes: ascending by rows. A group wider than the last is a block of that shape.
        partial: what a byte of a partial costs, in bytes of K and V read once.
        half: rows of a block that are computed apart from those behind them; 0: none are.
        narrow: what a step for those costs, one for more = 1. If that is less, `make_plan` tries
            other plans, too.
        claims: whether a program that is through with its queue takes the next one that nobody has;
            else it takes every so many-th. Programs for layers with windows do so anyway.
    """

    shapes: tuple[Shape, ...]
    partial: float = 1
    half: int = 0
    narrow: float = 1
    claims: bool = False

    @staticmethod
    def cpu() -> Machine:
        """cpu.py gathers by page and pads no more than it must, so tiles are pages."""
        shapes = (Shape(1 << i, 0, 1 << 30, 8192, 1 + (1 << i) / 16, 16) for i in range(11))
        return Machine(tuple(shapes))

    @staticmethod
    @functools.cache
    def gpu(processors: int, heads: Heads, major: int) -> Machine:
        """As many programs as the kernels have resident on `processors` multiprocessors.

        On Hopper, layers with windows have kernels of their own, and programs without a queue.
        Costs there are those that were fastest on an H200; elsewhere they are estimates.

        Args:
            processors: streaming multiprocessors.
            heads: of the layers.
            major: the GPU's compute capability, see `processors_of`.
        """
        if is_hopper(heads, major):
            # A partial has a block to begin and end beside its bytes.
            shapes = (
                Shape(64, 64, processors, 256, 1.0, 128),
                Shape(128, 64, processors, 256, 1.0, 128),
            )
            return Machine(shapes, partial=4, half=64, narrow=0.75, claims=True)
        # Products on cores that are not made for them cost in proportion to the rows.
        dear = heads.itemsize > 2 or max(heads.key_dim, heads.value_dim) > 128
        shapes = (
            Shape(16, 32, 4 * processors, 128, 1.0, 32),
            Shape(64, 64, 2 * processors, 256, 4.0 if dear else 1.1, 64),
            Shape(128, 128, processors, 256, 8.0 if dear else 1.4, 128),
        )
        return Machine(shapes, partial=3)

    @staticmethod
    def of(device: torch.device, heads: Heads) -> Machine:
        """The machine behind a device, as layers of these heads use it."""
        if device.type != "cuda":
            return Machine.cpu()
        processors, major = processors_of(device)
        return Machine.gpu(processors, heads, major)

    def chunk(self, page_size: int) -> int:
        """Tokens of a page that are addressed together."""
        return chunk_size([shape.tokens or page_size for shape in self.shapes], page_size)


def processors_of(device: torch.device) -> tuple[int, int]:
    """Streaming multiprocessors and compute capability of a GPU, 0 for AMD's; for the CPU, where
    kernels are interpreted, those to imitate."""
    if device.type != "cuda":
        return 2, 8
    return _processors_of(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _processors_of(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, 0 if torch.version.hip else properties.major


def chunk_size(tokens: list[int], page_size: int) -> int:
    """Tokens of a page that are addressed together, where shapes have steps of `tokens`."""
    return min(page_size, *tokens, _CHUNK)


def is_hopper(heads: Heads, major: int) -> bool:
    """Whether `hopper.py` serves layers of these heads on GPUs of compute capability `major`."""
    dims = heads.key_dim, heads.value_dim
    if major != 9 or heads.itemsize != 2 or heads.group > 128:
        return False
    # Queries are copied asynchronously, by heads' rows of whole 32 bytes, else Triton refuses.
    return max(dims) <= 128 and heads.key_dim % 16 == 0 and heads.value_dim % 8 == 0


class Tables(NamedTuple):
    """The plan's tables, int32.

    A chunk is some tokens of one node, in one page. A block is the attention of some query rows to
    the chunks of one or more nodes, each of which is for a range of its rows; a step is what is
    computed at once, of as many chunks as make a KV tile. A queue is the steps that a program runs
    one after another, for one KV head: those of whole blocks.

    Attributes:
        shapes: [S, 6], for each of the machine's: m, n, first block, end block, first queue, end
            queue. Blocks and queues are sorted by shape.
        queues: [L+1, 5] first chunk, first block; those of the next queue end it. And of that
            block: first row, end row, chunks in pairs.
        chunks: [T, 9] its place, page times page size plus slot; tokens; position of the first;
            tokens up to the furthest position of the rows that it is for, and up to the hindmost,
            as planned, whether they are in the chunk or not; those rows, first + end << 16, in the
            block's; the block's first row (into `rows`); where that row's partial goes, those of
            the others behind it, or -1: the block is its rows' only one; and 32 times the number of
            the block's rows, plus 1 in a block's first chunk, plus 2 where all rows see all tokens
            of the step, 4 where each of those is seen, 8 where the step is one of a pair, 16 where
            one follows the step, or its pair. Some chunks are empty, for steps to be whole.
        blocks: [B, 5] first row, end row (into `rows`), first chunk, end chunk; and how many chunks
            are in pairs: of a step for the first half of the rows, and one for the others.
        rows: [K] query rows, B * T of q [B, heads, T, dim] counted as b * T + t.
        slots: where the partials are, row by row.
        merge_rows: [M] the rows whose output no block writes: those of partials, or of no block.
        merge_ptr: [M+1], the partials of row merge_rows[i] are slots[merge_ptr[i]:merge_ptr[i+1]].
        positions: [R or more] of the query rows, far below 0 if they see nothing; what follows
            the first R is padding.
        page_size: tokens in a page.
    """

    shapes: np.ndarray
    queues: np.ndarray
    chunks: np.ndarray
    blocks: np.ndarray
    rows: np.ndarray
    slots: np.ndarray
    merge_rows: np.ndarray
    merge_ptr: np.ndarray
    positions: np.ndarray
    page_size: int


@dataclass(frozen=True, eq=False)
class Plan:
    """What every layer of a forward does, made once, for layers of `heads`.

    As a tensor it is int32 [1, 1, C, W]: row 0 is the header, row 1 the positions, the other rows
    hold the tables one after another, shapes first. W is at least the number of query rows and of
    partials, so a launcher sizes its workspace from the shape, without waiting for the device. The
    header:

        0, 1, 2             query rows, partials, page size
        3                   the position of row 0 as planned: how far all have advanced since
        4 + 2 i, 5 + 2 i    offset in the tensor and size, in elements, of table i of
                            shapes, queues, chunks, blocks, rows, slots, merge_rows, merge_ptr
        20                  claims so far, also those that found no queue left; 0 between calls
    """

    tables: Tables
    heads: Heads

    @property
    def partials(self) -> int:
        """Results that wait for the merge; each is one query token's, in all its heads."""
        return int(self.tables.merge_ptr[-1])

    @property
    def merges(self) -> bool:
        """Whether there are rows whose output no block writes: of several partials, or none."""
        return len(self.tables.merge_rows) > 0

    @property
    def kv_tokens(self) -> int:
        """Tokens whose K and V each KV head reads, at the positions planned for; re-reads count."""
        chunks = self.tables.chunks
        return int(np.clip(chunks[:, 3], 0, chunks[:, 1]).sum())

    @functools.cached_property
    def shape(self) -> tuple[int, int]:
        """A (C, W) that holds the plan; W a multiple of 64, so that few differ."""
        width = -(-self._width // _ALIGN) * _ALIGN
        return 2 + -(-self._size // width), width

    @property
    def _width(self) -> int:
        return max(len(self.tables.positions), self.partials, HEADER)

    @property
    def _size(self) -> int:
        return sum(aligned(getattr(self.tables, name).size) for name in TABLES)

    def tensor(self, device: torch.device | str) -> torch.Tensor:
        """The plan as the smallest tensor that holds it.

        Returns:
            int32 [1, 1, C, W].

        Raises:
            ValueError: if the plan was made for another machine than the GPU it is sent to.
        """
        check_blocks(self.tables.shapes, self.heads, torch.device(device))
        height, width = self.shape
        elements = self.elements(self.shape)
        whole = torch.nn.functional.pad(elements, (0, height * width - len(elements)))
        return whole.view(1, 1, height, width).to(device)

    def fits(self, capacity: tuple[int, int]) -> bool:
        """Whether a tensor of (C, W) holds the plan."""
        height, width = capacity
        return width >= self._width and (height - 2) * width >= self._size

    def elements(self, capacity: tuple[int, int]) -> torch.Tensor:
        """The plan's elements, laid out for a tensor of this capacity.

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
        flat[width : width + len(positions)] = positions
        offset = 2 * width
        for i, name in enumerate(TABLES):
            table = getattr(self.tables, name)
            flat[4 + 2 * i : 6 + 2 * i] = offset, table.size
            flat[offset : offset + table.size] = table.ravel()
            offset += aligned(table.size)
        return torch.from_numpy(flat)

    @staticmethod
    def read(tensor: torch.Tensor) -> Tables:
        """The tables in a plan tensor: views of it on the CPU, copies from another device."""
        width = tensor.shape[-1]
        flat = tensor.cpu().numpy().reshape(-1)
        header = flat[:HEADER].tolist()
        tables = []
        for i, name in enumerate(TABLES):
            offset, size = header[4 + 2 * i], header[5 + 2 * i]
            table = flat[offset : offset + size]
            tables.append(table.reshape(-1, COLUMNS[name]) if name in COLUMNS else table)
        return Tables(*tables, flat[width : width + header[0]], header[2])

    @staticmethod
    def positions(tensor: torch.Tensor) -> torch.Tensor:
        """The positions in a plan tensor, a view [W]: one for each query row, then padding.

        They may be advanced in place, on the device, all alike, until one reaches the end of its
        node.
        """
        return tensor[0, 0, 1]


class OtherBlocks(ValueError):
    """A plan is cut for other kernels than are to run it."""


def check_blocks(shapes: np.ndarray, heads: Heads, device: torch.device) -> None:
    """Makes sure that a device's kernels for layers of `heads` run the blocks of a plan.

    Args:
        shapes: the plan's table.

    Raises:
        OtherBlocks: if they run others, and would read the tables for what they are not.
    """
    if device.type != "cuda":
        return  # cpu.py runs any plan
    made = [tuple(shape) for shape in shapes[:, :2].tolist()]
    runs = [(shape.rows, shape.tokens) for shape in Machine.of(device, heads).shapes]
    if made != runs:
        raise OtherBlocks(
            f"This plan has blocks of (rows, tokens) {made}, and the kernels on {device} for "
            f"elements of {heads.itemsize} bytes run {runs}. Make it for that machine, "
            "Machine.of(device, heads). The layers of a model need one dtype, which is "
            "model.dtype or autocast's, and GPUs of one kind."
        )


def make_plan(
    nodes: Nodes,
    node: np.ndarray,
    position: np.ndarray,
    heads: Heads,
    page_size: int,
    machine: Machine,
    ahead: int | None = None,
    window: int | None = None,
) -> Plan:
    """Plans the attention of query rows over a prefix tree.

    A row attends to every token on the path from its root to `node` at a position up to its own.
    For a decode step on Hopper, up to three plans are drafted, and the one is made that should take
    the least time: what few rows see in queues of its own, or spread over those of its tile, or
    blocks of the smallest shape alone.

    Args:
        nodes: the tree.
        node: int [R], the deepest node that a row may see; -1: it sees nothing, and gets zeros.
        position: int [R], the row's own.
        heads: the layer's heads.
        page_size: tokens in a page, a power of two from 16.
        machine: what to cut tiles for.
        ahead: how far `Plan.positions` is going to be advanced; `None`: as far as the rows' nodes
            are long. 0 spares a prefill the reading of what its rows never see.
        window: of the layers that the plan is for, as in `attention`: what lies before it for all
            rows is left out. They can do with a plan for all tokens as well.

    Raises:
        ValueError: if an argument isn't as said here; but `nodes` is not looked through.
    """
    node, position = np.asarray(node), np.asarray(position)
    _check(nodes, node, position, heads, page_size, ahead, window)
    if window is not None:
        machine = replace(machine, claims=False)
    forest = _compress(nodes, node, position, window)
    where = position[forest.rows]
    advance, unseen = _advance(nodes, node[forest.rows], where, ahead)

    def draft(tiles: _Tiles, runs: _Runs, spread: bool = False) -> _Draft:
        return _draft(len(where), tiles, runs, page_size, heads, machine, spread)

    packs = _packs(forest, heads, machine)
    tiles = _query_tiles(forest, packs, heads, machine)
    runs = _runs(nodes, forest, tiles, where, advance, window)
    best = draft(tiles, runs)
    # To search is not worth it for one forward, and there is nothing to choose where no block has
    # two halves.
    wide = forest.queries.max(initial=0) * heads.group > machine.shapes[0].rows
    if machine.narrow < 1 and ahead != 0 and heads.group <= machine.half and wide:
        drafts = [best]
        # Where there are more tiles than queues, hardly one of them is cut.
        if np.count_nonzero(tiles.shape) < machine.shapes[-1].programs // heads.kv:
            drafts.append(draft(tiles, runs, spread=True))
        times = [_duration(each, heads, machine) for each in drafts]
        small = _whole_trees(forest, heads, machine)
        least = 0.0  # tiles may have less in their windows than packs have
        if window is None:
            least = _least_duration(small, forest, unseen, heads, machine)
        # Only if that doesn't read much more, and can take less time.
        if small.cost < 1.4 * packs.cost and least < min(times):
            tiles = _query_tiles(forest, small, heads, machine)
            drafts.append(draft(tiles, _runs(nodes, forest, tiles, where, advance, window)))
            times.append(_duration(drafts[-1], heads, machine))
        best = drafts[times.index(min(times))]
    known = np.where(node < 0, _NOWHERE, position)
    return Plan(_tables(nodes, forest.rows, best, known, heads, machine), heads)


class _Forest(NamedTuple):
    """The tree without nodes that no row sees, every chain of them taken as one.

    The members of a chain are seen by the same rows. Chains are ordered by depth, those of one
    parent side by side.
    """

    alive: np.ndarray  # [A] nodes that are seen, in preorder
    chain: np.ndarray  # [A] theirs
    begin: np.ndarray  # [A] rows at or below are rows[begin:end]
    end: np.ndarray  # [A]
    levels: np.ndarray  # [D+1] chains of depth d are levels[d]..levels[d+1]-1
    parent: np.ndarray  # [C], -1 for a root
    tokens: np.ndarray  # [C] those that a row sees
    first: np.ndarray  # [C] rows at or below are rows[first:first + queries]
    queries: np.ndarray  # [C]
    rows: np.ndarray  # [L] rows that see anything, in preorder of their nodes


def _compress(nodes: Nodes, node: np.ndarray, position: np.ndarray, window: int | None) -> _Forest:
    count = len(nodes.parent)
    own = np.bincount(node + 1, minlength=count + 1)
    rows = _stable_argsort(node + 1, count)[own[0] :]
    before = _offsets(own[1:])
    alive = (before[nodes.end] > before[:-1]).nonzero()[0]
    begin, end, parent = before[alive], before[nodes.end[alive]], nodes.parent[alive]
    queries = end - begin
    # An only child that all rows of its parent pass through follows it in the preorder.
    begins = parent < 0
    begins[1:] |= (queries[1:] != queries[:-1]) | (parent[1:] != alive[:-1])
    first = begins.nonzero()[0]
    top = alive[first]
    chains = len(first)
    chain = np.zeros(count + 1, np.int64)
    chain[top] = 1
    chain = chain.cumsum() - 1  # in preorder; where a node isn't seen, the last that has begun
    chain[-1] = -1  # of a root's parent
    # Chains above a chain: those begun before it less those whose subtree is over.
    over = np.bincount(chain[nodes.end[top] - 1] + 1, minlength=chains + 1)
    depth = np.arange(chains) - over.cumsum()[:-1]
    order = _stable_argsort(depth, chains)
    rank = np.empty(chains + 1, np.int64)
    rank[order] = np.arange(chains)
    rank[-1] = -1
    tokens = np.zeros(chains, np.int64)
    if chains:
        length = nodes.length[alive]
        if window is not None:
            _, hindmost = extrema(position[rows], begin, end)
            length = length - np.clip(hindmost - window + 1 - nodes.start[alive], 0, length)
        tokens = np.add.reduceat(length, first, dtype=np.int64)
    return _Forest(
        alive,
        rank[chain[alive]],
        begin,
        end,
        _offsets(np.bincount(depth)),
        rank[chain[nodes.parent[top]]][order],
        tokens[order],
        begin[first][order],
        queries[first][order],
        rows,
    )


class _Packs(NamedTuple):
    """Which chains of the tree are read together."""

    top: np.ndarray  # [C] the chain at the top of each one's pack
    shape: np.ndarray  # [C] of its tiles
    cost: float  # of all packs, see `_packs`


def _packs(forest: _Forest, heads: Heads, machine: Machine) -> _Packs:
    """Cuts the tree into packs of connected nodes.

    A tile of a pack reads each node of it that any of its rows sees, and computes it for all of
    them. What one reads again, or computes for nothing, is weighed against a partial for each query
    at every edge that is cut: from the leaves up, the least cost of a subtree that is a pack's from
    above, for each shape; and of one that is cut off.
    """
    chains = len(forest.parent)
    price = np.array([[shape.cost] for shape in machine.shapes], float)
    start = price * [[shape.start] for shape in machine.shapes]
    tiles = -(-forest.queries // _room(heads, machine)[:, None])  # [S, C]
    within = tiles * forest.tokens * price
    starts = tiles * start
    partials = forest.queries * _partial(heads, machine)
    alone = np.empty(chains)
    families = _starts(forest.parent)
    parents = forest.parent[families]
    # Where levels begin, in chains and in families, the deepest first.
    levels = np.stack([forest.levels, families.searchsorted(forest.levels)], 1)[::-1].tolist()
    for (end, last), (begin, first) in itertools.pairwise(levels):
        level = slice(begin, end)
        alone[level] = (within[:, level] + starts[:, level]).min(0) + partials[level]
        if begin:
            least = np.minimum(within[:, level], alone[level])
            family = slice(first, last)
            within[:, parents[family]] += np.add.reduceat(least, families[family] - begin, 1)
    best = (within + starts).argmin(0)
    joins = within <= alone
    top = np.arange(chains)
    for begin, end in itertools.pairwise(forest.levels[1:].tolist()):
        level = np.arange(begin, end)
        above = top[forest.parent[begin:end]]
        top[begin:end] = np.where(joins[best[above], level], above, level)
    return _Packs(top, best[top], alone[: forest.levels[1]].sum() if chains else 0)


def _whole_trees(forest: _Forest, heads: Heads, machine: Machine) -> _Packs:
    """The packs if there is the smallest shape alone: no cut saves anything then."""
    shape, roots = machine.shapes[0], slice(*forest.levels[:2])
    tiles = -(-forest.queries // _room(heads, machine)[0])
    top = forest.first[roots].searchsorted(forest.first, side="right") - 1
    cost = shape.cost * (tiles @ forest.tokens + shape.start * tiles[roots].sum())
    partials = forest.queries[roots].sum() * _partial(heads, machine)
    return _Packs(top, np.zeros_like(top), cost + partials)


def _partial(heads: Heads, machine: Machine) -> float:
    """What a partial of a query costs, in tokens."""
    return heads.partial_bytes * machine.partial / heads.token_bytes


def _room(heads: Heads, machine: Machine) -> np.ndarray:
    """Queries of a tile, of each shape."""
    return np.array([max(shape.rows // heads.group, 1) for shape in machine.shapes])


class _Tiles(NamedTuple):
    """Query tiles, sorted by shape."""

    pack: np.ndarray  # [A] of alive[a]
    pack_of: np.ndarray  # [Q] of each tile, ascending; a pack's tiles are in the order of rows
    order: np.ndarray  # [Q] tiles by shape, in the numbering of `pack_of`
    begin: np.ndarray  # [Q] first of rows, in that order
    end: np.ndarray  # [Q]
    shape: np.ndarray  # [Q] of the machine's


def _query_tiles(forest: _Forest, packs: _Packs, heads: Heads, machine: Machine) -> _Tiles:
    """Cuts the rows of packs into tiles, each of the smallest shape that they fit."""
    tops = (packs.top == np.arange(len(packs.top))).nonzero()[0]
    number = np.empty(len(packs.top), np.int64)
    number[tops] = np.arange(len(tops))
    shape = packs.shape[tops]
    start = np.array([each.cost * each.start for each in machine.shapes])
    room = _room(heads, machine)
    pack, begin, end = _cut_rows(forest, number[packs.top], tops, room[shape], start[shape])
    most = [each.rows for each in machine.shapes]
    shape = np.searchsorted(most[:-1], (end - begin) * heads.group)
    order = _stable_argsort(shape, len(most))
    return _Tiles(
        number[packs.top[forest.chain]], pack, order, begin[order], end[order], shape[order]
    )


def _cut_rows(
    forest: _Forest, pack: np.ndarray, packs: np.ndarray, room: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts the rows of packs into tiles.

    To begin a tile costs its start, and what is seen on both sides, which is read twice. Tiles of a
    pack are full; or, if that costs less, each ends where the next begins at the least cost, every
    row that is left out counting as much as rows of full tiles cost on average.

    Args:
        pack: [C] the chains'.
        packs: [P] the chain at the top of each pack.
        room: [P] rows of a tile.
        start: [P] of a tile, in tokens.

    Returns:
        The pack of each tile, its first row, and its end row, int [Q].
    """
    queries = forest.queries[packs]
    edges = _offsets(queries)  # of packs, laid end to end
    rows = int(edges[-1])
    owner = np.arange(len(packs)).repeat(queries)
    begin = forest.first - forest.first[packs][pack] + edges[pack]
    seen = np.bincount(begin + 1, forest.tokens, rows + 2)
    seen -= np.bincount(begin + forest.queries, forest.tokens, rows + 2)
    cost = seen.cumsum()[:rows] + start[owner]
    of_full, index = _expand(-(-queries // room))
    first = full = edges[of_full] + index * room[of_full]
    # However they are cut, a tile begins within each full one's rows, or just behind them.
    least = np.minimum.reduceat(np.append(cost[1:], 0), full)[:-1] if rows else cost
    if (cost[full[1:]] > least)[index[1:] > 0].any():
        full_cost = np.bincount(of_full, cost[full], len(packs))
        worth = cost - (full_cost / queries)[owner] * np.arange(rows)
        left = edges[owner + 1] - np.arange(rows)
        size = np.minimum(room[owner], left)
        for most in np.unique(room[queries > room]).tolist():
            # To look at more would take the host longer than it is worth.
            fewest = max(most - 63, 1)
            some = ((room[owner] == most) & (left > most)).nonzero()[0]
            ends = np.lib.stride_tricks.sliding_window_view(worth, most - fewest + 1)
            size[some] = fewest + ends[some + fewest].argmin(1)
        following, found = (np.arange(rows) + size).tolist(), [0]
        while found[-1] < rows:
            found.append(following[found[-1]])
        early = np.array(found[:-1], np.int64)
        chosen = np.bincount(owner[early], cost[early], len(packs)) < full_cost
        first = np.sort(np.concatenate([full[~chosen[of_full]], early[chosen[owner[early]]]]))
    last = np.append(first[1:], rows)[: len(first)]
    shift = forest.first[packs] - edges[:-1]
    return owner[first], first + shift[owner[first]], last + shift[owner[first]]


class _Runs(NamedTuple):
    """What each tile reads of a node, sorted by tile, in preorder."""

    tile: np.ndarray  # [N], by shape
    node: np.ndarray  # [N]
    begin: np.ndarray  # [N] rows of the tile that see it, counted from the tile's first
    end: np.ndarray  # [N]
    furthest: np.ndarray  # [N] the largest position of those
    hindmost: np.ndarray  # [N]
    past: np.ndarray  # [N] tokens that lie before their windows
    seen: np.ndarray  # [N] tokens that they see, or will, with those


def _advance(
    nodes: Nodes, node: np.ndarray, where: np.ndarray, ahead: int | None
) -> tuple[int, int]:
    """By how much rows of these nodes, at positions `where`, advance: all alike, until one reaches
    the end of its node. And how many tokens before the ends of their nodes they don't see even
    then, summed over rows."""
    left = nodes.start[node] + nodes.length[node] - 1 - where
    advance = max(int(left.min(initial=ahead if ahead is not None else _FAR)), 0)
    return advance, int(np.maximum(left - advance, 0).sum())


def _runs(
    nodes: Nodes,
    forest: _Forest,
    tiles: _Tiles,
    where: np.ndarray,
    advance: int,
    window: int | None,
) -> _Runs:
    """What tiles read, for rows at positions `where` that may advance so far."""
    rank = np.empty(len(tiles.order), np.int64)
    rank[tiles.order] = np.arange(len(rank))
    rows = len(forest.rows)
    begins = tiles.pack_of * rows + tiles.begin[rank]
    first, last = (
        begins.searchsorted(tiles.pack * rows + row, side="right") - 1
        for row in (forest.begin, forest.end - 1)
    )
    owner, more = _expand(last - first + 1)
    tile = rank[first[owner] + more]
    order = _stable_argsort(tile, len(rank))
    owner, tile = owner[order], tile[order]
    first = tiles.begin[tile]
    begin = np.maximum(forest.begin[owner], first)
    end = np.minimum(forest.end[owner], tiles.end[tile])
    furthest, hindmost = extrema(where, begin, end)
    node = forest.alive[owner]
    seen = np.maximum(furthest + advance + 1 - nodes.start[node], 1)
    seen = np.minimum(seen, nodes.length[node])
    runs = _Runs(
        tile, node, begin - first, end - first, furthest, hindmost, np.zeros_like(seen), seen
    )
    if window is None:
        return runs
    past = np.maximum(hindmost - window + 1 - nodes.start[node], 0)
    return _Runs(*(column[past < seen] for column in runs._replace(past=past)))


def extrema(values: np.ndarray, begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, ...]:
    """The largest and the smallest of each values[begin:end]; none of them is empty."""
    bounds = np.empty(2 * len(begin), np.int64)
    bounds[::2], bounds[1::2] = begin, end
    values = np.append(values, 0)  # an end may lie behind the last
    return tuple(f.reduceat(values, bounds)[::2] for f in (np.maximum, np.minimum))


class _Draft(NamedTuple):
    """A plan, but for the order of chunks in their blocks and what the tables say of them."""

    runs: _Runs
    run: np.ndarray  # [T] of each chunk
    token: np.ndarray  # [T] its first, counted from its node's
    queues: np.ndarray  # the plan's table; shapes and blocks, too
    shapes: np.ndarray
    blocks: np.ndarray
    block: np.ndarray  # [T] of each chunk
    step: np.ndarray  # [B] chunks of a step
    begin: np.ndarray  # [T] rows of its block that a chunk is for
    end: np.ndarray  # [T]
    halves: tuple[np.ndarray, np.ndarray, np.ndarray] | None  # what `_halves` returns
    partial: np.ndarray  # this and the next two: what `_partials` returns
    owners: np.ndarray
    written: np.ndarray
    page_size: int


def _draft(
    rows: int,
    tiles: _Tiles,
    runs: _Runs,
    page_size: int,
    heads: Heads,
    machine: Machine,
    spread: bool,
) -> _Draft:
    """Cuts tiles into queues, and these into blocks.

    Args:
        rows: that see anything.
        spread: whether what few of a tile's rows see is spread over all of its queues; else it is
            in queues of its own, which leave fewer partials.
    """
    sizes = np.array([shape.tokens or page_size for shape in machine.shapes])
    size = machine.chunk(page_size)
    of_tile = (sizes // size)[tiles.shape]  # chunks of a step
    run, token, lengths = _chunks(runs, of_tile, size)
    tile_ptr = _offsets(lengths * of_tile)
    if spread:
        first = _starts(runs.tile)
        counts = np.zeros(len(of_tile), np.int64)
        counts[runs.tile[first]] = np.maximum.reduceat(runs.end, first)
        of_run = runs.begin[run], runs.end[run], counts, runs.tile[run], of_tile
        halves = _halves(*of_run, heads, machine)
        if halves is not None:
            order, _ = _spread(*halves, runs.tile[run], of_tile)
            run, token = run[order], token[order]

    # Queues are cut from the steps of a shape, blocks from the query tiles where queues end.
    bounds = tiles.shape.searchsorted(np.arange(len(machine.shapes) + 1))
    cut = np.zeros(len(run) + 1, bool)
    for i, (shape, a, b) in enumerate(zip(machine.shapes, bounds, bounds[1:], strict=False)):
        some = lengths[a:b][lengths[a:b] > 0]  # a tile has none if its windows are empty
        if len(some):
            programs, least = shape.programs / heads.kv, shape.least // int(sizes[i])
            cuts = _cuts(some, programs, least, machine.claims)
            cut[tile_ptr[a] + cuts * (sizes[i] // size)] = True
    cut[-1] = True
    queues = cut.nonzero()[0]
    cut[tile_ptr] = True
    chunk = cut.nonzero()[0]
    shapes = np.empty((len(machine.shapes), COLUMNS["shapes"]), np.int32)
    shapes[:, 0] = [shape.rows for shape in machine.shapes]
    shapes[:, 1] = sizes
    for column, starts in ((2, chunk[:-1]), (4, queues)):
        at = starts.searchsorted(tile_ptr[bounds])
        shapes[:, column], shapes[:, column + 1] = at[:-1], at[1:]

    # Of a tile, a block has the rows that its chunks are for.
    blocks = np.zeros((len(chunk) - 1, COLUMNS["blocks"]), np.int32)
    blocks[:, 2], blocks[:, 3] = chunk[:-1], chunk[1:]
    tile = tile_ptr.searchsorted(chunk[:-1], side="right") - 1
    least, most = np.zeros((2, 0), np.int64)
    if len(blocks):
        least = np.minimum.reduceat(runs.begin[run], chunk[:-1])
        most = np.maximum.reduceat(runs.end[run], chunk[:-1])
    counts = most - least
    blocks[:, 0] = tiles.begin[tile] + least
    blocks[:, 1] = blocks[:, 0] + counts
    block = np.arange(len(blocks)).repeat(chunk[1:] - chunk[:-1])
    step, first = of_tile[tile], least[block]
    begin, end = runs.begin[run] - first, runs.end[run] - first
    halves = _halves(begin, end, counts, block, step, heads, machine)
    if halves is not None:
        blocks[:, 4] = 2 * halves[2] * step
    table = np.zeros((len(queues), COLUMNS["queues"]), np.int32)
    table[:, 0] = queues
    table[:, 1] = chunk[:-1].searchsorted(queues)
    table[:-1, 2:] = blocks[table[:-1, 1]][:, [0, 1, 4]]
    return _Draft(
        runs, run, token, table, shapes, blocks, block, step, begin, end, halves,
        *_partials(blocks[:, 0], counts, rows), page_size,
    )  # fmt: skip


def _tables(
    nodes: Nodes,
    rows: np.ndarray,
    draft: _Draft,
    position: np.ndarray,
    heads: Heads,
    machine: Machine,
) -> Tables:
    """The tables of a draft; the rows are `_Forest.rows`, the positions of all."""
    blocks, block, size = draft.blocks, draft.block, machine.chunk(draft.page_size)
    run, token, begin, end = draft.run, draft.token, draft.begin, draft.end
    pair: np.ndarray | int = 0
    if draft.halves is not None:
        order, pair = _spread(*draft.halves, block, draft.step)
        run, token, begin, end = run[order], token[order], begin[order], end[order]
    counts = blocks[:, 1] - blocks[:, 0]
    node = draft.runs.node[run]
    length, start = nodes.length[node], nodes.start[node] + token
    shift = draft.page_size.bit_length() - 1
    inside = np.minimum(token, (length - 1) // size * size)
    page = np.asarray(nodes.pages, np.int32)[nodes.page_ptr[node] + (inside >> shift)]
    chunks = np.empty((len(run), COLUMNS["chunks"]), np.int32)
    chunks[:, 0] = (page << shift) + (inside & (draft.page_size - 1))
    chunks[:, 1] = np.minimum(np.maximum(length - token, 0), size)
    chunks[:, 2] = start
    chunks[:, 3] = draft.runs.furthest[run] + 1 - start
    chunks[:, 4] = draft.runs.hindmost[run] + 1 - start
    chunks[:, 5] = begin + (end << 16)
    chunks[:, 6] = blocks[block, 0]
    slot = np.where(draft.partial, (draft.partial * counts).cumsum() - counts, -1)
    chunks[:, 7] = slot[block]
    steps = draft.step.repeat((blocks[:, 3] - blocks[:, 2]) // draft.step)
    chunks[:, 8] = _flags(chunks, counts[block], steps, size) + pair
    chunks[blocks[:, 2], 8] += 1

    written, owners = np.zeros(len(position), bool), rows[draft.owners]
    written[rows] = draft.written
    merge_rows = (~written).nonzero()[0]
    return Tables(
        draft.shapes,
        draft.queues,
        chunks,
        blocks,
        rows.astype(np.int32),
        _stable_argsort(owners, len(position)).astype(np.int32),
        merge_rows.astype(np.int32),
        _offsets(np.bincount(owners, minlength=len(position))[merge_rows]).astype(np.int32),
        position.astype(np.int32),
        draft.page_size,
    )


def _chunks(runs: _Runs, step: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The chunks of each tile, filled up to whole steps of `step` [Q] chunks of `size` tokens.

    Returns:
        The run of each chunk, int [T]; its first token, counted from the node's; and the steps of
        each tile, int [Q].
    """
    skipped = runs.past // size
    counts = -(-runs.seen // size) - skipped
    full = np.bincount(runs.tile, counts, len(step)).astype(np.int64)
    lengths = -(-full // step)
    last = np.append(_starts(runs.tile), len(runs.tile))[1:] - 1
    counts[last] += (lengths * step - full)[runs.tile[last]]
    run, token = _expand(counts)
    return run, (token + skipped[run]) * size, lengths


def _partials(first: np.ndarray, counts: np.ndarray, rows: int) -> tuple[np.ndarray, ...]:
    """Which blocks leave partials: all but those that are the only one of each of their rows.

    Args:
        first, counts: [B] rows of a block are first .. first + counts.
        rows: of these, in all.

    Returns:
        bool [B]; the row of each partial, in the order of the blocks; and bool [rows], whether a
        block writes a row's output.
    """
    entry, index = _expand(counts)
    entry = first[entry] + index
    single = np.bincount(entry, minlength=rows)[entry] == 1
    partial = ~np.logical_and.reduceat(single, _offsets(counts)[:-1])
    waits = partial.repeat(counts)
    written = np.zeros(rows, bool)
    written[entry[~waits]] = True
    return partial, entry[waits], written


def _flags(chunks: np.ndarray, counts: np.ndarray, step: np.ndarray, size: int) -> np.ndarray:
    """The last column of chunks, int [T], but for the bits of a block's first and of pairs.

    Args:
        counts: [T] rows of their blocks.
        step: [steps] chunks of each.
        size: tokens of a chunk.
    """
    seen = (chunks[:, 1] == size) & (chunks[:, 3] >= size)
    whole = seen & (chunks[:, 4] >= size) & (chunks[:, 5] == counts << 16)
    flags = np.bitwise_and.reduceat(whole * 2 + seen * 4, step.cumsum() - step)
    return flags.repeat(step) + counts * 32


def _duration(draft: _Draft, heads: Heads, machine: Machine) -> float:
    """About how many steps a plan takes on a machine with halves: queues, each taken by the program
    that is through first, or by one after the other; and a merge.

    What a byte of a partial costs here, 0.8 of one of K and V, goes with `Machine.narrow` by which
    of two plans was the faster one on an H200.
    """
    if not len(draft.blocks):
        return 0
    shape = machine.shapes[0]
    row, end_row, chunk, end_chunk, pairs = draft.blocks.T
    chunks = end_chunk - chunk
    paired = np.where((end_row - row) * heads.group <= machine.half, chunks, pairs)
    steps = (chunks - (1 - machine.narrow) * paired) * machine.chunk(draft.page_size)
    blocks = (steps + shape.start) / shape.tokens
    queues = np.add.reduceat(blocks, draft.queues[:-1, 1]).repeat(heads.kv)
    programs = np.zeros(shape.programs)
    for begin in range(0, len(queues), shape.programs):
        some = queues[begin : begin + shape.programs]
        if machine.claims:
            programs.sort()
        programs[: len(some)] += some
    partials = len(draft.owners)
    moved = partials * heads.kv * heads.partial_bytes
    read = shape.programs * shape.tokens * heads.token_bytes
    return programs.max() + 2 * (partials > 0) + 0.8 * moved / read


def _least_duration(
    packs: _Packs, forest: _Forest, unseen: int, heads: Heads, machine: Machine
) -> float:
    """A lower bound on the `_duration` of a plan of `_whole_trees` without a window: every step is
    as cheap as those for half of the rows, all programs end at once, and nothing is merged.

    Args:
        unseen: see `_advance`.
    """
    shape = machine.shapes[0]
    tokens = packs.cost - len(forest.rows) * _partial(heads, machine) - unseen
    return machine.narrow * tokens * heads.kv / (shape.tokens * shape.programs)


def _halves(
    begin: np.ndarray,
    end: np.ndarray,
    counts: np.ndarray,
    block: np.ndarray,
    step: np.ndarray,
    heads: Heads,
    machine: Machine,
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Which chunks are for few of their block's rows, and which steps of theirs make pairs; `None`
    if nothing is to be spread.

    Args:
        begin, end: [T] rows that chunks are for, counted from their block's first.
        counts: [B] rows of a block.
        block: [T] the chunks'.
        step: [B] chunks of a step.

    Returns:
        bool [T], whether a chunk is for few of its block's rows; int [T], 1 or 2 if these are in
        one half, else 0; and int [B], how many steps for either half are in pairs.
    """
    if not machine.half or not (few := end - begin < counts[block]).any():
        return None
    side = np.where(end * heads.group <= machine.half, 1, 0)
    side[begin * heads.group >= machine.half] = 2
    sizes = np.bincount(block * 3 + side, minlength=3 * len(step)).reshape(-1, 3)
    return few, side, sizes[:, 1:].min(1) // step


def _spread(
    few: np.ndarray, side: np.ndarray, pairs: np.ndarray, block: np.ndarray, step: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Spreads a block's steps for few of its rows evenly among those for all of them.

    The first wait for the memory; the others, that more blocks read, are in the L2 and wait for
    the matrix units. A step for one half of the rows is put before one for the other half, for
    both to be computed at once; one that is in no such pair comes first, if there is one. Pairs are
    whole, so none of the groups that compute them passes by two steps in a row: `hopper.py` relies
    on that.

    Args:
        few, side, pairs: see `_halves`.
        block: [T] the chunks'.
        step: [B] chunks of a step.

    Returns:
        The chunks' new order, [T]; and in that order, their flags of pairs.
    """
    blocks = len(step)
    key = block * 3 + side
    rank = np.empty(len(key), np.int64)
    rank[_stable_argsort(key, 3 * blocks)] = _expand(np.bincount(key, minlength=3 * blocks))[1]
    side = np.where(rank < (pairs * step)[block], side, 0)
    # By block and kind: 0 for all rows, 1 for few, and of pairs 2 the first, 3 the second half's.
    # What is left of kind 0 shares a step with the first of kind 1.
    key = block * 4 + np.where(side > 0, 1 + side, few)
    order = _stable_argsort(key, 4 * blocks)
    common, rare = np.bincount(key, minlength=4 * blocks).reshape(-1, 4)[:, :2].T
    whole = -(-common // step)
    counts = np.stack([whole, (common + rare) // step - whole, pairs, pairs], 1)  # of steps
    late = np.full(counts.shape, 0.5)
    late[:, 0] = 0
    late[whole == 0, 1] = 0
    owner, nth = _expand(counts.ravel())
    block, kind = owner // 4, owner % 4
    # Where in its block a step is to come: from 0 to below 1, so block + where sorts by block.
    where = (nth + late.ravel()[owner]) / counts.ravel()[owner]
    at = (block + where).argsort(kind="stable")
    size = step[block]
    begin = size.cumsum() - size
    block, kind, begin, size = block[at], kind[at], begin[at], size[at]
    order = order[begin.repeat(size) + _expand(size)[1]]
    # Behind a step, or a pair of them.
    behind = np.arange(len(at)) + np.where(kind == 2, 2, 1)
    follower = np.minimum(behind, len(at) - 1)
    followed = (kind[follower] >= 2) & (block[follower] == block) & (behind < len(at))
    return order, ((kind >= 2) * 8 + followed * 16).repeat(size)


def _cuts(lengths: np.ndarray, programs: float, least: int, claims: bool) -> np.ndarray:
    """Cuts query tiles of so many steps, laid end to end, into even queues, one for each program.

    A cut may fall inside a tile if it leaves `least` steps on both sides. To begin a tile counts
    as a step. But if programs claim queues, and tiles are short beside what a program does, these
    stay whole; and the last of them are in short queues, for programs to end together.

    Args:
        programs: that there are for a KV head; what is left of a whole number has claimed queues.

    Returns:
        int64, where the queues begin, in steps; the last ones may be the end, some of them equal.
    """
    ends = (lengths + 1).cumsum()
    total = int(ends[-1])
    queues = min(max(int(programs), 1), total)
    share = total / programs
    if claims and lengths.max() <= share * _CLAIMED / 2:
        # To claim a queue takes time, and where they are longer, programs end less evenly.
        even, short = int(share * (1 - _CLAIMED)), max(8, int(share * _CLAIMED / 12))
        cut = np.append(np.arange(queues) * even, np.arange(queues * even, total, short))
        least = total
    else:
        cut = np.arange(queues) * total // queues
    tile = ends.searchsorted(cut, side="right")
    length = lengths[tile]
    begin = ends[tile] - length - 1
    inside = np.minimum(cut - begin, length)
    if total < queues * least:  # to cut there at every queue's end would be to cut too often
        pieces = np.maximum(length // least, 1)
        inside = (2 * inside * pieces + length) // (2 * length) * length // pieces
    front = 2 * inside < length
    inside[front & (inside < least)] = 0
    back = ~front & (length - inside < least)
    inside[back] = length[back]
    return begin - tile + inside


def _check(
    nodes: Nodes,
    node: np.ndarray,
    position: np.ndarray,
    heads: Heads,
    page_size: int,
    ahead: int | None,
    window: int | None,
) -> None:
    if page_size < 16 or page_size & (page_size - 1):
        raise ValueError(f"page_size={page_size}: it must be a power of two from 16.")
    if ahead is not None and ahead < 0 or window is not None and window < 1:
        raise ValueError(
            f"ahead={ahead}, window={window}: positions are advanced by 0 or more, and a window "
            "has 1 token or more; None if there is no such limit."
        )
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


def aligned(size: int) -> int:
    """Elements that a table takes: whole sectors of 32 bytes."""
    return -(-size // 8) * 8


def _offsets(counts: np.ndarray) -> np.ndarray:
    """[n+1]: 0, counts[0], counts[0] + counts[1], .."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    counts.cumsum(out=offsets[1:])
    return offsets


def _expand(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """0 counts[0] times, 1 counts[1] times, ..; and beside it 0, 1, .. for each of them."""
    owner = np.arange(len(counts)).repeat(counts)
    return owner, np.arange(len(owner)) - (counts.cumsum() - counts).repeat(counts)


def _starts(values: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin."""
    begins = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=begins[1:])
    return begins.nonzero()[0]


def _stable_argsort(keys: np.ndarray, below: int) -> np.ndarray:
    # NumPy sorts 16 bits by radix, wider ones by merging.
    return (keys.astype(np.uint16) if below < 1 << 16 else keys).argsort(kind="stable")
