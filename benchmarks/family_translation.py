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
import json
import tempfile
import time
from pathlib import Path

from comparison import machine, read_results, table
from transformers import DataCollatorForSeq2Seq, MarianMTModel, set_seed
from translation import make_task, recipe

from hf_selfkd import AuxiliaryHeadsConfig, Seq2SeqSelfKDTrainer, exit_model
from hf_selfkd.metrics import compute_translation_metrics


METHODS = ("family", "family, taught in full", "alone")
REPORTED = ("bleu", "chrf", "token_nll", "token_ece", "token_accuracy")
SHOWN = {
    "bleu": ("BLEU", 1),
    "chrf": ("chrF", 1),
    "token_nll": ("token NLL", 3),
    "token_ece": ("token ECE %", 1),
    "cpu_seconds": ("CPU s of training", 0),
}


def make_model(task: dict, layers: int) -> MarianMTModel:
    """A model with so many layers in its decoder, that writes greedily."""
    config = copy.deepcopy(task["config"])
    config.decoder_layers = layers
    model = MarianMTModel(config)
    model.generation_config.update(max_length=64, num_beams=1, bad_words_ids=None)
    return model


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


def measured(trainer: Seq2SeqSelfKDTrainer, model: MarianMTModel, test) -> dict:
    """The figures of a model on the test set."""
    whole, trainer.model, trainer.model_wrapped = trainer.model, model, model
    metrics = trainer.evaluate(test)
    trainer.model = trainer.model_wrapped = whole
    return {name: metrics[f"eval_{name}"] for name in REPORTED}


def trainings(method: str, args: argparse.Namespace) -> list[tuple[int, list[int]]]:
    """Layers and exits of each training of a method."""
    if method != "alone":
        return [(args.decoder_layers, args.exits)]
    return [(layers, []) for layers in (*args.exits, args.decoder_layers)]


def members(task: dict, method: str, seed: int, args: argparse.Namespace) -> list[dict]:
    """Train a method; a row for the whole model and each exit."""
    rows = []
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
                rows.append({"layers": kept, "cpu_seconds": seconds} | measured(trainer, member, task["test"]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_files", nargs="+", help="local parquet files; the Hub otherwise")
    parser.add_argument("--test_files", nargs="+")
    parser.add_argument("--source", default="de", help="column of the source sentences")
    parser.add_argument("--target", default="en", help="column of the target sentences")
    parser.add_argument("--max_train_samples", type=int, default=6000)
    parser.add_argument("--vocab_size", type=int, default=4000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2, help="of the encoder")
    parser.add_argument("--decoder_layers", type=int, default=4)
    parser.add_argument("--exits", nargs="+", type=int, default=[2])
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--keep", type=Path, help="folder for the family of the first seed")
    parser.add_argument("--results", type=Path, default=Path("results_family_translation.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the table of the results and stop")
    args = parser.parse_args()
    if not args.table:
        run_missing(args)
    rows = read_results(args.results)
    print(table(rows, list(dict.fromkeys(row["method"] for row in rows)), SHOWN))


def run_missing(args: argparse.Namespace) -> None:
    """Do the trainings that `--results` lacks."""
    task = make_task(args)
    done = {(row["training"], row["seed"]) for row in read_results(args.results)}
    for seed in args.seeds:
        for method in args.methods:
            if (method, seed) in done:
                continue
            rows = members(task, method, seed, args)
            with args.results.open("a") as file:
                for row in rows:
                    name = "whole" if row["layers"] == args.decoder_layers else f"exit {row['layers']}"
                    line = {"method": f"{method}, {name}", "training": method, "seed": seed, "epochs": args.epochs}
                    file.write(json.dumps(line | row | machine()) + "\n")
                    print(line | row, flush=True)


if __name__ == "__main__":
    main()
