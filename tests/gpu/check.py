"""The Triton kernels against the float64 reference, feature by feature.

On a GPU:          python tests/gpu/check.py
Without one:       TRITON_INTERPRET=1 python tests/gpu/check.py --small
                   as on GPUs of capabilities 8.0 and 9.0, one after the other
Under a sanitizer: compute-sanitizer --tool memcheck --report-api-errors no
                   python tests/gpu/check.py --small --repeat 1
                   or initcheck. racecheck knows no mbarriers: of Hopper's kernel it reports what
                   these order, and zeros that both groups write to one tile.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gluon  # noqa: E402
from trees import Case, nodes_of, pools  # noqa: E402

from pat_hf.cache.memory import Memory  # noqa: E402
from pat_hf.kernels import forward, hopper, launch, naive, ops  # noqa: E402
from pat_hf.kernels.constants import CLAIMS  # noqa: E402
from pat_hf.kernels.plan import Heads, Machine, Plan, make_plan  # noqa: E402
from pat_hf.kernels.store import store  # noqa: E402


class Check(NamedTuple):
    """One feature combination; the tree is drawn from the seed.

    Attributes:
        advance: by how much rows have moved on since the plan was made.
        processors: that the plan is cut for; the fewer, the more blocks a queue has.
        cancels: two rows, and values of shared and own tokens that add up to little; only partials
            of more precision than theirs do, too.
        far: whether the pages lie all over 2^32 elements, with NaN in between.
    """

    seed: int
    dtype: torch.dtype = torch.float16
    heads: tuple[int, int] = (8, 2)
    dims: tuple[int, int] = (64, 64)
    page_size: int = 32
    length: int = 1
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    nodes: int = 12
    longest: int = 150
    rows: int = 9
    advance: int = 0
    processors: int = 132
    cancels: bool = False
    far: bool = False


SMALL = [
    Check(0, nodes=6, rows=5, advance=7),
    Check(1, heads=(6, 2), dims=(80, 48), page_size=16, length=2, window=40, nodes=5, rows=3),
    Check(2, torch.float16, heads=(5, 1), softcap=2.0, sinks=True, nodes=5, rows=4),
    Check(3, torch.float32, heads=(2, 2), dims=(16, 24), page_size=64, length=3, nodes=5, rows=3),
    Check(4, heads=(16, 1), nodes=4, rows=12, sinks=True, longest=60),
    Check(5, torch.float32, (16, 1), (16, 16), window=30, nodes=3, rows=6, longest=200),
    Check(6, heads=(16, 1), window=30, softcap=2.0, nodes=4, rows=24, processors=1, advance=3),
    Check(7, heads=(8, 1), sinks=True, nodes=3, rows=3, longest=900),
    Check(8, heads=(160, 1), dims=(16, 16), nodes=3, rows=3, longest=50),
    Check(9, heads=(4, 1), cancels=True),
    Check(300, torch.float16, (12, 2), (128, 80), 16, 2, softcap=3.0, sinks=True, advance=2),
    Check(301, heads=(24, 2), dims=(96, 128), nodes=9, rows=20),
    # Queues of long and short blocks, of few rows and many, one after the other.
    Check(316, heads=(8, 2), nodes=9, longest=250, rows=20, processors=1),
    Check(319, heads=(16, 2), nodes=9, longest=300, rows=30, processors=2, sinks=True),
    # Wide blocks with steps for a half of their rows.
    Check(328, heads=(32, 2), nodes=20, longest=150, rows=24, processors=2),
    # The same, pairs of them among steps for all rows.
    Check(438, heads=(32, 2), nodes=9, rows=8, longest=300, processors=1),
    # A block that is all pairs.
    Check(1642, heads=(16, 1), nodes=9, rows=9, longest=300, processors=8),
    # Dims that Hopper's kernel can't copy, and ones below a product's least.
    Check(330, heads=(8, 2), dims=(120, 120), nodes=4, rows=3),
    Check(331, heads=(8, 2), dims=(8, 4), nodes=4, rows=3),
    # On two multiprocessors, the merge's programs have four heads each; of 34 partials a row.
    Check(406, heads=(6, 2), dims=(16, 16), sinks=True, nodes=3, rows=2, longest=9000),
    # One block of one group alone, of two steps, in a page; the plan ends just behind its rows.
    Check(342, heads=(1, 1), page_size=128, nodes=1, rows=2, longest=128),
    # Wide blocks whose second half begins within a query token's heads, and goes on behind them.
    Check(334, heads=(12, 1), nodes=3, rows=12, longest=200, processors=1),
    # Programs claim the last queues.
    Check(700, heads=(16, 1), nodes=60, rows=60, longest=100, processors=1),
    # Nothing to merge: a merge that is launched for nothing, and none.
    Check(407, nodes=3, rows=1),
    Check(408, nodes=3, rows=1),
]
LARGE = [
    *(Check(10 + d, dims=(d, d)) for d in (64, 80, 96, 128, 192, 256)),
    *(Check(20 + g, heads=(2 * g, 2), dims=(128, 128), rows=40) for g in range(1, 17)),
    *(
        Check(50 + i, dtype, (12, 4), dims, page, length, window, softcap, sinks, 40, 400, 60)
        for i, (dtype, dims, (page, length), (window, softcap, sinks)) in enumerate(
            itertools.islice(
                itertools.product(
                    (torch.float16, torch.bfloat16, torch.float32),
                    ((128, 128), (192, 128), (80, 96)),
                    ((16, 1), (32, 4), (128, 1)),
                    ((None, None, False), (100, None, True), (None, 3.0, True)),
                ),
                0,
                None,
                4,
            )
        )
    ),
    Check(100, torch.bfloat16, cancels=True),
    Check(200, heads=(32, 4), dims=(128, 128), nodes=5, longest=3000, rows=900, advance=20),
    Check(201, heads=(64, 8), dims=(128, 128), nodes=300, longest=90, rows=300, length=3),
    Check(202, torch.bfloat16, (8, 2), (96, 80), 16, window=200, softcap=3.0, rows=600, advance=9),
    Check(203, heads=(16, 2), dims=(128, 128), page_size=128, sinks=True, longest=900, rows=700),
    # Programs have several queues, of blocks of all shapes.
    Check(204, heads=(1600, 200), dims=(64, 64), nodes=20, rows=40, advance=2),
    Check(205, torch.bfloat16, (400, 200), (128, 80), length=3, nodes=20, rows=70),
    # They claim queues of some whole blocks.
    Check(206, heads=(16, 16), dims=(128, 128), nodes=2000, longest=60, rows=2000),
    # Addresses beyond 32 bits, contexts of a million tokens, and batches of thousands.
    Check(208, dims=(128, 128), rows=40, far=True),
    Check(209, torch.float32, dims=(128, 128), rows=40, far=True),
    Check(360, heads=(1, 1), nodes=2, longest=1 << 20, rows=4, far=True),
    Check(217, torch.float32, (1, 1), nodes=2, longest=1 << 20, rows=4),
    Check(216, heads=(16, 2), dims=(128, 128), nodes=3000, longest=60, rows=4096),
]


def draw(check: Check) -> Case:
    """A random tree of depth up to 8 with ragged nodes, rows anywhere, one of several unseeing.

    The positions are those of the plan.
    """
    heads = Heads(*check.heads, *check.dims, torch.finfo(check.dtype).bits // 8)
    if check.cancels:
        nodes = nodes_of([0, 1, 1], [200] * 3, check.page_size)
        return Case(nodes, np.array([1, 2]), np.array([399, 399]), heads, check.page_size, 1)
    generator = np.random.default_rng(check.seed)
    depths, lengths = [0], []
    for _ in range(check.nodes - 1):
        depths.append(int(generator.integers(0, min(depths[-1] + 1, 7) + 1)))
    lengths = generator.integers(1, generator.choice([20, check.longest], check.nodes) + 1)
    nodes = nodes_of(depths, lengths.tolist(), check.page_size)
    node = generator.choice(np.flatnonzero(nodes.length > check.advance), check.rows)
    if check.rows > 1:
        node[-1] = -1
    node = np.repeat(node, check.length)
    ahead = np.where(node < 0, 1, nodes.length[node] - check.advance)
    inside = generator.integers(0, 1 << 20, len(node)) % ahead
    position = np.where(node < 0, 0, nodes.start[node] + inside)
    return Case(nodes, node, position, heads, check.page_size, check.length)


def run(check: Check, device: torch.device, repeat: int, major: int) -> tuple[float, float]:
    """The kernels' error and its bound: twice that of PyTorch in the same dtype, plus 1e-5."""
    case = draw(check)
    machine = Machine.gpu(check.processors, case.heads, major)
    window = check.window if check.seed % 2 else None
    made = make_plan(*case[:5], machine, window=window)
    plan = made.tensor(device)
    Plan.positions(plan).add_(check.advance)
    case = case._replace(position=case.position + check.advance)
    q, k, v = pools(case, check.dtype, seed=check.seed)
    if check.cancels:
        shared = torch.from_numpy(case.nodes.pages[: case.nodes.page_ptr[1]])
        k, v = k * 0.3, v - 1
        v[shared.long()] += 2
    if check.seed % 2:  # as Transformers has it
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    aside = check.seed % 8 == 5  # no row begins at a multiple of 16 bytes
    if check.seed % 4 == 2:  # pages of tokens of heads
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    sinks = torch.randn(check.heads[0]) if check.sinks else None
    if check.sinks:
        sinks[-1] = -torch.inf  # which is none
    options = {"scale": check.dims[0] ** -0.5, "window": check.window, "softcap": check.softcap}
    merge = made.merges or check.seed % 2 == 1
    k_pool, v_pool = (_apart(x.to(device)) if check.far else x.to(device) for x in (k, v))
    # With a stride, as views have it.
    moved = None if sinks is None else sinks.to(device).repeat_interleave(2)[::2]
    _poison(device)
    q_given = q.to(device)
    if aside:
        q_given = torch.cat([q_given[..., :1], q_given], 3)[..., 1:]
    outs = [
        forward.forward(q_given, k_pool, v_pool, plan, sinks=moved, merge=merge, **options).cpu()
        for _ in range(repeat)
    ]
    claimed = plan.flatten()[CLAIMS.value].item()
    if claimed or not all(torch.equal(outs[0], out) for out in outs[1:]):
        return float("inf"), 0.0
    tree = (case.nodes, case.node, case.position)
    exact = naive.attention(q, k, v, *tree, sinks=sinks, **options)
    rounding = (exact.to(check.dtype).double() - exact).abs().max().item()
    error = (outs[0].double() - exact).abs().max().item()
    least = max(rounding, _spread(case, q, k, v, sinks, options, check.dtype))
    return error, 2 * least + 1e-5


