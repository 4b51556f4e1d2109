"""
What a history of the size of ImageNet or of WMT14 takes: bytes, rows a second, seconds and memory of a checkpoint.

    python benchmarks/history_scale.py imagenet
    python benchmarks/history_scale.py wmt14 --top_k 8

Rows are made up and as many as those data sets have, in random order; no model runs. Each figure is of the code that
a training runs: note a batch, read a batch, the end of an epoch, save, load into a new history. Bytes on the disk are
those of both generations, the table and the file of the running epoch. Memory is what the process has for itself
(`RssAnon` of Linux), at its peak, above what it had before: pages of a mapped file are the cache's, and are given back
when others need them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from comparison import machine

from hf_selfkd.config import MethodArguments
from hf_selfkd.files import load_tensors, save_tensors
from hf_selfkd.samples import SampleIndex
from hf_selfkd.teachers.history import HistoryStore


@dataclass
class Shape:
    """
    The size of a data set.

    Args:
        samples (`int`): images or sentences.
        classes (`int`): classes or words.
        tokens (`int`): rows of a sample, on average.
        batch (`int`): samples that are noted at once.
    """

    samples: int
    classes: int
    tokens: int
    batch: int


SHAPES = {"imagenet": Shape(1_281_167, 1000, 1, 4096), "wmt14": Shape(4_500_000, 32_000, 30, 2048)}


def batches(shape: Shape, seed: int) -> Iterator[SampleIndex]:
    """An epoch: every sample once, sentences of 1 to 59 tokens; the length of a sentence belongs to its id."""
    order = np.random.default_rng(seed).permutation(shape.samples)
    for start in range(0, shape.samples, shape.batch):
        ids = order[start : start + shape.batch].astype(np.int64)
        if shape.tokens == 1:
            yield SampleIndex(ids, ids % shape.classes, len(ids))
            continue
        counts = 1 + (ids * 2654435761 % 2**32) % (2 * shape.tokens - 1)
        total = int(counts.sum())
        yield SampleIndex(ids, ids, total, counts, np.arange(total))


class Pool:
    """Made-up top entries, `[R, k]`, of which each batch takes a part, so that little time goes into making them."""

    def __init__(self, rows: int, shape: Shape, top_k: int):
        generator = torch.Generator().manual_seed(0)
        scores = torch.rand(rows, top_k, generator=generator).log().sort(dim=-1, descending=True).values
        self.log_probs = scores - scores.logsumexp(-1, keepdim=True) - 0.1
        self.index = torch.randint(shape.classes, (rows, top_k), generator=generator)

    def of(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries of so many rows."""
        return self.log_probs[:count], self.index[:count]


def own_memory() -> int:
    """Bytes that this process has for itself, of Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


# Looks at another process until its input is closed, then says the peak: a thread would wait for NumPy to be done.
WATCHER = """
import select, sys
peak = 0
print(flush=True)
while not select.select([sys.stdin], [], [], 2e-3)[0]:
    with open(f"/proc/{sys.argv[1]}/status") as file:
        peak = max(peak, next(int(line.split()[1]) for line in file if line.startswith("RssAnon")))
print(1024 * peak)
"""


class Watch:
    """Seconds, and the peak of `own_memory` above its beginning, looked at every 2 ms."""

    def __enter__(self):
        command = [sys.executable, "-c", WATCHER, str(os.getpid())]
        self.watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.watcher.stdout.readline()
        self.before, self.start = own_memory(), time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.start
        self.peak = max(0, int(self.watcher.communicate()[0]) - self.before)


def epoch(store: HistoryStore, shape: Shape, pool: Pool, number: int) -> dict[str, float]:
    """Read and note every sample; rows, seconds and memory, of the end of the epoch by itself."""
    reading = writing = rows = 0
    with Watch() as steps:
        for samples in batches(shape, number):
            log_probs, index = pool.of(samples.total)
            start = time.perf_counter()
            if store.history is None:
                store.prepare(samples, shape.classes)
            store.read(samples, samples.total, torch.device("cpu"))
            middle = time.perf_counter()
            store.history.write(samples, log_probs, torch.empty(0, dtype=torch.int64), index)
            reading, writing = reading + middle - start, writing + time.perf_counter() - middle
            rows += samples.total
    with Watch() as end:
        store.end_epoch(number)
    return {
        "rows": rows,
        "read_rows_per_s": rows / reading,
        "write_rows_per_s": rows / writing,
        "steps_memory_bytes": steps.peak,
        "end_of_epoch_s": end.seconds,
        "end_of_epoch_memory_bytes": end.peak,
    }


def bytes_on_disk(store: HistoryStore, folder: Path) -> int:
    """Of the table and of the running epoch, whose files have no name."""
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    files += [os.fstat(file.fileno()) for file in store.history.journal.files.values()]
    return sum(512 * file.st_blocks for file in files)


def measure(name: str, shape: Shape, top_k: int, parent: str | None) -> dict:
    """All figures of a history of this shape."""
    config = MethodArguments(
        history_top_k=top_k, history_dtype="float16", history_device="disk", history_max_bytes=10**12
    )
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        folder = Path(folder)

        def new(part: str) -> HistoryStore:
            tokens = float(shape.tokens)
            return HistoryStore(
                config, shape.samples, None, torch.device("cpu"), folder / part, 3, rows_per_sample=tokens
            )

        store, pool = new("history"), Pool(2 * shape.batch * shape.tokens, shape, top_k)
        first, second = epoch(store, shape, pool, 0), epoch(store, shape, pool, 1)
        figures = {
            "shape": name,
            "top_k": top_k,
            "samples": shape.samples,
            "dense_fp32_bytes": 4 * second["rows"] * shape.classes,
            "row_bytes": store.history.codec.row_bytes,
            "disk_bytes": bytes_on_disk(store, folder / "history"),
            **second,
            "first_end_of_epoch_s": first["end_of_epoch_s"],
            "first_steps_memory_bytes": first["steps_memory_bytes"],
        }
        checkpoint = folder / "teacher.safetensors"
        with Watch() as save:
            save_tensors(checkpoint, *store.history.state())
        expected = store.stored([0, shape.samples - 1])
        del store
        loaded = new("again")
        with Watch() as load:
            loaded.load(load_tensors(checkpoint), [])
        figures |= {
            "checkpoint_bytes": checkpoint.stat().st_size,
            "save_s": save.seconds,
            "save_memory_bytes": save.peak,
            "load_s": load.seconds,
            "load_memory_bytes": load.peak,
        }
        if not torch.equal(loaded.stored([0, shape.samples - 1]), expected):
            raise RuntimeError("what was loaded is not what was saved.")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--top_k", type=int, default=32)
    parser.add_argument("--samples", type=int, help="fewer than the data set has")
    parser.add_argument("--folder", help="on the disk that is measured; the one of temporary files by default")
    parser.add_argument("--results", type=Path, default=Path("history_scale.jsonl"))
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    shape.samples = args.samples or shape.samples
    line = measure(args.shape, shape, args.top_k, args.folder) | machine()
    with args.results.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line, indent=2))


if __name__ == "__main__":
    main()
