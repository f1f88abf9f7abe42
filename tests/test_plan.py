"""The plan: every row attends to every token of its path once, at the least traffic."""

import itertools
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pat_hf.kernels import plan as planner
from pat_hf.kernels.plan import (
    Heads,
    Machine,
    Nodes,
    Plan,
    Shape,
    _compress,
    _cut_rows,
    _halves,
    _packs,
    _spread,
    _tables,
    _whole_trees,
    make_plan,
)

from .trees import Case, cases, nodes_of, path_tokens, room

# A token is 512 bytes in a KV head, one more partial of a query 4128.
HEADS = Heads(query=8, kv=2, key_dim=128, value_dim=128, itemsize=2)
MACHINES = [
    Machine.cpu(),
    Machine.gpu(132, HEADS, 9),
    Machine.gpu(132, HEADS, 8),
    Machine((Shape(1, 64, 1 << 30, 64, 1, 16), Shape(16, 32, 1 << 30, 64, 2, 16))),
    Machine((Shape(16, 0, 8, 16, 1, 16), Shape(64, 16, 8, 16, 1, 0)), half=8),
]


def plan_of(nodes, node, position=None, heads=HEADS, machine=MACHINES[0], ahead=None):
    node = np.array(node)
    if position is None:
        position = (nodes.start + nodes.length - 1)[node]
    return make_plan(nodes, node, np.array(position), heads, 16, machine, ahead)


def drafts_of(*args, **kwargs):
    """A plan, and beside it the arguments and results of each `_draft` for it."""
    made, draft = [], planner._draft

    def keep(*given):
        made.append((given, draft(*given)))
        return made[-1][1]

    with mock.patch.object(planner, "_draft", keep):
        return make_plan(*args, **kwargs), made


def tables_of(draft, case: Case, machine):
    rows = _compress(*case[:3], None).rows
    return _tables(case.nodes, rows, draft, case.position, case.heads, machine)


def reads(plan):
    """(rows, tokens read) of every block, in order of the rows."""
    tables = plan.tables
    return sorted(
        (
            sorted(tables.rows[a:b].tolist()),
            int(tables.chunks[c:d, 1].sum()),
        )
        for a, b, c, d in tables.blocks[:, :4].tolist()
    )


def assert_covers(tables, case: Case, position, window=None):
    """Each visible (row, token) pair is in one block, and no block has any other."""
    pairs = []
    for first_row, last_row, first, last in tables.blocks[:, :4].tolist():
        rows = tables.rows[first_row:last_row].astype(np.int64)
        place, count, start = tables.chunks[first:last, :3].T[..., None].astype(np.int64)
        inside = np.arange(case.page_size)
        chunk = np.nonzero(inside < count)[0]
        token, where = (x[inside < count] for x in (place + inside, start + inside))
        index = np.arange(len(rows))[:, None]
        for_rows = tables.chunks[first:last, 5][chunk]
        seen = (index >= for_rows & 0xFFFF) & (index < for_rows >> 16)
        seen &= where <= position[rows][:, None]
        if window is not None:
            seen &= where > position[rows][:, None] - window
        pairs.append((rows[:, None] << 40 | token)[seen])
    expected = []
    for row in range(len(case.node)):
        tokens = path_tokens(case, row, position[row])
        if window is not None:
            tokens = np.setdiff1d(tokens, path_tokens(case, row, position[row] - window))
        expected.append(row << 40 | tokens)
    got, expected = np.concatenate([*pairs, []]), np.concatenate([*expected, []])
    assert np.array_equal(np.sort(got), np.sort(expected))


