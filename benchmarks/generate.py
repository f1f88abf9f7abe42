"""Times `model.generate()` on a PATCache and on stock caches, in one process.

    python benchmarks/generate.py cpu                        # two cores, a 100M-parameter Llama
    python benchmarks/generate.py W1 W2 W3 --model qwen3-8b  # or a name on the hub, or a folder
    python benchmarks/generate.py --tree 1,8,32_1024,2048,64 --new-tokens 48

A workload is a prefix tree: nodes on each level, and the tokens of each. Models that are known by
name here have random weights; time does not depend on them. TTFT is the time from the call to the
first token, TPOT the mean time of each further one; medians over `--repeat` calls, after one that
is not counted, between which PyTorch keeps its memory. What runs out of GPU memory is printed as
such and has no row.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

# Transformers imports a package `kernels`, which must not be the file of that name beside this one.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).parent]

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    StoppingCriteria,
)

import pat_hf
from pat_hf.cache.prefix_tree import PrefixTree

# name: ("nodes_tokens[xN]", new tokens)
WORKLOADS = {
    "cpu": ("1,32_2048,32", 64),
    "cpu-disjoint": ("32_160", 64),
    "W1": ("1,32_8192,64", 49),
    "W1-256": ("1,256_8192,64", 49),
    "W1-1024": ("1,1024_8192,64", 49),
    "W2": ("1,8,32_1024,2048,64", 49),
    "W3": ("1_4096x32", 49),
    "disjoint": ("8_2048", 49),
}
MODELS: dict[str, PretrainedConfig] = {
    "llama-100m": LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
    ),
}

BANDWIDTH = 4.3e12  # bytes/s of an H200, which the floors are for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--tree", help="a workload of your own: nodes_tokens, [xN: N samples each]")
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--model", help=f"{', '.join(MODELS)}, or what from_pretrained() takes")
    parser.add_argument("--modes", nargs="+", default=["pat", "dynamic"], choices=MODES)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-warm-up", action="store_true", help="count the first call, too")
    parser.add_argument("--out", type=Path, help="where to write the rows as JSON")
    args = parser.parse_args()
    if unknown := [name for name in args.workloads if name not in WORKLOADS]:
        parser.error(f"no workload: {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    if not (args.workloads or args.tree):
        parser.error(f"give --tree, or workloads of {', '.join(WORKLOADS)}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = args.model or ("qwen3-8b" if device == "cuda" else "llama-100m")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    options = {"attn_implementation": "pat", "dtype": dtype}
    torch.manual_seed(0)
    if source in MODELS:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(MODELS[source], **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, device_map=device, **options)
    model.eval()
    config = model.config
    named = {name: WORKLOADS[name] for name in args.workloads}
    if args.tree:
        named[args.tree] = (args.tree, 49)
    rows: list[dict] = []
    result = conditions(config, dtype) | {"rows": rows}
    for name, (tree, new_tokens) in named.items():
        prompts = prompts_of(tree, config.vocab_size).to(device)
        for mode in args.modes:
            warm_up = not args.no_warm_up
            work = (prompts, args.new_tokens or new_tokens, mode, args.beams)
            try:
                row = measure(model, *work, args.repeat, warm_up)
            except torch.OutOfMemoryError:  # what it held is freed before the next call
                print(f"{name}, {mode}: out of memory", flush=True)
                continue
            rows.append({"workload": name, "tree": tree, "mode": mode, "beams": args.beams} | row)
            print(json.dumps(rows[-1]), flush=True)
            if args.out:
                args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


def prompts_of(tree: str, vocabulary: int) -> torch.Tensor:
    """Prompts [leaves * samples, tokens] of a tree in the notation "nodes_tokens[xN]"."""
    try:
        tree, _, samples = tree.partition("x")
        nodes, tokens = ([int(n) for n in part.split(",")] for part in tree.split("_"))
        if len(nodes) != len(tokens) or any(b % a for a, b in zip(nodes, nodes[1:], strict=False)):
            raise ValueError
    except ValueError:
        sys.exit(f'{tree!r} is not a tree such as "1,8,32_1024,2048,64".')
    generator = torch.Generator().manual_seed(0)
    levels = [
        torch.randint(0, vocabulary, (n, t), generator=generator).repeat_interleave(
            nodes[-1] // n, 0
        )
        for n, t in zip(nodes, tokens, strict=True)
    ]
    return torch.cat(levels, 1).repeat_interleave(int(samples or 1), 0)


class Clock(StoppingCriteria):
    """Stops nothing, notes the time of every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object
    ) -> torch.Tensor:
        # Only the first token needs the device to be done: the rest is a mean.
        if input_ids.is_cuda and not self.times:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


MODES = {
    "pat": ("pat", pat_hf.PATCache, {}),
    **{
        f"pat-{decode}": ("pat", functools.partial(pat_hf.PATCache, decode=decode), {})
        for decode in ("eager", "captured", "compiled")
    },
    "dynamic": ("sdpa", lambda model: None, {}),
    "static": ("sdpa", lambda model: None, {"cache_implementation": "static"}),
    "continuous": ("paged|sdpa", None, {}),
}


