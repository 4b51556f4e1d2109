"""A teacher of one's own making: predictions from a file (born-again networks, an ensemble, last month's run)."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..batch import Batch
from ..devices import to_device
from ..losses.soft_targets import SoftTargets, log_softmax
from .base import State, Taught, Teacher


KINDS = ("probs", "log_probs", "logits")  # names of the array in a file, each of which says what is in it


class Predictions:
    """
    Predictions for samples, by their ids.

    Args:
        values (`torch.FloatTensor` of shape `[N, C]`): of any floating type, on the CPU; rows with NaN say nothing.
        kind (`str`): `"probs"`, `"log_probs"` or `"logits"`.
        ids (`np.ndarray` of `int64`, shape `[N]`, *optional*): of the samples; row numbers by default.

    Raises:
        ValueError: if shapes do not fit, ids stand twice or probabilities do not add up to 1.
    """

    def __init__(self, values: torch.Tensor, kind: str, ids: np.ndarray | None = None):
        if values.dim() != 2 or not values.is_floating_point():
            raise ValueError(
                f"{kind} of shape {list(values.shape)} and type {values.dtype}: [samples, classes] of floats."
            )
        self.values, self.kind = values, kind
        self.order = None
        if ids is not None:
            if ids.shape != (len(values),) or ids.dtype.kind not in "iu" or len(np.unique(ids)) != len(ids):
                raise ValueError(
                    f"ids of shape {list(ids.shape)} for {len(values)} rows: one integer each, none twice."
                )
            self.order = np.argsort(ids, kind="stable")
            self.ids = ids[self.order].astype(np.int64)
        if kind == "probs":
            self._check_probabilities()

    def _check_probabilities(self) -> None:
        for start in range(0, len(self.values), 4096):
            part = self.values[start : start + 4096].float()
            wrong = ((part.sum(dim=-1) - 1).abs() > 1e-2) | (part < 0).any(dim=-1)
            if bool(wrong.any()):
                row = int(wrong.nonzero()[0])
                raise ValueError(
                    f"row {start + row} of probs adds up to {part[row].sum():.4g}: if these are scores, name the "
                    "array logits."
                )

    @classmethod
    def load(cls, path: str | Path) -> Predictions:
        """
        Read a `.npz` or `.safetensors` file with one array named `probs`, `log_probs` or `logits`, and perhaps `ids`.

        Raises:
            ValueError: if there is no such file, or it holds something else.
        """
        path = Path(path)
        if not path.is_file() or path.suffix not in (".npz", ".safetensors"):
            raise ValueError(f"teacher_predictions={str(path)!r} is no .npz or .safetensors file that exists.")
        try:
            arrays = _read(path)
        except Exception as error:
            raise ValueError(f"teacher_predictions={str(path)!r} cannot be read: {error}.") from error
        found = [name for name in KINDS if name in arrays]
        if len(found) != 1 or arrays.keys() - {*KINDS, "ids"}:
            raise ValueError(
                f"teacher_predictions={str(path)!r} holds {', '.join(arrays)}: it needs one of {', '.join(KINDS)}, "
                "and may have ids."
            )
        try:
            ids = arrays.get("ids")
            return cls(arrays[found[0]], found[0], None if ids is None else ids.numpy())
        except ValueError as error:
            raise ValueError(f"teacher_predictions={str(path)!r}: {error}") from error

    def places(self, ids: np.ndarray) -> np.ndarray:
        """The rows `[B]` of samples; -1 where there is none."""
        if self.order is None:
            return np.where((ids >= 0) & (ids < len(self.values)), ids, -1)
        at = np.searchsorted(self.ids, ids).clip(max=max(len(self.ids) - 1, 0))
        return np.where(self.ids[at] == ids, self.order[at], -1)

    def log_probs(self, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities `[B, C]`, float32, and which of the samples `[B]` have any."""
        places = torch.from_numpy(self.places(ids))
        values = self.values[places.clamp_min(0)].float()
        known = (places >= 0) & ~values.isnan().any(dim=-1)
        return log_softmax(values.log() if self.kind == "probs" else values), known

    def checksum(self) -> str:
        """Of the values."""
        return f"{zlib.crc32(self.values.contiguous().view(torch.uint8).numpy()):08x}"


def _read(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


class PredictionsTeacher(Teacher):
    """
    Predictions from a file, the same in every epoch, from the first one on.

    Args:
        predictions ([`Predictions`]): of the training samples.
    """

    kind = "predictions"
    has_past = True
    needs_ids = True
    first_epoch = 0

    def __init__(self, predictions: Predictions):
        super().__init__()
        self.predictions = predictions
        self.found = 0  # samples that the file had a prediction for, each time that they were seen

    def targets(self, batch: Batch) -> Taught:
        if batch.samples is None:
            return Taught()
        log_probs, known = self.predictions.log_probs(batch.samples.ids)
        self.found += int(known.sum())
        device = batch.labels.device
        return Taught(SoftTargets(to_device(log_probs, device), to_device(known, device)))

    def stored(self, sample_ids: Any) -> torch.Tensor:
        log_probs, known = self.predictions.log_probs(np.asarray(torch.as_tensor(sample_ids).cpu()))
        return torch.where(known[:, None], log_probs.exp(), torch.nan)

    def states(self, keeps: bool = True) -> Iterator[tuple[str, State]]:
        yield "teacher", ({}, {"predictions": self.predictions.checksum()})

    def load(self, name: str, state: State, journals: list[dict[str, torch.Tensor]]) -> None:
        """
        Raises:
            ValueError: if the run had other predictions before.
        """
        written, own = state[1].get("predictions"), self.predictions.checksum()
        if written != own:
            raise ValueError(
                f"teacher_predictions holds other values (checksum {own}) than when the checkpoint was written "
                f"({written}): give the same file."
            )
