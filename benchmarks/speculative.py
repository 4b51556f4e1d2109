"""
Whether an exit that drafts makes the whole translation model faster.

The test sentences are translated greedily, one at a time, by the whole model, by each exit, and by the whole model
with each exit as its draft (`assistant_model` of transformers). Drafted translations must be those of the whole model,
token by token. The model is one that was saved with its exits, such as by

    python benchmarks/family_translation.py --train_files "train-*.parquet" --test_files "test-*.parquet" \
        --methods family --seeds 0 --keep outputs/family
    python benchmarks/speculative.py outputs/family --test_files "test-*.parquet"

Before each exit the whole model is timed again; ratios are to that.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import sacrebleu
import torch
from comparison import load, machine
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel
from translation import HUB_NAME

from hf_selfkd import exit_model, load_auxiliary_heads
from hf_selfkd.heads import heads_of


def translate(model: PreTrainedModel, sentences: list[list[int]], draft: PreTrainedModel | None = None) -> tuple:
    """Greedy translations, one sentence at a time, and their seconds."""
    start, written = time.perf_counter(), []
    for words in sentences:
        with torch.no_grad():
            found = model.generate(torch.tensor([words]), assistant_model=draft, max_new_tokens=63, do_sample=False)
        written.append(found[0].tolist())
    return written, time.perf_counter() - start


def measure(model: PreTrainedModel, sentences: list[list[int]]) -> Iterator[dict]:
    """A row for the whole model, each exit and each draft."""
    translate(model, sentences[:20])  # warm up
    for exit in heads_of(model).exits:
        small = exit_model(model, exit)
        whole, seconds = translate(model, sentences)
        yield {"member": "whole", "written": whole, "same": len(whole), "time_ratio": 1.0, "seconds": seconds}
        for name, arguments in ((f"exit {exit}", (small, sentences)), (f"draft {exit}", (model, sentences, small))):
            written, own = translate(*arguments)
            same = sum(one == other for one, other in zip(written, whole, strict=True))
            yield {"member": name, "written": written, "same": same, "time_ratio": own / seconds, "seconds": own}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model that was saved with its exits (save_heads=True)")
    parser.add_argument("--test_files", nargs="+", help="local parquet files; the Hub otherwise")
    parser.add_argument("--source", default="de")
    parser.add_argument("--target", default="en")
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--results", type=Path, default=Path("results_speculative.jsonl"))
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = load_auxiliary_heads(AutoModelForSeq2SeqLM.from_pretrained(args.model), args.model).eval()
    test = load(args.test_files, HUB_NAME, "test", args.sentences)
    sentences = [tokenizer(text, truncation=True, max_length=64)["input_ids"] for text in test[args.source]]
    for row in measure(model, sentences):
        texts = [text.strip() for text in tokenizer.batch_decode(row.pop("written"), skip_special_tokens=True)]
        row |= {"bleu": sacrebleu.corpus_bleu(texts, [test[args.target]]).score, "sentences": len(texts)}
        print(row, flush=True)
        with args.results.open("a") as file:
            file.write(json.dumps(row | machine()) + "\n")


if __name__ == "__main__":
    main()
