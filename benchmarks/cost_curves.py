"""
What `history` costs over `Trainer` as classes, samples, words and processes grow, one line of JSON a point.

    export OMP_NUM_THREADS=1
    python benchmarks/cost_curves.py --curves classes samples words
    torchrun --nproc-per-node 2 benchmarks/cost_curves.py --curves processes

Each point is a pair of trainings that take turns in one process, in both orders (benchmarks/step_time.py), by the
processor's clock. Of `processes` it is whole trainings in turns, epoch against epoch by the clock on the wall, as what
processes wait for one another counts. What counts for your own model are the milliseconds that a step takes more,
which hardly depend on the model: the models here are so small that the ratio is about the worst that there is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from comparison import machine, read_results
from loss import keep_freed_memory
from step_time import InMemory, Sentences, in_both_orders, interval, make_trainer
from torch.utils.data import Dataset
from transformers import TrainerCallback


PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # as torchrun says
TURNS = 8  # trainings of either side, where whole ones take turns
IMAGES = {"model": "small", "pixels": 32, "batch_size": 128, "steps_per_epoch": 10, "rounds": 6}
TOKENS = {"model": "marian", "batch_size": 16, "length": 24, "steps_per_epoch": 3, "rounds": 2, "top_k": 16}
CURVES = {
    "classes": [IMAGES | {"classes": count, "top_k": None} for count in (10, 100, 1000)]
    + [IMAGES | {"classes": count, "top_k": 32} for count in (100, 1000, 10_000)],
    "samples": [
        IMAGES
        | {"model": "tiny", "pixels": 8, "batch_size": 500, "classes": 100, "top_k": 32}
        | {"steps_per_epoch": steps, "rounds": rounds}
        for steps, rounds in ((20, 8), (200, 2), (2000, 1))
    ],
    "words": [TOKENS | {"classes": count} for count in (1000, 32_000, 128_000)],
    "processes": [IMAGES | {"classes": 100, "top_k": None, "processes": PROCESSES}],
}


class Epochs(TrainerCallback):
    """Seconds of the epochs of a training on the wall, without the first, which has no past to read."""

    def __init__(self):
        self.begun: list[float] = []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.begun.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [end - begin for begin, end in pairwise(self.begun[1:])]


def whole_trainings(args: argparse.Namespace, data: Dataset, folder: str) -> tuple[list[float], float, float]:
    """As `in_both_orders`, by whole trainings: turns within one would cross in what processes tell one another."""
    epochs: dict[bool, list[list[float]]] = {False: [], True: []}
    for turn in range(TURNS):
        for target in (False, True)[:: 1 if turn % 2 else -1]:
            trainer, clock = make_trainer(target, args, args.rounds + 2, data, folder), Epochs()
            trainer.add_callback(clock)
            trainer.train()
            epochs[target].append(clock.seconds)
    ratios = [sum(ours) / sum(plain) for plain, ours in zip(epochs[False], epochs[True], strict=True)]
    plain, ours = (1000 / args.steps_per_epoch * statistics.median(sum(epochs[side], [])) for side in (False, True))
    return ratios, plain, ours


def measure(curve: str, point: dict) -> dict:
    """One point: milliseconds of a step of either side, and their ratio."""
    args = argparse.Namespace(teacher="history", chunked_logits=False, **point)
    size = args.batch_size * args.steps_per_epoch * PROCESSES
    tokens = args.model == "marian"
    torch.manual_seed(0)  # the same data in every process
    data = Sentences(size, args.classes, args.length) if tokens else InMemory(size, args.classes, args.pixels)
    keep_freed_memory(True)
    with tempfile.TemporaryDirectory() as folder:
        if curve == "processes":
            ratios, plain, ours = whole_trainings(args, data, folder)
        else:
            ratios, plain, ours = in_both_orders(args, data, folder, time.process_time)
    keep_freed_memory(False)
    return {
        "curve": curve,
        **point,
        "samples": size,
        "plain_ms": round(plain, 2),
        "selfkd_ms": round(ours, 2),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_interval": [round(end, 4) for end in interval(ratios)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", nargs="+", choices=list(CURVES), default=list(CURVES))
    parser.add_argument("--results", type=Path, default=Path("cost_curves.jsonl"))
    args = parser.parse_args()
    done = read_results(args.results)
    for curve in args.curves:
        for point in CURVES[curve]:
            if any(row["curve"] == curve and point.items() <= row.items() for row in done):
                continue
            line = measure(curve, point) | machine()
            if os.environ.get("RANK", "0") != "0":
                continue
            with args.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
