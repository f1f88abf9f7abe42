"""Attention on the CPU against the float64 reference, with NaN in all that must not be read."""

import doctest
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code

from pat_hf.kernels import cpu, naive, ops
from pat_hf.kernels.plan import Heads, Machine, Plan, Shape, make_plan

from .trees import Case, cases, nodes_of, path_tokens, pools, room

MACHINES = [
    Machine.cpu(),
    Machine.gpu(132, Heads(8, 2, 128, 128, 2), 9),
    Machine.gpu(132, Heads(8, 2, 128, 128, 2), 8),
    Machine((Shape(1, 64, 1 << 30, 64, 1, 16), Shape(16, 32, 1 << 30, 64, 2, 16))),
    Machine((Shape(16, 0, 8, 16, 1, 16), Shape(64, 16, 8, 16, 1, 0))),
]
# Three levels, 40 requests of three query tokens, the leaves ragged.
LEAVES = [5 + 13 * i % 90 for i in range(40)]
DEPTHS = [0] + [d for i in range(40) for d in ([1, 2] if i % 10 == 0 else [2])]
LENGTHS = [300] + [n for i, own in enumerate(LEAVES) for n in ([70, own] if i % 10 == 0 else [own])]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New memory is filled with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1 << 13, cpu._ELEMENTS], ids=["many-jobs", "few-jobs"])
def elements(request, monkeypatch):
    monkeypatch.setattr(cpu, "_ELEMENTS", request.param)
    cpu._work.cache_clear()


def batch(key_dim=64, value_dim=64, group=3, kv=2):
    nodes = nodes_of(DEPTHS, LENGTHS, 32)
    leaves = np.flatnonzero(nodes.end == np.arange(len(nodes.end)) + 1)
    node = np.repeat(leaves, 3)
    position = (nodes.start + nodes.length)[node] - np.tile([3, 2, 1], len(leaves))
    return Case(nodes, node, position, Heads(group * kv, kv, key_dim, value_dim, 4), 32, 3)


def attend(case, tensors, machine=MACHINES[0], **options):
    plan = make_plan(*case[:5], machine).tensor("cpu")
    return ops.attention(*tensors, plan, **options)


def expect(case, tensors, **options):
    return naive.attention(*tensors, case.nodes, case.node, case.position, **options)


def dense(case, tensors, scale):
    """torch's own attention, in q's dtype, over K and V laid out for every row."""
    q, k_pages, v_pages = tensors
    rows = range(len(case.node))
    paths = [torch.from_numpy(path_tokens(case, row, case.position[row])) for row in rows]
    token = torch.nn.utils.rnn.pad_sequence(paths, batch_first=True, padding_value=-1)
    seen, page, slot = token >= 0, token // case.page_size, token % case.page_size
    group = case.heads.group
    keys, values = (
        torch.where(seen[..., None, None], pool[page, :, slot], 0)
        .transpose(1, 2)
        .repeat_interleave(group, 1)
        for pool in (k_pages, v_pages)
    )
    query = q.transpose(1, 2).reshape(-1, case.heads.query, 1, case.heads.key_dim)
    out = F.scaled_dot_product_attention(query, keys, values, seen[:, None, None], scale=scale)
    return out.view(-1, case.length, case.heads.query, case.heads.value_dim)


@st.composite
def options(draw, query_heads):
    sinks = torch.linspace(-2, 2, query_heads, dtype=torch.float64)
    return {
        "scale": draw(st.sampled_from([0.1, 0.35, 1.0])),
        "window": draw(st.sampled_from([None, None, 1, 7, 64])),
        "softcap": draw(st.sampled_from([None, None, 3.0])),
        "sinks": draw(st.sampled_from([None, sinks])),
    }


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_equals_the_reference(data):
    case = data.draw(cases())
    given = data.draw(options(case.heads.query))
    machine = data.draw(st.sampled_from(MACHINES))
    tensors = pools(case, torch.float64)
    out = attend(case, tensors, machine, **given)
    torch.testing.assert_close(out, expect(case, tensors, **given), rtol=1e-9, atol=1e-10)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_positions_advance_in_place(data):
    case = data.draw(cases(max_nodes=8, early=True))
    given = data.draw(options(case.heads.query))
    steps = data.draw(st.integers(0, room(case)))
    plan = make_plan(*case[:5], MACHINES[0]).tensor("cpu")
    Plan.positions(plan).add_(steps)
    later = case._replace(position=case.position + steps)
    tensors = pools(later, torch.float64)
    out = ops.attention(*tensors, plan, **given)
    torch.testing.assert_close(out, expect(later, tensors, **given), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(64, 64), (96, 40)])
