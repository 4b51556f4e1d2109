"""
Early exit of a text classifier on real data: is the promise kept on the test set, and how much time is saved?

    hf-selfkd train text-classification ... --auxiliary_heads exits --save_heads --output_dir texts
    python benchmarks/early_exit_texts.py texts --validation_files validation.parquet --test_files test.parquet

Thresholds are calibrated on the validation texts, for one `max_accuracy_loss` after the other, and checked on the test
texts, none of which was used before. The time is that of the test texts (`--timed` of them), alone and in batches of
32, over the time of the whole model, in alternating rounds within one process.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from comparison import load, machine
from early_exit import measure
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_selfkd import EarlyExit, load_auxiliary_heads


def batches_of(dataset, tokenizer, size: int) -> list[dict[str, torch.Tensor]]:
    """Padded batches with labels."""
    found = []
    for start in range(0, len(dataset), size):
        part = dataset[start : start + size]
        texts = tokenizer(list(part["text"]), truncation=True, max_length=48, padding=True, return_tensors="pt")
        found.append({**texts, "labels": torch.tensor(part["label"])})
    return found


def checked(early: EarlyExit, batches: list[dict[str, torch.Tensor]], whole: list[torch.Tensor]) -> dict[str, float]:
    """Accuracy of early exit and the whole model on the test texts, and how often only the whole model is right."""
    early.reset()
    found = torch.cat([early(**inputs).logits.argmax(-1) for inputs in without_labels(batches)])
    labels, said = torch.cat([batch["labels"] for batch in batches]), torch.cat(whole)
    return {
        "accuracy": float((found == labels).float().mean()),
        "whole_accuracy": float((said == labels).float().mean()),
        "failures": float(((said == labels) & (found != labels)).float().mean()),
        "test_samples": len(labels),
        "test_shares": early.shares(),
    }


def without_labels(batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """The inputs of batches."""
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of a training with exits")
    parser.add_argument("--validation_files", nargs="+", required=True)
    parser.add_argument("--test_files", nargs="+", required=True)
    parser.add_argument("--max_test_samples", type=int)
    parser.add_argument("--losses", nargs="+", type=float, default=[0.02, 0.01, 0.005])
    parser.add_argument("--timed", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, default=Path("early_exit_texts.jsonl"))
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    validation, test = load(args.validation_files, "", "train", None), load(args.test_files, "", "train", None)
    test = test if args.max_test_samples is None else test.select(range(args.max_test_samples))
    model = load_auxiliary_heads(AutoModelForSequenceClassification.from_pretrained(args.folder), args.folder).eval()
    early, batches = EarlyExit(model), batches_of(test, tokenizer, 100)
    with torch.no_grad():
        whole = [model(**inputs).logits.argmax(-1) for inputs in without_labels(batches)]
    (timed,) = without_labels(batches_of(test.select(range(args.timed)), tokenizer, args.timed))
    for loss in args.losses:
        summary = early.calibrate(batches_of(validation, tokenizer, 100), max_accuracy_loss=loss)
        row = {
            "method": f"max_accuracy_loss={loss}",
            "seed": 0,
            "validation_samples": len(validation),
            "thresholds": summary.thresholds,
        }
        row |= {"validation_accuracy": summary.accuracy} | checked(early, batches, whole)
        for size in (1, 32):
            times = measure(early, timed, size, args.rounds)
            row |= {f"ratio_batch_{size}": times["ratio"], f"quartiles_batch_{size}": times["quartiles"]}
        row["operations"] = times["operations"]
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | machine()) + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    main()
