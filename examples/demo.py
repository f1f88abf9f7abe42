"""Answers many questions over shared documents with `generate()`, and shows what sharing saved.

    python examples/demo.py
    python examples/demo.py --model Qwen/Qwen3-8B --prompts my-prompts.jsonl

Without arguments: the small model that comes with the repository, on questions over generated
documents behind one set of instructions. The answers are compared with stock `generate()`'s.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import facts
import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    StoppingCriteria,
)

import pat_hf

EMBEDDED = Path(__file__).parent / "facts-llama"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(EMBEDDED), help="a causal LM: hub name or folder")
    parser.add_argument(
        "--prompts",
        type=Path,
        help='your prompts: lines of JSON {"prompt": ..., "answer": ... (if known)}, or of text',
    )
    parser.add_argument("--contexts", type=int, default=4, help="sets of generated documents")
    parser.add_argument("--questions", type=int, default=12, help="questions to each set")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()

    if args.prompts:
        pairs = read_prompts(args.prompts)
    else:
        pairs = facts.batch(
            random.Random(args.seed), questions=args.questions, contexts=args.contexts
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(
        args.model, attn_implementation="pat", dtype="auto" if device == "cuda" else torch.float32
    ).to(device)
    inputs = tokenizer([prompt for prompt, _ in pairs], return_tensors="pt", padding=True)
    inputs = inputs.to(device)
    print(
        f"{type(model).__name__}, {model.num_parameters() / 1e6:,.1f} M parameters, "
        f"{model.dtype} on {device}; {len(pairs)} prompts of {inputs.attention_mask.sum(1).min()}"
        f" to {inputs.input_ids.shape[1]} tokens\n"
    )

    cache = pat_hf.PATCache(model)
    ours, our_times = timed(model, inputs, args.new_tokens, "pat_hf", cache)
    model.set_attn_implementation("sdpa")
    stock, stock_times = timed(model, inputs, args.new_tokens, "stock ", None)

    length = inputs.input_ids.shape[1]
    answers = tokenizer.batch_decode(ours[:, length:], skip_special_tokens=True)
    show_answers(pairs, answers)
    print(f"\n{cache.report()}\n\n{cache.tree()}\n")
    print(f"{'':10}{'first token':>14}{'each further':>16}{'in all':>10}")
    for name, (first, step, total) in (("pat_hf", our_times), ("stock", stock_times)):
        print(f"{name:10}{first:12.2f} s{step * 1e3:13.1f} ms{total:8.2f} s")
    print("faster by ", *(f"{s / o:.1f}x " for o, s in zip(our_times, stock_times, strict=True)))

    same = [torch.equal(a, b) for a, b in zip(*padded(ours, stock), strict=True)]
    print(f"\n{sum(same)} of {len(same)} answers are token for token those of stock generate().")
    if all(same) or model.dtype != torch.float32:
        return 0
    print("They should all be, in float32: please report this.", file=sys.stderr)
    return 1


def read_prompts(path: Path) -> list[tuple[str, str | None]]:
    """Prompts of a file, each with its answer if one is given."""
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        sys.exit(f"{path} holds no prompts. Write one a line, as text or as JSON.")
    if path.suffix not in (".json", ".jsonl"):
        return [(line, None) for line in lines]
    pairs = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            pairs.append((row["prompt"], row.get("answer")))
            if not isinstance(row["prompt"], str):
                raise TypeError
        except (ValueError, TypeError, KeyError, AttributeError):
            sys.exit(f'{path}, line {number}: {line[:60]!r} is not {{"prompt": "..."}}.')
    return pairs


def timed(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    new_tokens: int,
    name: str,
    cache: pat_hf.PATCache | None,
) -> tuple[torch.Tensor, tuple[float, float, float]]:
    """Generates greedily; sequences, and seconds to the first token, per further one, in all."""
    with tqdm(total=new_tokens, desc=f"{name} prefill", unit="token") as bar:
        progress = Progress(bar, name)
        start = time.perf_counter()
        sequences = model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=model.generation_config.pad_token_id or 0,
            stopping_criteria=[progress],
        )
        total = time.perf_counter() - start
    first = progress.first - start
    steps = sequences.shape[1] - inputs["input_ids"].shape[1] - 1
    return sequences, (first, (total - first) / max(steps, 1), total)


class Progress(StoppingCriteria):
    """Stops nothing: moves a progress bar at each token, and notes when the first one came."""

    def __init__(self, bar: tqdm, name: str):
        self.bar = bar
        self.name = name
        self.first = 0.0

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        if not self.first:
            if input_ids.is_cuda:
                torch.cuda.synchronize()
            self.first = time.perf_counter()
            self.bar.set_description(f"{self.name} decode ")
        self.bar.update()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def show_answers(pairs: list[tuple[str, str | None]], answers: list[str]) -> None:
    """Prints the end of each prompt with its answer, and the number right where that is known."""
    right = known = 0
    for (prompt, wanted), answer in zip(pairs, answers, strict=True):
        asked = prompt.rstrip().removesuffix("\nAnswer:").splitlines() or [""]
        mark = " "
        if wanted is not None:
            known += 1
            right += answer.strip() == wanted
            mark = "✓" if answer.strip() == wanted else f"✗ ({wanted})"
        print(f"{asked[-1][-90:]:<72} {answer.strip()[:60]} {mark}")
    if known:
        print(f"\n{right} of {known} right")


def padded(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both at the longer one's length: the runs may have stopped at different steps."""
    longest = max(a.shape[1], b.shape[1])
    return tuple(torch.nn.functional.pad(x, (0, longest - x.shape[1])) for x in (a, b))


if __name__ == "__main__":
    sys.exit(main())