def test_error_is_at_most_twice_that_of_torch(elements, dtype, dims):
    case = batch(*dims)
    tensors = pools(case, dtype)
    exact = expect(case, tensors, scale=0.2)
    out = attend(case, tensors, scale=0.2)
    assert out.dtype == dtype and out.is_contiguous() and out.shape == exact.shape
    error = (out.double() - exact).abs().max()
    allowed = (dense(case, tensors, 0.2).double() - exact).abs().max()
    assert error <= 2 * allowed + 1e-5


@pytest.mark.parametrize("group", range(1, 9))
def test_every_group_size(elements, group):
    case = batch(16, 16, group)
    tensors = pools(case, torch.float64)
    given = {"scale": 0.3, "window": 100, "sinks": torch.ones(2 * group, dtype=torch.float64)}
    out = attend(case, tensors, **given)
    torch.testing.assert_close(out, expect(case, tensors, **given), rtol=1e-9, atol=1e-10)


def test_tree_prefill(elements):
    # The tokens of all nodes are the rows of one sequence.
    nodes = nodes_of([0, 1, 2, 2, 1], [50, 33, 70, 1, 200], 16)
    node = np.repeat(np.arange(5), nodes.length)
    position = np.concatenate([s + np.arange(n) for s, n in zip(nodes.start, nodes.length)])  # noqa: B905
    case = Case(nodes, node, position, Heads(6, 2, 32, 32, 4), 16, len(node))
    tensors = pools(case, torch.float64)
    exact = expect(case, tensors, scale=0.2)
    torch.testing.assert_close(attend(case, tensors, scale=0.2), exact, rtol=1e-9, atol=1e-10)
    # In chunks, which end inside nodes; what is behind them is not stored yet.
    for begin in range(0, len(node), 100):
        part = slice(begin, begin + 100)
        chunk = case._replace(node=node[part], position=position[part], length=len(node[part]))
        q, k_pages, v_pages = tensors[0][:, :, part], *pools(chunk, torch.float64)[1:]
        for ahead in (0, None):
            plan = make_plan(*chunk[:5], MACHINES[0], ahead).tensor("cpu")
            out = ops.attention(q, k_pages, v_pages, plan, scale=0.2)
            again = expect(chunk, (q, k_pages, v_pages), scale=0.2)
            torch.testing.assert_close(out, again, rtol=1e-9, atol=1e-10)


def test_rows_that_see_nothing_are_zeros():
    nodes = nodes_of([0, 1], [40, 20])
    case = Case(nodes, np.array([-1, 1, -1]), np.array([3, 50, 9]), Heads(4, 2, 8, 8, 4), 16, 1)
    for option in ({}, {"window": 4}, {"sinks": torch.zeros(4)}, {"softcap": 2.0}):
        out = attend(case, pools(case), scale=1.0, **option)
        assert out[[0, 2]].eq(0).all() and out[1].ne(0).all()


def test_a_sink_of_minus_infinity_is_none():
    nodes = nodes_of([0, 1], [20, 5])
    case = Case(nodes, np.array([1, -1]), np.array([24, 0]), Heads(4, 2, 8, 8, 4), 16, 1)
    q, k_pages, v_pages = pools(case)
    plan = make_plan(*case[:5], MACHINES[0]).tensor("cpu")
    sinks = torch.full((4,), -torch.inf)
    out = ops.attention(q, k_pages, v_pages, plan, scale=0.4, sinks=sinks)
    torch.testing.assert_close(out, ops.attention(q, k_pages, v_pages, plan, scale=0.4))
    assert not out[1].any()


