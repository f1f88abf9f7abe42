"""Train, or evaluate, the embedded model `facts-llama`: a small Llama that looks up facts.

    python examples/train_facts.py --minutes 4                      # on a GPU
    python examples/train_facts.py --evaluate examples/facts-llama  # anywhere
    python examples/train_facts.py --evaluate examples/facts-llama --attn pat

Many questions are trained on each context. They don't see each other, and their positions start
where the documents end, so each is trained exactly as it will be asked: right after the documents.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data workers fork

import facts
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
LENGTHS = (1, 4, 8, 10, 14)  # documents per evaluated context; 10 make about 1,000 tokens
QUESTIONS = 14  # per training context
QUESTION_TOKENS = 20  # what one question and its answer take, roughly


# --- tokenizer -----------------------------------------------------------------------------------


def train_tokenizer(vocab_size: int, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over words, pairs of digits and single newlines.

    A newline never merges, so the tokens of instructions, documents and question don't depend on
    what follows them: equal texts in front are equal tokens in front.
    """
    bpe = Tokenizer(models.BPE())
    words = r"\n| ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]|\s"
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    rng = random.Random(f"tokenizer {seed}")
    texts = (
        text
        for _ in range(1000)
        for d in facts.documents(rng, 4)
        for text in (facts.context([d]), *map(facts.ask, (f.question for f in d.facts)))
    )
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", special.index("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


# --- data ----------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Rows of one context and its questions, right-padded, all (rows, length)."""

    tokens: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor  # 0: context, i > 0: the i-th question with its answer, -1: padding
    answers: torch.Tensor  # whether a token belongs to an answer, end token included


