"""
One training with exits against the same smaller architectures trained alone, with the same budget each.

    python benchmarks/family.py ag_news --pretrained MODEL --exits 2 4 --max_train_samples 400 --train_files ...
    python benchmarks/family.py cifar100 --model resnet --pixels 64 --exits 1 2 --images_per_class 50 --train_files ...

`family` is the preset `exits`: the whole model and its exits learn from labels, exits also from the whole model;
`family, PS-KD` adds past predictions to the labels of all, `family, shallow first` lets the shallowest exit count ten
times. `alone` trains the whole architecture and each one with
fewer layers for itself, plainly: pretrained models keep the first layers of the pretrained weights. Every finished
training appends a JSON line for each member to `--results`; what is there is not repeated. `--table` prints the table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from classification import ag_news, cifar100, digits
from comparison import machine, read_results, table
from transformers import PreTrainedModel, ResNetConfig, ResNetForImageClassification, set_seed

from hf_selfkd import AuxiliaryHeadsConfig, SelfKDConfig, SelfKDTrainer, exit_model
from hf_selfkd.exits.export import native_head
from hf_selfkd.heads import attach_auxiliary_heads, strip_auxiliary_heads
from hf_selfkd.metrics import compute_classification_metrics


METHODS = {
    "family": {"alpha": 0.0},
    "family, PS-KD": {"alpha": 0.8},
    "family, shallow first": {"alpha": 0.0},
    "alone": {"alpha": 0.0},
}
REPORTED = ("accuracy", "nll", "brier", "ece", "ece_15", "aurc")
SHOWN = {
    "error": ("error %", 2),
    "nll": ("NLL", 3),
    "ece": ("ECE %", 2),
    "aurc": ("AURC x1000", 1),
    "train_seconds": ("seconds", 0),
}


def small_resnet() -> ResNetForImageClassification:
    """A ResNet of three stages as its configuration says, with the stem that divides sizes by 4."""
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic", num_labels=100
        )
    )


def truncated(model: PreTrainedModel, exit: int) -> PreTrainedModel:
    """The first layers of a model that is not trained yet, with the model's own classifier on top."""
    attach_auxiliary_heads(model, AuxiliaryHeadsConfig(head="native", layers=[exit - 1]))
    small = exit_model(model, native_head(model, exit).exit).train()
    strip_auxiliary_heads(model)
    return small


def train(task: dict, model: PreTrainedModel, settings: dict, heads: AuxiliaryHeadsConfig | None, seed: int) -> tuple:
    """Train once; the trainer, and seconds of the clock and of the processor."""
    data = {name: task[name] for name in ("train_dataset", "data_collator") if name in task}
    with tempfile.TemporaryDirectory() as folder:
        config = SelfKDConfig(
            folder,
            seed=seed,
            per_device_eval_batch_size=256,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="error",
            **task["arguments"],
            **settings,
        )
        trainer = SelfKDTrainer(
            model, config, compute_metrics=compute_classification_metrics, auxiliary_heads=heads, **data
        )
        start = time.perf_counter(), time.process_time()
        trainer.train()
        return trainer, time.perf_counter() - start[0], time.process_time() - start[1]


def measured(trainer: SelfKDTrainer, model: PreTrainedModel, test) -> dict:
    """The figures of a model on the test set."""
    whole, trainer.model, trainer.model_wrapped = trainer.model, model, model
    metrics = trainer.evaluate(test)
    trainer.model = trainer.model_wrapped = whole
    found = {name: metrics[f"eval_{name}"] for name in REPORTED}
    return {"error": 100 * (1 - found["accuracy"])} | found


def members(task: dict, method: str, exits: list[int], seed: int) -> list[dict]:
    """Train a method; a row for the whole model and each exit."""
    set_seed(seed)
    model = task["make_model"]()
    layers = [exit - 1 for exit in exits]
    rows = []
    if method == "alone":
        for exit in [*exits, None]:
            set_seed(seed)
            model = task["make_model"]()
            small = model if exit is None else truncated(model, exit)
            trainer, seconds, cpu = train(task, small, METHODS[method], None, seed)
            rows.append(
                {"exit": exit, "train_seconds": seconds, "cpu_seconds": cpu}
                | measured(trainer, small, task["eval_dataset"])
            )
        return rows
    heads = AuxiliaryHeadsConfig.preset("exits", layers=layers)
    if method == "family, shallow first":
        heads.layer_weights = [10.0] + [1.0] * (len(layers) - 1)
    trainer, seconds, cpu = train(task, model, METHODS[method], heads, seed)
    for exit in [*exits, None]:
        member = trainer.model if exit is None else exit_model(trainer.model, exit)
        rows.append(
            {"exit": exit, "train_seconds": seconds, "cpu_seconds": cpu}
            | measured(trainer, member, task["eval_dataset"])
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("cifar100", "digits", "ag_news"))
    parser.add_argument("--train_files", nargs="+", help="local parquet files; the Hub otherwise")
    parser.add_argument("--test_files", nargs="+")
    parser.add_argument("--pretrained", help="folder or name of the model that AG News fine-tunes")
    parser.add_argument("--exits", nargs="+", type=int, required=True, help="layers or stages of each exit")
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--max_test_samples", type=int)
    parser.add_argument("--images_per_class", type=int)
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--model", choices=("resnet", "vit"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--max_grad_norm", type=float, default=1.0, help="of the Trainer; 0 does not clip")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--table", action="store_true", help="print the table of the results and stop")
    args = parser.parse_args()
    path = args.results or Path(f"family_{args.task}.jsonl")
    if not args.table:
        run_missing(path, args)
    rows = read_results(path)
    print(table(rows, list(dict.fromkeys(row["method"] for row in rows)), SHOWN))


def run_missing(path: Path, args: argparse.Namespace) -> None:
    """Do the trainings that `path` lacks."""
    fixed = {"few_shot_fraction": 1.0, "validation_files": None, "label_noise": 0.0, "learning_rate": 0.05}
    of_task = "vit" if args.model == "vit" else None
    options = argparse.Namespace(**{**vars(args), **fixed, "model": of_task})
    task = {"cifar100": cifar100, "digits": digits, "ag_news": ag_news}[args.task](options)
    if args.model == "resnet":
        task["make_model"] = small_resnet
    task["arguments"]["max_grad_norm"] = args.max_grad_norm
    done = {(row["training"], row["seed"]) for row in read_results(path)}
    for seed in args.seeds:
        for method in args.methods:
            if (method, seed) in done:
                continue
            rows = members(task, method, args.exits, seed)
            with path.open("a") as file:
                for row in rows:
                    name = "whole" if row["exit"] is None else f"exit {row['exit']}"
                    line = {"method": f"{method}, {name}", "training": method, "seed": seed} | row | machine()
                    file.write(json.dumps(line) + "\n")
                    print({key: line[key] for key in ("method", "seed", *SHOWN)}, flush=True)


if __name__ == "__main__":
    main()
