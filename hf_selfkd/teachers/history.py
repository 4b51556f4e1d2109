"""The teacher that remembers: rows stored when each sample was last trained on."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import SelfKDConfig
from ..history import WARM_START, Plan, PredictionHistory, plan_history
from ..losses.soft_targets import LOG_ZERO, SoftTargets
from ..losses.summary import summarize
from ..samples import SampleIndex
from ..tasks.rows import Rows
from .base import Teacher


logger = logging.getLogger(__name__)


class HistoryTeacher(Teacher):
    """
    The rows stored when each sample was last trained on, in an earlier epoch (PS-KD as its authors' code has it).

    Args:
        config ([`SelfKDConfig`]): its `history_*` fields.
        size (`int`): number of samples.
        ids (`np.ndarray`, *optional*): their ids; `0..size - 1` by default.
        device (`torch.device`): where the model is.
        folder (`str` or `Path`): for a history on disk.
        num_epochs (`int`): epochs of the run, for the trace.
        gather (`Callable`, *optional*): concatenates equal tensors of all processes; `None` for one process.
        rank (`int`): of this process.
        writes (`bool`): whether this process writes the files of its node.
    """

    kind = "history"
    needs_ids = True

    def __init__(
        self,
        config: SelfKDConfig,
        size: int,
        ids: np.ndarray | None,
        device: torch.device,
        folder: str | Path,
        num_epochs: int,
        gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
        rank: int = 0,
        writes: bool = True,
    ):
        super().__init__()
        self.config, self.size, self.device, self.folder = config, size, device, folder
        self.ids = None if ids is None else np.sort(ids)
        self.num_epochs, self.gather, self.rank, self.writes = num_epochs, gather, rank, writes
        self.history: PredictionHistory | None = None  # made at the first batch, which tells the classes and the rows

    @property
    def trace(self) -> torch.Tensor:
        """`torch.HalfTensor` of shape `[samples, epochs]`: probability of the true class; NaN where not visited."""
        if self.history is None or self.history.trace is None:
            raise ValueError("history_trace=False or nothing trained yet: set history_trace=True and train.")
        return self.history.trace

    @property
    def top_k(self) -> int | None:
        return None if self.history is None else self.history.codec.top_k

    def begin_epoch(self, epoch: int) -> None:
        if self.history is not None and epoch != self.epoch:
            self.history.end_epoch(max(self.epoch, WARM_START), self.gather, self.rank)
        self.epoch = epoch

    def look_up(self, samples: SampleIndex) -> None:
        if self.history is not None:
            self.history.look_up(samples)

    def targets(self, samples: SampleIndex, inputs: dict[str, Any], rows: Rows) -> SoftTargets | None:
        self._prepare(samples, rows)
        return self.history.read(samples, len(rows.labels), rows.logits.device)

    def observe(self, samples: SampleIndex, rows: Rows, mixed: bool = False) -> None:
        self._prepare(samples, rows)
        if mixed:
            return
        with torch.no_grad():
            top_k = self.history.codec.top_k
            if top_k is None:
                self.history.write(samples, rows.log_probs, rows.labels)
                return
            summary = rows.summary if rows.top_k == top_k else summarize(rows.logits.detach(), top_k)
            true = None if self.history.trace is None else rows.label_log_probs
            log_probs = (summary.top - summary.log_norm.unsqueeze(-1)).clamp_min_(LOG_ZERO)
            self.history.write(samples, log_probs, rows.labels, summary.index, true)

    def _prepare(self, samples: SampleIndex, rows: Rows) -> None:
        if self.history is None:
            self._make_history(samples, rows)
        elif rows.logits.shape[-1] != self.history.codec.num_classes:
            raise ValueError(
                f"the model has {rows.logits.shape[-1]} classes, the stored predictions "
                f"{self.history.codec.num_classes}: resume with the model that made them."
            )

    def _make_history(self, samples: SampleIndex, rows: Rows) -> None:
        ragged = samples.rows is not None
        counted = torch.tensor([len(samples.ids), samples.total if ragged else len(samples.ids)])
        if self.gather is not None:
            counted = self.gather(counted).view(-1, 2).sum(dim=0)
        samples, num_rows = counted.tolist()
        num_rows = -(-self.size * num_rows // samples)  # for tokens an estimate from the first batch
        plan = plan_history(self.config, num_rows, rows.logits.shape[-1], self.device, self.folder)
        self.history = self._new_history(plan, ragged)
        logger.info(
            f"Prediction history: about {plan.num_bytes} bytes on {plan.place!r} for {self.size} samples, "
            f"{'whole rows' if plan.codec.top_k is None else f'top {plan.codec.top_k}'} in {plan.codec.dtype}."
        )

    def _new_history(self, plan: Plan, ragged: bool) -> PredictionHistory:
        processes = 1 if self.gather is None else len(self.gather(torch.zeros(1)))
        return PredictionHistory(
            self.size,
            plan.codec,
            plan.place,
            self.device,
            self.folder,
            ids=self.ids,
            ragged=ragged,
            trace_epochs=self.num_epochs if self.config.history_trace else 0,
            writes=self.writes,
            expected_rows=plan.num_rows * 17 // (16 * processes),  # some are replayed to fill the last batch
        )

    def stored(self, sample_ids: Any) -> torch.Tensor:
        if self.history is None:
            raise ValueError("no predictions are stored yet: train first.")
        return self.history.probabilities(np.asarray(torch.as_tensor(sample_ids).cpu()))

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        if self.history is None:
            return {}, {}
        return self.history.state()

    def process_state(self) -> dict[str, torch.Tensor]:
        return {} if self.history is None else self.history.journal_state()

    def load(
        self, tensors: dict[str, torch.Tensor], metadata: dict[str, str], journals: list[dict[str, torch.Tensor]]
    ) -> None:
        if not metadata.get("num_classes"):
            return  # saved before the first batch
        num_classes, ragged = int(metadata["num_classes"]), metadata["ragged"] == "True"
        stored_ids = tensors["ids"].numpy() if "ids" in tensors else None
        same_ids = (stored_ids is None) == (self.ids is None) and (
            stored_ids is None or np.array_equal(stored_ids, self.ids)
        )
        if int(metadata["size"]) != self.size or not same_ids:
            raise ValueError(
                f"the checkpoint's history was made for {metadata['size']} samples "
                f"({'ids of their own' if stored_ids is not None else 'row numbers as ids'}), the training set has "
                f"{self.size} ({'ids of their own' if self.ids is not None else 'row numbers as ids'}): give the same "
                "dataset and sample_id_column as before."
            )
        top_k = None if metadata["top_k"] == "None" else int(metadata["top_k"])
        for name, value in (("history_top_k", top_k), ("history_dtype", metadata["dtype"])):
            asked = getattr(self.config, name)
            if asked not in (None, "auto", value) and not (name == "history_top_k" and asked == num_classes):
                raise ValueError(
                    f"{name}={asked} but the checkpoint's history has {value}: resume with {name}={value}."
                )
        rows = int(tensors["counts"].sum()) if ragged else self.size
        config = copy.copy(self.config)  # what is stored decides, not what would be chosen for a new history
        config.history_top_k, config.history_dtype = top_k or num_classes, metadata["dtype"]
        plan = plan_history(config, max(rows, 1), num_classes, self.device, self.folder)
        self.history = self._new_history(plan, ragged)
        self.history.load_state(tensors, self.gather)
        for journal in journals:
            self.history.add_journal(journal)
