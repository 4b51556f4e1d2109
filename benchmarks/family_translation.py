"""
A translation model with exits in its decoder against the same models with a shallower decoder trained alone.

`family` is the preset `exits` at `alpha=0`: the whole model and its exits learn from labels, exits also from the whole
model, as far as that knows the labels; in `family, taught in full` from every row alike. `alone` trains the whole
architecture and each one with fewer layers of the decoder for itself, plainly, for the same number of epochs. Every
finished training appends a JSON line for each member to `--results`; what is there is not repeated.
`--keep` saves the family of the first seed, for `benchmarks/speculative.py`.

    python benchmarks/family_translation.py --train_files "train-*.parquet" --test_files "test-*.parquet"
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path

from comparison import TRANSLATION, add_flags, evaluated, read_results, run_missing_families, table
from transformers import DataCollatorForSeq2Seq, MarianMTModel, set_seed
from translation import add_recipe_flags, greedy_marian, make_task, recipe

from hf_selfkd import AuxiliaryHeadsConfig, Seq2SeqSelfKDTrainer, exit_model
from hf_selfkd.metrics import compute_translation_metrics


METHODS = ("family", "family, taught in full", "alone")
REPORTED = ("bleu", "chrf", "token_nll", "token_ece", "token_accuracy")
SHOWN = TRANSLATION | {"cpu_seconds": ("CPU s of training", 0)}


def make_model(task: dict, layers: int) -> MarianMTModel:
    """A model with so many layers in its decoder."""
    config = copy.deepcopy(task["config"])
    config.decoder_layers = layers
    return greedy_marian(config)


def make_trainer(
    task: dict, model: MarianMTModel, exits: list[int], trust: bool, seed: int, folder: str, args: argparse.Namespace
) -> Seq2SeqSelfKDTrainer:
    """The trainer of all members: the recipe of `benchmarks/translation.py`."""
    layers = [exit - 1 for exit in exits]
    config = recipe(folder, seed, args, alpha=0.0)
    heads = AuxiliaryHeadsConfig.preset("exits", layers=layers, deep_to_shallow_trust=trust) if exits else None
    return Seq2SeqSelfKDTrainer(
        model,
        config,
        train_dataset=task["train"],
        processing_class=task["tokenizer"],
        data_collator=DataCollatorForSeq2Seq(task["tokenizer"], model=model),
        compute_metrics=compute_translation_metrics(task["tokenizer"]),
        auxiliary_heads=heads,
    )


def trainings(method: str, args: argparse.Namespace) -> list[tuple[int, list[int]]]:
    """Layers and exits of each training of a method."""
    if method != "alone":
        return [(args.decoder_layers, args.exits)]
    return [(layers, []) for layers in (*args.exits, args.decoder_layers)]


def members(task: dict, method: str, seed: int, args: argparse.Namespace) -> dict[str, dict]:
    """Train a method; the figures of the whole model and of each exit."""
    found = {}
    for layers, exits in trainings(method, args):
        set_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(task, make_model(task, layers), exits, method == "family", seed, folder, args)
            start = time.process_time()
            trainer.train()
            seconds = time.process_time() - start
            if args.keep and exits and seed == args.seeds[0]:
                trainer.args.save_heads = True
                trainer.save_model(str(args.keep))
            for kept in [*exits, layers]:
                member = trainer.model if kept == layers else exit_model(trainer.model, kept)
                figures = evaluated(trainer, member, task["test"])
                cost = {"epochs": args.epochs, "layers": kept, "cpu_seconds": seconds}
                name = "whole" if kept == args.decoder_layers else f"exit {kept}"
                found[name] = cost | {figure: figures[figure] for figure in REPORTED}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_files", nargs="+", help="local parquet files; the Hub otherwise")
    parser.add_argument("--test_files", nargs="+")
    parser.add_argument("--source", default="de", help="column of the source sentences")
    parser.add_argument("--target", default="en", help="column of the target sentences")
    parser.add_argument("--max_train_samples", type=int, default=6000)
    parser.add_argument("--vocab_size", type=int, default=4000)
    parser.add_argument("--decoder_layers", type=int, default=4)
    parser.add_argument("--exits", nargs="+", type=int, default=[2])
    add_recipe_flags(parser)
    parser.set_defaults(epochs=10)
    parser.add_argument("--keep", type=Path, help="folder for the family of the first seed")
    add_flags(parser, METHODS, [0, 1, 2], "results_family_translation.jsonl")
    args = parser.parse_args()
    if not args.table:
        task = make_task(args)
        run_missing_families(
            args.results, args.seeds, args.methods, lambda *one: members(task, *one, args), ("layers", *SHOWN)
        )
    rows = read_results(args.results)
    print(table(rows, list(dict.fromkeys(row["method"] for row in rows)), SHOWN))


if __name__ == "__main__":
    main()
