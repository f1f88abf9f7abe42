"""Writes the README's tables of figures from benchmarks/results.

python benchmarks/tables.py
"""

from __future__ import annotations

import functools
import json
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IDEAS = {
    "packing": "packing: each request reads its own path",
    "tiles": "tile shapes: all blocks are as wide as the widest, where there are rows",
    "splitting": "splitting: no run of K and V is cut",
    "search": "search (ours): one plan is made, with blocks of up to 128 rows",
    "order": "order (ours): steps are in the tree's, and all of a block's are for all of its rows",
    "claims": "claims (ours): programs have all of their queues from the start",
    "merge": "the merge kernel, its result missing: what it takes of the time",
    "cuts": "tiles that end where least is seen on both sides",
    "pieces": "reading chunks in pieces",
}
LAYERS = 36  # of Qwen3-8B, say
SIZES = {"30 to 100 MB": (30, 100), "100 to 500 MB": (100, 500), "over 500 MB": (500, 1e9)}


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))


def filled(text: str) -> str:
    """The README with every `<!-- name -->` section made from results/name.json."""
    return re.sub(
        r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->",
        lambda match: f"<!-- {match[1]} -->\n{section(match[1])}<!-- /{match[1]} -->",
        text,
        flags=re.DOTALL,
    )


def section(name: str) -> str:
    """A file of results as text and a table, and where they come from."""
    results = json.loads((RESULTS / f"{name}.json").read_text())
    tables = {
        "kernels-h200": kernels,
        "kernels-strewn-h200": functools.partial(
            against_peers, "With pages at random, all over the pool"
        ),
        "kernels-slower-h200": functools.partial(
            against_peers, "On a slower card of the same kind"
        ),
        "kernels-ideas-h200": ideas,
        "kernels-irregular-h200": shares,
        "kernels-products-h200": products,
        "long-h200": long,
        "first-h200": first,
        "first-made-h200": first,
    }
    table = tables.get(name, generate)(results)
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    note = f" ({results['note']})" if "note" in results else ""
    source = f"`{results['command']}`{note}, {versions}, commit {results['commit']}."
    return f"{table}\n\n{source}\n"


def generate(results: dict) -> str:
    """Rows of benchmarks/generate.py, with the ratio to the stock dynamic cache of the same run."""
    head = ["workload", "batch", "cache", "first token", "each further", "tokens/s"]
    stock = {row["workload"]: row for row in results["rows"] if row["mode"] == "dynamic"}
    peaks = all(row["peak_gb"] for row in results["rows"])
    head += ["peak memory"] if peaks else []
    head += ["prefill speed-up", "decode speed-up"] if stock else []
    cells = [head]
    cells.append(["---"] * len(cells[0]))
    for row in results["rows"]:
        base = stock.get(row["workload"])
        ratios = [f"{base[x] / row[x]:.2f}x" if base else "" for x in ("ttft_s", "tpot_ms")]
        name = ": ".join(dict.fromkeys((row["workload"], row["tree"])))
        line = [name, str(row["batch"]), row["mode"]]
        line += [f"{row['ttft_s']:.3g} s", f"{row['tpot_ms']:.4g} ms"]
        line += [f"{row['decode_tokens_s']:,.0f}"]
        line += [f"{row['peak_gb']:.1f} GB"] if peaks else []
        line += ratios if stock else []
        cells.append(line)
    threads = f", {results['threads']} threads" if results["threads"] else ""
    over = " Speed-ups are over `dynamic`, stock `generate()`." if stock else ""
    return (
        f"{results['model']}, {results['dtype'].removeprefix('torch.')}, random weights, on "
        f"{results['machine']}{threads}. A workload is given by the nodes on each level of its "
        "prefix tree, and the tokens of each: `1,32_2048,32` is one node of 2,048 tokens and below "
        f"it 32 of 32; `x32`: 32 samples of each prompt.{over}\n\n"
        + "\n".join(f"| {' | '.join(line)} |" for line in cells)
    )


def long(results: dict) -> str:
    """How much slower a token becomes as the answers grow."""
    (row,) = results["rows"]
    return (
        f"With {row['workload']} and {row['new_tokens']:,} new tokens ({row['mode']}), a step "
        f"grows from {row['early_ms']:.2f} ms (100th to 200th token) to {row['late_ms']:.2f} ms "
        f"(last 100). To read the K and V added in between takes {row['grown_ms']:.2f} ms at 4.3 "
        "TB/s."
    )


def first(results: dict) -> str:
    """Times to the first token of the first call and of later ones."""
    (row,) = results["rows"]
    return (
        f"{row['workload']} ({row['mode']}) on one {results['machine']} with no kernel on disk: "
        f"{row['first_call_ttft_s']:.2f} s to the first token of the first call, "
        f"{row['ttft_s']:.2f} s to that of later ones."
    )


