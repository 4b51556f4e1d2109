"""
What self-distillation costs: the time of a training step of `SelfKDTrainer` over that of `Trainer`.

Both trainers run in one process and take turns step by step, so that whatever else the machine does meets both. A step
is everything from its beginning to that of the next one: fetching and collating the batch, forward, backward,
optimizer, logging, history and, once an epoch, the exchange of the history; the first epoch, which has no history to
read, does not count. All is done in either order (made first, plays first), which cancels what the order does to a
ratio. An epoch in both orders gives one ratio; reported are their median and a 95 % interval of it (bootstrap). The
data are tensors in memory, so that loading does not dilute the step. `--clock cpu` counts the processor time of the
process instead of seconds, for a machine that is not idle (one thread, no accelerator).

    export OMP_NUM_THREADS=1
    python benchmarks/step_time.py --model resnet18 --clock cpu --steps_per_epoch 5
    python benchmarks/step_time.py --model small --clock cpu --steps_per_epoch 40 --rounds 16
    python benchmarks/step_time.py --model small --clock cpu --steps_per_epoch 40 --rounds 16 --teacher control
    python benchmarks/step_time.py --model marian --batch_size 64 --classes 32000 --steps_per_epoch 3 --rounds 4

The control is `Trainer` against itself: how far its ratio is from 1 is the error of the measurement. For `marian`,
a translation model whose vocabulary is `--classes`, the other side is `Seq2SeqTrainer` with label smoothing 0.1, which
is what people use. `history_share` is the time that reading and writing the history took, over that of the training,
measured in a training of its own (for wide rows without the search for the largest entries, which shares a pass with
the loss: `benchmarks/loss.py` has it), and `peak_ratio` the ratio of the peaks of memory in training, above what is
held before it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import platform
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable

import torch
from loss import PeakMemory, keep_freed_memory
from transformers import (
    MarianConfig,
    MarianMTModel,
    PrinterCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_selfkd import SelfKDConfig, SelfKDTrainer, Seq2SeqSelfKDConfig, Seq2SeqSelfKDTrainer
from hf_selfkd.teachers.base import Teacher


MODELS = {
    "tiny": {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]},
    "resnet18": {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]},
    "small": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
}


class InMemory(torch.utils.data.Dataset):
    """Random square images; of a large data set every 4096th is the same."""

    def __init__(self, size: int, num_classes: int, pixels: int = 32):
        self.pixels = torch.randn(min(size, 4096), 3, pixels, pixels)
        self.labels = torch.randint(0, num_classes, (size,)).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.pixels[index % 4096], "labels": self.labels[index]}


class Sentences(torch.utils.data.Dataset):
    """Random pairs of sentences of `length` tokens."""

    def __init__(self, size: int, vocabulary: int, length: int):
        self.source, self.target = torch.randint(3, vocabulary, (2, size, length))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        target = self.target[index]
        shifted = torch.cat((target.new_zeros(1), target[:-1]))
        return {"input_ids": self.source[index], "labels": target, "decoder_input_ids": shifted}


def marian(args: argparse.Namespace) -> MarianMTModel:
    """Three layers on each side, width 256."""
    return MarianMTModel(
        MarianConfig(
            vocab_size=args.classes,
            d_model=256,
            encoder_layers=3,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=1024,
            decoder_ffn_dim=1024,
            max_position_embeddings=64,
            pad_token_id=0,
            decoder_start_token_id=0,
            eos_token_id=1,
            forced_eos_token_id=None,
        )
    )


class HistoryClock:
    """How long reading and writing the history takes, and how long training, once there is a past to read."""

    def __init__(self, trainer: Trainer, clock: Callable[[], float]):
        self.seconds, self.start, self.end = 0.0, None, None
        make = trainer._make_teacher

        def made(*arguments):
            teacher = make(*arguments)
            for name in ("prepare", "targets", "observe"):
                setattr(teacher, name, self._timed(teacher, getattr(teacher, name), clock))
            return teacher

        trainer._make_teacher = made

    def _timed(self, teacher: Teacher, function: Callable, clock: Callable[[], float]) -> Callable:
        def timed(*arguments, **keywords):
            start = clock()
            result = function(*arguments, **keywords)
            if teacher.epoch > 0:
                self.start, self.end = start if self.start is None else self.start, clock()
                self.seconds += self.end - start
            return result

        return timed


class Turns(TrainerCallback):
    """
    Times the steps of a trainer and, at the beginning of each, lets the other trainer do one of its own. The trainers
    have a thread each, of which one waits.
    """

    def __init__(self, clock: Callable[[], float]):
        self.clock, self.my_turn = clock, threading.Semaphore(0)
        self.other: Turns | None = None
        self.seconds: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.my_turn.acquire()
        self.last = self.clock()

    def on_step_begin(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(self.clock() - self.last)
        self.other.my_turn.release()
        self.my_turn.acquire()
        self.last = self.clock()

    def play(self, trainer: Trainer) -> None:
        """Train; whatever happens, the other trainer is not left waiting."""
        try:
            trainer.train()
        finally:
            self.other.my_turn.release()


def train_in_turns(trainers: list[Trainer], clock: Callable[[], float]) -> list[list[float]]:
    """Train, the first trainer beginning; seconds of the steps of each, without the last step."""
    turns = [Turns(clock) for _ in trainers]
    for mine, other, trainer in zip(turns, turns[::-1], trainers, strict=True):
        mine.other = other
        trainer.add_callback(mine)
    threads = [
        threading.Thread(target=mine.play, args=(trainer,)) for mine, trainer in zip(turns, trainers, strict=True)
    ]
    gc.collect()
    gc.freeze()  # what was there before costs neither of them anything
    for thread in threads:
        thread.start()
    turns[0].my_turn.release()
    for thread in threads:
        thread.join()
    return [mine.seconds[1:] for mine in turns]


def interval(values: list[float], draws: int = 2000) -> list[float]:
    """95 % interval of the median, by bootstrap."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return [medians[draws // 40], medians[-1 - draws // 40]]


