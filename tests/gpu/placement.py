"""A model spread over GPUs, or offloaded, against stock sdpa on one: the same tokens.

    python tests/gpu/placement.py

Takes two GPUs, or one for the cases that need no second; without any, the CPU and the disk.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import accelerate
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import batch, pair  # noqa: E402

import pat_hf  # noqa: E402

EMBED, HEAD = ["model.embed_tokens", "model.rotary_emb"], ["model.norm", "lm_head"]
LAYERS = [f"model.layers.{i}" for i in range(3)]
MODES = {
    "greedy": {"do_sample": False},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 4},
    "hidden states": {"do_sample": False, "output_hidden_states": True},  # not packed
}


def maps(gpus: int) -> dict[str, dict[str, int | str]]:
    """Where the embeddings, the three layers, and the norm and head go."""
    here = 0 if gpus else "cpu"
    spreads = {
        "offloaded layers": (here, [here, "cpu", "cpu"], here),
        "offloaded ends": ("cpu", [here, here, here], "cpu"),
        "all offloaded": ("cpu", ["cpu"] * 3, "cpu"),
        "layers on disk": (here, ["disk", here, "disk"], here),
    }
    if gpus > 1:
        spreads |= {
            "two GPUs": (0, [0, 1, 1], 1),
            "two GPUs, second first": (1, [1, 0, 0], 0),
            "two GPUs by turns": (0, [1, 0, 1], 0),
            "two GPUs and the CPU": (0, [1, "cpu", 0], 1),
        }
    return {
        name: dict.fromkeys(EMBED, first)
        | dict(zip(LAYERS, layers, strict=True))
        | dict.fromkeys(HEAD, last)
        for name, (first, layers, last) in spreads.items()
    }


def run(model, inputs, cache, **kwargs) -> torch.Tensor:
    torch.manual_seed(0)
    out = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=40,
        return_dict_in_generate=True,
        **kwargs,
    )
    return out.sequences.cpu()


def compared(name: str, device_map: dict, folder: str, inputs, expected, pairs) -> bool:
    """Prints whether all modes give what sdpa gives."""
    main = next((d for d in device_map.values() if d not in ("cpu", "disk")), "cpu")
    model = accelerate.dispatch_model(
        copy.deepcopy(pair("Llama")[1]),
        device_map,
        main_device=main,
        offload_dir=folder,
        skip_keys="past_key_values",
        force_hooks=True,
    )
    cache = pat_hf.PATCache(model, page_size=16)
    found = []
    for mode, kwargs in MODES.items():
        for turn in ("first", "second"):  # the second finds the prompts stored
            ours = run(model, inputs, cache, **kwargs)
            if not torch.equal(ours, expected[mode]):
                shape = [ours.shape == expected[mode].shape]
                at = (ours != expected[mode]).nonzero()[0].tolist() if all(shape) else ours.shape
                found.append(f"{mode}, {turn} call: differs at {at}")
    ours = pat_hf.loglikelihoods(model, *pairs).logprobs
    error = (ours - expected["scores"]).abs().max().item()
    if not error < 1e-3:
        found.append(f"loglikelihoods: off by {error:.2e}")
    print(f"{name:<24} {'; '.join(found) or 'OK'}")
    return not found


def main() -> None:
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(2, 97, (90,), generator=generator).tolist()
    prompts = [shared[:n] + [2 + n % 60] * (1 + n % 7) for n in (90, 90, 61, 40, 7)]
    prompts.append(shared)
    inputs = {key: value.to(device) for key, value in batch(prompts).items()}
    pairs = [prompts, [prompt[:9] for prompt in prompts[::-1]]]

    stock, pat = (copy.deepcopy(model).to(device) for model in pair("Llama"))
    expected = {mode: run(stock, inputs, None, **kwargs) for mode, kwargs in MODES.items()}
    expected["scores"] = pat_hf.loglikelihoods(pat, *pairs).logprobs
    with tempfile.TemporaryDirectory() as folder:
        good = [
            compared(name, device_map, f"{folder}/{i}", inputs, expected, pairs)
            for i, (name, device_map) in enumerate(maps(gpus).items())
        ]
    print(f"{sum(good)} of {len(good)} placements on {gpus} GPUs give the tokens of sdpa")
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
