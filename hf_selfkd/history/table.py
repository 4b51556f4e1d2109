"""
The prediction history: what the model said of every sample in an earlier epoch.

One table, addressed by sample id (and position, for tokens), is read during an epoch and never written. New
predictions go to a journal; between two epochs the processes exchange their journals once and the table takes the
first prediction of each sample. So what is read never depends on the order of steps or processes, a sample that is
replayed to fill a batch changes nothing, and a sample that was not visited keeps what it had.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..losses.soft_targets import MAX_HELD, SoftTargets, label_entries
from ..samples import SampleIndex
from .codec import Codec


NEVER, WARM_START = -2, -1  # epoch stamps of samples without a prediction, and of those made before training

EXCHANGE_ROWS = 65536  # rows sent at a time between processes


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[0] .. starts[0] + counts[0] - 1, starts[1] .. and so on, in one array."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - counts), counts) + np.arange(total)


def _to(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Move without making the host wait for the device."""
    if tensor.device == device:
        return tensor
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class PredictionHistory:
    """
    Past predictions of every sample; see the head of this module.

    Args:
        size (`int`): number of samples.
        ids (`np.ndarray` of `int64`, *optional*): their ids, sorted; `0..size - 1` by default.
        place (`str`): `"accelerator"`, `"cpu"` or `"disk"`.
        device (`torch.device`): where the model is.
        folder (`str` or `Path`): for `"disk"`.
        codec ([`Codec`]): how rows are stored.
        ragged (`bool`): whether samples have several rows each.
        trace_epochs (`int`, *optional*, defaults to 0): epochs for which to keep the true-class probabilities.
        writes (`bool`, *optional*, defaults to `True`):
            whether this process writes the files of `"disk"`, which the processes of a node share.
        expected_rows (`int`, *optional*, defaults to 0): rows that this process will predict in an epoch, about.
    """

    def __init__(
        self,
        size: int,
        codec: Codec,
        place: str,
        device: torch.device,
        folder: str | Path,
        ids: np.ndarray | None = None,
        ragged: bool = False,
        trace_epochs: int = 0,
        writes: bool = True,
        expected_rows: int = 0,
    ):
        self.expected_rows = expected_rows
        self.size, self.ids, self.codec, self.ragged = size, ids, codec, ragged
        self.place, self.folder, self.writes = place, Path(folder), writes
        self.device = torch.device(device) if place == "accelerator" else torch.device("cpu")
        self.stamps = np.full(size, NEVER, dtype=np.int32)
        self._complete = False  # whether every sample has a prediction
        self.hashes = np.zeros(size, dtype=np.int64)
        self.counts = np.zeros(size, dtype=np.int32) if ragged else None
        self.starts = np.full(size, -1, dtype=np.int64) if ragged else None
        self.table: dict[str, torch.Tensor] = {}
        self.trace = torch.full((size, trace_epochs), math.nan, dtype=torch.float16) if trace_epochs else None
        # What was predicted in this epoch: which samples, and their rows in buffers that are made once. Tensors that
        # outlive a step would scatter the memory that the next step needs in one piece.
        # (slots, order, label hashes, rows of each) of batches, once an epoch put into one array.
        self.samples: list[tuple[np.ndarray | int, ...]] = []
        self.journal: dict[str, torch.Tensor] = {}
        self.filled = 0
        # Rows of small batches, not encoded yet (see `write`), and how many entries they have.
        self.waiting: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]] = []
        self.held = 0
        # What `look_up` said of the last batch, and a mask that is true everywhere, of the length of the last one.
        self._last: tuple[SampleIndex, np.ndarray, np.ndarray | None] | None = None
        self._every: torch.Tensor | None = None
        self.visits = 0  # micro-batches of this epoch so far, the order in which predictions were made

    # Reading

    def slots(self, ids: np.ndarray) -> np.ndarray:
        """Where the samples of these ids are kept.

        Raises:
            ValueError: if an id is unknown.
        """
        if self.ids is None:
            values = ids.tolist()  # Python finds the ends of a batch sooner than NumPy
            if not values or (min(values) >= 0 and max(values) < self.size):
                return ids
            slots, known = ids, (ids >= 0) & (ids < self.size)
        else:
            slots = np.minimum(np.searchsorted(self.ids, ids), self.size - 1)
            known = self.ids[slots] == ids
        if not known.all():
            raise ValueError(
                f"sample_id={ids[~known][0]} is out of range: the history was made for {self.size} samples"
                f"{' with ids 0 to ' + str(self.size - 1) if self.ids is None else ''}; give the trainer the whole "
                "training set, or set sample_id_column."
            )
        return slots

    def read(self, samples: SampleIndex, num_rows: int, device: torch.device) -> SoftTargets | None:
        """
        The most recent predictions of earlier epochs.

        Args:
            samples ([`~hf_selfkd.samples.SampleIndex`]): of the batch.
            num_rows (`int`): rows of the batch, padding included.
            device (`torch.device`): where to put them.

        Returns:
            [`~hf_selfkd.losses.SoftTargets`]: or `None` if no sample of the batch has one.

        Raises:
            ValueError: if an id is unknown, or a sample's labels are not those of the stored prediction.
        """
        slots, known = self.look_up(samples)
        if known is None and samples.total == num_rows and not self.ragged:
            if self._every is None or len(self._every) != num_rows or self._every.device != device:
                self._every = torch.ones(num_rows, dtype=torch.bool, device=device)
            soft_targets = self._past(slots, self._every, device)
            soft_targets.all_valid = True
            return soft_targets
        known = np.ones(len(slots), dtype=bool) if known is None else known
        if not known.any():
            return None
        source, mask = slots[known], known
        if self.ragged:
            source = _ranges(self.starts[source], self.counts[source])
            mask = np.zeros(num_rows, dtype=bool)
            mask[samples.rows[np.repeat(known, samples.counts)]] = True
        soft_targets = self._past(source, _to(torch.from_numpy(mask), device), device)
        if len(source) == num_rows:
            soft_targets.all_valid = samples.total == num_rows
            return soft_targets
        target = _to(torch.from_numpy(np.flatnonzero(mask)), device)
        soft_targets.log_probs = soft_targets.log_probs.new_zeros(
            num_rows, soft_targets.log_probs.shape[1]
        ).index_copy_(0, target, soft_targets.log_probs)
        if soft_targets.index is not None:
            soft_targets.index = soft_targets.index.new_zeros(num_rows, soft_targets.index.shape[1]).index_copy_(
                0, target, soft_targets.index
            )
        return soft_targets

    def _past(self, source: np.ndarray, mask: torch.Tensor, device: torch.device) -> SoftTargets:
        """These rows of the table."""
        index = _to(torch.from_numpy(source), self.device)
        parts = {name: _to(part.index_select(0, index), device) for name, part in self.table.items()}
        return self.codec.decode(parts, mask)

    def look_up(self, samples: SampleIndex) -> tuple[np.ndarray, np.ndarray | None]:
        """
        Where these samples are kept and which have a prediction (`None` for all).

        Raises:
            ValueError: if an id is unknown, or a prediction was made for other labels than the sample has now.
        """
        if self._last is not None and self._last[0] is samples:
            return self._last[1:]  # of the same batch, read before it is written
        slots, known = self.slots(samples.ids), None
        hashes = self.hashes.take(slots)
        if not self._complete:
            known = self.stamps[slots] != NEVER
            hashes = np.where(known, hashes, samples.label_hash)
        if hashes.tobytes() != samples.label_hash.tobytes():  # faster than by elements
            where = np.flatnonzero(hashes != samples.label_hash)[0]
            raise ValueError(
                f"the labels of sample_id={samples.ids[where]} are not those its stored prediction was made for "
                f"(hash {samples.label_hash[where]} now, {self.hashes[slots[where]]} stored): the training set was "
                "shuffled, filtered or relabelled since. Give the same dataset, or name a stable id in "
                "sample_id_column."
            )
        self._last = (samples, slots, known)
        return slots, known

    def probabilities(self, ids: np.ndarray) -> torch.Tensor:
        """
        What is stored for these samples.

        Args:
            ids (`np.ndarray` of `int64`, shape `[n]`): sample ids.

        Returns:
            `torch.FloatTensor` of shape `[n, C]` (with several rows a sample: `[rows of all, C]`), on the CPU: NaN
            where there is none; with top-k rows the rest of the mass is spread evenly over the other classes.
        """
        slots = self.slots(np.asarray(ids, dtype=np.int64))
        known = self.stamps[slots] != NEVER
        if self.ragged:
            counts = np.where(known, self.counts[slots], 1)
            source = _ranges(np.where(known, self.starts[slots], 0), counts)
            known = np.repeat(known, counts)
        else:
            source = slots
        result = torch.full((len(source), self.codec.num_classes), math.nan)
        if known.any():
            index = torch.from_numpy(source[known]).to(self.device)
            parts = {name: part.index_select(0, index).cpu() for name, part in self.table.items()}
            soft_targets = self.codec.decode(parts, torch.ones(len(index), dtype=torch.bool))
            probs = soft_targets.log_probs.exp()
            if soft_targets.index is not None:
                rest = (1 - probs.sum(-1, keepdim=True)).clamp_min(0)
                even = rest / max(self.codec.num_classes - self.codec.top_k, 1)
                probs = even.expand(-1, self.codec.num_classes).scatter(-1, soft_targets.index, probs)
            result[torch.from_numpy(known)] = probs
        return result

    # Writing

    def write(
        self,
        samples: SampleIndex,
        log_probs: torch.Tensor,
        labels: torch.Tensor,
        index: torch.Tensor | None = None,
        true_log_probs: torch.Tensor | None = None,
    ) -> None:
        """
        Note the predictions of a batch, to be read from the next epoch on.

        Args:
            samples ([`~hf_selfkd.samples.SampleIndex`]): of the batch.
            log_probs (`torch.FloatTensor` of shape `[R, C]`, or `[R, k]` with `index`):
                float32, detached; it may be read later, so it must not be changed.
            labels (`torch.LongTensor` of shape `[R]`): for the trace.
            index (`torch.LongTensor` of shape `[R, k]`, *optional*): classes of the entries to store.
            true_log_probs (`torch.FloatTensor` of shape `[R]`, *optional*): of the labels, for the trace of entries.

        Raises:
            ValueError: as [`~PredictionHistory.read`] does, which is not called at alpha 0.
        """
        slots, _ = self.look_up(samples)
        true = None
        if self.trace is not None:
            true = label_entries(log_probs, labels) if true_log_probs is None else true_log_probs
            true = true.exp().masked_fill_(labels < 0, math.nan)
        rows = (log_probs, index, true)
        if self.ragged:
            places = _to(torch.from_numpy(samples.rows), log_probs.device)
            rows = tuple(None if part is None else part.index_select(0, places) for part in rows)
        self.samples.append((slots, self.visits, samples.label_hash, samples.counts if self.ragged else 1))
        self.waiting.append(rows)
        self.held += rows[0].numel()
        self.visits += 1
        # Small batches are encoded several at a time: fetching code that has not just run into the processor's cache
        # takes longer than running it.
        if self.held > MAX_HELD:
            self._encode()

    def _encode(self) -> None:
        """Move the rows that wait to the journal."""
        if not self.waiting:
            return
        log_probs, index, true = (
            None if parts[0] is None else parts[0] if len(parts) == 1 else torch.cat(parts)
            for parts in zip(*self.waiting, strict=True)
        )
        self.waiting, self.held = [], 0
        parts = self.codec.encode(log_probs, index)
        if true is not None:
            parts["true_probs"] = true.to(torch.float16).unsqueeze(-1)
        self._note(parts)

    def _note(self, parts: dict[str, torch.Tensor]) -> None:
        start, self.filled = self.filled, self.filled + len(parts["log_probs"])
        held = len(self.journal["log_probs"]) if self.journal else 0
        if self.filled > held or not self.journal:
            size = max(self.filled, 2 * held, self.expected_rows)
            pinned = self.device.type == "cpu" and parts["log_probs"].is_cuda
            for name, (width, dtype) in self._columns.items():
                buffer = torch.empty(size, width, dtype=dtype, device=self.device, pin_memory=pinned)
                if held:
                    buffer[:start] = self.journal[name][:start]
                self.journal[name] = buffer
        for name, part in parts.items():
            self.journal[name][start : self.filled].copy_(part, non_blocking=True)

    @property
    def _columns(self) -> dict[str, tuple[int, torch.dtype]]:
        return self.codec.widths | ({"true_probs": (1, torch.float16)} if self.trace is not None else {})

    def _take_journal(self) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
        """The journal: `[n, 4]` of (slot, order, label hash, rows), and the parts of their rows."""
        self._encode()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies to the host may be under way; once an epoch, not once a step
        samples = np.empty((sum(len(batch[0]) for batch in self.samples), 4), dtype=np.int64)
        start = 0
        for batch in self.samples:
            rows = samples[start : start + len(batch[0])]
            for column, values in enumerate(batch):
                rows[:, column] = values
            start += len(rows)
        samples = samples[samples[:, 3] > 0]
        if self.journal:
            return samples, {name: buffer[: self.filled] for name, buffer in self.journal.items()}
        columns = self._columns.items()
        parts = {name: torch.zeros(0, width, dtype=dtype, device=self.device) for name, (width, dtype) in columns}
        return samples, parts

    def end_epoch(
        self, stamp: int, gather: Callable[[torch.Tensor], torch.Tensor] | None = None, rank: int = 0
    ) -> None:
        """
        Move the journals of all processes into the table. Every process must call this.

        Args:
            stamp (`int`): the epoch in which the predictions were made.
            gather (`Callable`, *optional*):
                concatenates a tensor of the same shape from all processes; `None` for one process.
            rank (`int`, *optional*, defaults to 0): of this process.
        """
        samples, parts = self._take_journal()
        samples, rows = _only_finite(
            samples, torch.isfinite(parts["log_probs"].sum(dim=-1, dtype=torch.float32)).cpu().numpy()
        )
        everyone, owners, local = _gather_samples(samples, gather)
        first = _first_of_each(everyone, self.size)
        self._check_labels_agree(everyone, first)
        everyone, owners, local = everyone[first], owners[first], local[first]
        destination = self._allocate(everyone[:, 0], everyone[:, 3], gather)
        starts = np.cumsum(samples[:, 3]) - samples[:, 3]
        mine = local[owners == rank]
        rows = rows[_ranges(starts[mine], samples[mine, 3])]
        if len(rows) < len(parts["log_probs"]):  # else all of them, in order
            index = torch.from_numpy(rows).to(self.device)
            parts = {name: part.index_select(0, index) for name, part in parts.items()}
        row_owners = np.repeat(owners, everyone[:, 3])
        self._store(parts, lambda owner: torch.from_numpy(destination[row_owners == owner]), gather)
        self.stamps[everyone[:, 0]] = stamp
        self._complete = bool((self.stamps != NEVER).all())
        self.hashes[everyone[:, 0]] = everyone[:, 2]
        if self.trace is not None and 0 <= stamp < self.trace.shape[1]:
            true = self.table["true_probs"].index_select(0, torch.from_numpy(destination).to(self.device)).float()
            sums = np.add.reduceat(true.cpu().numpy()[:, 0], np.cumsum(everyone[:, 3]) - everyone[:, 3])
            self.trace[everyone[:, 0], stamp] = torch.from_numpy(sums / everyone[:, 3]).to(torch.float16)
        self.samples, self.filled, self.visits, self._last = [], 0, 0, None

    def _check_labels_agree(self, samples: np.ndarray, first: np.ndarray) -> None:
        expected = np.empty(self.size, dtype=np.int64)
        expected[samples[first, 0]] = samples[first, 2]
        different = samples[:, 2] != expected[samples[:, 0]]
        if different.any():
            slot = samples[np.flatnonzero(different)[0], 0]
            raise ValueError(
                f"sample_id={slot if self.ids is None else self.ids[slot]} came with two different labels in one "
                "epoch: the ids of sample_id_column are not unique."
            )

    def _allocate(self, slots: np.ndarray, counts: np.ndarray, gather: Callable | None) -> np.ndarray:
        """Rows of the table for these samples, one after the other; makes room for those that have none yet."""
        if not self.ragged:
            self._grow(self.size, gather)
            return slots
        new = self.starts[slots] < 0
        held = int(self.counts.sum())
        self.starts[slots[new]] = held + np.cumsum(counts[new]) - counts[new]
        self.counts[slots[new]] = counts[new]
        self._grow(max(int(self.counts.sum()), 1), gather)  # at least one row: a file cannot be mapped empty
        return _ranges(self.starts[slots], counts)

    def _grow(self, num_rows: int, gather: Callable | None = None) -> None:
        """Make the table at least this long, keeping what it holds."""
        held = len(self.table["log_probs"]) if self.table else 0
        if held >= num_rows:
            return
        if self.place == "disk":
            if self.writes:
                self.folder.mkdir(parents=True, exist_ok=True)
                for name, (width, dtype) in self._columns.items():
                    path = self.folder / f"{name}.bin"
                    if not held:
                        path.unlink(missing_ok=True)  # of an earlier run, which may still hold it open
                    with open(path, "ab") as file:
                        file.truncate(num_rows * width * dtype.itemsize)
            if gather is not None:
                gather(torch.zeros(1))  # nobody maps a file before it is long enough
        for name, (width, dtype) in self._columns.items():
            if self.place == "disk":
                path = str(self.folder / f"{name}.bin")
                part = torch.from_file(path, shared=True, size=num_rows * width, dtype=dtype).view(num_rows, width)
            else:
                part = torch.zeros(num_rows, width, dtype=dtype, device=self.device)
                part[:held] = self.table[name] if held else 0
            self.table[name] = part

    def _store(
        self,
        parts: dict[str, torch.Tensor],
        rows_of: Callable[[int], torch.Tensor],
        gather: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        """Write this process's rows, and those of the others, where they belong; `rows_of(rank)` are their places."""
        if gather is None:
            rows = rows_of(0).to(self.device)
            for name, part in parts.items():
                self.table[name].index_copy_(0, rows, part)
            return
        lengths = gather(torch.tensor([len(parts["log_probs"])])).tolist()
        places = [rows_of(owner) for owner in range(len(lengths))]
        for start in range(0, max(lengths), EXCHANGE_ROWS):
            size = min(EXCHANGE_ROWS, max(lengths) - start)
            for name, part in parts.items():
                piece = part[start : start + size].contiguous().view(torch.uint8)  # not every backend sends int16
                sent = piece.new_zeros(size, piece.shape[1])
                sent[: len(piece)] = piece
                received = gather(sent).view(len(lengths), size, -1).to(self.device)
                if self.place == "disk" and not self.writes:
                    continue
                for owner, rows in enumerate(places):
                    rows = rows[start : start + size].to(self.device)
                    values = received[owner, : len(rows)].contiguous().view(part.dtype)
                    self.table[name].index_copy_(0, rows, values)
        if self.place == "disk":
            gather(torch.zeros(1))  # nobody reads before the writer of the node is done

    # Saving

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Everything that all processes agree on, as tensors and metadata."""
        tensors = {f"table.{name}": part for name, part in self.table.items()}
        for name in ("stamps", "hashes", "counts", "starts", "ids"):
            if getattr(self, name) is not None:
                tensors[name] = torch.from_numpy(getattr(self, name))
        tensors["visits"] = torch.tensor([self.visits])
        if self.trace is not None:
            tensors["trace"] = self.trace
        metadata = {
            "size": str(self.size),
            "num_classes": str(self.codec.num_classes),
            "dtype": str(self.codec.dtype).removeprefix("torch."),
            "top_k": str(self.codec.top_k),
            "ragged": str(self.ragged),
        }
        return tensors, metadata

    def load_state(self, tensors: dict[str, torch.Tensor], gather: Callable | None = None) -> None:
        """Take over what [`~PredictionHistory.state`] gave. Every process must call this."""
        for name in ("stamps", "hashes", "counts", "starts"):
            if name in tensors:
                setattr(self, name, tensors[name].numpy().copy())
        self._complete = bool((self.stamps != NEVER).all())
        self.visits = int(tensors["visits"])  # also where no journal is loaded: later visits stay later
        if "trace" in tensors and self.trace is not None:
            epochs = min(self.trace.shape[1], tensors["trace"].shape[1])
            self.trace[:, :epochs] = tensors["trace"][:, :epochs]
        stored = {name: tensors[f"table.{name}"] for name in self._columns if f"table.{name}" in tensors}
        if stored:
            self._grow(len(stored["log_probs"]), gather)
            if self.place != "disk" or self.writes:
                for name, part in stored.items():
                    self.table[name].copy_(part)
            if self.place == "disk" and gather is not None:
                gather(torch.zeros(1))

    def journal_state(self) -> dict[str, torch.Tensor]:
        """The predictions of this epoch so far, which each process has for itself."""
        samples, parts = self._take_journal()
        return {"samples": torch.from_numpy(samples), "visits": torch.tensor([self.visits]), **parts}

    def add_journal(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over a journal; several may follow one another when the number of processes changed."""
        if len(tensors["samples"]):
            self._encode()
            self.samples.append(tuple(tensors["samples"].numpy().T))
            self._note({name: tensors[name] for name in self._columns})
        self.visits = max(self.visits, int(tensors["visits"]))


def _only_finite(samples: np.ndarray, finite: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drop the samples with a prediction that is not finite (a step that overflowed): they keep what they had.

    Returns the samples left and where their rows stand among all rows of the journal.
    """
    rows = np.arange(len(finite))
    if finite.all():
        return samples, rows
    keep = np.ones(len(samples), dtype=bool)
    keep[np.repeat(np.arange(len(samples)), samples[:, 3])[~finite]] = False
    return samples[keep], rows[np.repeat(keep, samples[:, 3])]


def _gather_samples(samples: np.ndarray, gather: Callable | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The journals' samples of all processes, whose each is, and its number there."""
    if gather is None:
        return samples, np.zeros(len(samples), dtype=np.int64), np.arange(len(samples))
    lengths = gather(torch.tensor([len(samples)])).tolist()
    sent = torch.zeros(max(lengths), 4, dtype=torch.int64)
    sent[: len(samples)] = torch.from_numpy(samples)
    received = gather(sent).view(len(lengths), len(sent), 4).numpy()
    everyone = np.concatenate([received[owner, :length] for owner, length in enumerate(lengths)])
    owners = np.repeat(np.arange(len(lengths)), lengths)
    return everyone, owners, np.concatenate([np.arange(length) for length in lengths])


def _first_of_each(samples: np.ndarray, size: int) -> np.ndarray:
    """Where the first prediction of each of `size` samples stands, by step and then by process; grouped by process."""
    latest_first = np.argsort(samples[:, 1], kind="stable")[::-1]  # equal steps in the order of processes
    first = np.empty(size, dtype=np.int64)
    first[samples[latest_first, 0]] = latest_first  # of several assignments the last one stays
    return np.flatnonzero(first[samples[:, 0]] == np.arange(len(samples)))