def make_batch(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, documents: int, rows: int
) -> Batch:
    """Draw `rows` contexts of `documents` documents, each with up to QUESTIONS questions."""
    asked = []
    texts = []
    for _ in range(rows):
        drawn = facts.documents(rng, documents)
        known = [fact for d in drawn for fact in d.facts]
        chosen = rng.sample(known, min(QUESTIONS, len(known)))
        asked.append(len(chosen))
        texts.append(facts.context(drawn))
        for fact in chosen:
            texts += [facts.ask(fact.question), " " + fact.answer]
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ids = iter([e.ids for e in encoded])

    packed = []
    for count in asked:
        context = [tokenizer.bos_token_id, *next(ids)]
        tokens, positions = list(context), list(range(len(context)))
        segments, answers = [0] * len(context), [False] * len(context)
        for i in range(1, count + 1):
            question, answer = next(ids), [*next(ids), tokenizer.eos_token_id]
            size = len(question) + len(answer)
            tokens += question + answer
            positions += range(len(context), len(context) + size)
            segments += [i] * size
            answers += [False] * len(question) + [True] * len(answer)
        packed.append((tokens, positions, segments, answers))

    length = -(-max(len(row[0]) for row in packed) // 64) * 64
    fields = []
    for field, (pad, dtype) in enumerate(
        [(tokenizer.pad_token_id, np.int64), (0, np.int64), (-1, np.int64), (False, np.bool_)]
    ):
        table = np.full((rows, length), pad, dtype)
        for i, row in enumerate(packed):
            table[i, : len(row[field])] = row[field]
        fields.append(torch.from_numpy(table))
    return Batch(*fields)


class Stream(IterableDataset):
    """Endless training batches of about `tokens` tokens, of at most `level` documents a row."""

    def __init__(self, tokenizer, tokens: int, seed: int, level) -> None:
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.seed = seed
        self.level = level

    def __iter__(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"train {self.seed} {worker.id if worker else 0}")
        while True:
            documents = rng.randint(1, int(self.level.value))
            length = 210 + 80 * documents + QUESTION_TOKENS * QUESTIONS
            yield make_batch(rng, self.tokenizer, documents, max(1, self.tokens // length))


# --- model ---------------------------------------------------------------------------------------


def new_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with grouped-query attention: 8 heads of 64 on 2 key/value heads."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 3 // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        initializer_range=0.04,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def forward(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of every token but the first, and whether it was the likeliest."""
    own = batch.segments[:, :, None] == batch.segments[:, None, :]
    shared = (batch.segments >= 0)[:, :, None] & (batch.segments == 0)[:, None, :]
    visible = (own | shared).tril()
    logits = model(
        input_ids=batch.tokens,
        attention_mask=visible[:, None],
        position_ids=batch.positions,
        use_cache=False,
    ).logits[:, :-1]
    target = batch.tokens[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")
    return loss.view_as(target), logits.argmax(-1) == target


def exact(batch: Batch, right: torch.Tensor) -> float:
    """The share of questions all of whose answer tokens are right: the greedy answer is exact."""
    segments = batch.segments[:, 1:].clamp(min=0)
    wrong = (~right & batch.answers[:, 1:]).long()
    misses = torch.zeros(len(wrong), QUESTIONS + 1, dtype=torch.long, device=wrong.device)
    misses.scatter_add_(1, segments, wrong)
    asked = torch.zeros_like(misses).scatter_add_(1, segments, batch.answers[:, 1:].long()) > 0
    return (misses[asked] == 0).float().mean().item()


def train(args: argparse.Namespace) -> None:
    """Train and save, saving once a minute on the way; ends at --steps or --minutes."""
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for each of our many shapes
    if args.init:
        tokenizer = AutoTokenizer.from_pretrained(args.init)
        model = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(args.vocab, args.seed)
        model = new_model(tokenizer, args)
    model.to(device).train()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(tokenizer)} tokens, {model.device}", flush=True)

    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
    level = multiprocessing.Value("d", args.documents if args.init else args.level)
    loader = DataLoader(
        Stream(tokenizer, args.tokens, args.seed, level),
        batch_size=None,
        num_workers=args.workers,
        prefetch_factor=4 if args.workers else None,
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)
    held_out = random.Random("held out while training")
    rows = max(1, args.tokens // 2048)
    checks = {
        n: Batch(*(t.to(device) for t in make_batch(held_out, tokenizer, n, rows)))
        for n in (1, 4, 10)
        if n <= args.documents
    }
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    begun = saved = time.monotonic()
    waited = 0.0
    for step in range(args.steps):
        before = time.monotonic()
        batch = Batch(*(t.to(device, non_blocking=True) for t in next(batches)))
        waited += time.monotonic() - before
        done = max(step / args.steps, (before - begun) / 60 / args.minutes)
        warm = min(1.0, (step + 1) / args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = (
                args.lr * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * min(1, done))) / 2)
            )
        with autocast:
            loss, right = forward(model, batch)
        is_answer = batch.answers[:, 1:]
        answer_loss = loss[is_answer].mean()
        other_loss = loss[(batch.segments[:, 1:] >= 0) & ~is_answer].mean()
        (answer_loss + args.other_loss * other_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if level.value < args.documents and exact(batch, right) > 0.8:
            level.value = min(args.documents, level.value + 0.03)
        if step % args.report == 0:
            model.eval()
            with torch.no_grad(), autocast:
                scores = {n: exact(check, forward(model, check)[1]) for n, check in checks.items()}
            model.train()
            print(
                f"step {step} {time.monotonic() - begun:.0f}s (waited {waited:.0f}s) "
                f"level {level.value:.1f} batch {tuple(batch.tokens.shape)} "
                f"answers {answer_loss.item():.3f} "
                f"others {other_loss.item():.3f} held-out "
                + " ".join(f"{n}: {score:.1%}" for n, score in scores.items()),
                flush=True,
            )
        if time.monotonic() - saved > 60:
            save(model, tokenizer, args.out)
            saved = time.monotonic()
        if done >= 1:
            break
    seconds = time.monotonic() - begun
    del batches, loader, optimizer, checks
    save(model, tokenizer, args.out)
    print(f"{step + 1} steps in {seconds:.0f}s", flush=True)

    results = evaluate(args.out, "sdpa", args.device, args.count)
    write_card(args, parameters, step + 1, seconds, results)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model with weights rounded to bfloat16, and the tokenizer."""
    rounded = LlamaForCausalLM(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config.do_sample = False
    rounded.generation_config.max_new_tokens = 24
    rounded.save_pretrained(out)
    tokenizer.save_pretrained(out)


# --- evaluation ----------------------------------------------------------------------------------


class Result(NamedTuple):
    """How many of the greedy answers were exactly right, at one number of documents."""

    documents: int
    tokens: float
    asked: int
    right: int


def accuracy(
    model: Any,
    tokenizer: Any,
    pairs: list[tuple[str, str]],
    batch_size: int = 64,
    new_cache: Callable[[], Any] | None = None,
) -> tuple[int, float]:
    """Answer `pairs` of prompt and answer greedily: the number exactly right, tokens per prompt."""
    right = tokens = 0
    for start in range(0, len(pairs), batch_size):
        prompts, answers = zip(*pairs[start : start + batch_size], strict=True)
        inputs = tokenizer(list(prompts), padding=True, return_tensors="pt").to(model.device)
        inputs.pop("token_type_ids", None)
        options = {"past_key_values": new_cache()} if new_cache else {}
        with torch.no_grad():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=24, **options)
        said = tokenizer.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += sum(s.strip() == a for s, a in zip(said, answers, strict=True))
        tokens += int(inputs["attention_mask"].sum())
    return right, tokens / len(pairs)


def evaluate(
    path: Path,
    attn: str = "sdpa",
    device: str = "cpu",
    count: int = 256,
    lengths: tuple[int, ...] = LENGTHS,
    dtype: torch.dtype = torch.float32,
) -> list[Result]:
    """Ask a saved model `count` held-out questions at each number of documents; print and return.

    Up to eight questions share a context. Contexts come from seeds that training never uses.
    """
    if not (Path(path) / "config.json").exists():
        raise SystemExit(f"no model at {path}; train one with --out {path}")
    new_cache = None
    if attn == "pat":
        import pat_hf
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attn, dtype=dtype)
    model.to(device).eval()
    if attn == "pat":

        def new_cache() -> pat_hf.PATCache:
            return pat_hf.PATCache(model)

    results = []
    for documents in lengths:
        rng = random.Random(f"held out {documents}")
        questions = min(8, 4 * documents)  # each document states at least four facts
        pairs = facts.batch(rng, documents, questions, contexts=-(-count // questions))
        right, tokens = accuracy(model, tokenizer, pairs, 32, new_cache)
        results.append(Result(documents, tokens, len(pairs), right))
        print(
            f"{documents:3} documents {tokens:6.0f} tokens: {right}/{len(pairs)} right, "
            f"{right / len(pairs):.2%}",
            flush=True,
        )
    return results


def write_card(
    args: argparse.Namespace, parameters: int, steps: int, seconds: float, results: list[Result]
) -> None:
    """Write the model's README.md: what it is, what was measured, how it was trained."""
    cuda = torch.cuda.is_available() and args.device.startswith("cuda")
    hardware = f"one {torch.cuda.get_device_name()}" if cuda else "a CPU"
    rows = "\n".join(
        f"| {r.documents} | {r.tokens:.0f} | {r.right} of {r.asked} | {r.right / r.asked:.1%} |"
        for r in results
    )
    (args.out / "README.md").write_text(
        CARD.format(**locals(), minutes=args.minutes, seed=args.seed)
    )


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# facts-llama

A Llama of {parameters:,} parameters (grouped-query attention, 8 heads of 64 on 2 key/value heads)
that answers questions from facts stated in its prompt, and does nothing else. Demo, examples and
tests use it: it runs offline, on a CPU, on text a person can read, and an answer is right or wrong.

Prompts come from [`facts.py`](../facts.py): instructions, then documents, then one question. All
text is generated, so there is nothing to memorise; weights are stored in bfloat16.

Held-out accuracy: exact match of the greedy answer, in float32 with the weights stored here. The
contexts were drawn from seeds that training doesn't use.

| documents | tokens in the prompt | right | accuracy |
| --- | --- | --- | --- |
{rows}

Trained for {steps} steps in {seconds:.0f} s on {hardware} with

    python examples/train_facts.py --minutes {minutes:g} --seed {seed}

How far training gets in that time depends on the machine, so a repetition gives a similar model,
not the same one. To measure again:

    python examples/train_facts.py --evaluate examples/facts-llama
"""


def main() -> None:
    """Parse arguments; train, or with --evaluate measure a saved model."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--evaluate", type=Path, metavar="MODEL", help="measure, don't train")
    parser.add_argument("--attn", default="sdpa", help="sdpa, eager or pat (with --evaluate)")
    parser.add_argument("--dtype", default="float32", help="of the weights (with --evaluate)")
    parser.add_argument("--count", type=int, default=256, help="questions asked per length")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--out", type=Path, default=HERE / "facts-llama")
    parser.add_argument("--init", type=Path, metavar="MODEL", help="go on from a saved model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20000, help="stop after so many steps")
    parser.add_argument("--minutes", type=float, default=4.2, help="or after so many minutes")
    parser.add_argument("--tokens", type=int, default=1 << 16, help="per step")
    parser.add_argument("--documents", type=int, default=14, help="at most, in training")
    parser.add_argument("--level", type=float, default=4.0, help="documents at most, at first")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=150, help="steps")
    parser.add_argument("--other-loss", type=float, default=0.3, help="weight of other tokens")
    parser.add_argument("--vocab", type=int, default=3072)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2))
    parser.add_argument("--report", type=int, default=100, help="steps between reports")
    args = parser.parse_args()
    if args.evaluate:
        evaluate(
            args.evaluate, args.attn, args.device, args.count, dtype=getattr(torch, args.dtype)
        )
    else:
        train(args)


if __name__ == "__main__":
    main()
