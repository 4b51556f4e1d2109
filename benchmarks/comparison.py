"""What the benchmarks that compare methods share: data, the runs that are still missing, and their table."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, load_dataset
from transformers import PreTrainedModel, Trainer


FIGURES = {"error": ("error %", 2), "nll": ("NLL", 3), "ece": ("ECE %", 2), "aurc": ("AURC x1000", 2)}
DETECTION = {
    "map": ("mAP", 3),
    "map_50": ("mAP50", 3),
    "map_75": ("mAP75", 3),
    "d_ece": ("D-ECE %", 1),
    "counted": ("detections from 0.3", 0),
    "score": ("their mean score", 2),
    "precision": ("their precision", 2),
    "cpu_seconds": ("CPU seconds", 0),
}
PIXELS = {"mean_iou": ("mean IoU", 3), "pixel_accuracy": ("pixel accuracy", 3)}
MULTI_LABEL = {
    "map": ("mAP", 3),
    "micro_f1": ("micro F1", 3),
    "macro_f1": ("macro F1", 3),
    "bce": ("NLL", 3),
    "ece": ("ECE %", 2),
    "cpu_seconds": ("CPU s", 0),
}
SPEECH = {
    "cer": ("CER %", 1),
    "wer": ("WER %", 1),
    "nll": ("NLL a character", 3),
    "cpu_seconds": ("CPU s", 0),
}
TOKENS = {"token_nll": ("token NLL", 3), "token_ece": ("token ECE %", 2)}
TRANSLATION = {"bleu": ("BLEU", 1), "chrf": ("chrF", 1)} | TOKENS
PHONEMES = {"phoneme_error": ("phoneme error %", 2), "word_error": ("word error %", 2)} | TOKENS
COST = {
    "cpu_ms_per_image": ("CPU ms an image", 2),
    "cpu_seconds": ("CPU s", 0),
    "cpu_minutes": ("CPU minutes", 1),
}


def load(files: list[str] | None, name: str, split: str, limit: int | None) -> Dataset:
    """A split from local parquet files, or from the Hub."""
    if files:
        dataset = load_dataset("parquet", data_files={split: files}, split=split)
    else:
        dataset = load_dataset(name, split=split)
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def machine() -> dict:
    """What the figures were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def read_results(path: Path) -> list[dict]:
    """The finished runs of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def run_missing(
    path: Path, seeds: list[int], methods: list[str], run: Callable[[str, int], dict], shown: tuple
) -> None:
    """Do the runs that `path` lacks, append a line for each, and print the figures that are `shown`."""
    done = {(row["method"], row["seed"]) for row in read_results(path)}
    for seed in seeds:
        for method in methods:
            if (method, seed) in done:
                continue
            result = run(method, seed) | machine()
            with path.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print({key: result[key] for key in ("method", "seed", *shown)}, flush=True)


def run_missing_families(
    path: Path, seeds: list[int], methods: list[str], run: Callable[[str, int], dict[str, dict]], shown: tuple
) -> None:
    """As `run_missing`, of trainings that give several models: `run` gives the figures of each by its name."""
    done = {(row["training"], row["seed"]) for row in read_results(path)}
    for seed in seeds:
        for method in methods:
            if (method, seed) in done:
                continue
            members = run(method, seed)
            with path.open("a") as file:
                for name, figures in members.items():
                    line = {"method": f"{method}, {name}", "training": method, "seed": seed} | figures | machine()
                    file.write(json.dumps(line) + "\n")
                    print({key: line[key] for key in ("method", "seed", *shown)}, flush=True)


def evaluated(trainer: Trainer, model: PreTrainedModel, dataset: Any) -> dict[str, float]:
    """The figures of a model that was trained within another one, whose trainer evaluates it."""
    whole, trainer.model, trainer.model_wrapped = trainer.model, model, model
    metrics = trainer.evaluate(dataset)
    trainer.model = trainer.model_wrapped = whole
    return {name.removeprefix("eval_"): value for name, value in metrics.items()}


def add_flags(parser: argparse.ArgumentParser, methods: Iterable[str], seeds: list[int], results: str) -> None:
    """The flags of every comparison."""
    names = list(methods)
    parser.add_argument("--methods", nargs="+", default=names, choices=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds)
    parser.add_argument(
        "--results", type=Path, default=Path(results), help="JSON lines; what is there is not run again"
    )
    parser.add_argument("--table", action="store_true", help="print the table of the results and do nothing else")


def table(results: list[dict], methods: list[str], metrics: dict[str, tuple[str, int]]) -> str:
    """
    The Markdown table: mean and standard deviation over seeds of every figure.

    Args:
        results (`list[dict]`): the finished runs.
        methods (`list[str]`): the rows; a method without runs is left out.
        figures (`dict`): `name: (title, digits)` of the columns.
    """
    lines = [
        "| method | seeds | " + " | ".join(title for title, _ in metrics.values()) + " |",
        "|---|---|" + "---|" * len(metrics),
    ]
    for method in methods:
        rows = [row for row in results if row["method"] == method]
        if not rows:
            continue
        cells = []
        for name, (_, digits) in metrics.items():
            values = [row[name] for row in rows]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(f"| {method} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
