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
    python benchmarks/step_time.py --model marian --batch_size 64 --classes 32000 --steps_per_epoch 3 --rounds 4

The control is `Trainer` against itself: how far its ratio is from 1 is the noise of the measurement. For `marian`,
a translation model whose vocabulary is `--classes`, the other side is `Seq2SeqTrainer` with label smoothing 0.1, which
is what people use. `history_share` is the time that reading and writing the history took, over that of the training
(for wide rows without the search for the largest entries, which shares a pass with the loss: `benchmarks/loss.py` has
it), and `peak_ratio` the ratio of the peaks of memory in training, above what is held before it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from loss import PeakMemory
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
    """Seconds that a trainer's teacher spent on reading and writing."""

    def __init__(self, trainer: Trainer, clock: Callable[[], float]):
        self.seconds = 0.0
        make = getattr(trainer, "_make_teacher", None)
        if make is None:
            return

        def made():
            teacher = make()
            for name in ("targets", "observe"):
                setattr(teacher, name, self._timed(getattr(teacher, name), clock))
            return teacher

        trainer._make_teacher = made

    def _timed(self, function: Callable, clock: Callable[[], float]) -> Callable:
        def timed(*arguments, **keywords):
            start = clock()
            result = function(*arguments, **keywords)
            self.seconds += clock() - start
            return result

        return timed


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
    if args.model == "marian":
        if not self_distils:
            config = Seq2SeqTrainingArguments(label_smoothing_factor=0.1, **common)
            return Seq2SeqTrainer(marian(args), config, train_dataset=data)
        own = {"teacher": args.teacher, "history_top_k": args.top_k, "chunked_logits": args.chunked_logits}
        config = Seq2SeqSelfKDConfig(**own, **common)
        return Seq2SeqSelfKDTrainer(marian(args), config, train_dataset=data)
    config = ResNetConfig(layer_type="basic", num_labels=args.classes, **MODELS[args.model])
    model = ResNetForImageClassification(config)
    if not self_distils:
        return Trainer(model, TrainingArguments(**common), train_dataset=data)
    return SelfKDTrainer(model, SelfKDConfig(teacher=args.teacher, **common), train_dataset=data)


def peak_of_steps(trainer: Trainer) -> int:
    """Bytes that training takes above what the trainer holds already, with memory given back to the system first."""
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
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--length", type=int, default=24, help="tokens of a sentence")
    parser.add_argument("--top_k", type=int, default=16, help="stored entries of a token")
    parser.add_argument("--chunked_logits", action="store_true", help="never hold the logits of all tokens")
    args = parser.parse_args()
    size = args.batch_size * args.steps_per_epoch
    if args.model == "marian":
        data = Sentences(size, args.classes, args.length)
    else:
        data = InMemory(size, args.classes)
    with tempfile.TemporaryDirectory() as folder:
        trainers = [
            make_trainer(self_distils, args, data, folder) for self_distils in (False, args.teacher != "control")
        ]
        clock = time.process_time if args.clock == "cpu" else time.perf_counter
        times = [StepTimes(clock), StepTimes(clock)]
        history = HistoryClock(trainers[1], clock)
        for trainer, callback in zip(trainers, times, strict=True):
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(callback)
        rounds: list[tuple[float, float]] = []
        whole = 0.0
        for number in range(args.rounds + 1):
            for player in (0, 1) if number % 2 else (1, 0):
                start = clock()
                trainers[player].train()
                whole += (clock() - start) * player
            if number:  # the first round warms up
                rounds.append(tuple(statistics.mean(callback.seconds) for callback in times))
        share = history.seconds / whole
        peaks = [peak_of_steps(trainer) for trainer in trainers]
    plain, ours = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratios = sorted(b / a for a, b in rounds)
    print(
        json.dumps(
            {
                "model": args.model,
                "teacher": args.teacher,
                "chunked_logits": args.chunked_logits,
                "batch_size": args.batch_size,
                "clock": args.clock,
                "plain_ms": round(1000 * plain, 2),
                "selfkd_ms": round(1000 * ours, 2),
                "ratio": round(statistics.median(ratios), 4),
                "ratio_min_max": [round(ratios[0], 4), round(ratios[-1], 4)],
                "history_share": round(share, 4),
                "peak_mib": [round(peak / 2**20) for peak in peaks],
                "peak_ratio": round(peaks[1] / peaks[0], 3),
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
