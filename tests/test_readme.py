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
    first, turns, enabled, store, scoring = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {
        "name": str(ROOT / "examples" / "facts-llama"),
        "prompts": ["Question: Who?\nAnswer:", "Question: When was it?\nAnswer:"],
        "contexts": [[5, 6, 7], [5, 6, 8]],
        "continuations": [[9], [10, 11]],
    }
    exec(first, names)
    assert names["out"].shape[0] == 2
    assert "2 requests" in capsys.readouterr().out
    cache = names["cache"]
    prompted, prefilled = cache.prompted, cache.prefilled
    exec(turns, names | {"questions": ["\nQuestion: Where?\nAnswer:", "\nQuestion: Why?\nAnswer:"]})
    assert cache.prefilled - prefilled < (cache.prompted - prompted) / 2
    used = []

    class trainer:
        @staticmethod
        def train():
            out = names["model"].generate(**names["inputs"], return_dict_in_generate=True)
            used.append(type(out.past_key_values))

    exec(enabled, names | {"trainer": trainer})
    trainer.train()
    assert used[0] is names["pat_hf"].PATCache and used[1] is not used[0]
    exec(store, names)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith(("reused", "kept"))]
    assert "\n".join(f"    {line}" for line in lines) in README
    assert names["cache"].report().kept_tokens > 0
    exec(scoring, names)
    assert len(names["scores"].logprobs) == len(names["scores"].greedy) == 2
