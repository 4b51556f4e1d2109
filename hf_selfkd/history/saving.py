"""A history in a checkpoint: what all processes agree on, and how another history takes it over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from .addresses import NEVER, find_slots, ranges
from .storage import Gather


if TYPE_CHECKING:
    from .predictions import PredictionHistory

COPIED_ROWS = 65536  # rows of a table that are taken over at a time


def state_of(history: PredictionHistory) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Everything that all processes agree on, as tensors and metadata."""
    tensors = {f"table.{name}": part for name, part in history.table.items()}
    for name in ("stamps", "hashes", "counts", "starts", "ids"):
        if getattr(history, name) is not None:
            tensors[name] = torch.from_numpy(getattr(history, name))
    tensors["visits"] = torch.tensor([history.visits])
    if history.trace is not None:
        tensors["trace"] = history.trace
    metadata = {
        "size": str(history.size),
        "num_classes": str(history.codec.num_classes),
        "dtype": str(history.codec.dtype).removeprefix("torch."),
        "top_k": str(history.codec.top_k),
        "ragged": str(history.ragged),
    }
    return tensors, metadata


def load_same(history: PredictionHistory, tensors: dict[str, torch.Tensor], gather: Gather | None) -> None:
    """Take over what `state_of` gave for the same samples."""
    for name in ("stamps", "hashes", "counts", "starts"):
        if name in tensors:
            setattr(history, name, tensors[name].numpy().copy())
    _load_trace(history, tensors, slice(None), slice(None))
    stored = _stored(history, tensors)
    if stored:
        rows = np.arange(len(stored["log_probs"]))
        _copy_rows(history, stored, rows, rows, len(rows), gather)


def load_known(history: PredictionHistory, tensors: dict[str, torch.Tensor], gather: Gather | None) -> np.ndarray:
    """
    Take over what `state_of` gave for other samples, as far as these have the same ids; the rest stays empty.

    Returns:
        `np.ndarray`: the slot of each old slot, -1 where its sample is gone.
    """
    old_stamps = tensors["stamps"].numpy()
    ids = tensors["ids"].numpy() if "ids" in tensors else np.arange(len(old_stamps))
    moved, known = find_slots(ids, history.size, history.ids)
    if known is not None:
        moved = np.where(known, moved, -1)
    old = np.flatnonzero((moved >= 0) & (old_stamps != NEVER))
    new = moved[old]
    history.stamps[new], history.hashes[new] = old_stamps[old], tensors["hashes"].numpy()[old]
    _load_trace(history, tensors, torch.from_numpy(old), torch.from_numpy(new))
    stored = _stored(history, tensors)
    if stored and len(old):
        source, destination = old, new
        if history.ragged:
            counts = tensors["counts"].numpy()[old]
            source = ranges(tensors["starts"].numpy()[old], counts)
            destination = history.place_rows(new, counts)
        _copy_rows(history, stored, source, destination, history.table_rows, gather)
    return moved


def _stored(history: PredictionHistory, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The stored parts that this history has too: a trace may be new, or left out."""
    return {name: tensors[f"table.{name}"] for name in history.storage.columns if f"table.{name}" in tensors}


def _load_trace(history: PredictionHistory, tensors: dict[str, torch.Tensor], old, new) -> None:
    if "trace" in tensors and history.trace is not None:
        epochs = min(history.trace.shape[1], tensors["trace"].shape[1])
        history.trace[new, :epochs] = tensors["trace"][old, :epochs]


def _copy_rows(
    history: PredictionHistory,
    stored: dict[str, torch.Tensor],
    source: np.ndarray,
    destination: np.ndarray,
    num_rows: int,
    gather: Gather | None,
) -> None:
    """Copy rows into the table some at a time: what is stored is a view of a file that may exceed the memory."""
    history.storage.grow(num_rows, gather)
    if not history.storage.filled_by_others:
        for start in range(0, len(source), COPIED_ROWS):
            old = torch.from_numpy(source[start : start + COPIED_ROWS])
            new = torch.from_numpy(destination[start : start + COPIED_ROWS]).to(history.storage.device)
            for name, part in stored.items():
                history.table[name].index_copy_(0, new, part.index_select(0, old).to(history.storage.device))
    if history.storage.on_disk and gather is not None:
        gather(torch.zeros(1))  # nobody reads before the writer of the node is done
