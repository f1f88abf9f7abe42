"""Logits of captured steps on a GPU: their error over 256 forced tokens, and that of sdpa.

    python tests/gpu/logits.py [--layers 36] [--decode captured]

A model of Qwen3-8B's shape in bfloat16, its logits against the same weights in float32. Fails if
the error, at its mean or at its worst, is more than twice that of sdpa on a DynamicCache.
"""

import argparse
import copy
import sys

import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, Qwen3Config

import pat_hf


class Force(LogitsProcessor):
    """Makes `generate()` choose given tokens [batch, steps], whatever the scores."""

    def __init__(self, tokens, start):
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids, scores):
        wanted = self.tokens[:, input_ids.shape[1] - self.start]
        return torch.zeros_like(scores).scatter(1, wanted[:, None], 1.0)


def logits(model, prompts, tokens, cache=None):
    """Raw logits of every step, on the CPU: a list of float32 [batch, vocabulary]."""
    out = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        past_key_values=cache,
        max_new_tokens=tokens.shape[1],
        min_new_tokens=tokens.shape[1],
        do_sample=False,
        pad_token_id=0,
        logits_processor=[Force(tokens, prompts.shape[1])],
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences[:, prompts.shape[1] :], tokens)
    return out.logits


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--decode", nargs="+", default=["captured", "compiled"])
    args = parser.parse_args()
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=args.layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        shared = torch.randint(0, config.vocab_size, (1, 1024)).expand(8, -1)
        prompts = torch.cat([shared, torch.randint(0, config.vocab_size, (8, 64))], 1)
        tokens = torch.randint(0, config.vocab_size, (8, args.steps))
    exact = logits(copy.deepcopy(model).float(), prompts, tokens)

    def error(given):
        gaps = torch.stack([(a - b).abs().amax() for a, b in zip(given, exact, strict=True)])
        means = torch.stack([(a - b).abs().mean() for a, b in zip(given, exact, strict=True)])
        return gaps.max().item(), means.mean().item()

    sdpa = error(logits(model, prompts, tokens))
    print(f"sdpa: worst {sdpa[0]:.4f}, mean {sdpa[1]:.5f}")
    model.set_attn_implementation("pat")
    bad = False
    for decode in args.decode:
        cache = pat_hf.PATCache(model, decode=decode)
        ours = error(logits(model, prompts, tokens, cache))
        ratios = [a / b for a, b in zip(ours, sdpa, strict=True)]
        bad |= max(ratios) > 2 or not cache.decoding.endswith("(as asked for)")
        print(
            f"pat, {cache.decoding}: worst {ours[0]:.4f} ({ratios[0]:.2f} of sdpa's), "
            f"mean {ours[1]:.5f} ({ratios[1]:.2f})"
        )
    sys.exit("more than twice the error of sdpa" if bad else 0)


if __name__ == "__main__":
    main()
