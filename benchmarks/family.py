"""
One training with exits against the same smaller architectures trained alone, with the same budget each.

    python benchmarks/family.py ag_news --pretrained MODEL --exits 2 4 --max_train_samples 400 --train_files ...
    python benchmarks/family.py cifar100 --model resnet --pixels 64 --exits 1 2 --images_per_class 50 --train_files ...

`family` is the preset `exits`: the whole model and its exits learn from labels, exits also from the whole model, as
far as that knows the labels; `taught in full` from every row alike. `family, PS-KD` adds past predictions to the
labels of all, `shallow first` lets the shallowest exit count ten times. `alone` trains the whole architecture and
each one with fewer layers for itself, plainly: pretrained models keep the first layers of the pretrained weights.
Every finished training appends a JSON line for each member to `--results`; what is there is not repeated. `--table`
prints the table.
"""

from __future__ import annotations

import argparse
import tempfile
import time

from classification import ag_news, cifar100, digits
from comparison import add_flags, evaluated, read_results, run_missing_families, table
from transformers import PreTrainedModel, ResNetConfig, ResNetForImageClassification, set_seed

from hf_selfkd import AuxiliaryHeadsConfig, SelfKDConfig, SelfKDTrainer, exit_model
from hf_selfkd.exits.export import native_head
from hf_selfkd.heads import attach_auxiliary_heads, strip_auxiliary_heads
from hf_selfkd.metrics import compute_classification_metrics


METHODS = {  # and their alpha
    "family": 0.0,
    "family, PS-KD": 0.8,
    "family, taught in full": 0.0,
    "family, shallow first, taught in full": 0.0,
    "alone": 0.0,
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


def train(task: dict, model: PreTrainedModel, alpha: float, heads: AuxiliaryHeadsConfig | None, seed: int) -> tuple:
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
            alpha=alpha,
            **task["arguments"],
        )
        trainer = SelfKDTrainer(
            model, config, compute_metrics=compute_classification_metrics, auxiliary_heads=heads, **data
        )
        start = time.perf_counter(), time.process_time()
        trainer.train()
        return trainer, time.perf_counter() - start[0], time.process_time() - start[1]


def heads_of_method(method: str, exits: list[int]) -> AuxiliaryHeadsConfig:
    """The preset, and what a method changes of it."""
    changes = {"deep_to_shallow_trust": "taught in full" not in method}
    if "shallow first" in method:
        changes["layer_weights"] = [10.0] + [1.0] * (len(exits) - 1)
    return AuxiliaryHeadsConfig.preset("exits", layers=[exit - 1 for exit in exits], **changes)


def trainings(method: str, exits: list[int]) -> list[tuple[int | None, list[int]]]:
    """Layers (`None` for all) and exits of each training of a method."""
    return [(exit, []) for exit in (*exits, None)] if method == "alone" else [(None, exits)]


def members(task: dict, method: str, seed: int, exits: list[int]) -> dict[str, dict]:
    """Train a method; the figures of the whole model and of each exit."""
    found = {}
    for layers, inside in trainings(method, exits):
        set_seed(seed)
        model = task["make_model"]()
        model = model if layers is None else truncated(model, layers)
        heads = heads_of_method(method, inside) if inside else None
        trainer, seconds, cpu = train(task, model, METHODS[method], heads, seed)
        for exit in [*inside, layers]:
            member = trainer.model if exit == layers else exit_model(trainer.model, exit)
            figures = evaluated(trainer, member, task["eval_dataset"])
            cost = {"exit": exit, "train_seconds": seconds, "cpu_seconds": cpu}
            error = {"error": 100 * (1 - figures["accuracy"])}
            name = "whole" if exit is None else f"exit {exit}"
            found[name] = cost | error | {figure: figures[figure] for figure in REPORTED}
    return found


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
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--max_grad_norm", type=float, default=1.0, help="of the Trainer; 0 does not clip")
    add_flags(parser, METHODS, [0, 1, 2], "results_family.jsonl")
    args = parser.parse_args()
    if not args.table:
        task = make_task(args)
        run_missing_families(
            args.results, args.seeds, args.methods, lambda *one: members(task, *one, args.exits), tuple(SHOWN)
        )
    rows = read_results(args.results)
    print(table(rows, list(dict.fromkeys(row["method"] for row in rows)), SHOWN))


def make_task(args: argparse.Namespace) -> dict:
    """What the trainer needs."""
    fixed = {"few_shot_fraction": 1.0, "validation_files": None, "label_noise": 0.0, "learning_rate": 0.05}
    of_task = "vit" if args.model == "vit" else None
    options = argparse.Namespace(**{**vars(args), **fixed, "model": of_task})
    task = {"cifar100": cifar100, "digits": digits, "ag_news": ag_news}[args.task](options)
    if args.model == "resnet":
        task["make_model"] = small_resnet
    task["arguments"]["max_grad_norm"] = args.max_grad_norm
    return task


if __name__ == "__main__":
    main()
