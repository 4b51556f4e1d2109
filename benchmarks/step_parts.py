"""
Where each millisecond of a step of `SelfKDTrainer` goes, one line of JSON.

    export OMP_NUM_THREADS=1
    python benchmarks/step_parts.py --model small
    python benchmarks/step_parts.py --model resnet18 --steps_per_epoch 5
    python benchmarks/step_parts.py --model marian --batch_size 64 --classes 32000 --steps_per_epoch 3 --epochs 4

The parts of `SelfDistiller.step`, the backward pass and the optimizer are timed by the processor's clock while the
past is read, from the second epoch on; what is left of the time of the epochs is the loop of `Trainer`, its data and
logging. `of plain training too` is what `Trainer` does as well. The models are those of benchmarks/step_time.py, which
says what a step costs over one of `Trainer`: reading the clock adds some microseconds here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from comparison import machine
from loss import keep_freed_memory
from step_time import MODELS, InMemory, Sentences, make_trainer
from transformers import Trainer, TrainerCallback

import hf_selfkd.distiller


PARTS = {  # owner in the distiller ("" for itself) and method: what it is
    ("task", "split"): "samples of the batch",
    ("", "_check"): "labels and shapes checked",
    ("teacher", "prepare"): "past read",
    ("teacher", "targets"): "past read",
    ("hard_loss", "forward"): "forward pass",
    ("hard_loss", "rows"): "rows and targets",
    ("hard_loss", "num_items"): "rows and targets",
    ("teacher", "observe"): "prediction noted",
    ("teacher", "join"): "loss",
    ("heads", "join"): "heads",
    ("metrics", "update"): "metrics",
}
PLAIN = ("forward pass", "backward pass", "optimizer", "loop, data and logging")


class Parts(TrainerCallback):
    """Times the parts of the steps of a trainer, from its second epoch on."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.seconds, self.steps, self.patches = trainer, Counter(), 0, []

    def timed(self, name: str, function: Callable) -> Callable:
        def wrapped(*arguments, **keywords):
            start = time.process_time()
            try:
                return function(*arguments, **keywords)
            finally:
                self.seconds[name] += time.process_time() - start

        return wrapped

    def patch(self, owner: object, method: str, name: str) -> None:
        patch = mock.patch.object(owner, method, self.timed(name, getattr(owner, method)))
        self.patches.append(patch)
        patch.start()

    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.epoch is None or round(state.epoch) != 1:
            return
        distiller = self.trainer.distiller
        for (owner, method), name in PARTS.items():
            self.patch(getattr(distiller, owner) if owner else distiller, method, name)
        self.patch(hf_selfkd.distiller, "make_targets", "rows and targets")
        self.patch(type(distiller.hard_loss), "__call__", "loss")
        self.patch(self.trainer.accelerator, "backward", "backward pass")
        self.patch(distiller, "begin_epoch", "end of the epoch: table written")
        self.start, self.first = time.process_time(), state.global_step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before = time.process_time()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.patches:
            self.seconds["optimizer"] += time.process_time() - self.before

    def on_train_end(self, args, state, control, **kwargs):
        total, self.steps = time.process_time() - self.start, state.global_step - self.first
        self.seconds["loop, data and logging"] = total - sum(self.seconds.values())
        for patch in self.patches:
            patch.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "marian"], default="small")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps_per_epoch", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--length", type=int, default=24, help="tokens of a sentence")
    parser.add_argument("--top_k", type=int, help="stored entries of a row; 16 of a token by default")
    parser.add_argument("--results", type=Path, default=Path("step_parts.jsonl"))
    args = parser.parse_args()
    args.teacher, args.chunked_logits = "history", False
    size = args.batch_size * args.steps_per_epoch
    tokens = args.model == "marian"
    data = Sentences(size, args.classes, args.length) if tokens else InMemory(size, args.classes)
    keep_freed_memory(True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(True, args, args.epochs, data, folder)
        parts = Parts(trainer)
        trainer.add_callback(parts)
        trainer.train()
    milliseconds = {name: 1000 * seconds / parts.steps for name, seconds in parts.seconds.most_common()}
    line = {
        **{name: getattr(args, name) for name in ("model", "batch_size", "steps_per_epoch", "classes")},
        "steps": parts.steps,
        "milliseconds": {name: round(value, 4) for name, value in milliseconds.items()},
        "of plain training too": round(sum(milliseconds[name] for name in PLAIN), 4),
        "all": round(sum(milliseconds.values()), 4),
    } | machine()
    with args.results.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line, indent=2))


if __name__ == "__main__":
    main()