def test_layers_of_other_heads_share_a_plan():
    case = batch(16, 16, group=2, kv=2)
    plan = make_plan(*case[:5], MACHINES[0]).tensor("cpu")
    for heads, window in ((Heads(4, 2, 16, 16, 4), None), (Heads(6, 1, 8, 24, 4), 50)):
        layer = case._replace(heads=heads)
        tensors = pools(layer, torch.float64)
        out = ops.attention(*tensors, plan, scale=0.3, window=window)
        exact = expect(layer, tensors, scale=0.3, window=window)
        torch.testing.assert_close(out, exact, rtol=1e-9, atol=1e-10)


def test_a_plan_may_be_overwritten_by_another():
    case = batch(16, 16)
    later = case._replace(node=case.node[::-1].copy(), position=case.position[::-1].copy())
    plans = [make_plan(*each[:5], MACHINES[0]) for each in (case, later)]
    capacity = tuple(np.maximum(*(plan.shape for plan in plans)).tolist())
    buffer = torch.full((1, 1, *capacity), 1 << 30, dtype=torch.int32)
    tensors = pools(case, torch.float64)
    for plan in plans:
        elements = plan.elements(capacity)
        buffer.view(-1)[: len(elements)] = elements
        ops.attention(*tensors, buffer, scale=0.3)
    exact = expect(later, tensors, scale=0.3)
    out = ops.attention(*tensors, buffer, scale=0.3)
    torch.testing.assert_close(out, exact, rtol=1e-9, atol=1e-10)


def test_strided_inputs():
    case = batch(16, 16)
    q, k_pages, v_pages = pools(case, torch.float64)
    exact = expect(case, (q, k_pages, v_pages), scale=0.3)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k_pages, v_pages = torch.stack([k_pages, v_pages], 1).unbind(1)
    out = attend(case, (q, k_pages, v_pages), scale=0.3)
    torch.testing.assert_close(out, exact, rtol=1e-9, atol=1e-10)


def test_opcheck():
    case = batch(16, 16)
    plan = make_plan(*case[:5], MACHINES[0]).tensor("cpu")
    for sinks in (None, torch.ones(6)):
        torch.library.opcheck(
            torch.ops.pat_hf.attention.default, (*pools(case), plan, sinks, 0.3, 20, None, True)
        )


def test_compiles_to_one_node_and_runs_in_inference_mode():
    case = batch(16, 16)
    tensors = pools(case)
    plan = make_plan(*case[:5], MACHINES[0]).tensor("cpu")
    expected = ops.attention(*tensors, plan, scale=0.3)
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert torch.equal(ops.attention(*tensors, plan, scale=0.3), expected)
    assert torch.equal(compiled(*tensors, plan, scale=0.3), expected)


@pytest.mark.skipif(not shutil.which("g++"), reason="PyTorch compiles with g++")
def test_compiled_it_is_stored_where_it_is_read():
    torch.use_deterministic_algorithms(False)  # would have PyTorch compile less
    case = batch(16, 16)
    q, *pages = (x.nan_to_num() for x in pools(case))
    held = [torch.stack([x, x], 1)[:, 0] for x in pages]  # as of a pool: with others in between
    k, v = (torch.randn(3, *x.shape[1:2], 1, x.shape[3]) for x in pages)
    plan = make_plan(*case[:5], MACHINES[0]).tensor("cpu")
    targets = torch.tensor([1, 2, 4]), torch.tensor([0, 3, 15])

    def step(k_pages, v_pages):
        ops.store(k_pages, v_pages, k * 2, v * 2, *targets)
        return ops.attention(q, k_pages, v_pages, plan, scale=0.3)

    torch._dynamo.reset()
    expected = step(*pages)
    with torch._inductor.config.patch(force_disable_caches=True):  # they don't know the op's tags
        out, (code,) = run_and_get_code(torch.compile(step, fullgraph=True), *held)
    torch.testing.assert_close(out, expected)
    assert all(map(torch.equal, held, pages))
    assert f"empty_strided_cpu(({len(held[0])}," not in code  # no copy of the pages
    assert "pat_hf.store" not in code


