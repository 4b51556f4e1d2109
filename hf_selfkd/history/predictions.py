"""
The prediction history: what the model said of every sample in an earlier epoch.

One table, addressed by sample id (and position, for tokens), is read during an epoch and never written. New
predictions go to a journal; between two epochs the processes exchange their journals once and the table takes the
first prediction of each sample. So what is read never depends on the order of steps or processes, a sample that is
replayed to fill a batch changes nothing, and a sample that was not visited keeps what it had.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import torch

from ..losses.soft_targets import label_entries
from ..samples import SampleIndex
from . import saving
from .addresses import NEVER, ranges
from .codec import Codec
from .exchange import check_labels_agree, exchange_rows, first_of_each, gather_samples, only_finite
from .journal import Journal
from .plan import too_many_rows
from .storage import Gather, TableStorage
from .table import PredictionTable


logger = logging.getLogger(__name__)

NAMED = 5  # samples that a warning names


class PredictionHistory(PredictionTable):
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
            whether this process writes the files of `"disk"`, which the processes of a node share; it is the first
            process of its node.
        expected_rows (`int`, *optional*, defaults to 0): rows that this process will predict in an epoch, about.
        max_bytes (`int`, *optional*): refuse to hold more than this in the table and one epoch's journals.
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
        max_bytes: int | None = None,
    ):
        source, folder = torch.device(device), Path(folder)
        device = source if place == "accelerator" else torch.device("cpu")
        spill = folder if place == "disk" else None
        self.journal = Journal(codec, device, source, ragged, trace_epochs > 0, spill, expected_rows, max_bytes)
        storage = TableStorage(self.journal.columns, place, device, folder, writes)
        super().__init__(size, codec, storage, ids, ragged)
        self.max_bytes = max_bytes
        self.trace = torch.full((size, trace_epochs), math.nan, dtype=torch.float16) if trace_epochs else None

    @property
    def visits(self) -> int:
        """`int`: micro-batches of this epoch so far."""
        return self.journal.visits

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
        noted, rows = self._noted(samples, slots), (log_probs, index, true)
        if self.ragged:
            self.journal.add(noted, samples.label_hash, samples.counts, rows, samples.rows)
        else:
            self.journal.add(noted, samples.label_hash, 1, rows)

    def _noted(self, samples: SampleIndex, slots: np.ndarray) -> np.ndarray:
        """What the journal notes of each sample, to know it by: where it is kept."""
        return slots

    def _name_of_noted(self, noted: int) -> str:
        """The sample that the journal noted so, for messages."""
        return self.name_of(noted)

    def _warn_of_lost(self, noted: np.ndarray, finite: np.ndarray) -> None:
        """Name samples whose predictions are not kept. In other steps of the epoch they may have been finite."""
        lost = np.setdiff1d(noted, finite)
        if len(lost):
            names = ", ".join(self._name_of_noted(int(one)) for one in lost[:NAMED])
            logger.warning(
                f"The predictions of {len(lost)} samples in this epoch were not finite ({names}"
                f"{', ...' if len(lost) > NAMED else ''}): they keep the past predictions that they had. Look at "
                "these samples, and at the steps whose hard_loss is NaN."
            )

    def _settled(self, everyone: np.ndarray) -> np.ndarray:
        """The samples `[n, 4]` of all journals, with their slots in the first column."""
        return everyone

    def end_epoch(self, stamp: int, gather: Gather | None = None, rank: int = 0) -> None:
        """
        Move the journals of all processes into the table. Every process must call this.

        Args:
            stamp (`int`): the epoch in which the predictions were made.
            gather (`Callable`, *optional*):
                concatenates a tensor of the same shape from all processes; `None` for one process.
            rank (`int`, *optional*, defaults to 0): of this process.
        """
        noted = self.journal.sample_table()
        samples, starts = only_finite(noted, self.journal.finite())
        self._warn_of_lost(noted[:, 0], samples[:, 0])
        everyone, owners, local = gather_samples(samples, gather)
        everyone = self._settled(everyone)
        first = first_of_each(everyone, self.size)
        check_labels_agree(everyone, first, self.size, self.name_of)
        everyone, owners, local = everyone[first], owners[first], local[first]
        visited, counts = everyone[:, 0], everyone[:, 3]
        destination = self.place_rows(visited, counts)
        self._check_bytes(len(destination))
        self.storage.grow(self.table_rows, gather)
        mine = local[owners == rank]
        rows = ranges(starts[mine], samples[mine, 3])
        exchange_rows(self.journal, rows, destination, np.repeat(owners, counts), self.storage, gather, rank)
        self.stamps[visited] = stamp
        self._complete = bool((self.stamps != NEVER).all())
        self.hashes[visited] = everyone[:, 2]
        if self.trace is not None and 0 <= stamp < self.trace.shape[1]:
            true = (
                self.table["true_probs"].index_select(0, torch.from_numpy(destination).to(self.storage.device)).float()
            )
            sums = np.add.reduceat(true.cpu().numpy()[:, 0], np.cumsum(counts) - counts)
            self.trace[visited, stamp] = torch.from_numpy(sums / counts).to(torch.float16)
        self.journal.clear()
        self._last = None

    def _check_bytes(self, journal_rows: int) -> None:
        """Refuse more rows than fit; for tokens their number is known at the end of the first epoch, not before."""
        num_bytes = (self.table_rows + journal_rows) * self.codec.row_bytes
        if self.ragged and self.max_bytes is not None and num_bytes > self.max_bytes:
            raise too_many_rows(f"{self.table_rows} rows", self.codec, num_bytes, self.max_bytes)

    # Saving

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Everything that all processes agree on, as tensors and metadata."""
        return saving.state_of(self)

    def load_state(
        self, tensors: dict[str, torch.Tensor], gather: Gather | None = None, keep_known: bool = False
    ) -> np.ndarray | None:
        """
        Take over what [`~PredictionHistory.state`] gave. Every process must call this.

        Args:
            tensors (`dict[str, torch.Tensor]`): of `state`, made with the same codec.
            gather (`Callable`, *optional*): as in [`~PredictionHistory.end_epoch`].
            keep_known (`bool`, *optional*, defaults to `False`):
                whether the history was made for other samples: those whose id is among ours keep their predictions,
                the others of ours begin without any. By default it was made for the same ones.

        Returns:
            `np.ndarray` or `None`: with `keep_known`, what [`~PredictionHistory.add_journal`] needs to know.
        """
        moved = None
        if keep_known:
            moved = saving.load_known(self, tensors, gather)
        else:
            saving.load_same(self, tensors, gather)
        self._complete = bool((self.stamps != NEVER).all())
        self.journal.visits = int(tensors["visits"])  # also where no journal is loaded: later visits stay later
        return moved

    def journal_state(self) -> dict[str, torch.Tensor]:
        """The predictions of this epoch so far, which each process has for itself."""
        return self.journal.state()

    def add_journal(self, tensors: dict[str, torch.Tensor], moved: np.ndarray | None = None) -> None:
        """
        Take over a journal; several may follow one another when the number of processes changed.

        Args:
            tensors (`dict[str, torch.Tensor]`): of [`~PredictionHistory.journal_state`].
            moved (`np.ndarray`, *optional*): what `load_state(..., keep_known=True)` returned.
        """
        self.journal.load(tensors, moved)