def assert_consistent(tables, heads, machine, page_size):
    shapes, blocks, chunks = tables.shapes, tables.blocks, tables.chunks
    queues = tables.queues[:, 0]
    assert (blocks[tables.queues[:-1, 1], 2] == queues[:-1]).all()
    assert tables.queues[-1].tolist() == [len(chunks), len(blocks), 0, 0, 0]
    assert (tables.queues[:-1, 2:] == blocks[tables.queues[:-1, 1]][:, [0, 1, 4]]).all()
    size = machine.chunk(page_size)
    assert shapes[:, 0].tolist() == [shape.rows for shape in machine.shapes]
    for first in (2, 4):
        assert shapes[:, first].tolist() == [0, *shapes[:-1, first + 1]]
    assert shapes[-1, 3] == len(blocks) and shapes[-1, 5] == len(queues) - 1
    # Blocks are whole in a queue, queues in a shape.
    assert blocks[:, 2].tolist() == [0, *blocks[:-1, 3]][: len(blocks)]
    assert (blocks[:, 2] < blocks[:, 3]).all() and (np.diff(queues) > 0).all()
    assert queues[0] == 0 and queues[-1] == len(chunks) and np.isin(queues[:-1], blocks[:, 2]).all()
    # A chunk lies in a page.
    assert (chunks[:, 0] % size == 0).all()
    for i, (m, n, begin, end, queue, last_queue) in enumerate(shapes.tolist()):
        assert n == machine.shapes[i].tokens or n == page_size and not machine.shapes[i].tokens
        # At most a queue for each program; and if they claim some, one for 8 steps or tiles begun.
        units = (queues[last_queue] - queues[queue]) * size // n + end - begin
        claimed = machine.claims * (units // 8 + 1)
        assert last_queue - queue <= max(machine.shapes[i].programs // heads.kv, 1) + claimed
        if begin < end:
            assert queues[queue] == blocks[begin, 2] and queues[last_queue] == blocks[end - 1, 3]
        rows = (blocks[begin:end, 1] - blocks[begin:end, 0]) * heads.group
        assert (rows <= m).all() or i == len(shapes) - 1 and (rows <= max(m, heads.group)).all()
        for row, end_row, first, last, paired in blocks[begin:end].tolist():
            run, position = chunks[first:last], tables.positions[tables.rows[row:end_row]]
            many = n // size
            assert (last - first) % many == 0 and run[:, 1].any()
            assert (run[:, 1] >= 0).all() and (run[:, 1] <= size).all()
            low, high = run[:, 5] & 0xFFFF, run[:, 5] >> 16
            assert low.min() == 0 and high.max() == end_row - row and (low < high).all()
            # Pairs of steps for a half of the rows each, not the first if not all are in pairs.
            pairs = np.flatnonzero(run[:, 8] & 8).reshape(-1, 2, many)
            assert pairs.size == paired
            assert paired == len(run) or not (pairs[:, 0, 0] == 0).any()
            assert (np.diff(pairs.reshape(-1, 2 * many)) == 1).all()
            assert (high[pairs[:, 0]] * heads.group <= machine.half).all()
            assert (low[pairs[:, 1]] * heads.group >= machine.half).all()
            followed = np.zeros(len(run), bool)
            behind = np.arange(len(run)) + many
            behind[pairs[:, 0]] += many
            followed[behind < len(run)] = run[behind[behind < len(run)], 8] & 8 > 0
            assert (run[:, 8] >> 4 & 1).tolist() == followed.tolist()
            assert (run[:, 6] == row).all() and (run[:, 7] == run[0, 7]).all()
            assert (run[:, 8] >> 5 == end_row - row).all()
            assert (run[:, 8] & 1).tolist() == [chunk == 0 for chunk in range(last - first)]
            whole = (run[:, 1] == size) & (low == 0) & (high == end_row - row)
            whole &= run[:, 4] >= size
            whole = whole.reshape(-1, many).all(1).repeat(many)
            assert (run[:, 8] >> 1 & 1).tolist() == whole.tolist()
            seen = (run[:, 1] == size) & (run[:, 3] >= size)
            seen = seen.reshape(-1, many).all(1).repeat(many)
            assert (run[:, 8] >> 2 & 1).tolist() == seen.tolist()
            for chunk, a, b in zip(run, low, high, strict=True):
                assert chunk[3] == position[a:b].max() + 1 - chunk[2]
                assert chunk[4] == position[a:b].min() + 1 - chunk[2]
    # A result is a row's only one, or one of its partials.
    owner = np.full(len(tables.slots), -1)
    for i, row in enumerate(tables.merge_rows):
        owner[tables.slots[tables.merge_ptr[i] : tables.merge_ptr[i + 1]]] = row
    counts = np.zeros(len(tables.positions), int)
    for row, end_row in blocks[:, :2].tolist():
        counts[tables.rows[row:end_row]] += 1
    partials = []
    for row, end_row, first, _, _ in blocks.tolist():
        slot, rows = chunks[first, 7], tables.rows[row:end_row]
        assert slot >= 0 or (counts[rows] == 1).all()
        if slot >= 0:
            assert owner[slot : slot + len(rows)].tolist() == rows.tolist()
            partials += range(slot, slot + len(rows))
    assert sorted(partials) == list(range(len(owner)))


@given(cases(), st.sampled_from(MACHINES))
@settings(max_examples=150, deadline=None)
def test_every_pair_once(case, machine):
    plan, drafts = drafts_of(*case[:5], machine)
    for tables in (plan.tables, *(tables_of(draft, case, machine) for _, draft in drafts)):
        assert_consistent(tables, case.heads, machine, case.page_size)
        assert_covers(tables, case, case.position)
    fixed = make_plan(*case[:5], machine, ahead=0)
    assert_covers(fixed.tables, case, case.position)
    if machine.narrow == 1:  # else the packs may be others
        assert fixed.kv_tokens == plan.kv_tokens


@given(cases(max_nodes=8, early=True), st.sampled_from(MACHINES), st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_positions_advance_within_their_nodes(case, machine, steps):
    steps = min(steps, room(case))
    position = case.position + steps
    assert_covers(make_plan(*case[:5], machine).tables, case, position)
    assert_covers(make_plan(*case[:5], machine, ahead=steps).tables, case, position)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("ahead", [None, 20])
def test_a_row_before_its_node_advances_into_it(machine, ahead):
    nodes = nodes_of([0, 1], [100, 50])
    case = Case(nodes, np.array([1]), np.array([10]), HEADS, 16, 1)
    plan = make_plan(*case[:5], machine, ahead)
    assert_covers(plan.tables, case, case.position + 20)


@given(cases(early=True), st.sampled_from(MACHINES), st.integers(1, 100), st.integers(0, 200))
@settings(max_examples=150, deadline=None)
def test_what_lies_before_the_windows_is_left_out(case, machine, window, steps):
    plan = make_plan(*case[:5], machine, window=window)
    assert_consistent(plan.tables, case.heads, machine, case.page_size)
    position = case.position + min(steps, room(case))
    assert_covers(plan.tables, case, case.position, window)
    assert_covers(plan.tables, case, position, window)
    chunks, size = plan.tables.chunks, machine.chunk(case.page_size)
    assert (chunks[:, 4] - window < size)[chunks[:, 1] > 0].all()
    # Short nodes may be read more often, where that is cheaper than to compute them for more rows.
    with_window, without = (
        _packs(_compress(*case[:3], x), case.heads, machine).cost for x in (window, None)
    )
    assert with_window <= without


def test_a_window_bounds_what_is_read():
    nodes = nodes_of([0, 1, 1], [2000, 100, 60])
    tables = make_plan(nodes, [1, 2], [2099, 2059], HEADS, 16, MACHINES[0], window=50).tables
    read = [tables.chunks[a:b, 1].sum() for a, b in tables.blocks[:, 2:4].tolist()]
    assert sum(read) <= 3 * (50 + 16)


@pytest.mark.parametrize("machine", MACHINES)
def test_rows_whose_windows_are_empty_are_left_to_the_merge(machine):
    nodes = nodes_of([0, 1, 1], [40, 20, 30])
    tables = make_plan(nodes, [1, 2], [59, 500], HEADS, 16, machine, window=5).tables
    partials = dict(zip(tables.merge_rows.tolist(), np.diff(tables.merge_ptr), strict=True))
    assert partials[1] == 0 and 1 not in tables.rows[tables.blocks[0, 0] : tables.blocks[0, 1]]
    assert (tables.chunks[:, 1] > 0).any()
    none = make_plan(nodes, [1, 2], [500, 500], HEADS, 16, machine, window=5).tables
    assert none.merge_rows.tolist() == [0, 1] and not len(none.blocks)


def machine_of(*costs, rows=(16, 64), partial=1):
    """Shapes of so many rows; a token costs `costs`, a block nothing beside its tokens."""
    shapes = (Shape(m, 16, 1 << 30, 1 << 20, cost, 0) for m, cost in zip(rows, costs, strict=True))
    return Machine(tuple(shapes), partial)


def test_siblings_are_read_together_if_partials_cost_more():
    # Four leaves in a tile of 16 rows, the root read once; or cut off, 4 x 4128 / 512 tokens.
    machine = machine_of(1, 9)
    nodes = nodes_of([0] + [1] * 4, [64] + [32] * 4)
    assert reads(plan_of(nodes, range(1, 5), machine=machine)) == [([0, 1, 2, 3], 64 + 4 * 32)]


def test_a_run_that_many_share_is_a_pack_of_its_own():
    # With the root in each of four tiles of 16 rows, 4 x 300 + 16 x 64 tokens; in a tile of 64,
    # at 1.5 a token, 1986; cut off, 450 + 16 x 64 and 16 partials, 129 tokens' worth.
    nodes = nodes_of([0] + [1] * 16, [300] + [64] * 16)
    plan = plan_of(nodes, range(1, 17), machine=machine_of(1, 1.5))
    assert reads(plan) == sorted([(list(range(16)), 300)] + [([i], 64) for i in range(16)])
    assert plan.partials == 32
    # Dear partials: all of it in the tile of 64.
    dear = plan_of(nodes, range(1, 17), machine=machine_of(1, 1.5, partial=9))
    assert reads(dear) == [(list(range(16)), 300 + 16 * 64)] and dear.partials == 0


def test_tiles_end_where_least_is_seen_on_both_sides():
    # Of 32 rows each: full tiles would read half of the families twice.
    machine = Machine.gpu(132, HEADS, 9)
    families = [24] * 5
    depths = [0] + [x for family in families for x in (1, *[2] * family)]
    lengths = [1000] + [x for family in families for x in (1000, *[16] * family)]
    nodes = nodes_of(depths, lengths)
    leaves = np.setdiff1d(np.arange(len(depths)), nodes.parent)
    plan = plan_of(nodes, leaves, machine=machine, ahead=0)
    assert plan.kv_tokens == sum(lengths) + 4 * 1000
    # A run that costs more to read again than the families do is read by as few tiles as can be.
    lengths[0] = 9000
    nodes = nodes_of(depths, lengths)
    plan = plan_of(nodes, leaves, machine=machine, ahead=0)
    assert plan.kv_tokens == sum(lengths) + 3 * 9000 + 2 * 1000


def packs_of(generator):
    """A forest of three levels; each chain's pack, some of them inside of others; the packs' first
    chains, rooms, and starts."""
    depths = []
    for _ in range(5):
        counts = generator.integers(1, 40, generator.integers(1, 9))
        depths += [0] + [x for count in counts for x in (1, *[2] * count)]
    lengths = np.maximum(generator.pareto(1, len(depths)) * 60, 1).astype(int)
    nodes = nodes_of(depths, lengths.tolist())
    leaves = np.setdiff1d(np.arange(len(depths)), nodes.parent)
    forest = _compress(nodes, leaves, (nodes.start + nodes.length - 1)[leaves], None)
    top = []
    for chain, parent in enumerate(forest.parent):
        apart = parent < 0 or forest.queries[chain] > 1 and generator.random() < 0.2
        top.append(chain if apart else top[parent])
    packs, pack = np.unique(top, return_inverse=True)
    rooms = generator.choice([1, 2, 7, 16, 64], len(packs))
    return forest, pack, packs, rooms, generator.integers(1, 200, len(packs))


@pytest.mark.parametrize("seed", range(8))
def test_rows_are_cut_into_tiles_that_fit_and_cost_little(seed):
    generator = np.random.default_rng(seed)
    ours, fulls, bests = 0, 0, 0
    for _ in range(10):
        forest, pack, packs, rooms, starts = packs_of(generator)
        owner, begin, end = _cut_rows(forest, pack, packs, rooms, starts)
        assert (np.diff(owner) >= 0).all()
        for i, (chain, most) in enumerate(zip(packs, rooms, strict=True)):
            rows = np.arange(forest.queries[chain])
            cuts, ends = begin[owner == i] - forest.first[chain], end[owner == i]
            assert cuts[0] == 0 and (cuts[1:] == ends[:-1] - forest.first[chain]).all()
            assert ends[-1] == forest.first[chain] + len(rows)
            size = ends - begin[owner == i]
            assert size.min() > 0 and size.max() <= most
            # What it costs to begin a tile at each row.
            first = (forest.first - forest.first[chain])[pack == i]
            last = first + forest.queries[pack == i]
            both = (first < rows[:, None]) & (rows[:, None] < last)
            cost = np.append((both * forest.tokens[pack == i]).sum(1) + starts[i], 0)
            mine, full = (cost[cut].sum() for cut in (cuts[1:], rows[most::most]))
            assert mine <= full
            best = np.zeros(len(cost))  # from a row to the end
            for row in rows[::-1]:
                following = slice(row + 1, min(row + most, len(rows)) + 1)
                best[row] = (cost + best)[following].min()
            ours, fulls, bests = ours + mine, fulls + full, bests + best[0]
    assert fulls - ours > 0.6 * (fulls - bests)


@given(cases(), st.sampled_from([1, 2, 4]))
@settings(max_examples=100, deadline=None)
def test_with_one_shape_no_cut_saves_anything(case, machine):
    machine = replace(MACHINES[machine], shapes=MACHINES[machine].shapes[:1])
    forest = _compress(*case[:3], None)
    ours, searched = (pack(forest, case.heads, machine) for pack in (_whole_trees, _packs))
    assert ours.top.tolist() == searched.top.tolist()
    assert ours.shape.tolist() == searched.shape.tolist()
    assert ours.cost == pytest.approx(searched.cost)


def test_costs_count_bytes():
    nodes = nodes_of([0] + [1] * 16, [300] + [64] * 16)
    for heads, packs in (
        (Heads(8, 2, 128, 128, 2), 17),
        (Heads(8, 2, 128, 128, 1), 17),  # twice the tokens: 1732 < 1986
        (Heads(2, 2, 128, 128, 2), 1),  # all 16 queries in one tile
    ):
        plan = plan_of(nodes, range(1, 17), heads=heads, machine=machine_of(1, 1.5))
        assert len(plan.tables.blocks) == packs


def test_children_decide_one_by_one():
    # The long leaves are cut off, each for itself; the short ones go with their parent.
    nodes = nodes_of([0] + [1] * 8, [160] + [16] * 4 + [4000] * 4)
    plan = plan_of(nodes, range(1, 9), machine=machine_of(1, 2, rows=(4, 64), partial=3))
    assert reads(plan) == sorted(
        [(list(range(8)), 160 + 4 * 16)] + [([i], 4000) for i in range(4, 8)]
    )


def test_chains_are_one_run():
    nodes = nodes_of(range(500), [5] * 500)
    plan = plan_of(nodes, [499, 499])
    assert reads(plan) == [([0, 1], 2500)] and plan.partials == 0
    assert len(plan.tables.chunks) == 500


def test_deep_trees_stay_small():
    # A row ends at each of 400 levels: 80,200 pairs of row and node, 1,283,200 of row and token.
    nodes = nodes_of(range(400), [16] * 400)
    plan = plan_of(nodes, range(400))
    assert len(plan.tables.chunks) < 80_200 / 4
    assert plan.kv_tokens < 1_283_200 / 4


def test_a_long_run_is_split_evenly_among_the_queues():
    machine = Machine((Shape(16, 64, 2 * 20, 128, 1, 64),))
    for length, longest in ((100, 6), (40, 3), (20, 2), (3, 3)):
        plan = plan_of(nodes_of([0, 1, 1], [64 * length, 64, 64]), [1, 2], machine=machine)
        tables = plan.tables
        steps = np.diff(tables.queues[:, 0]) // 4
        assert len(steps) <= 20 and steps.max() <= longest
        assert steps.sum() == length + 2
        rows = tables.blocks[:, 1] - tables.blocks[:, 0]
        assert plan.partials == rows.sum()


@pytest.mark.parametrize(
    "kv, lengths, short",  # least units of a claimed queue: steps, and 1 to begin a tile
    [
        (8, [1024] * 256, 17),  # a tile's
        (1, [64, 250] * 800, 8),
        (8, [128] * 4096, 12),  # a 60th of what a program does
        (48, [4096] * 40, 65),
    ],
)
def test_programs_claim_the_last_of_many_short_tiles(kv, lengths, short):
    heads = HEADS._replace(query=kv, kv=kv)
    nodes = nodes_of([0] * len(lengths), lengths)
    rows = np.arange(len(lengths))
    case = Case(nodes, rows, nodes.length - 1, heads, 16, 1)
    plan, fixed = (
        make_plan(*case[:5], replace(Machine.gpu(132, heads, 9), claims=claims))
        for claims in (True, False)
    )
    for tables in (plan.tables, fixed.tables):
        assert_consistent(tables, heads, Machine.gpu(132, heads, 9), 16)
        assert_covers(tables, case, case.position)
    even = 132 // kv
    assert len(fixed.tables.queues) - 1 == even and plan.partials == 0
    # Layers with windows have kernels whose programs claim nothing.
    windowed = make_plan(*case[:5], Machine.gpu(132, heads, 9), window=1 << 20)
    assert all(map(np.array_equal, windowed.tables, fixed.tables))
    steps, longest = np.diff(plan.tables.queues[:, 0]) // 4, -(-max(lengths) // 64)
    share = steps.sum() * kv / 132
    assert (abs(steps[:even] - 0.8 * share) < longest).all()
    # A fifth is claimed, and what would be of programs that are too few for a queue of each head.
    assert abs(steps[even:].sum() / steps.sum() - (1 - 0.8 * even * kv / 132)) < 0.05
    units = steps + np.diff(plan.tables.queues[:, 1])
    assert abs(units[even:].mean() / short - 1) < 0.1 and units[even:].max() <= short + longest


def test_long_tiles_are_cut_in_even_queues():
    heads, machine = HEADS._replace(query=8, kv=8), Machine.gpu(132, HEADS, 9)
    nodes = nodes_of([0] * 40, [1024] * 40)  # 2.4 for each program, of those with 8 heads
    tables = plan_of(nodes, range(40), heads=heads, machine=machine).tables
    steps = np.diff(tables.queues[:, 0]) // 4
    assert len(steps) == 16 and steps.max() - steps.min() <= 1


def test_what_few_rows_see_is_spread_among_what_all_see():
    heads = HEADS._replace(query=32, kv=8)
    machine = Machine.gpu(132, heads, 9)
    nodes = nodes_of([0] + [1] * 32, [8192] + [256] * 32)
    case = Case(nodes, np.arange(1, 33), np.full(32, 8192 + 255), heads, 16, 1)
    tables = make_plan(*case[:5], machine).tables
    assert_consistent(tables, heads, machine, 16)
    assert_covers(tables, case, case.position)
    assert len(tables.blocks) == len(tables.queues) - 1 == 16
    for _, _, begin, end, paired in tables.blocks.tolist():
        flags = tables.chunks[begin:end:4, 8]  # of steps
        assert paired == 4 * 8
        assert "".join(".2"[flag] for flag in flags >> 3 & 1) == "..22" * 4


@pytest.mark.parametrize(
    "query, kv, groups, root, ahead, drafts",
    [
        (32, 8, 1, 64, None, [(False, True), (True, True), (False, False)]),
        (32, 8, 1, 8192, None, [(False, True), (True, True)]),  # too dear to be read twice
        (32, 8, 20, 64, None, [(False, True), (False, False)]),  # enough tiles for all queues
        (64, 8, 20, 2048, None, [(False, True)]),  # nor can small blocks take less time
        (32, 8, 1, 64, 0, [(False, True)]),
        (16, 8, 1, 64, None, [(False, False)]),
        (64, 1, 1, 64, None, [(False, True), (True, True), (False, False)]),
        (128, 1, 1, 64, None, [(False, True)]),
    ],
)
def test_what_is_drafted(query, kv, groups, root, ahead, drafts):
    heads = HEADS._replace(query=query, kv=kv)
    nodes = nodes_of([0, *[1] * 32] * groups, [root, *[256] * 32] * groups)
    node = np.flatnonzero(nodes.parent >= 0)
    position = (nodes.start + nodes.length - 1)[node]
    machine = Machine.gpu(132, heads, 9)
    _, made = drafts_of(nodes, node, position, heads, 16, machine, ahead)
    assert [(given[-1], bool(given[1].shape.any())) for given, _ in made] == drafts


def test_the_draft_that_should_take_the_least_time_is_made():
    best = []
    forests = (1, 32, 64, 256), (1, 64, 2048, 64), (1, 128, 8192, 512), (20, 40, 64, 256)
    for trees, leaves, root, own in forests:
        heads = HEADS._replace(query=32, kv=8)
        machine = Machine.gpu(132, heads, 9)
        nodes = nodes_of([0, *[1] * leaves] * trees, [root, *[own] * leaves] * trees)
        node = np.flatnonzero(nodes.parent >= 0)
        case = Case(nodes, node, np.full(len(node), root + own - 1), heads, 16, 1)
        plan, drafts = drafts_of(*case[:5], machine)
        made = [tables_of(draft, case, machine) for _, draft in drafts]
        times = [_time(tables, heads) for tables in made]
        given = [planner._duration(draft, heads, machine) for _, draft in drafts]
        np.testing.assert_allclose(given, times)
        best.append(int(np.argmin(times)))
        assert all(map(np.array_equal, plan.tables, made[best[-1]]))
    assert sorted(set(best)) == [0, 1, 2]


@given(
    cases(max_nodes=60, max_length=500),
    st.sampled_from([(8, 1), (32, 8), (64, 2)]),
    st.none() | st.integers(1, 500),
)
@settings(max_examples=150, deadline=None)
def test_what_is_not_drafted_takes_longer(case, heads, window):
    """By `_duration`, by which one of the drafts is chosen; with a window there is no bound."""
    heads, bounds = HEADS._replace(query=heads[0], kv=heads[1]), []
    case = case._replace(heads=heads)
    machine, bound = Machine.gpu(4, heads, 9), planner._least_duration
    plan = make_plan(*case[:5], machine, window=window)
    with mock.patch.object(planner, "_least_duration", lambda *x: bounds.append(bound(*x)) or 0):
        searched, drafts = drafts_of(*case[:5], machine, window=window)
    assert all(map(np.array_equal, plan.tables, searched.tables))
    assert window is None or not bounds
    (*_, spread), last = drafts[-1]
    if bounds and len(drafts) > 1 and not spread:
        assert bounds[0] <= planner._duration(last, heads, machine)


def _time(tables, heads):
    """About how many steps of 64 tokens the plan takes, a merge and its partials included."""
    times = []
    for begin, end in itertools.pairwise(tables.queues[:, 0].tolist()):
        time = 0
        for row, end_row, first, last, pairs in tables.blocks.tolist():
            if begin <= first < end:
                cheap = last - first if (end_row - row) * heads.group <= 64 else pairs
                time += 128 / 64 + (last - first - cheap / 4) * 16 / 64
        times += [time] * heads.kv
    programs = [0.0] * 132
    for i, time in enumerate(times):
        if i % 132 == 0:  # those that are through first take the next
            programs.sort()
        programs[i % 132] += time
    partials = int(tables.merge_ptr[-1])
    moved = partials * heads.query * 2 * 129 * 4  # float32, written and read
    return max(programs) + 2 * (partials > 0) + 0.8 * moved / (132 * 64 * 512)


def test_a_block_begins_with_a_step_that_is_in_no_pair():
    heads, machine = HEADS._replace(query=1, kv=1), MACHINES[4]
    begin = np.array([0, 8] * 3 + [0])  # of 16 rows; the last step is for a half, but has no other
    block, step = np.zeros(7, np.int64), np.array([1])
    halves = _halves(begin, begin + 8, np.array([16]), block, step, heads, machine)
    order, flags = _spread(*halves, block, step)
    assert order.tolist() == [6, 0, 1, 2, 3, 4, 5] and halves[2] == [3]
    assert flags.tolist() == [16, 24, 24, 24, 24, 8, 8]


def test_queues_of_short_blocks_are_even():
    machine = Machine((Shape(4, 64, 2 * 20, 128, 1, 64),))
    for leaves in (7, 20, 190):
        nodes = nodes_of([0] * leaves, [40] * leaves)
        tables = plan_of(nodes, range(leaves), machine=machine).tables
        steps = np.diff(tables.queues[:, 0]) // 4
        assert len(steps) == min(leaves, 20) and steps.max() - steps.min() <= 1


def test_prefill_reads_no_further_than_its_rows():
    nodes = nodes_of([0, 1], [1024, 4096])
    machine = Machine((Shape(128, 32, 1 << 30, 1 << 20, 1, 32),))
    position = np.arange(1024 + 512, 1024 + 1024)
    plan = plan_of(nodes, [1] * 512, position, machine=machine, ahead=0)
    # Tiles of 32 query tokens, each up to its own last key.
    assert [tokens for _, tokens in reads(plan)] == [1536 + 32 * i for i in range(1, 17)]
    open_end = plan_of(nodes, [1] * 512, position, machine=machine)
    assert max(tokens for _, tokens in reads(open_end)) == 5120
    assert open_end.kv_tokens == plan.kv_tokens


def test_rows_that_see_nothing():
    nodes = nodes_of([0, 1, 0], [10, 20, 30])
    plan = plan_of(nodes, [-1, 1, -1], [0, 29, 7])
    assert reads(plan) == [([1], 30)] and plan.kv_tokens == 30
    for node, position in (([-1, -1], [0, 0]), ([], [])):
        plan = plan_of(nodes, np.array(node, int), np.array(position, int))
        assert len(plan.tables.blocks) == 0 and plan.kv_tokens == 0
        tables = Plan.read(plan.tensor("cpu"))
        assert tables.merge_rows.tolist() == list(range(len(node)))
        assert tables.merge_ptr.tolist() == [0] * (len(node) + 1)
    empty = Nodes(*(np.empty(0, np.int32),) * 4, np.zeros(1, np.int32), np.empty(0, np.int32))
    assert len(plan_of(empty, [-1], [0]).tables.blocks) == 0


@pytest.mark.parametrize("machine", MACHINES)
def test_empty_nodes(machine):
    nodes = nodes_of([0, 1, 2, 1, 0], [0, 40, 0, 30, 0])
    case = Case(nodes, np.arange(5), np.array([0, 39, 39, 29, 0]), HEADS, 16, 1)
    tables = make_plan(*case[:5], machine).tables
    assert (tables.chunks[:, 1] > 0).any()
    assert_covers(tables, case, case.position)
    empty = make_plan(nodes_of([0], [0]), case.node[:1], case.position[:1], HEADS, 16, machine)
    assert empty.kv_tokens == 0


def test_tensor_holds_the_tables():
    plan = plan_of(nodes_of([0, 1, 1], [100, 30, 40]), [1, 2], [110, 120])
    tensor = plan.tensor("cpu")
    assert tensor.dtype == torch.int32 and tensor.shape == (1, 1, *plan.shape)
    for read, made in zip(Plan.read(tensor), plan.tables, strict=True):
        assert np.array_equal(read, made)
    Plan.positions(tensor).add_(3)
    assert Plan.read(tensor).positions.tolist() == [113, 123]
    assert tensor.shape[3] >= max(2, plan.partials)


def test_tensor_of_a_given_capacity():
    plan = plan_of(nodes_of([0, 1, 1], [100, 30, 40]), [1, 2])
    height, width = plan.shape
    for capacity in (plan.shape, (height + 3, width), (height, 2 * width), (3, 9 * width)):
        assert plan.fits(capacity)
        tensor = torch.full((1, 1, *capacity), -1, dtype=torch.int32)
        elements = plan.elements(capacity)
        tensor.view(-1)[: len(elements)] = elements
        assert np.array_equal(Plan.read(tensor).blocks, plan.tables.blocks)
    for capacity in ((height - 1, width), (height, width // 2), (2, width)):
        assert not plan.fits(capacity)
        with pytest.raises(ValueError, match=r"needs W >= .* too small"):
            plan.elements(capacity)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"page_size": 24}, "page_size=24: it must be a power of two from 16"),
        ({"heads": Heads(7, 2, 64, 64, 2)}, "7 query heads don't divide among 2 KV heads"),
        ({"node": np.array([0])}, r"node \(1,\) and position \(2,\) must both be \[R\]"),
        ({"node": np.array([0, 3])}, "node runs from 0 to 3; there are nodes 0 to 2"),
        ({"node": np.array([-2, 1])}, "node runs from -2 to 1"),
        ({"window": 0}, "a window has 1 token or more"),
        ({"ahead": -1}, "ahead=-1, window=None: positions are advanced by 0 or more"),
    ],
)
def test_refuses_contradictions(change, message):
    arguments = dict(
        nodes=nodes_of([0, 1, 1], [100, 30, 40]),
        node=np.array([1, 2]),
        position=np.array([129, 139]),
        heads=HEADS,
        page_size=16,
        machine=Machine.cpu(),
    )
    make_plan(**arguments)
    with pytest.raises(ValueError, match=message):
        make_plan(**{**arguments, **change})


def test_a_plan_for_another_machine_is_not_sent_to_a_gpu(monkeypatch):
    nodes = nodes_of([0], [40], 16)
    heads = Heads(4, 2, 16, 16, 4)
    plan = make_plan(nodes, np.array([0]), np.array([39]), heads, 16, Machine.cpu())
    monkeypatch.setattr(Machine, "of", staticmethod(lambda *_: Machine.gpu(132, heads, 9)))
    with pytest.raises(ValueError, match="Machine.of"):
        plan.tensor("cuda")
    assert plan.tensor("cpu").device.type == "cpu"