def test_a_plan_with_nothing_to_merge_needs_no_merge():
    case = Case(
        nodes_of([0], [200]), np.zeros(1, int), np.full(1, 199), Heads(4, 2, 8, 8, 4), 16, 1
    )
    q, *pages = pools(case)
    whole, cut = (make_plan(*case[:5], Machine((Shape(16, 0, 8, n, 1, 16),))) for n in (999, 16))
    assert cut.merges and not whole.merges
    out = ops.attention(q, *pages, whole.tensor("cpu"), scale=0.3, merge=whole.merges)
    torch.testing.assert_close(out, ops.attention(q, *pages, cut.tensor("cpu"), scale=0.3))
    with pytest.raises(ValueError, match="has rows to merge, and merge=False"):
        ops.attention(q, *pages, cut.tensor("cpu"), scale=0.3, merge=False)
    unseeing = make_plan(*case._replace(node=np.full(1, -1))[:5], Machine.cpu())
    assert unseeing.merges and not unseeing.partials


def test_backend_of_the_cpu_is_torch():
    assert ops.backend("cpu") == ops.backend(torch.device("cpu")) == "torch"


def test_the_example_runs():
    assert doctest.testmod(ops).attempted > 0
    assert doctest.testmod(ops).failed == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"q": torch.zeros(2, 4, 8)},
            r"q \[2, 4, 8\], .*expected q \[B, query heads, T, key dim\]",
        ),
        ({"v_pages": torch.zeros(5, 2, 32, 8)}, "K and V must have the same pages, KV heads and"),
        ({"q": torch.zeros(2, 4, 1, 16)}, "q has key dim 16 and the pool 8"),
        ({"q": torch.zeros(2, 5, 1, 8)}, "5 query heads don't divide among 2 KV heads"),
        ({"q": torch.zeros(2, 4, 1, 8).half()}, "q is torch.float16, k_pages torch.float32"),
        ({"plan_tensor": torch.zeros(1, 1, 3, 64)}, r"plan is torch.float32 \[1, 1, 3, 64\]"),
        ({"q": torch.zeros(9, 4, 9, 8)}, "9 x 9 query rows and the plan, .* at most 64"),
        ({"q": torch.zeros(3, 4, 1, 8)}, "made for 2 query rows .* q has 3 x 1 rows"),
        (
            {"k_pages": torch.zeros(5, 2, 32, 8), "v_pages": torch.zeros(5, 2, 32, 8)},
            "pages of 16 tokens; .* the pool pages of 32",
        ),
        ({"scale": -1.0}, r"scale=-1.0: it must be positive"),
        ({"scale": float("nan")}, r"scale=nan: it must be positive"),
        ({"softcap": 0.0}, r"softcap=0.0, window=None: each must be positive"),
        ({"window": 0}, r"softcap=None, window=0: each must be positive"),
        ({"sinks": torch.zeros(2)}, r"sinks \[2\]: one for each of 4 query heads"),
        ({"q": torch.zeros(2, 4, 1, 8, device="meta")}, "on cpu, meta; move them to one"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    nodes = nodes_of([0, 1, 1], [20, 5, 7])
    case = Case(nodes, np.array([1, 2]), np.array([24, 26]), Heads(4, 2, 8, 8, 4), 16, 1)
    q, k_pages, v_pages = pools(case)
    plan = make_plan(*case[:5], MACHINES[0]).tensor("cpu")
    given = {"q": q, "k_pages": k_pages, "v_pages": v_pages, "plan_tensor": plan, "scale": 1.0}
    ops.attention(**given)
    with pytest.raises(ValueError, match=message):
        ops.attention(**{**given, **change})
