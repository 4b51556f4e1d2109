"""The table of a history: what is read of earlier epochs, and where each sample's rows are."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..devices import compiles_shapes, to_device
from ..losses.soft_targets import SoftTargets
from ..samples import SampleIndex
from .addresses import NEVER, WARM_START, find_slots, ranges
from .codec import Codec
from .storage import TableStorage


__all__ = ["NEVER", "WARM_START", "PredictionTable"]


class PredictionTable:
    """
    The most recent prediction of every sample, addressed by sample id (and position, for tokens).

    Args:
        size (`int`): number of samples.
        codec ([`Codec`]): how rows are stored.
        storage ([`TableStorage`]): where rows are stored.
        ids (`np.ndarray` of `int64`, *optional*): ids of the samples, sorted; `0..size - 1` by default.
        ragged (`bool`): whether samples have several rows each.

    Attributes:
        stamps (`np.ndarray` of shape `[size]`): the epoch of each sample's prediction, or `NEVER` or `WARM_START`.
        hashes (`np.ndarray` of shape `[size]`): the hash of the labels that it was made for.
        counts, starts (`np.ndarray` of shape `[size]`, *optional*): with several rows a sample, how many and where.
    """

    def __init__(
        self, size: int, codec: Codec, storage: TableStorage, ids: np.ndarray | None = None, ragged: bool = False
    ):
        self.size, self.ids, self.codec, self.ragged, self.storage = size, ids, codec, ragged, storage
        self.stamps = np.full(size, NEVER, dtype=np.int32)
        self._complete = False  # whether every sample has a prediction
        self.hashes = np.zeros(size, dtype=np.int64)
        self.counts = np.zeros(size, dtype=np.int32) if ragged else None
        self.starts = np.full(size, -1, dtype=np.int64) if ragged else None
        # What `look_up` said of the last batch, and a mask that is true everywhere, of the length of the last one.
        self._last: tuple[SampleIndex, np.ndarray, np.ndarray | None] | None = None
        self._every: torch.Tensor | None = None

    @property
    def table(self) -> dict[str, torch.Tensor]:
        """`dict[str, torch.Tensor]`: the stored parts of all rows; empty before the end of the first epoch."""
        return self.storage.parts

    def name_of(self, slot: int) -> str:
        """The sample of a slot, for messages."""
        return f"sample_id={slot if self.ids is None else self.ids[slot]}"

    def slots(self, ids: np.ndarray) -> np.ndarray:
        """Where the samples of these ids are kept.

        Raises:
            ValueError: if an id is unknown.
        """
        slots, known = find_slots(ids, self.size, self.ids)
        if known is not None:
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
        fixed = compiles_shapes(device)  # then one way serves batches with and without samples that have no past
        if known is None and samples.total == num_rows and not self.ragged and not fixed:
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
            source = ranges(self.starts[source], self.counts[source])
            mask = np.zeros(num_rows, dtype=bool)
            mask[samples.rows[np.repeat(known, samples.counts)]] = True
        if fixed:  # rows without a past read the first row of the table
            spread = np.zeros(num_rows, dtype=np.int64)
            spread[mask] = source
            return self._past(spread, to_device(torch.from_numpy(mask), device), device)
        soft_targets = self._past(source, to_device(torch.from_numpy(mask), device), device)
        if len(source) == num_rows:
            soft_targets.all_valid = samples.total == num_rows
            return soft_targets
        target = to_device(torch.from_numpy(np.flatnonzero(mask)), device)
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
        index = to_device(torch.from_numpy(source), self.storage.device)
        parts = {name: to_device(part.index_select(0, index), device) for name, part in self.storage.parts.items()}
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
            source = ranges(np.where(known, self.starts[slots], 0), counts)
            known = np.repeat(known, counts)
        else:
            source = slots
        result = torch.full((len(source), self.codec.num_classes), math.nan)
        if known.any():
            index = torch.from_numpy(source[known]).to(self.storage.device)
            parts = {name: part.index_select(0, index).cpu() for name, part in self.storage.parts.items()}
            soft_targets = self.codec.decode(parts, torch.ones(len(index), dtype=torch.bool))
            result[torch.from_numpy(known)] = self.codec.probabilities(soft_targets)
        return result

    @property
    def table_rows(self) -> int:
        """`int`: rows that the table must have; at least one, as a file cannot be mapped empty."""
        return max(int(self.counts.sum()), 1) if self.ragged else self.size

    def place_rows(self, slots: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Rows of the table for these samples, one sample after the other; new rows for samples that have none yet."""
        if not self.ragged:
            return slots
        new = self.starts[slots] < 0
        held = int(self.counts.sum())
        self.starts[slots[new]] = held + np.cumsum(counts[new]) - counts[new]
        self.counts[slots[new]] = counts[new]
        return ranges(self.starts[slots], counts)
