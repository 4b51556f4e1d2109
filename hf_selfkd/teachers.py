"""Teachers: where past predictions come from. They know rows and epochs, never tasks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .config import SelfKDConfig
from .history import WARM_START, Plan, PredictionHistory, plan_history
from .losses import LOG_ZERO, Past, log_softmax, summarize
from .rows import Rows
from .samples import SampleKeys


logger = logging.getLogger(__name__)


class Teacher:
    """
    What every teacher answers to; by itself the teacher that is silent (`teacher="none"`).

    Attributes:
        epoch (`int`): the epoch that is being trained, counted from 0; -1 before training.
    """

    kind = "none"
    needs_ids = False

    def __init__(self):
        self.epoch = -1

    @property
    def top_k(self) -> int | None:
        """`int`: entries that it stores of each row, as far as it knows; `None` if whole rows or nothing."""
        return None

    def begin_epoch(self, epoch: int) -> None:
        """Close the epoch before this one. Every process must call this; calling it again changes nothing."""
        self.epoch = epoch

    def expect(self, keys: SampleKeys | None) -> None:
        """Look these samples up before the model runs; this spares time, and finds faults early."""

    def targets(self, keys: SampleKeys | None, inputs: dict[str, Any], rows: Rows) -> Past | None:
        """Past predictions for these rows, or `None` if there are none at all."""
        return None

    def observe(self, keys: SampleKeys | None, rows: Rows, mixed: bool = False) -> None:
        """
        Take note of the present predictions; `rows` may have a gradient, what is kept of them has none. Every process
        must call this for every batch; nothing is kept of `mixed` images.
        """

    def after_step(self) -> None:
        """Take note of an optimizer step."""

    def stored(self, sample_ids: Any) -> torch.Tensor:
        """
        The probabilities held for these samples.

        Args:
            sample_ids (`Sequence[int]`, `np.ndarray` or `torch.LongTensor`, shape `[n]`): sample ids.

        Returns:
            `torch.FloatTensor` of shape `[n, C]` (token tasks: `[rows of these samples, C]`), on the CPU; NaN rows
            where there is no past prediction.

        Raises:
            ValueError: if this teacher stores no rows, or an id is unknown.
        """
        raise ValueError(f"teacher={self.kind!r} stores no rows: use teacher='history'.")

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What all processes agree on: tensors and metadata."""
        return {}, {}

    def process_state(self) -> dict[str, torch.Tensor]:
        """What this process has for itself."""
        return {}

    def load(
        self, tensors: dict[str, torch.Tensor], metadata: dict[str, str], journals: list[dict[str, torch.Tensor]]
    ) -> None:
        """Take over what `state` and the `process_state` of some processes gave."""


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

    def expect(self, keys: SampleKeys) -> None:
        if self.history is not None:
            self.history.look_up(keys)

    def targets(self, keys: SampleKeys, inputs: dict[str, Any], rows: Rows) -> Past | None:
        self._prepare(keys, rows)
        return self.history.read(keys, len(rows.labels), rows.logits.device)

    def observe(self, keys: SampleKeys, rows: Rows, mixed: bool = False) -> None:
        self._prepare(keys, rows)
        if mixed:
            return
        with torch.no_grad():
            top_k = self.history.codec.top_k
            if top_k is None:
                self.history.write(keys, rows.log_probs, rows.labels)
                return
            summary = rows.summary if rows.top_k == top_k else summarize(rows.logits.detach(), top_k)
            true = None if self.history.trace is None else rows.label_log_probs
            log_probs = (summary.top - summary.log_norm.unsqueeze(-1)).clamp_min_(LOG_ZERO)
            self.history.write(keys, log_probs, rows.labels, summary.index, true)

    def _prepare(self, keys: SampleKeys, rows: Rows) -> None:
        if self.history is None:
            self._make_history(keys, rows)
        elif rows.logits.shape[-1] != self.history.codec.num_classes:
            raise ValueError(
                f"the model has {rows.logits.shape[-1]} classes, the stored predictions "
                f"{self.history.codec.num_classes}: resume with the model that made them."
            )

    def _make_history(self, keys: SampleKeys, rows: Rows) -> None:
        ragged = keys.rows is not None
        counted = torch.tensor([len(keys.ids), keys.total if ragged else len(keys.ids)])
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


