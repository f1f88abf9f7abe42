"""Times attention over prefix trees: CUDA-graph replays with a cold L2, medians.

    python benchmarks/kernels.py --out kernels.json            # the 80 cases of the PAT paper
    python benchmarks/kernels.py --tree 1,10_4096,416 --heads 32/8
    python benchmarks/kernels.py --irregular 8 --sdpa          # random trees; torch's SDPA beside
    python benchmarks/kernels.py --without packing merge       # what single ideas are worth

A tree "1,10_4096,416" has 1 node of 4,096 tokens and below it 10 of 416; one query per leaf, in
shuffled order. Pages are numbered along the tree, as a new cache does, or at random. Where a plan
leaves nothing to merge, no merge is launched. A row of the result: tree, heads, us (median),
roofline_us, error (the largest over some rows, against float64), bound (twice that of PyTorch's
SDPA plus 1e-5), kv_mb (distinct K and V), tb_s (kv_mb over us), tflop_s (products over us, of what
requests see), share (of the roofline, net of `one_kernel_us`, what a graph of one tiny kernel
takes, at most FLOOR_US), eager_us (mean of eager calls in a row, so with a warm L2), plan_ms
(median, on the host), sdpa_us, best_us (the fastest peer's time, from peers-h200.json), without_us
(times with one idea left out).
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

# Transformers imports a package `kernels`, which must not be this file.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).parent]

import numpy as np
import torch
import triton

from pat_hf.cache.prefix_tree import PrefixTree
from pat_hf.kernels import hopper, plan
from pat_hf.kernels.ops import attention
from pat_hf.kernels.plan import Heads, Machine, Nodes, make_plan

HERE = Path(__file__).parent
DIM = 128
BANDWIDTH, FLOPS = 4.3e12, 790e12
FLOOR_US = 4.6  # of the peers' measurements; a higher one here would raise our shares alone
IDEAS = ("packing", "tiles", "search", "order", "claims", "splitting", "merge", "cuts", "pieces")
TREES = (
    "1,10_4096,416",
    "1,256_256,32",
    "1,1024_2048,32",
    "1,2,64_1024,256,256",
    "1,4,256_32,256,32",
    "1,8,512_32,512,256",
    "1,8,512_32,2048,256",
    "1,8,512_512,512,256",
    "1,4,8,256_32,256,256,32",
    "1,4,16,512_1024,256,128,32",
    "1,4,16,64,256,1024_256,32,256,64,32,256",
    "1,16,32,64,128,1024_256,128,64,32,32,32",
    "1,16,32,64,256,1024_256,128,64,32,32,32",
    "1,8,16,32,64,128,1024_256,128,64,32,32,32,32",
    "1,8,16,32,64,256,1024_256,128,64,32,32,32,32",
    "2,8,16,256_256,256,32,32",
    "4,16,256,512_512,32,128,32",
    "8,16,32,256_512,512,256,32",
    "256_1024",
    "256_4096",
)
HEADS = ("32/32", "16/8", "32/8", "64/8")


def regular(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Parents and lengths, in preorder, of a tree "nodes per level_tokens per node"."""
    counts, tokens = ([int(x) for x in part.split(",")] for part in text.split("_"))
    parent, length = [], []

    def grow(level: int, index: int, above: int) -> None:
        me = len(parent)
        parent.append(above)
        length.append(tokens[level])
        if level + 1 < len(counts):
            below, here = counts[level + 1], counts[level]
            for child in range(-(-index * below // here), -(-(index + 1) * below // here)):
                grow(level + 1, child, me)

    for root in range(counts[0]):
        grow(0, root, -1)
    return np.array(parent), np.array(length)


def irregular(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A tree of depth 1 to 8, 1 to 3,000 tokens a node, most of them few; 7 to 700 leaves."""
    generator = np.random.default_rng(seed)
    leaves, deepest = int(np.exp(generator.uniform(np.log(7), np.log(700)))), 8
    parent, length = [], []

    def grow(share: int, depth: int, above: int) -> None:
        me = len(parent)
        parent.append(above)
        length.append(int(min(3000, 1 + generator.pareto(1.0) * 40)))
        while share > 1 or (share and depth + 1 < deepest and generator.random() < 0.1):
            some = share if depth + 2 >= deepest else int(generator.integers(1, share + 1))
            if depth + 2 >= deepest:
                for _ in range(some):
                    grow(1, deepest - 1, me)
            else:
                grow(some, depth + 1, me)
            share -= some

    grow(leaves, 0, -1)
    return np.array(parent), np.array(length)


def ragpulse(folder: Path, batch: int, count: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Trees of batches of the RAGPulse trace (arXiv 2511.12979), in the order of arrival.

    Args:
        folder: with `0_trace.jsonl` and the tables of lengths, `1_*.jsonl` to `5_*.jsonl`.
        batch, count: requests in a batch, and batches, evenly over the trace.
    """
    lengths: dict[int, int] = {}
    for file in sorted(folder.glob("[1-5]_*.jsonl")):
        for line in filter(str.strip, file.read_text().splitlines()):
            number, tokens = json.loads(line).values()
            lengths[number] = tokens
    parts = ("sys_prompt", "passages_ids", "history", "web_search", "user_input")
    trace = [json.loads(x)["hash_ids"] for x in (folder / "0_trace.jsonl").read_text().splitlines()]
    trees = {}
    for i, first in enumerate(np.linspace(0, len(trace) - batch, count).astype(int)):
        tree = PrefixTree()
        for record in trace[first : first + batch]:
            ids = [number for part in parts for number in record[part]]
            text = [(number << 12) + np.arange(lengths[number]) for number in ids]
            tree.insert(np.concatenate(text))
        order = tree.preorder()
        length = np.array([node.length for node in order.nodes])
        trees[f"ragpulse{batch}-{i}"] = (order.parent, length)
    return trees


def nodes_of(parent: np.ndarray, length: np.ndarray, page_size: int, strewn: bool) -> Nodes:
    """The tree, with pages from 1 on in its order, or strewn over the pool."""
    count = len(parent)
    end, start = np.arange(1, count + 1), np.zeros(count, np.int64)
    for i in range(count):
        if parent[i] >= 0:
            start[i] = start[parent[i]] + length[parent[i]]
    for i in range(count - 1, -1, -1):
        if parent[i] >= 0:
            end[parent[i]] = max(end[parent[i]], end[i])
    page_ptr = np.concatenate([[0], np.cumsum(-(-length // page_size))])
    pages = 1 + np.arange(page_ptr[-1])
    if strewn:
        pages = np.random.default_rng(0).permutation(pages)
    return Nodes(
        *(x.astype(np.int32) for x in (parent, end)),
        start,
        *(x.astype(np.int32) for x in (length, page_ptr, pages)),
    )


def alone(nodes: Nodes, node: np.ndarray) -> tuple[Nodes, np.ndarray]:
    """A tree in which every row has a path of its own, over the same pages."""
    parent, end, start, length, pages, leaves = [], [], [], [], [], []
    for leaf in node.tolist():
        path = []
        while leaf >= 0:
            path.insert(0, leaf)
            leaf = int(nodes.parent[leaf])
        first = len(parent)
        for depth, each in enumerate(path):
            parent.append(first + depth - 1 if depth else -1)
            end.append(first + len(path))
            start.append(int(nodes.start[each]))
            length.append(int(nodes.length[each]))
            pages.append(nodes.pages[nodes.page_ptr[each] : nodes.page_ptr[each + 1]])
        leaves.append(len(parent) - 1)
    counts = np.concatenate([[0], np.cumsum([len(x) for x in pages])])
    columns = (parent, end, start, length, counts, np.concatenate(pages))
    kinds = (np.int32, np.int32, np.int64, np.int32, np.int32, np.int32)
    return Nodes(*(np.asarray(x, k) for x, k in zip(columns, kinds, strict=True))), np.array(leaves)


def _heads(text: str) -> Heads:
    query, kv = map(int, text.split("/"))
    return Heads(query, kv, DIM, DIM, 2)


@contextmanager
def left_out(idea: str | None, processors: int, heads: Heads) -> Iterator[Machine]:
    """The machine to plan for, and kernels, with one of the ideas left out.

    packing: each request reads all of its path. tiles: as wide as the widest shape, where rows are.
    search: one plan is made. order: steps are in the tree's, and all of a wide block's are for all
    of its rows.
    claims: programs have all of their queues from the start. splitting: no run of KV is cut.
    cuts: query tiles are full, wherever they end. pieces: on Hopper, chunks are read whole.
    merge: not run, so the output is incomplete; what is saved is what the merge costs.
    """
    major = torch.cuda.get_device_capability()[0]
    machine = Machine.gpu(processors, heads, major)
    with ExitStack() as stack:
        if idea == "tiles":
            widest = machine.shapes[-1]
            narrow = tuple(shape._replace(cost=9 * widest.cost) for shape in machine.shapes[:-1])
            machine = replace(machine, shapes=(*narrow, widest))
        if idea == "search":
            machine = replace(machine, narrow=1)
        if idea == "claims":
            machine = replace(machine, claims=False)
        if idea == "order":
            stack.enter_context(mock.patch.object(plan, "_halves", lambda *_: None))
        if idea == "splitting":
            whole = tuple(shape._replace(least=1 << 30) for shape in machine.shapes)
            machine = replace(machine, shapes=whole)
        if idea == "cuts":
            # Tiles cost so much to start that only their number counts.
            cut = plan._cut_rows
            dear = lambda *args: cut(*args[:-1], args[-1] + 1e30)  # noqa: E731
            stack.enter_context(mock.patch.object(plan, "_cut_rows", dear))
        if idea == "pieces":
            stack.enter_context(mock.patch.object(hopper, "PIECE", plan._CHUNK))
        if idea == "merge":
            stack.enter_context(mock.patch.object(plan.Plan, "merges", False))
        for name in ("gpu", "of"):
            stack.enter_context(mock.patch.object(Machine, name, staticmethod(lambda *_: machine)))
        yield machine


class Case:
    """Tensors and plan of one tree and one head configuration."""

    def __init__(
        self,
        name: str,
        tree: tuple[np.ndarray, np.ndarray],
        heads: str,
        page_size: int,
        machine: Machine,
        shared: bool = True,
        strewn: bool = False,
    ):
        self.name, self.heads_name = name, heads
        parent, length = tree
        self.heads = _heads(heads)
        kv = self.heads.kv
        self.nodes = nodes_of(parent, length, page_size, strewn)
        leaves = np.setdiff1d(np.arange(len(parent)), parent)
        self.node = np.random.default_rng(0).permutation(leaves)
        self.position = (self.nodes.start + length)[self.node] - 1
        paths = (self.nodes, self.node) if shared else alone(self.nodes, self.node)
        self.make_plan = functools.partial(
            make_plan, *paths, self.position, self.heads, page_size, machine
        )
        self.plan = self.make_plan()
        self.plan_tensor = self.plan.tensor("cuda")
        shape = (len(self.nodes.pages) + 1, kv, page_size, DIM)
        self.q = torch.randn(
            len(leaves), self.heads.query, 1, DIM, device="cuda", dtype=torch.float16
        )
        self.k = torch.randn(shape, device="cuda", dtype=torch.float16)
        self.v = torch.randn(shape, device="cuda", dtype=torch.float16)
        self.page_size = page_size
        self.kv_bytes = int(length.sum()) * kv * self.heads.token_bytes
        moved = self.kv_bytes + 2 * self.q.numel() * 2
        self.flops = 4 * DIM * self.heads.query * int((self.position + 1).sum())
        self.roofline_us = max(moved / BANDWIDTH, self.flops / FLOPS) * 1e6

    def __call__(self) -> torch.Tensor:
        tensors = self.q, self.k, self.v, self.plan_tensor
        return attention(*tensors, scale=DIM**-0.5, merge=self.plan.merges)

    def dense(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [KV heads, tokens, dim] of a row's path."""
        node, slots = int(self.node[row]), []
        while node >= 0:
            inside = np.arange(self.nodes.length[node])
            page = self.nodes.pages[self.nodes.page_ptr[node] + inside // self.page_size]
            slots.insert(0, page.astype(np.int64) * self.page_size + inside % self.page_size)
            node = int(self.nodes.parent[node])
        slots = torch.from_numpy(np.concatenate(slots)).cuda()
        page, slot = slots // self.page_size, slots % self.page_size
        return self.k[page, :, slot].transpose(0, 1), self.v[page, :, slot].transpose(0, 1)

    def error(self, out: torch.Tensor, rows: int = 6) -> tuple[float, float]:
        """Ours, and twice that of PyTorch's SDPA in fp16 plus 1e-5; against float64."""
        worst, torchs = 0.0, 0.0
        for row in np.linspace(0, len(self.node) - 1, rows).astype(int):
            k, v = self.dense(int(row))
            q = self.q[row].view(self.heads.kv, self.heads.group, DIM)
            sdpa = torch.nn.functional.scaled_dot_product_attention
            exact = sdpa(q.double(), k.double(), v.double()).view(-1, DIM)
            theirs = sdpa(q[None], k[None], v[None]).view(-1, DIM)
            worst = max(worst, (out[row, 0].double() - exact).abs().max().item())
            torchs = max(torchs, (theirs.double() - exact).abs().max().item())
        return worst, 2 * torchs + 1e-5

    def sdpa(self):
        """PyTorch's SDPA over the dense K and V of every request, padded to the longest."""
        k, v = zip(*(self.dense(row) for row in range(len(self.node))), strict=True)
        pad = torch.nn.utils.rnn.pad_sequence
        lengths = torch.tensor([x.shape[1] for x in k], device="cuda")
        k, v = (pad([x.transpose(0, 1) for x in y], True).transpose(1, 2) for y in (k, v))
        mask = None
        if (lengths != lengths[0]).any():
            mask = (torch.arange(k.shape[2], device="cuda") < lengths[:, None])[:, None, None]
        return lambda: torch.nn.functional.scaled_dot_product_attention(
            self.q, k, v, attn_mask=mask, enable_gqa=True
        )


def graph_us(function, flush: torch.Tensor, repeat: int) -> float:
    """Median of replays, each after 256 MB have been written over the L2."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        held = function()
    times = []
    for i in range(repeat + 3):
        flush.fill_(i)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    del held
    return statistics.median(begin.elapsed_time(end) * 1e3 for begin, end in times[3:])


def eager_us(function, repeat: int) -> float:
    """Mean of calls in a row, launches included."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeat):
        function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3 / repeat


def host_ms(function, repeat: int) -> float:
    """Median of calls on the host."""
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def measure(case: Case, flush: torch.Tensor, floor: float, repeat: int, sdpa: bool) -> dict:
    error, bound = case.error(case())
    us = graph_us(case, flush, repeat)
    row = {
        "tree": case.name,
        "heads": case.heads_name,
        "us": round(us, 2),
        "roofline_us": round(case.roofline_us, 2),
        "error": error,
        "bound": bound,
        "kv_mb": round(case.kv_bytes / 1e6, 1),
        "tb_s": round(case.kv_bytes / us / 1e6, 3),
        "tflop_s": round(case.flops / us / 1e6, 1),
        "share": round(case.roofline_us / max(us - floor, 1e-3), 3),
        "eager_us": round(eager_us(case, 10), 1),
        "plan_ms": round(host_ms(case.make_plan, 11), 3),
    }
    if sdpa:
        row["sdpa_us"] = round(graph_us(case.sdpa(), flush, repeat), 2)
    return row


def summary(rows: list[dict]) -> str:
    """The rows for people, and the times of others, or with one idea left out, over ours."""
    lines = [
        f"{'tree':44}{'heads':>6}{'us':>8}{'eager':>8}{'best':>8}{'x':>6}{'TB/s':>6}{'share':>7}"
        f"{'error/bound':>12}"
    ]
    ratios: dict[str, list[float]] = {}
    for row in rows:
        best = row.get("best_us", float("nan"))
        lines.append(
            f"{row['tree']:44}{row['heads']:>6}{row['us']:8.1f}{row['eager_us']:8.1f}{best:8.1f}"
            f"{best / row['us']:6.2f}{row['tb_s']:6.2f}{row['share']:7.2f}"
            f"{row['error'] / row['bound']:12.2f}"
        )
        others = {key: row[key] for key in ("best_us", "sdpa_us") if key in row}
        others |= {f"without {idea}": us for idea, us in row.get("without_us", {}).items()}
        for name, us in others.items():
            ratios.setdefault(name, []).append(us / row["us"])
    for name, times in ratios.items():
        lines.append(
            f"{name}: {statistics.geometric_mean(times):.3f}x our time, {min(times):.3f}x to "
            f"{max(times):.3f}x, 1x or more in {sum(x >= 1 for x in times)} of {len(times)}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tree", action="append", help='"nodes_tokens"')
    parser.add_argument("--heads", action="append", help="query heads/KV heads")
    parser.add_argument("--irregular", type=int, default=0, help="add so many random trees")
    parser.add_argument("--ragpulse", type=Path, help="add batches of the trace in that folder")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--strewn", action="store_true", help="pages at random")
    parser.add_argument("--repeat", type=int, default=25)
    parser.add_argument("--sdpa", action="store_true", help="time PyTorch's dense SDPA too")
    parser.add_argument("--without", nargs="+", default=[], choices=IDEAS, help="time that, too")
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    names = arguments.tree or (() if arguments.irregular or arguments.ragpulse else TREES)
    trees = {name: regular(name) for name in names}
    trees |= {f"seed{i}": irregular(i) for i in range(arguments.irregular)}
    if arguments.ragpulse:
        for batch in (16, 64, 256):
            trees |= ragpulse(arguments.ragpulse, batch, 3)
    device = torch.device("cuda", torch.cuda.current_device())
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    empty = torch.zeros(1, device=device)
    floor = graph_us(lambda: empty.add_(1), flush, 50)
    cases = json.loads((HERE / "peers-h200.json").read_text())["cases"]
    peers = {(case["tree"], case["heads"]): case["best_us"] for case in cases}
    rows: list[dict] = []
    result = conditions(arguments) | {"one_kernel_us": round(floor, 2), "rows": rows}
    for heads in arguments.heads or HEADS:
        for name, tree in trees.items():
            given = name, tree, heads, arguments.page_size
            case = Case(*given, Machine.of(device, _heads(heads)), strewn=arguments.strewn)
            row = measure(case, flush, min(floor, FLOOR_US), arguments.repeat, arguments.sdpa)
            if (name, heads) in peers:
                row["best_us"] = peers[name, heads]
            del case
            for idea in arguments.without:
                with left_out(idea, processors, _heads(heads)) as other:
                    case = Case(*given, other, idea != "packing", arguments.strewn)
                    times = row.setdefault("without_us", {})
                    times[idea] = round(graph_us(case, flush, arguments.repeat), 2)
                    del case
            rows.append(row)
            torch.cuda.empty_cache()
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(summary(rows))


def conditions(arguments: argparse.Namespace) -> dict[str, object]:
    """What a figure depends on: machine, versions, commit, command, method."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=7"],
        capture_output=True,
        text=True,
        cwd=HERE,
    )
    return {
        "machine": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "commit": commit.stdout.strip() or None,
        "command": " ".join(["python", *sys.argv]),
        "method": f"median of {arguments.repeat} CUDA-graph replays, 256 MB written before each; "
        f"planning outside; fp16, dim {DIM}, page size {arguments.page_size}"
        f"{', pages at random' * arguments.strewn}",
        "roofline": "max((distinct KV + Q + O bytes)/4.3e12, flops/790e12)",
    }


if __name__ == "__main__":
    main()
