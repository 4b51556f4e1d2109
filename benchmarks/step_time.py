"""
What self-distillation costs: the time of a training step of `SelfKDTrainer` over that of `Trainer`.

Both trainers run in one process and take turns, in alternating order, and the median of the paired ratios is
reported. A step is everything from its beginning to that of the next one: fetching and collating the batch, forward,
backward, optimizer, history and, once an epoch, the exchange of the history; the first epoch, which has no history to
read, does not count. The data are tensors in memory, so that loading does not dilute it. `--clock cpu` counts the
processor time of the process instead of seconds, for a machine that is not idle (one thread, no accelerator).

    python benchmarks/step_time.py --model resnet18
    python benchmarks/step_time.py --model small
    python benchmarks/step_time.py --model small --teacher control

The control is `Trainer` against itself: how far its ratio is from 1 is the noise of the measurement.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from transformers import (
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_selfkd import SelfKDConfig, SelfKDTrainer


MODELS = {
    "resnet18": {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]},
    "small": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
}


class InMemory(torch.utils.data.Dataset):
    """Random images of 32 x 32 pixels."""

    def __init__(self, size: int, num_classes: int):
        self.pixels, self.labels = torch.randn(size, 3, 32, 32), torch.randint(0, num_classes, (size,)).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


class StepTimes(TrainerCallback):
    """Seconds from the beginning of each step to that of the next one, after the first epoch."""

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.seconds: list[float] = []
        self.last: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.seconds, self.last = [], None

    def on_step_begin(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = self.clock()
        if self.last is not None and state.epoch >= 1:
            self.seconds.append(now - self.last)
        self.last = now


def make_trainer(self_distils: bool, args: argparse.Namespace, data: InMemory, folder: str) -> Trainer:
    """A trainer of the model that is measured."""
    torch.manual_seed(0)
    config = ResNetConfig(layer_type="basic", num_labels=args.classes, **MODELS[args.model])
    common = {
        "output_dir": folder,
        "per_device_train_batch_size": args.batch_size,
        "num_train_epochs": args.epochs,
        "optim": "sgd",
        "save_strategy": "no",
        "logging_steps": 10,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }
    model = ResNetForImageClassification(config)
    if not self_distils:
        return Trainer(model, TrainingArguments(**common), train_dataset=data)
    return SelfKDTrainer(model, SelfKDConfig(teacher=args.teacher, **common), train_dataset=data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--teacher", choices=("history", "snapshot", "ema", "control"), default="history")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps_per_epoch", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--classes", type=int, default=100)
    args = parser.parse_args()
    data = InMemory(args.batch_size * args.steps_per_epoch, args.classes)
    with tempfile.TemporaryDirectory() as folder:
        trainers = [
            make_trainer(self_distils, args, data, folder) for self_distils in (False, args.teacher != "control")
        ]
        clock = time.process_time if args.clock == "cpu" else time.perf_counter
        times = [StepTimes(clock), StepTimes(clock)]
        for trainer, callback in zip(trainers, times, strict=True):
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(callback)
        rounds: list[tuple[float, float]] = []
        for number in range(args.rounds + 1):
            for player in (0, 1) if number % 2 else (1, 0):
                trainers[player].train()
            if number:  # the first round warms up
                rounds.append(tuple(statistics.mean(callback.seconds) for callback in times))
    plain, ours = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratios = sorted(b / a for a, b in rounds)
    print(
        json.dumps(
            {
                "model": args.model,
                "teacher": args.teacher,
                "batch_size": args.batch_size,
                "clock": args.clock,
                "plain_ms": round(1000 * plain, 2),
                "selfkd_ms": round(1000 * ours, 2),
                "ratio": round(statistics.median(ratios), 4),
                "ratio_min_max": [round(ratios[0], 4), round(ratios[-1], 4)],
                "rounds": len(rounds),
                "steps_per_round": args.steps_per_epoch * (args.epochs - 1),
                "threads": torch.get_num_threads(),
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
