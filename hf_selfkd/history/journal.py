"""The journal of a history: what one process predicted in the epoch that is being trained."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from ..devices import compiles_shapes, copies_in_background, synchronize, to_device
from ..losses.soft_targets import MAX_HELD
from .addresses import ranges
from .codec import Codec, bytes_of
from .plan import too_many_rows
from .storage import full_disk


BUFFER_BYTES = 2**24  # of the rows in one buffer, at most
SUMMED_ROWS = 2**18  # at a time, to see whether they are finite
LEAST_BYTES = 2**20  # at least, where the number of rows is a guess


class Journal:
    """
    The predictions of one epoch, in the order in which they were made: which samples, and their rows.

    Rows lie in buffers of a fixed size. A full buffer is followed by another one and is not touched again before the
    epoch ends, so nothing moves while copies from an accelerator may be under way, and the journal is never larger
    than its rows by more than a buffer. With a folder there are two buffers, which are written to a file in turn: one
    is filled while the other, whose copies are done by then, is written.

    Args:
        codec ([`Codec`]): how rows are stored.
        device (`torch.device`): where the buffers are.
        source (`torch.device`): where the model is.
        ragged (`bool`): whether samples have several rows each.
        traced (`bool`): whether the probability of the true class is kept beside each row.
        folder (`Path`, *optional*): where to keep the rows, instead of in memory.
        expected_rows (`int`, *optional*, defaults to 0): rows of an epoch, about; a buffer need not hold more.
        max_bytes (`int`, *optional*): refuse to keep more than this.
    """

    def __init__(
        self,
        codec: Codec,
        device: torch.device,
        source: torch.device,
        ragged: bool = False,
        traced: bool = False,
        folder: Path | None = None,
        expected_rows: int = 0,
        max_bytes: int | None = None,
    ):
        self.codec, self.device, self.source, self.ragged, self.folder = codec, device, source, ragged, folder
        self.columns = codec.widths | ({"true_probs": (1, torch.float16)} if traced else {})
        self.max_bytes = max_bytes
        self.row_bytes = bytes_of(self.columns)
        self.buffer_rows = BUFFER_BYTES // self.row_bytes
        if (
            expected_rows
        ):  # which is a guess where samples have several rows: one far too low must not make many buffers
            least = LEAST_BYTES // self.row_bytes if ragged else 0
            self.buffer_rows = min(self.buffer_rows, max(expected_rows, least))
        self.buffer_rows = max(1, self.buffer_rows)
        self.in_background = device.type == "cpu" and copies_in_background(source)
        self.fixed_shapes = compiles_shapes(source)
        # (slots, order, label hashes, rows of each) of batches, once an epoch put into one array.
        self.samples: list[tuple[np.ndarray | int, ...]] = []
        self.visits = 0  # micro-batches of this epoch so far, the order in which predictions were made
        # Rows of small batches, not encoded yet (see `add`), and how many entries they have.
        self.waiting: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]] = []
        self.places: list[np.ndarray | None] = []  # which rows of these count
        self.held = 0
        # Made once: tensors that outlive a step would scatter the memory that the next step needs in one piece.
        self.buffers: list[dict[str, torch.Tensor]] = []
        self.filled = 0  # rows in buffers and files
        self.files: dict[str, BinaryIO] = {}
        self.written = 0  # full buffers that are in the files
        self.copied: dict[int, torch.cuda.Event] = {}  # for a full buffer: when its copies were done

    # Writing

    def add(
        self,
        slots: np.ndarray,
        label_hash: np.ndarray,
        counts: np.ndarray | int,
        rows: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
        places: np.ndarray | None = None,
    ) -> None:
        """
        Note a batch.

        Args:
            slots (`np.ndarray` of shape `[B]`): where the samples are kept.
            label_hash (`np.ndarray` of shape `[B]`): of their labels.
            counts (`np.ndarray` of shape `[B]`, or `int`): rows of each sample.
            rows (`tuple`): log-probabilities of the rows, the classes of entries and the probability of the label.
            places (`np.ndarray`, *optional*): which of these rows are those of the samples; all by default.
        """
        if places is not None and not self.fixed_shapes:
            index = to_device(torch.from_numpy(places), rows[0].device)
            rows = tuple(None if part is None else part.index_select(0, index) for part in rows)
        self.samples.append((slots, self.visits, label_hash, counts))
        self.waiting.append(rows)
        self.places.append(places)
        self.held += rows[0].numel()
        self.visits += 1
        # Small batches are encoded several at a time: fetching code that has not just run into the processor's cache
        # takes longer than running it.
        if self.held > MAX_HELD:
            self.encode()

    def encode(self) -> None:
        """Move the rows that wait to the buffers."""
        if not self.waiting:
            return
        log_probs, index, true = (
            None if parts[0] is None else parts[0] if len(parts) == 1 else torch.cat(parts)
            for parts in zip(*self.waiting, strict=True)
        )
        places = self._places() if self.fixed_shapes else None
        self.waiting, self.places, self.held = [], [], 0
        parts = self.codec.encode(log_probs, index)
        if true is not None:
            parts["true_probs"] = true.to(torch.float16).unsqueeze(-1)
        self._append(parts) if places is None else self._scatter(parts, places)

    def _places(self) -> np.ndarray:
        """Which of the rows that wait count, one batch after the other."""
        ends = np.cumsum([len(rows[0]) for rows in self.waiting])
        found = [
            end - len(rows[0]) + (np.arange(len(rows[0])) if places is None else places)
            for end, rows, places in zip(ends, self.waiting, self.places, strict=True)
        ]
        return np.concatenate(found)

    def _scatter(self, parts: dict[str, torch.Tensor], places: np.ndarray) -> None:
        """
        As `_append`, of the rows at these places; shapes depend on nothing but the number of all rows. The others go
        to a row behind the buffer, which nobody reads.
        """
        start = 0
        while start < len(places):
            number, place = divmod(self.filled, self.buffer_rows)
            buffer = self._buffer(number)
            rows = min(self.buffer_rows - place, len(places) - start)
            target = np.full(len(parts["log_probs"]), self.buffer_rows)
            target[places[start : start + rows]] = place + np.arange(rows)
            index = to_device(torch.from_numpy(target), self.device)
            for name, part in parts.items():
                buffer[name].index_copy_(0, index, part.to(self.device))
            self.filled += rows
            start += rows

    def _append(self, parts: dict[str, torch.Tensor]) -> None:
        start, total = 0, len(parts["log_probs"])
        while start < total:
            number, place = divmod(self.filled, self.buffer_rows)
            buffer = self._buffer(number)
            rows = min(self.buffer_rows - place, total - start)
            for name, part in parts.items():
                buffer[name][place : place + rows].copy_(part[start : start + rows], non_blocking=self.in_background)
            self.filled += rows
            start += rows
            if self.folder is not None and self.in_background and place + rows == self.buffer_rows:
                self.copied[number] = torch.cuda.Event()
                self.copied[number].record(torch.cuda.current_stream(self.source))

    def _buffer(self, number: int) -> dict[str, torch.Tensor]:
        """The buffer of this number, made or free to be filled."""
        if number * self.buffer_rows == self.filled:
            self._check_bytes()
        if self.folder is not None:
            if number - 2 == self.written:
                self._write(self.written)
                self.written += 1
            number %= 2
        if number == len(self.buffers):
            self.buffers.append(
                {
                    name: torch.empty(
                        self.buffer_rows + int(self.fixed_shapes),
                        width,
                        dtype=dtype,
                        device=self.device,
                        pin_memory=self.in_background,
                    )
                    for name, (width, dtype) in self.columns.items()
                }
            )
        return self.buffers[number]

    def _check_bytes(self) -> None:
        if self.max_bytes is not None and self.filled * self.row_bytes > self.max_bytes:
            raise too_many_rows(f"{self.filled} rows so far", self.codec, self.filled * self.row_bytes, self.max_bytes)

    def _write(self, number: int) -> None:
        """Write the rows of a buffer to the files, where its number says."""
        if number in self.copied:
            self.copied.pop(number).synchronize()
        rows = min(self.buffer_rows, self.filled - number * self.buffer_rows)
        buffer = self.buffers[number % 2]
        try:
            for name, (width, dtype) in self.columns.items():
                if name not in self.files:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    # A file without a name: nobody else finds it, and it is gone with the process.
                    self.files[name] = tempfile.TemporaryFile(dir=self.folder)
                self.files[name].seek(number * self.buffer_rows * width * dtype.itemsize)
                self.files[name].write(buffer[name][:rows].view(torch.uint8).numpy())
                self.files[name].flush()
        except OSError as error:
            raise full_disk(error, self.folder, rows * self.row_bytes) from error

    # Reading

    def _parts(self) -> Iterator[dict[str, torch.Tensor]]:
        """The rows, in pieces that follow one another."""
        self.encode()
        if self.in_background:
            synchronize(self.source)  # copies may be under way; once an epoch, not once a step
        if self.folder is not None and self.filled:
            for number in range(self.written, -(-self.filled // self.buffer_rows)):
                self._write(number)  # the last one goes on being filled, and is then written again
            yield {name: self._mapped(name) for name in self.columns}
            return
        for number in range(-(-self.filled // self.buffer_rows)):
            rows = min(self.buffer_rows, self.filled - number * self.buffer_rows)
            yield {name: part[:rows] for name, part in self.buffers[number].items()}

    def _mapped(self, name: str) -> torch.Tensor:
        width, dtype = self.columns[name]
        values = np.memmap(self.files[name], np.uint8, "r+", shape=(self.filled, width * dtype.itemsize))
        return torch.from_numpy(values).view(dtype)

    def sample_table(self) -> np.ndarray:
        """`[n, 4]` of (slot, order, label hash, rows) of the samples that have rows."""
        table = np.empty((sum(len(batch[0]) for batch in self.samples), 4), dtype=np.int64)
        start = 0
        for batch in self.samples:
            rows = table[start : start + len(batch[0])]
            for column, values in enumerate(batch):
                rows[:, column] = values
            start += len(rows)
        return table[table[:, 3] > 0]

    def finite(self) -> np.ndarray:
        """Which rows are finite, `[filled]`."""
        # By parts: a sum in float32 first makes a copy of all that it sums, of a file on disk as well.
        found = [
            torch.isfinite(rows.sum(dim=-1, dtype=torch.float32)).cpu()
            for part in self._parts()
            for rows in part["log_probs"].split(SUMMED_ROWS)
        ]
        return torch.cat(found).numpy() if found else np.ones(0, dtype=bool)

    def select(self, rows: np.ndarray, size: int) -> Iterator[dict[str, torch.Tensor]]:
        """The rows of these numbers, which ascend, at most `size` at a time."""
        pieces = list(self._parts())
        ends = np.cumsum([len(piece["log_probs"]) for piece in pieces])
        for start in range(0, len(rows), size):
            wanted = rows[start : start + size]
            found = []
            for piece, end in zip(pieces, ends, strict=True):
                first = end - len(piece["log_probs"])
                own = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, end)] - first
                if len(own):
                    found.append(_select(piece, own))
            yield found[0] if len(found) == 1 else _joined(found)

    def empty(self) -> dict[str, torch.Tensor]:
        """No rows."""
        return {name: torch.zeros(0, width, dtype=dtype) for name, (width, dtype) in self.columns.items()}

    def clear(self) -> None:
        """Begin an epoch."""
        self.samples, self.filled, self.visits, self.written, self.copied = [], 0, 0, 0, {}

    # Saving

    def state(self) -> dict[str, torch.Tensor]:
        """The predictions so far, as tensors."""
        pieces = list(self._parts())
        parts = pieces[0] if len(pieces) == 1 else _joined(pieces) if pieces else self.empty()
        return {"samples": torch.from_numpy(self.sample_table()), "visits": torch.tensor([self.visits]), **parts}

    def load(self, tensors: dict[str, torch.Tensor], moved: np.ndarray | None = None) -> None:
        """
        Take over what `state` gave; several may follow one another when the number of processes changed.

        Args:
            tensors (`dict[str, torch.Tensor]`): of `state`.
            moved (`np.ndarray`, *optional*): the slot of each old slot, -1 where its sample is gone.
        """
        samples = tensors["samples"].numpy().copy()
        parts = {name: tensors[name] for name in self.columns if name in tensors}
        if "true_probs" in self.columns and "true_probs" not in parts:  # the trace was turned on since
            parts["true_probs"] = torch.full((len(parts["log_probs"]), 1), math.nan, dtype=torch.float16)
        if moved is not None:
            kept = moved[samples[:, 0]] >= 0
            starts = np.cumsum(samples[:, 3]) - samples[:, 3]
            parts = _select(parts, ranges(starts[kept], samples[kept, 3]))
            samples = samples[kept]
            samples[:, 0] = moved[samples[:, 0]]
        if len(samples):
            self.encode()
            self.samples.append(tuple(samples.T))
            self._append(parts)
        self.visits = max(self.visits, int(tensors["visits"]))


def _select(parts: dict[str, torch.Tensor], rows: np.ndarray) -> dict[str, torch.Tensor]:
    """The rows of these numbers, which ascend; without a copy where they follow one another."""
    if not len(rows) or rows[-1] - rows[0] == len(rows) - 1:
        start = int(rows[0]) if len(rows) else 0
        return {name: part[start : start + len(rows)] for name, part in parts.items()}
    index = torch.from_numpy(rows)
    return {name: part.index_select(0, index.to(part.device)) for name, part in parts.items()}


def _joined(pieces: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