def make_trainer(self_distils: bool, args: argparse.Namespace, epochs: int, data: InMemory, folder: str) -> Trainer:
    """A silent trainer of the model that is measured."""
    trainer = new_trainer(self_distils, args, epochs, data, folder)
    trainer.remove_callback(PrinterCallback)
    return trainer


def new_trainer(self_distils: bool, args: argparse.Namespace, epochs: int, data: InMemory, folder: str) -> Trainer:
    torch.manual_seed(0)
    common = {
        "output_dir": folder,
        "use_cpu": not torch.cuda.is_available(),  # said, or processes of a launcher would train alone
        "per_device_train_batch_size": args.batch_size,
        "num_train_epochs": epochs,
        "optim": "sgd",
        "save_strategy": "no",
        "logging_steps": 10,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }
    if args.model == "marian":
        if not self_distils:
            config = Seq2SeqTrainingArguments(label_smoothing_factor=0.1, **common)
            return Seq2SeqTrainer(marian(args), config, train_dataset=data)
        own = {"teacher": args.teacher, "history_top_k": args.top_k or 16, "chunked_logits": args.chunked_logits}
        config = Seq2SeqSelfKDConfig(**own, **common)
        return Seq2SeqSelfKDTrainer(marian(args), config, train_dataset=data)
    config = ResNetConfig(layer_type="basic", num_labels=args.classes, **MODELS[args.model])
    model = ResNetForImageClassification(config)
    if not self_distils:
        return Trainer(model, TrainingArguments(**common), train_dataset=data)
    own = {"teacher": args.teacher, "history_top_k": args.top_k}
    return SelfKDTrainer(model, SelfKDConfig(**own, **common), train_dataset=data)


def in_both_orders(
    args: argparse.Namespace, data: torch.utils.data.Dataset, folder: str, clock: Callable[[], float]
) -> tuple[list[float], float, float]:
    """Ratios, one of an epoch in both orders, and the median milliseconds of a step of either side."""
    steps = args.steps_per_epoch
    targets = (False, args.teacher != "control")
    epochs: list[list[list[float]]] = []  # of each order: seconds of the epochs of either side
    for order in (1, -1):
        trainers = [make_trainer(target, args, args.rounds + 2, data, folder) for target in targets[::order]]
        seconds = train_in_turns(trainers, clock)[::order]
        # The first epoch has no history, the last one no end.
        starts = range(steps, steps * (args.rounds + 1), steps)
        epochs.append([[sum(target[start : start + steps]) for start in starts] for target in seconds])
    ratios = [math.sqrt(b / a * d / c) for a, b, c, d in zip(*epochs[0], *epochs[1], strict=True)]
    plain, ours = (1000 / steps * statistics.median(one + other) for one, other in zip(*epochs, strict=True))
    return ratios, plain, ours


def history_share(trainer: Trainer, clock: Callable[[], float]) -> float:
    """The part of a training that its history takes; not of one that is timed, as asking for the time takes time."""
    history = HistoryClock(trainer, clock)
    trainer.train()
    return history.seconds / (history.end - history.start)


def peak_of_steps(trainer: Trainer) -> int:
    """Bytes that training takes above what the trainer holds already, with memory given back to the system first."""
    trainer.train()  # warms up
    if not torch.cuda.is_available():
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with PeakMemory() as watched:
        trainer.train()
    return watched.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "marian"], default="small")
    parser.add_argument("--teacher", choices=("history", "snapshot", "ema", "control"), default="history")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--steps_per_epoch", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=8, help="epochs that count, in either order")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--length", type=int, default=24, help="tokens of a sentence")
    parser.add_argument("--top_k", type=int, help="stored entries of a row; 16 of a token by default")
    parser.add_argument("--chunked_logits", action="store_true", help="never hold the logits of all tokens")
    parser.add_argument("--keep_freed_memory", action="store_true", help="for marian too: see benchmarks/loss.py")
    args = parser.parse_args()
    steps = args.steps_per_epoch
    size = args.batch_size * steps
    data = Sentences(size, args.classes, args.length) if args.model == "marian" else InMemory(size, args.classes)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    targets = (False, args.teacher != "control")
    with tempfile.TemporaryDirectory() as folder:
        # Of a short step, fetching memory again is a part that depends on what the step before left, on both sides.
        keep_freed_memory(args.keep_freed_memory or args.model != "marian")
        ratios, plain, ours = in_both_orders(args, data, folder, clock)
        share = history_share(make_trainer(True, args, 6, data, folder), clock) if targets[1] else 0.0
        keep_freed_memory(False)
        peaks = [peak_of_steps(make_trainer(target, args, 2, data, folder)) for target in targets]
    print(
        json.dumps(
            {
                "model": args.model,
                "teacher": args.teacher,
                "chunked_logits": args.chunked_logits,
                "batch_size": args.batch_size,
                "clock": args.clock,
                "plain_ms": round(plain, 2),
                "selfkd_ms": round(ours, 2),
                "ratio": round(statistics.median(ratios), 4),
                "ratio_interval": [round(end, 4) for end in interval(ratios)],
                "ratio_min_max": [round(min(ratios), 4), round(max(ratios), 4)],
                "history_share": round(share, 4),
                "peak_mib": [round(peak / 2**20) for peak in peaks],
                "peak_ratio": round(peaks[1] / peaks[0], 3),
                "rounds": args.rounds,
                "steps_per_round": 2 * steps,
                "threads": torch.get_num_threads(),
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
