"""
What the loss over a vocabulary costs: forward and backward over logits `[rows, vocabulary]`, in time and memory.

Compared in one process, in turns: `F.cross_entropy`, the label smoother of transformers, and the loss of progressive
self-distillation with stored entries (each tail rule) and with dense past rows. The median time of the rounds and
the peak of memory above the logits are reported, and both relative to `F.cross_entropy`. Memory is that of the
process (Linux) or of the CUDA allocator.

    python benchmarks/loss.py
    python benchmarks/loss.py --vocabulary 32000 --rows 2048 --dtype bfloat16
    python benchmarks/loss.py --vocabulary 32000 --keep_freed_memory
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable

import psutil
import torch
import torch.nn.functional as F
from transformers.trainer_pt_utils import LabelSmoother

from hf_selfkd.losses.cross_entropy import cross_entropy_sum
from hf_selfkd.losses.progressive import progressive_cross_entropy
from hf_selfkd.losses.soft_targets import SoftTargets
from hf_selfkd.losses.summary import summarize


def keep_freed_memory(keep: bool) -> None:
    """
    Whether the C library (glibc) keeps what is freed, in one heap for all threads, as the allocator of an accelerator
    does. By default it gives large tensors back to the system, and fetching them again takes time.
    """
    mmap_max, arena_max, trim_threshold = -4, -8, -1
    values = {mmap_max: 0, trim_threshold: 2**31 - 1} if keep else {mmap_max: 2**16, trim_threshold: 2**17}
    for option, value in {arena_max: 1, **values}.items():
        ctypes.CDLL("libc.so.6").mallopt(option, value)


def make_losses(
    rows: int, vocabulary: int, top_k: int, device: str
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The losses, as functions of the logits that give a mean."""
    labels = torch.randint(vocabulary, (rows,), device=device)
    mask = torch.ones(rows, dtype=torch.bool, device=device)
    probs = torch.softmax(torch.randn(rows, 4 * top_k, device=device), -1)[:, :top_k].sort(-1, descending=True).values
    index = torch.stack([torch.randperm(vocabulary, device=device)[:top_k] for _ in range(rows)])
    smoother = LabelSmoother(0.1)

    def stored(tail: str) -> Callable:
        soft_targets = SoftTargets(probs.log(), mask, index, tail)
        return lambda logits: progressive_cross_entropy(logits, labels, soft_targets, 0.5).total.sum() / rows

    return {
        "F.cross_entropy": lambda logits: F.cross_entropy(logits.float(), labels),
        "plain, in chunks": lambda logits: cross_entropy_sum(logits, labels) / rows,
        "label smoother": lambda logits: smoother({"logits": logits[None]}, labels[None]),
        **{f"top {top_k}, {rule}": stored(rule) for rule in ("label", "bucket", "uniform", "renormalize")},
    }


def dense_rows(rows: int, vocabulary: int, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    labels = torch.randint(vocabulary, (rows,), device=device)
    soft_targets = SoftTargets(
        torch.randn(rows, vocabulary, device=device).log_softmax(-1), torch.ones(rows, dtype=torch.bool, device=device)
    )
    return lambda logits: progressive_cross_entropy(logits, labels, soft_targets, 0.5).total.sum() / rows


class PeakMemory:
    """Bytes above those at the beginning; on the CPU the resident memory, looked at every 0.2 ms."""

    def __enter__(self):
        gc.collect()
        self.peak = 0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return self
        self.process, self.stop = psutil.Process(), threading.Event()
        self.start = self.process.memory_info().rss
        self.watcher = threading.Thread(target=self._watch)
        self.watcher.start()
        return self

    def _watch(self) -> None:
        while not self.stop.is_set():
            self.peak = max(self.peak, self.process.memory_info().rss - self.start)
            time.sleep(2e-4)

    def __exit__(self, *_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() - self.start
            return
        self.stop.set()
        self.watcher.join()


def step(loss: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor) -> float:
    """Seconds of one forward and backward."""
    leaf = logits.detach().requires_grad_()
    if logits.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    loss(leaf).backward()
    if logits.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(rows: int, vocabulary: int, args: argparse.Namespace) -> list[dict]:
    """One result per loss."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    logits = torch.randn(rows, vocabulary, device=device, dtype=getattr(torch, args.dtype))
    losses = make_losses(rows, vocabulary, args.top_k, device)
    if args.dense_rows:
        losses["whole rows"] = dense_rows(rows, vocabulary, device)
    times: dict[str, list[float]] = {name: [] for name in losses}
    if args.keep_freed_memory:
        keep_freed_memory(True)
    for number in range(args.rounds + 1):
        for name, loss in losses.items():
            seconds = step(loss, logits)
            if number:  # the first round warms up
                times[name].append(seconds)
    if args.keep_freed_memory:
        keep_freed_memory(False)
    memory = {}
    for name, loss in losses.items():
        if not logits.is_cuda:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that is kept for reuse would hide a peak
        with PeakMemory() as watched:
            step(loss, logits)
        memory[name] = watched.peak
    top = []
    for _ in range(args.rounds):
        seconds = []
        for top_k in (None, args.top_k):
            start = time.perf_counter()
            summarize(logits, top_k)
            if logits.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        top.append(seconds[1] - seconds[0])
    plain = statistics.median(times["F.cross_entropy"])
    results = [
        {
            "loss": name,
            "ms": round(1000 * statistics.median(seconds), 2),
            "time_ratio": round(
                statistics.median(a / b for a, b in zip(seconds, times["F.cross_entropy"], strict=True)), 3
            ),
            "peak_mib": round(memory[name] / 2**20),
            "memory_ratio": round(memory[name] / max(memory["F.cross_entropy"], 1), 3),
        }
        for name, seconds in times.items()
    ]
    entries = statistics.median(top)
    results.append(
        {
            "loss": "(finding the entries to store)",
            "ms": round(1000 * entries, 2),
            "time_ratio": round(entries / plain, 3),
        }
    )
    common = {"rows": rows, "vocabulary": vocabulary, "dtype": args.dtype, "threads": torch.get_num_threads()}
    device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return [result | common | {"device": device_name, "torch": torch.__version__} for result in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[8000, 32000, 128000])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--top_k", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--dense_rows", action="store_true", help="dense past rows too (the snapshot teacher)")
    parser.add_argument("--keep_freed_memory", action="store_true", help="time without fetching memory (glibc)")
    args = parser.parse_args()
    for vocabulary in args.vocabulary:
        for result in measure(args.rows, vocabulary, args):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
