"""The teacher that remembers: rows stored when each sample was last trained on, in an earlier epoch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..batch import Batch, Storage
from ..config import MethodArguments
from ..history import WARM_START, Plan, PredictionHistory, plan_history
from ..losses.soft_targets import LOG_ZERO, SoftTargets
from ..losses.summary import summarize
from ..samples import SampleIndex
from ..tasks.rows import Rows
from .base import State, Taught, Teacher


logger = logging.getLogger(__name__)


class HistoryStore:
    """
    One prediction history, of the model or of a head, made at the first batch, which tells the classes.

    Args:
        config ([`~hf_selfkd.config.MethodArguments`]): its `history_*` fields.
        size (`int`): number of samples.
        ids (`np.ndarray`, *optional*): their ids; `0..size - 1` by default.
        device (`torch.device`): where the model is.
        folder (`str` or `Path`): for a history on disk.
        num_epochs (`int`): epochs of the run, for the trace.
        gather (`Callable`, *optional*): concatenates equal tensors of all processes; `None` for one process.
        rank (`int`): of this process.
        writes (`bool`): whether this process writes the files of its node.
        rows_per_sample (`float`, *optional*): labelled rows of a sample, on average; the first batch tells by default.
        local_processes (`int`, *optional*): processes of this node.
        bernoulli (`bool`, *optional*): whether each class of a sample has a row of its own, of no and yes.
    """

    def __init__(
        self,
        config: MethodArguments,
        size: int,
        ids: np.ndarray | None,
        device: torch.device,
        folder: str | Path,
        num_epochs: int,
        gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
        rank: int = 0,
        writes: bool = True,
        rows_per_sample: float | None = None,
        local_processes: int = 1,
        bernoulli: bool = False,
    ):
        self.bernoulli = bernoulli
        self.config, self.size, self.device, self.folder = config, size, device, folder
        self.ids = None if ids is None else np.sort(ids)
        self.num_epochs, self.gather, self.rank, self.writes = num_epochs, gather, rank, writes
        self.rows_per_sample, self.local_processes = rows_per_sample, local_processes
        self.history: PredictionHistory | None = None
        self._storage: Storage | None = None

    @property
    def storage(self) -> Storage | None:
        """[`~hf_selfkd.batch.Storage`]: what is kept of each row, once that is known."""
        return self._storage

    def end_epoch(self, epoch: int) -> None:
        """Let the predictions of an epoch be read from now on. Every process must call this."""
        if self.history is not None:
            self.history.end_epoch(max(epoch, WARM_START), self.gather, self.rank)

    def read(self, samples: SampleIndex, num_rows: int, device: torch.device) -> SoftTargets | None:
        """The most recent predictions of earlier epochs; see [`PredictionHistory.read`]."""
        return None if self.history is None else self.history.read(samples, num_rows, device)

    @torch.no_grad()
    def write(self, samples: SampleIndex, rows: Rows) -> None:
        """Note the present predictions of a batch."""
        rows = rows.kept
        self.prepare(samples, rows.logits.shape[-1])
        top_k = self.history.codec.top_k
        if top_k is None:
            self.history.write(samples, rows.log_probs, rows.labels)
            return
        summary = rows.summary if rows.top_k == top_k else summarize(rows.logits.detach(), top_k)
        true = None if self.history.trace is None else rows.label_log_probs
        log_probs = (summary.top - summary.log_norm.unsqueeze(-1)).clamp_min_(LOG_ZERO)
        self.history.write(samples, log_probs, rows.labels, summary.index, true)

    def prepare(self, samples: SampleIndex, num_classes: int) -> None:
        """Make the history, also where nothing is kept of a batch. Every process must call this."""
        if self.history is None:
            self._make_history(samples, num_classes)
        elif num_classes != self.history.codec.num_classes:
            raise ValueError(
                f"the model has {num_classes} classes, the stored predictions "
                f"{self.history.codec.num_classes}: resume with the model that made them, or, where the number of "
                "choices or positions is another one in each batch, use teacher='snapshot'."
            )

    def stored(self, sample_ids: Any) -> torch.Tensor:
        """The probabilities held for these samples; see [`Teacher.stored`]."""
        if self.history is None:
            raise ValueError("no predictions are stored yet: train first.")
        ids = np.asarray(torch.as_tensor(sample_ids).cpu())
        return self._of_classes(ids) if self.bernoulli else self.history.probabilities(ids)

    def _of_classes(self, ids: np.ndarray) -> torch.Tensor:
        """Of several labels a sample, the probability of each `[n, C]`."""
        slots = self.history.slots(ids.astype(np.int64))
        counts = self.history.counts[slots]
        result = torch.full((len(ids), int(self.history.counts.max())), torch.nan)
        if counts.any():
            yes = self.history.probabilities(ids[counts > 0])[:, 1]
            result[torch.from_numpy(counts > 0)] = yes.view(-1, result.shape[1])
        return result

    def _make_history(self, samples: SampleIndex, num_classes: int) -> None:
        ragged = samples.rows is not None
        num_rows = self._num_rows(samples, ragged)
        plan = self.plan(num_rows, num_classes)
        self.history = self._new_history(plan, ragged)
        logger.info(
            f"Prediction history: about {plan.num_bytes} bytes on {plan.place!r} for {self.size} samples, "
            f"{'all classes' if plan.codec.top_k is None else f'top {plan.codec.top_k}'} in {plan.codec.dtype}."
        )

    def _num_rows(self, samples: SampleIndex, ragged: bool) -> int:
        if not ragged:
            return self.size
        if self.rows_per_sample is not None:
            return max(1, round(self.size * self.rows_per_sample))
        counted = torch.tensor([len(samples.ids), int(samples.counts.sum())])
        if self.gather is not None:
            counted = self.gather(counted).view(-1, 2).sum(dim=0)
        of_samples, num_rows = counted.tolist()
        return -(-self.size * num_rows // of_samples)

    def _new_history(self, plan: Plan, ragged: bool) -> PredictionHistory:
        self._storage = Storage(plan.codec.top_k)
        processes = 1 if self.gather is None else len(self.gather(torch.zeros(1)))
        return self._make(
            plan,
            ragged,
            trace_epochs=self.num_epochs if self.config.history_trace else 0,
            writes=self.writes,
            expected_rows=plan.num_rows * 17 // (16 * processes),  # some are replayed to fill the last batch
            max_bytes=plan.max_bytes,
        )

    def _make(self, plan: Plan, ragged: bool, **options: Any) -> PredictionHistory:
        return PredictionHistory(
            self.size, plan.codec, plan.place, self.device, self.folder, ids=self.ids, ragged=ragged, **options
        )

    def load(self, state: State, journals: list[dict[str, torch.Tensor]]) -> None:
        """
        Take over a history of a checkpoint.

        Raises:
            ValueError: if it was made for other samples, or stored in another way than asked for.
        """
        tensors, metadata = state
        if not metadata.get("num_classes"):
            return  # saved before the first batch
        num_classes, ragged = int(metadata["num_classes"]), metadata["ragged"] == "True"
        grown = self._has_grown(tensors, metadata)
        top_k = None if metadata["top_k"] == "None" else int(metadata["top_k"])
        for name, value in (("history_top_k", top_k), ("history_dtype", metadata["dtype"])):
            asked = getattr(self.config, name)
            if asked not in (None, "auto", value) and not (name == "history_top_k" and asked == num_classes):
                raise ValueError(
                    f"{name}={asked} but the checkpoint's history has {value}: resume with {name}={value}."
                )
        rows = int(tensors["counts"].sum()) if ragged else self.size
        # What is stored decides, not what would be chosen for a new history.
        config = replace(self.config, history_top_k=top_k or num_classes, history_dtype=metadata["dtype"])
        plan = self.plan(max(rows, 1), num_classes, config)
        self.history = self._new_history(plan, ragged)
        moved = self.history.load_state(tensors, self.gather, keep_known=grown)
        for journal in journals:
            self.history.add_journal(journal, moved)

    def plan(self, num_rows: int, num_classes: int, config: MethodArguments | None = None) -> Plan:
        """How and where so many rows will be kept; see [`~hf_selfkd.history.plan.plan_history`]."""
        return plan_history(
            config or self.config,
            num_rows,
            num_classes,
            self.device,
            self.folder,
            self.local_processes,
            self.bernoulli,
        )

    def _has_grown(self, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bool:
        """
        Whether samples have come since, to those that the history was made for.

        Raises:
            ValueError: if it was made for others.
        """
        stored_ids = tensors["ids"].numpy() if "ids" in tensors else None
        same_kind = (stored_ids is None) == (self.ids is None)
        if (
            same_kind
            and stored_ids is not None
            and len(stored_ids) < self.size
            and np.isin(stored_ids, self.ids).all()
        ):
            logger.warning(
                f"The training set has {self.size - len(stored_ids)} samples more than the checkpoint's history: the "
                "rows of known ids are kept, new samples have no past yet."
            )
            return True
        same_ids = same_kind and (stored_ids is None or np.array_equal(stored_ids, self.ids))
        if int(metadata["size"]) != self.size or not same_ids:
            raise ValueError(
                f"the checkpoint's history was made for {metadata['size']} samples "
                f"({'ids of their own' if stored_ids is not None else 'row numbers as ids'}), the training set has "
                f"{self.size} ({'ids of their own' if self.ids is not None else 'row numbers as ids'}): give the same "
                "dataset and sample_id_column as before, or start a new run from these weights with from_pretrained "
                "(with a sample_id_column, data may grow: the rows of known ids are kept)."
            )
        return False


class HistoryTeacher(Teacher):
    """
    The rows stored when each sample was last trained on, in an earlier epoch (PS-KD as its authors' code has it).

    Args:
        store ([`HistoryStore`]): of the predictions of the model itself.
        head_stores (`list` of [`HistoryStore`], *optional*): of each auxiliary head that learns from the past.
        head_samples (`Callable`, *optional*): from a batch to the addresses of its views, for the heads.
    """

    kind = "history"
    has_past = True
    needs_ids = True

    def __init__(
        self,
        store: HistoryStore,
        head_stores: list[HistoryStore] | None = None,
        head_samples: Callable[[Batch], SampleIndex] | None = None,
    ):
        super().__init__()
        self.store, self.head_stores, self.head_samples = store, head_stores or [], head_samples

    @property
    def stores(self) -> dict[str, HistoryStore]:
        """All histories, by the names of their files in a checkpoint."""
        return {"teacher": self.store} | {f"head{i}": store for i, store in enumerate(self.head_stores)}

    @property
    def history(self) -> PredictionHistory | None:
        """[`PredictionHistory`]: of the model itself, once there is one."""
        return self.store.history

    @property
    def trace(self) -> torch.Tensor:
        """`torch.HalfTensor` of shape `[samples, epochs]`: probability of the true class; NaN where not visited."""
        if self.history is None or self.history.trace is None:
            raise ValueError("history_trace=False or nothing trained yet: set history_trace=True and train.")
        return self.history.trace

    @property
    def storage(self) -> Storage | None:
        return self.store.storage

    def begin_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            for store in self.stores.values():
                store.end_epoch(self.epoch)
        self.epoch = epoch

    def prepare(self, batch: Batch, num_classes: int | None) -> None:
        if batch.samples is not None and num_classes is not None:
            self.store.prepare(batch.samples, num_classes)

    def targets(self, batch: Batch) -> Taught:
        labels = batch.labels
        if batch.samples is None:
            return Taught()
        rows = labels.numel() if batch.samples.num_rows is None else batch.samples.num_rows
        taught = Taught(self.store.read(batch.samples, rows, labels.device))
        if self.head_stores:
            samples = self.head_samples(batch)
            rows = labels.numel() if batch.rotations is None else batch.rotations.size
            taught.heads = [store.read(samples, rows, labels.device) for store in self.head_stores]
        return taught

    def observe(self, batch: Batch, rows: Rows, head_rows: list[Rows]) -> None:
        if batch.samples is None:
            return
        samples = self.head_samples(batch) if self.head_stores and head_rows else None
        for store, part in zip(self.head_stores, head_rows, strict=False):
            self._observe(store, samples, part, batch.mixing is not None)
        self._observe(self.store, batch.samples, rows, batch.mixing is not None)

    @staticmethod
    def _observe(store: HistoryStore, samples: SampleIndex, rows: Rows, mixed: bool) -> None:
        store.prepare(samples, rows.kept.logits.shape[-1]) if mixed else store.write(samples, rows)

    def stored(self, sample_ids: Any) -> torch.Tensor:
        return self.store.stored(sample_ids)

    def states(self, keeps: bool = True) -> Iterator[tuple[str, State]]:
        for name, store in self.stores.items():
            yield name, ({}, {}) if store.history is None else store.history.state()

    def process_states(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for name, store in self.stores.items():
            if store.history is not None:
                yield name, store.history.journal_state()

    def load(self, name: str, state: State, journals: list[dict[str, torch.Tensor]]) -> None:
        self.stores[name].load(state, journals)
