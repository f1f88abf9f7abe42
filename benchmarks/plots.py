"""Draws the README's plots from benchmarks/results.

pip install '.[benchmarks]'
python benchmarks/plots.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {
    "svg.hashsalt": "pat_hf",
    "font.size": 9,
    "figure.constrained_layout.use": True,
}

from matplotlib import pyplot as plt  # noqa: E402

RESULTS = Path(__file__).parent / "results"
FLOOR_US = 4.6  # what timing an empty graph cost where the peers were measured


def main() -> None:
    kernels(json.loads((RESULTS / "kernels-h200.json").read_text()))
    generate(json.loads((RESULTS / "generate-h200.json").read_text()))


def kernels(results: dict) -> None:
    """Share of the roofline over the size of a case, ours and the best peer's."""
    figure, axes = plt.subplots(figsize=(6, 3.2))
    rows = results["rows"]
    size = [row["kv_mb"] for row in rows]
    peers = [row["roofline_us"] / (row["best_us"] - FLOOR_US) for row in rows]
    axes.scatter(size, peers, s=14, c="0.6", label="best of 13 peers")
    axes.scatter(size, [row["share"] for row in rows], s=14, c="C0", label="pat_hf")
    axes.set(
        xscale="log", ylim=(0, 1.1), xlabel="distinct K and V, MB", ylabel="share of the roofline"
    )
    axes.legend(loc="upper left", frameon=False)
    save(figure, "kernels-h200")


def generate(results: dict) -> None:
    """Time to the first token and of each further one, by workload and cache."""
    workloads = list(dict.fromkeys(row["workload"] for row in results["rows"]))
    modes = list(dict.fromkeys(row["mode"] for row in results["rows"]))
    figure, both = plt.subplots(1, 2, figsize=(7, 3.2))
    for axes, key, label in zip(
        both, ("ttft_s", "tpot_ms"), ("first token, s", "each further token, ms"), strict=True
    ):
        for i, mode in enumerate(modes):
            rows = [row for row in results["rows"] if row["mode"] == mode]
            x = [
                workloads.index(row["workload"]) + (i - (len(modes) - 1) / 2) * 0.8 / len(modes)
                for row in rows
            ]
            axes.bar(x, [row[key] for row in rows], 0.8 / len(modes), label=mode)
        axes.set_xticks(range(len(workloads)), workloads)
        axes.set(ylabel=label, yscale="log")
    both[0].legend(frameon=False)
    save(figure, "generate-h200")


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