class SnapshotTeacher(Teacher):
    """
    The weights at the end of the previous epoch, in evaluation mode, on the very view that is trained on.

    Only what training changes is copied (trainable parameters and buffers), so a PEFT model costs its adapters.

    Args:
        model (`nn.Module`): the model that is trained, unwrapped.
        predict (`Callable`):
            `predict(outputs)` gives the logits `[R, C]` of the model itself, then those of its heads, if they are to
            learn from the past.
        broadcast (`Callable`, *optional*):
            gives every process the tensor of the first one; `None` for one process. Processes agree on weights but not
            on batch statistics.
        warm_start (`bool`): let the initial weights teach the first epoch.
        dropout (`bool`): whether dropout stays on; statistics of batches are those of evaluation all the same.

    Attributes:
        of_heads (`list` of [`~hf_selfkd.losses.Past`]): what the heads said, as of the last call of `targets`.
    """

    kind = "snapshot"

    def __init__(
        self,
        model: nn.Module,
        predict: Callable[[Any], list[torch.Tensor]],
        broadcast: Callable[[torch.Tensor], torch.Tensor] | None = None,
        warm_start: bool = False,
        dropout: bool = False,
    ):
        super().__init__()
        self.model, self.predict, self.warm_start = model, predict, warm_start
        self.broadcast, self.dropout = broadcast, dropout
        persistent = model.state_dict().keys()  # the others are constants such as position ids
        self.buffers = [name for name, _ in model.named_buffers() if name in persistent]
        self.weights: dict[str, torch.Tensor] = {}
        self.of_heads: list[Past] = []

    def _live(self) -> dict[str, torch.Tensor]:
        live = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        for name in self.buffers:
            buffer = self.model.get_buffer(name).detach()
            live[name] = buffer if self.broadcast is None else self.broadcast(buffer.clone())
        return live

    def _copy(self) -> None:
        live = self._live()
        if self.weights.keys() != live.keys():
            self.weights = {name: tensor.clone() for name, tensor in live.items()}
        for name, tensor in live.items():
            self.weights[name].copy_(tensor)

    def begin_epoch(self, epoch: int) -> None:
        if epoch != self.epoch and (epoch > 0 or self.warm_start):
            self._copy()
        self.epoch = epoch

    @torch.no_grad()
    def targets(self, keys: SampleKeys | None, inputs: dict[str, Any], rows: Rows) -> Past | None:
        self.of_heads = []
        if not self.weights:
            return None
        modes = [(module, module.training) for module in self.model.modules()]
        for module, _ in modes:  # many a forward asks its own module, not a Dropout, whether it is training
            module.training = self.dropout and not isinstance(module, _BatchNorm)
        try:
            outputs = torch.func.functional_call(self.model, self.weights, kwargs=inputs)
        finally:
            for module, training in modes:
                module.training = training
        past, *self.of_heads = [_whole_past(log_softmax(logits)) for logits in self.predict(outputs)]
        return past

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        return {f"weights.{name}": tensor for name, tensor in self.weights.items()}, {}

    def load(
        self, tensors: dict[str, torch.Tensor], metadata: dict[str, str], journals: list[dict[str, torch.Tensor]]
    ) -> None:
        live = self._live()
        stored = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
        if not stored:
            return  # saved before the teacher had acted
        for name, tensor in live.items():
            if name not in stored or stored[name].shape != tensor.shape:
                raise ValueError(
                    f"the checkpoint's {self.kind} has no {name} of shape {list(tensor.shape)}: resume with the model "
                    "that made it."
                )
        # Into memory of its own, laid out as the live weights are: what is read from a file is not aligned, and some
        # kernels then round otherwise.
        self.weights = {name: torch.empty_like(tensor).copy_(stored[name]) for name, tensor in live.items()}


def _whole_past(log_probs: torch.Tensor) -> Past:
    mask = torch.isfinite(log_probs).all(dim=-1)
    return Past(log_probs.nan_to_num_(nan=0.0), mask)


class EMATeacher(SnapshotTeacher):
    """
    A moving average of the weights, in evaluation mode, from the second epoch on; buffers are copied.

    Args:
        model (`nn.Module`): the model that is trained, unwrapped.
        predict (`Callable`): as in [`SnapshotTeacher`].
        decay (`float`):
            of the average, at most `(1 + t) / (10 + t)` after `t` steps: with the full decay from the start the random
            initial weights would rule for 1 / (1 - decay) steps.
        broadcast (`Callable`, *optional*): as in [`SnapshotTeacher`].
        dropout (`bool`): as in [`SnapshotTeacher`].
    """

    kind = "ema"

    def __init__(
        self,
        model: nn.Module,
        predict: Callable[[Any], list[torch.Tensor]],
        decay: float,
        broadcast: Callable[[torch.Tensor], torch.Tensor] | None = None,
        dropout: bool = False,
    ):
        super().__init__(model, predict, broadcast, dropout=dropout)
        self.decay, self.updates = decay, 0

    def begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @torch.no_grad()
    def after_step(self) -> None:
        if not self.weights:
            self._copy()
        else:
            live = self._live()
            weight = max(1 - self.decay, 9 / (10 + self.updates))
            names = live.keys() - set(self.buffers)
            torch._foreach_lerp_([self.weights[name] for name in names], [live[name] for name in names], weight)
            for name in self.buffers:
                self.weights[name].copy_(live[name])
        self.updates += 1

    def targets(self, keys: SampleKeys | None, inputs: dict[str, Any], rows: Rows) -> Past | None:
        return super().targets(keys, inputs, rows) if self.epoch > 0 else None

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        return super().state()[0], {"updates": str(self.updates)}

    def load(
        self, tensors: dict[str, torch.Tensor], metadata: dict[str, str], journals: list[dict[str, torch.Tensor]]
    ) -> None:
        super().load(tensors, metadata, journals)
        self.updates = int(metadata["updates"])