def kernels(results: dict) -> str:
    """Rows of benchmarks/kernels.py by the size of their distinct K and V."""
    lines = [
        "| distinct K and V | cases | share of the roofline | speed, best peer = 1 | ahead in |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, (least, most) in (SIZES | {"all": (0, 1e9)}).items():
        rows = [row for row in results["rows"] if least <= row["kv_mb"] < most]
        speed = [row["best_us"] / row["us"] for row in rows]
        lines.append(
            f"| {name} | {len(rows)} | {mean(row['share'] for row in rows):.0%} "
            f"| {mean(speed):.2f}x | {sum(x >= 1 for x in speed)} |"
        )
    worst = max(row["error"] / row["bound"] for row in results["rows"])
    return (
        f"The {len(results['rows'])} cases of PAT's kernel benchmark on one {results['machine']}: "
        f"{results['method']}. Roofline: {results['roofline']}. The best peer of a case is the "
        "fastest of 13 variants of PAT's own CUDA, FlashInfer, FastTree, DeFT, Hydragen and "
        "PyTorch's SDPA, measured apart with pages of 32 tokens (`benchmarks/peers-h200.json`). "
        f"The largest error is {worst:.0%} of twice that of PyTorch's SDPA in fp16. "
        f"{planning(results['rows'])}\n\n" + "\n".join(lines)
    )


def planning(rows: list[dict]) -> str:
    """What plans take the host."""
    shares = {
        (row["tree"], row["heads"]): row["plan_ms"] / row["us"] * 1e3 / LAYERS for row in rows
    }
    many = [share for (tree, _), share in shares.items() if ",1024_" in tree]
    times = [row["plan_ms"] for row in rows]
    return (
        f"To plan takes the host {min(times):.1f} to {max(times):.1f} ms, once for up to a page of "
        f"steps: {min(shares.values()):.0%} to {max(shares.values()):.0%} of what attention takes "
        f"in one step of {LAYERS} layers, {min(many):.0%} to {max(many):.0%} where 1,024 requests "
        "share."
    )


def against_peers(where: str, results: dict) -> str:
    """The 80 cases in a sentence."""
    ratios = [row["best_us"] / row["us"] for row in results["rows"]]
    return (
        f"{where}: {mean(ratios):.2f}x the best peer, {min(ratios):.3f}x at least, ahead in "
        f"{sum(x >= 1 for x in ratios)} of {len(ratios)}."
    )


def ideas(results: dict) -> str:
    """What is lost without each of PAT's ideas, and with PyTorch's dense attention."""
    rows = results["rows"]
    lost = {
        IDEAS[idea]: [row["without_us"][idea] / row["us"] for row in rows]
        for idea in IDEAS
        if idea in rows[0]["without_us"]
    }
    lost["all of it: PyTorch's SDPA over dense K and V"] = [
        row["sdpa_us"] / row["us"] for row in rows
    ]
    lines = ["| without | time, with it = 1 | at most | at |", "| --- | --- | --- | --- |"]
    for idea, times in lost.items():
        most, tree = max(zip(times, (row["tree"] for row in rows), strict=True))
        lines.append(f"| {idea} | {mean(times):.2f}x | {most:.2f}x | {tree} |")
    heads = " and ".join(dict.fromkeys(row["heads"] for row in rows))
    return f"The {len(rows)} trees with {heads} heads, geometric means.\n\n" + "\n".join(lines)


def shares(results: dict) -> str:
    """Shares of the roofline on random trees and on those of a trace, beside regular ones'."""
    regular = json.loads((RESULTS / "kernels-h200.json").read_text())["rows"]
    regular += [row for row in results["rows"] if row["tree"][0].isdigit()]

    def alike(row: dict) -> float:
        """The share of the regular tree that is nearest in size, with the same heads."""
        same = [x for x in regular if x["heads"] == row["heads"]]
        return min(same, key=lambda x: abs(math.log(x["kv_mb"] / row["kv_mb"])))["share"]

    lines = [
        "| trees | cases | distinct K and V | share of the roofline | regular trees of that size |",
        "| --- | --- | --- | --- | --- |",
    ]
    for prefix, name in (("seed", "random"), ("ragpulse", "RAGPulse trace")):
        for size, (least, most) in ({"below 30 MB": (0, 30)} | SIZES).items():
            rows = [
                row
                for row in results["rows"]
                if row["tree"].startswith(prefix) and least <= row["kv_mb"] < most
            ]
            if rows:
                share = mean(row["share"] for row in rows)
                others = f"{mean(map(alike, rows)):.0%}" if least else ""
                lines.append(f"| {name} | {len(rows)} | {size} | {share:.0%} | {others} |")
    random = [row for row in results["rows"] if row["tree"].startswith("seed")]
    worth = []
    for idea in random[0].get("without_us", ()):
        times = [row["without_us"][idea] / row["us"] for row in random]
        worth.append(f"{mean(times):.2f}x without {IDEAS[idea]} (at most {max(times):.2f}x)")
    return "\n".join(lines) + f"\n\nThe random ones take {' and '.join(worth)}." * bool(worth)


def products(results: dict) -> str:
    """TFLOP/s, by tree and heads."""
    speed = {(row["tree"], row["heads"]): row["tflop_s"] for row in results["rows"]}
    trees, heads = (list(dict.fromkeys(names)) for names in zip(*speed, strict=True))
    lines = [f"| tree | {' | '.join(f'{name} heads' for name in heads)} |"]
    lines.append("| --- " * (1 + len(heads)) + "|")
    for tree in trees:
        figures = " | ".join(f"{speed[tree, name]:.0f}" for name in heads)
        lines.append(f"| {tree} | {figures} |")
    return "\n".join(lines)


def mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


if __name__ == "__main__":
    main()
