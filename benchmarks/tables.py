"""Writes the README's tables of figures from benchmarks/results.

python benchmarks/tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


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
    """A table of one file of results, or nothing if there is none."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return ""
    results = json.loads(path.read_text())
    lines = [
        "| workload | batch | cache | first token | each further | tokens/s | prefill | decode |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["rows"]:
        base = next(
            (
                r
                for r in results["rows"]
                if r["workload"] == row["workload"] and r["mode"] == "dynamic"
            ),
            row,
        )
        lines.append(
            f"| {row['workload']}: {row['tree']} | {row['batch']} | {row['mode']} "
            f"| {row['ttft_s']:.3g} s | {row['tpot_ms']:.4g} ms | {row['decode_tokens_s']:,.0f} "
            f"| {base['ttft_s'] / row['ttft_s']:.2f}x | {base['tpot_ms'] / row['tpot_ms']:.2f}x |"
        )
    threads = f", {results['threads']} threads" if results["threads"] else ""
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    return (
        f"{results['model']}, {results['dtype'].removeprefix('torch.')}, random weights, on "
        f"{results['machine']}{threads}. A workload is the nodes of each level of its prefix tree, "
        "and the tokens of each.\n\n"
        + "\n".join(lines)
        + f"\n\n`{results['command']}`, {versions}, commit {results['commit']}.\n"
    )


if __name__ == "__main__":
    main()
