"""The README's figures are those of the results, and its example runs."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_figures_are_those_of_the_results():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert "<!-- generate-cpu -->" in README
    assert tables.filled(README) == README


def test_the_examples_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, *others = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (second,) = (code for code in others if "keep_bytes" in code)
    names = {
        "name": str(ROOT / "examples" / "facts-llama"),
        "prompts": ["Question: Who?\nAnswer:", "Question: When was it?\nAnswer:"],
    }
    exec(first, names)
    assert names["out"].shape[0] == 2
    assert "2 requests" in capsys.readouterr().out
    exec(second, names)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith(("reused", "kept"))]
    assert "\n".join(f"    {line}" for line in lines) in README
    assert names["cache"].report().kept_tokens > 0
