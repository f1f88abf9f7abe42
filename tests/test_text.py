"""Real text: the embedded model's answers, in batches, through a pipeline, streamed."""

import importlib.util
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline

import pat_hf

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def embedded():
    spec = importlib.util.spec_from_file_location("facts", EXAMPLES / "facts.py")
    facts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(facts)
    path = EXAMPLES / "facts-llama"
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    pairs = facts.batch(random.Random(7), questions=12, contexts=4)  # as the demo has them
    return model, tokenizer, pairs


def test_answers_are_right_and_those_of_stock(embedded):
    model, tokenizer, pairs = embedded
    inputs = tokenizer([p for p, _ in pairs], padding=True, return_tensors="pt")
    kwargs = {"do_sample": False, "max_new_tokens": 24}
    stock = model.generate(**inputs, **kwargs)
    with pat_hf.enabled(model):
        cache = pat_hf.PATCache(model)
        ours = model.generate(**inputs, **kwargs, past_key_values=cache)
    assert torch.equal(ours, stock)
    said = tokenizer.batch_decode(ours[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(s.strip() == wanted for s, (_, wanted) in zip(said, pairs, strict=True))
    assert right >= 0.95 * len(pairs)
    report = cache.report()
    # Instructions, documents, question: two shared levels.
    assert report.depth >= 3 and report.prompt_tokens > 8 * report.prefilled_tokens
    if model.device.type == "cpu":
        readme = (EXAMPLES.parent / "README.md").read_text()
        assert "\n".join(f"    {line}" for line in str(report).splitlines()) in readme


def test_pipeline(embedded):
    model, tokenizer, pairs = embedded
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = [prompt for prompt, _ in pairs[:4]]
    options = {"batch_size": 4, "do_sample": False, "return_full_text": False}
    stock = pipe(prompts, **options)
    with pat_hf.enabled(model):
        assert pipe(prompts, **options) == stock


def test_streamer(embedded, capsys):
    model, tokenizer, pairs = embedded
    prompt, answer = pairs[0]
    with pat_hf.enabled(model):
        model.generate(
            **tokenizer(prompt, return_tensors="pt"),
            do_sample=False,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    assert capsys.readouterr().out.strip() == answer
