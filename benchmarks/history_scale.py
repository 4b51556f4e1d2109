"""
What a history of the size of ImageNet or of WMT14 takes: bytes, rows a second, seconds and memory of a checkpoint.

    python benchmarks/history_scale.py imagenet
    python benchmarks/history_scale.py wmt14 --top_k 8

Rows are made up and as many as those data sets have, in random order; no model runs. Each figure is of the code that
a training runs: note a batch, read a batch, the end of an epoch, save, load into a new history. Memory is what the
process has for itself (`RssAnon` of Linux): pages of the mapped file are the cache's, and are given back when others
need them.
"""

from __future__ import annotations

import argparse
import json
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


def own_memory(name: str = "RssAnon") -> int:
    """Bytes that this process has for itself, of Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def epoch(store: HistoryStore, shape: Shape, pool: Pool, number: int) -> dict[str, float]:
    """Read and note every sample; seconds of both, and of the end of the epoch."""
    reading = writing = rows = 0
    for samples in batches(shape, number):
        log_probs, index = pool.of(samples.total)
        start = time.perf_counter()
        if store.history is None:
            store.prepare(samples, shape.classes)
        store.read(samples, samples.total, torch.device("cpu"))
        middle = time.perf_counter()
        store.history.write(samples, log_probs, torch.empty(0, dtype=torch.int64), index)
        reading, writing, rows = reading + middle - start, writing + time.perf_counter() - middle, rows + samples.total
    start = time.perf_counter()
    store.end_epoch(number)
    return {"rows": rows, "read_s": reading, "write_s": writing, "end_s": time.perf_counter() - start}


def size_of(folder: Path) -> int:
    """Bytes that the files of a folder take on the disk."""
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file())


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

        store, before = new("history"), own_memory()
        pool = Pool(2 * shape.batch * shape.tokens, shape, top_k)
        made = own_memory() - before
        first, second = epoch(store, shape, pool, 0), epoch(store, shape, pool, 1)
        figures = {
            "shape": name,
            "top_k": top_k,
            "rows": first["rows"],
            "dense_fp32_bytes": 4 * first["rows"] * shape.classes,
            "row_bytes": store.history.codec.row_bytes,
            "disk_bytes": size_of(folder / "history"),
            "memory_bytes": own_memory() - before - made,
            "write_rows_per_s": first["rows"] / first["write_s"],
            "read_rows_per_s": second["rows"] / second["read_s"],
            "end_of_epoch_s": second["end_s"],
        }
        checkpoint, start = folder / "teacher.safetensors", time.perf_counter()
        save_tensors(checkpoint, *store.history.state())
        figures |= {"save_s": time.perf_counter() - start, "checkpoint_bytes": checkpoint.stat().st_size}
        expected = store.stored([0, shape.samples - 1])
        del store
        loaded, start = new("again"), time.perf_counter()
        loaded.load(load_tensors(checkpoint), [])
        figures |= {"load_s": time.perf_counter() - start, "peak_memory_bytes": own_memory("VmHWM")}
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