@contextmanager
def imitated(major: int) -> Iterator[None]:
    """A GPU of compute capability `major`, of two multiprocessors, on the CPU."""
    kernel = mock.patch.object(hopper, "hopper_kernel", gluon.Kernel())
    with kernel, mock.patch.object(forward, "processors_of", lambda device: (2, major)):
        yield


def stored_exactly(heads: int, dims: tuple[int, int], length: int, device: torch.device) -> bool:
    """Whether new K and V, in two layouts, come to lie where they belong, and nowhere else."""
    generator = torch.Generator().manual_seed(heads)
    size, batch = 16, 3
    place = torch.randperm(7 * size, generator=generator)[: batch * length]
    pages, slots = (x.to(device) for x in (place // size, place % size))
    pools = [torch.full((7, heads, size, dim), torch.nan, device=device) for dim in dims]
    given = [torch.randn(batch, heads, length, dim, generator=generator) for dim in dims]
    expected = [pool.clone() for pool in pools]
    for pool, x in zip(expected, given, strict=True):
        pool[pages, :, slots] = x.transpose(1, 2).flatten(0, 1).to(device)
    k, v = given[0].to(device), given[1].transpose(1, 2).contiguous().to(device).transpose(1, 2)
    launch.run([store(*pools, k, v, pages, slots)])
    return all(
        torch.equal(pool.nan_to_num(9.0), exact.nan_to_num(9.0))
        for pool, exact in zip(pools, expected, strict=True)
    )


def compiled_ahead(device: torch.device) -> bool:
    """Whether calls compile nothing on pages like those that `ops.compile_ahead` was given."""
    case = draw(Check(0))
    q, *pools_ = pools(case, torch.float16)
    pages = Memory().resize(0, len(pools_[0]), [x.shape[1:] for x in pools_], q.dtype, device)
    for page, pool in zip(pages, pools_, strict=True):
        page.copy_(pool)
    ops.compile_ahead(*Memory.sample([x.shape[1:] for x in pools_], q.dtype, device), q.shape[1])
    launch.wait()
    plan = make_plan(*case[:5], Machine.of(device, case.heads)).tensor(device)
    where = torch.zeros(len(q), dtype=torch.int64, device=device)
    k, v = (torch.zeros(len(q), *x.shape[1:2], 1, x.shape[3]).to(x) for x in pages)
    compiled = []
    hook = lambda **given: compiled.append(given["fn"].name)  # noqa: E731
    with mock.patch.object(triton.knobs.runtime, "jit_post_compile_hook", hook):
        ops.store(*pages, k, v, where, where)
        ops.attention(q.to(device), *pages, plan, scale=1.0)
    return not compiled


def _spread(case, q, k, v, sinks, options, dtype) -> float:
    """The largest error of a plain computation in `dtype` with float32 sums, as PyTorch's."""
    worst, group = 0.0, case.heads.group
    for row in range(0, len(case.node), max(len(case.node) // 24, 1)):
        node, b, t = int(case.node[row]), *divmod(row, case.length)
        keys, values, where = naive._path(k, v, case.nodes, node)
        seen = where <= int(case.position[row])
        if options["window"] is not None:
            seen &= where > int(case.position[row]) - options["window"]
        if not seen.any():
            continue
        keys, values = (
            keys[seen].repeat_interleave(group, 1),
            values[seen].repeat_interleave(group, 1),
        )
        results = []
        for kind in (dtype, torch.float64):
            x = torch.einsum("hd,nhd->hn", q[b, :, t].to(kind), keys.to(kind)) * options["scale"]
            if options["softcap"] is not None:
                x = options["softcap"] * torch.tanh(x / options["softcap"])
            if sinks is not None:
                x = torch.cat([x, sinks.to(kind)[:, None]], 1)
            p = x.softmax(1)[:, : len(keys)]
            results.append(torch.einsum("hn,nhd->hd", p, values.to(kind)).double())
        worst = max(worst, (results[0] - results[1]).abs().max().item())
    return worst


def _apart(pages: torch.Tensor) -> torch.Tensor:
    """The same pages, evenly over 2^32 elements, NaN between them."""
    size = pages[0].numel()
    step = (1 << 32) // len(pages) // size * size
    whole = torch.full((len(pages), step), torch.nan, dtype=pages.dtype, device=pages.device)
    apart = whole[:, :size].unflatten(1, pages.shape[1:])
    return apart.copy_(pages)


def _poison(device: torch.device) -> None:
    """Fills the memory that the next allocations get with NaN."""
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
    else:
        held = [torch.full((1 << n,), torch.nan, device=device) for n in range(8, 24)]
        del held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th check, from the i-th")
    arguments = parser.parse_args()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device = torch.device("cpu") if interpreted else torch.device("cuda", 0)
    shard, shards = map(int, arguments.shard.split("/"))
    failed, checks = 0, (SMALL if arguments.small else SMALL + LARGE)[shard::shards]
    majors = (8, 9) if interpreted else (torch.cuda.get_device_capability()[0],)
    checks = list(itertools.product(checks, majors))
    for check, major in checks:
        with imitated(major) if interpreted else nullcontext():
            error, bound = run(check, device, 1 if interpreted else arguments.repeat, major)
        failed += not error <= bound
        state = "passed" if error <= bound else "FAILED"
        print(f"{state}: error {error:.1e}, bound {bound:.1e}: sm {major}0, {check}", flush=True)
    for sizes in ((1, (16, 16), 1), (3, (80, 48), 5), (8, (128, 128), 1)):
        if not stored_exactly(*sizes, device):
            failed += 1
            print(f"FAILED: store of heads, dims, tokens {sizes}")
    if not (interpreted or shard or compiled_ahead(device)):
        failed += 1
        print("FAILED: calls compile what `compile_ahead` had not")
    print(f"{len(checks) - failed} of {len(checks)} checks passed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
