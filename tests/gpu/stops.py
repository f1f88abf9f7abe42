"""Requests that end at different steps, on a GPU: the same tokens as sdpa, in all ways to decode.

    python tests/gpu/stops.py

Stops are looked at a step late there, unless a default device is set, as the other tests do. And a
loop of the caller's that keeps the logits of captured steps; a step that can't be captured, which
is found out while it is; and a store that was saved on the CPU serves a model on the GPU.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path

import torch
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import batch, pair  # noqa: E402

import pat_hf  # noqa: E402

MODES = {
    "greedy": {"do_sample": False},
    "samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
}


def tokens(model, inputs, cache, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """What is generated, and the next random number."""
    torch.manual_seed(0)
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=60, **kwargs)
    return out.cpu(), torch.rand(1, device=out.device).cpu()


def keeping(model, input_ids, generation_config, logits_processor, stopping_criteria, **kwargs):
    """A loop of a caller's own, who keeps the logits of all steps: [steps, batch, vocabulary]."""
    kept = [model._prefill(input_ids, generation_config, kwargs).logits[:, -1]]
    mask = kwargs["attention_mask"]
    for _ in range(5):
        mask = torch.cat([mask, mask[:, -1:]], 1)
        step = {"input_ids": kept[-1].argmax(-1, keepdim=True), "attention_mask": mask}
        step |= {"position_ids": mask.sum(1, keepdim=True) - 1, "use_cache": True}
        step |= {"past_key_values": kwargs["past_key_values"]}
        kept.append(model(**step).logits[:, -1])
    return torch.stack(kept)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(2, 97, (90,), generator=generator).tolist()
    inputs = batch([shared[:n] + [2 + n % 60] * (1 + n % 7) for n in (90, 90, 61, 40, 7)])
    cpu_cache = pat_hf.PATCache(pair("Llama")[1], keep_bytes=1 << 20)
    tokens(pair("Llama")[1], inputs, cpu_cache, do_sample=False)
    inputs = {key: value.to(device) for key, value in inputs.items()}
    stock, pat = (copy.deepcopy(model).to(device) for model in pair("Llama"))
    failed = 0
    for ends in ([5], [5, 17, 40], list(range(2, 60))):
        for mode, kwargs in MODES.items():
            expected = tokens(stock, inputs, None, eos_token_id=ends, **kwargs)
            for decode in ("eager", "captured", "compiled"):
                cache = pat_hf.PATCache(pat, page_size=16, decode=decode)
                for turn in ("first", "second"):
                    ours = tokens(pat, inputs, cache, eos_token_id=ends, **kwargs)
                    good = all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
                    failed += not good
                    print(f"{len(ends)} ends, {mode}, {decode}, {turn}: {good}; {cache.decoding}")
    expected = stock.generate(
        **inputs, past_key_values=DynamicCache(config=stock.config), custom_generate=keeping
    )
    for decode in ("captured", "compiled"):
        cache = pat_hf.PATCache(pat, page_size=16, decode=decode)
        kept = pat.generate(**inputs, past_key_values=cache, custom_generate=keeping)
        good = torch.allclose(kept, expected, atol=1e-3)
        failed += not good
        print(f"logits kept by a loop of the caller's, {decode}: {good}; {cache.decoding}")
    norm = pat.model.norm.forward
    pat.model.norm.forward = lambda x: norm(x * float(x.isfinite().all()))  # waits for the device
    for mode, kwargs in MODES.items() if device.type == "cuda" else ():
        expected = tokens(stock, inputs, None, **kwargs)
        for decode in ("captured", "compiled"):
            cache, stream = pat_hf.PATCache(pat, decode=decode), torch.cuda.current_stream()
            for turn in ("first", "second"):
                ours = tokens(pat, inputs, cache, **kwargs)
                good = all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
                good &= torch.cuda.current_stream() == stream and "failed" in cache.decoding
                failed += not good
                print(f"not to be captured, {mode}, {decode}, {turn}: {good}; {cache.decoding}")
    del pat.model.norm.forward
    with tempfile.TemporaryDirectory() as folder:
        cpu_cache.save(f"{folder}/store.safetensors")
        cache = pat_hf.PATCache.load(f"{folder}/store.safetensors", pat)
    good = torch.equal(
        tokens(pat, inputs, cache, do_sample=False)[0],
        tokens(stock, inputs, None, do_sample=False)[0],
    )
    print("store from the CPU:", good, cache.report(), sep="\n")
    sys.exit(bool(failed) or not good)


if __name__ == "__main__":
    main()