def call(
    model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, mode: str, beams: int
) -> dict:
    """One generation: seconds to the first token of every request and to the end, peak bytes."""
    _, make_cache, kwargs = MODES[mode]
    cuda = prompts.is_cuda
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    clock, pages = Clock(), 0
    start = time.perf_counter()
    if make_cache is None:
        config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1)
        results = model.generate_batch(
            prompts.tolist(), generation_config=config, record_timestamps=True
        )
        clock.times = [max(result.timestamps[0] for result in results.values())]
    else:
        cache = make_cache(model)
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            num_beams=beams,
            pad_token_id=0,
            stopping_criteria=[clock],
            **kwargs,
        )
        if cuda and cache is not None:
            pages = cache.pool.memory.mapped  # PyTorch doesn't count them
    if cuda:
        torch.cuda.synchronize()
    return {
        "ttft": clock.times[0] - start,
        "end": time.perf_counter() - start,
        "times": clock.times,
        "peak": torch.cuda.max_memory_allocated() + pages if cuda else 0,
    }


def measure(
    model: PreTrainedModel,
    prompts: torch.Tensor,
    new_tokens: int,
    mode: str,
    beams: int,
    repeat: int,
    warm_up: bool,
) -> dict[str, object]:
    """One row: seconds to the first token, ms per further one, tokens/s, peak GB.

    `floor_ms` is the time to read the weights, without the embedding table, and every distinct
    prompt token's K and V once. Of long generations, `early_ms` is the time of a token among those
    from the 100th to the 200th, `late_ms` among the last 100, and `grown_ms` how much longer it
    takes to read what was stored in between.
    """
    model.set_attn_implementation(MODES[mode][0])
    gc.collect()
    torch.cuda.empty_cache()
    calls = [call(model, prompts, new_tokens, mode, beams) for _ in range(repeat + warm_up)]
    counted = calls[warm_up:]
    ttft = statistics.median(c["ttft"] for c in counted)
    step = statistics.median((c["end"] - c["ttft"]) / (new_tokens - 1) for c in counted)
    cuda = prompts.is_cuda
    floor = floor_ms(model, prompts)
    row = {
        "batch": len(prompts),
        "prompt_tokens": prompts.shape[1],
        "new_tokens": new_tokens,
        "ttft_s": round(ttft, 4),
        "tpot_ms": round(step * 1e3, 3),
        "decode_tokens_s": round(len(prompts) / step, 1),
        "first_call_s": round(calls[0]["end"], 3),
        "first_call_ttft_s": round(calls[0]["ttft"], 3),
        "peak_gb": round(max(c["peak"] for c in calls) / 1e9, 2) if cuda else None,
        "floor_ms": round(floor, 3) if cuda else None,
        "floor_share": round(floor / step / 1e3, 3) if cuda else None,
    }
    times = counted[-1]["times"]
    if len(times) > 300:
        stored = len(prompts) * (len(times) - 200) * token_bytes(model)
        row |= {
            "early_ms": round((times[200] - times[100]) * 10, 3),
            "late_ms": round((times[-1] - times[-101]) * 10, 3),
            "grown_ms": round(stored / BANDWIDTH * 1e3, 3) if cuda else None,
        }
    return row


def token_bytes(model: PreTrainedModel) -> int:
    """K and V of a token, in all layers."""
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * dim * model.dtype.itemsize


def floor_ms(model: PreTrainedModel, prompts: torch.Tensor) -> float:
    """What a decode step has to read at least, at `BANDWIDTH`."""
    config = model.config
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    if not config.tie_word_embeddings:
        embeddings = model.get_input_embeddings().weight
        weights -= embeddings.numel() * embeddings.element_size()
    tree = PrefixTree()
    for row in prompts.tolist():
        tree.insert(row)
    stored = token_bytes(model) * sum(node.length for node in tree)
    return (weights + stored) / BANDWIDTH * 1e3


def table(rows: list[dict]) -> str:
    """The rows for people, with the ratio to the workload's first stock mode."""
    lines = [f"{'workload':14}{'mode':14}{'batch':>6}{'TTFT s':>10}{'TPOT ms':>10}{'tokens/s':>10}"]
    for row in rows:
        lines.append(
            f"{row['workload']:14}{row['mode']:14}{row['batch']:6}{row['ttft_s']:10.3f}"
            f"{row['tpot_ms']:10.2f}{row['decode_tokens_s']:10.1f}"
        )
        alike = [r for r in rows if r["workload"] == row["workload"]]
        stock = [r for r in alike if not r["mode"].startswith("pat")]
        if stock and row is alike[-1]:
            for ours in (r for r in alike if r not in stock):
                prefill, decode = (stock[0][key] / ours[key] for key in ("ttft_s", "tpot_ms"))
                lines.append(
                    f"{'':14}{ours['mode']} is {prefill:.2f}x in prefill and {decode:.2f}x in "
                    f"decode to {stock[0]['mode']}"
                )
    return "\n".join(lines)


def conditions(config: PretrainedConfig, dtype: torch.dtype) -> dict[str, object]:
    """What a figure depends on: machine, versions, commit, command, model."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=7"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    cuda = torch.cuda.is_available()
    return {
        "machine": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "threads": None if cuda else torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "pat_hf": pat_hf.__version__,
        },
        "commit": commit.stdout.strip() or None,
        "command": shlex.join(["python", *sys.argv]),
        "model": f"{config.model_type}, {config.num_hidden_layers} layers of "
        f"{config.hidden_size}, {config.num_attention_heads}/{config.num_key_value_heads} heads",
        "dtype": str(dtype),
    }


if __name__ == "__main__":
    main()
