"""Which samples of a training set look wrong: what the model said of them, again and again, is another class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..history.addresses import NEVER
from ..teachers.history import HistoryTeacher


CHUNK = 4096  # samples whose predictions are read at once


@dataclass
class Paths:
    """
    How the probability of each sample's label moved.

    Args:
        ids (`np.ndarray` of `int64`, shape `[n]`): of the samples that were predicted.
        probs (`np.ndarray` of `float32`, shape `[n, epochs]`):
            probability of the label in each epoch, NaN where the sample was not visited; of the last epoch only
            without `history_trace`.
    """

    ids: np.ndarray
    probs: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """`np.ndarray` of shape `[n]`: over the epochs."""
        return np.nanmean(self.probs, axis=1)

    @property
    def deviation(self) -> np.ndarray:
        """`np.ndarray` of shape `[n]`: standard deviation over the epochs."""
        return np.nanstd(self.probs, axis=1)


def paths_of(teacher: HistoryTeacher) -> Paths | None:
    """
    What a history tells of the labels of its samples.

    Args:
        teacher ([`~hf_selfkd.teachers.HistoryTeacher`]): after training.

    Returns:
        [`Paths`]: or `None` if nothing was stored, or for tokens without `history_trace`.
    """
    history = teacher.history
    if history is None:
        return None
    ids = np.arange(history.size) if history.ids is None else history.ids
    if history.trace is not None:
        probs = history.trace.float().numpy()
    elif history.ragged:
        return None  # the labels of tokens are not stored
    else:
        probs = np.full((history.size, 1), np.nan, dtype=np.float32)
        for start in range(0, history.size, CHUNK):
            part = slice(start, min(start + CHUNK, history.size))
            labels = torch.from_numpy(np.where(history.stamps[part] == NEVER, 0, history.hashes[part]))
            # Where a sample has one row, its hash is its label.
            stored = history.probabilities(ids[part]).gather(-1, labels.clamp_min(0)[:, None])
            probs[part] = stored.masked_fill(labels[:, None] < 0, torch.nan).numpy()
    visited = ~np.isnan(probs).all(axis=1)
    return Paths(ids[visited], probs[visited]) if visited.any() else None


def most_suspicious(paths: Paths, count: int) -> np.ndarray:
    """
    Samples whose label the model believed least, the worst first: wrong labels gather there, as a model learns what
    most samples agree on before what contradicts them (Arpit et al., ICML 2017; Swayamdipta et al., EMNLP 2020).

    Args:
        paths ([`Paths`]): of all samples.
        count (`int`): at most so many.

    Returns:
        `np.ndarray` of `int64`: places in `paths`.
    """
    return np.argsort(paths.mean, kind="stable")[:count]


def most_undecided(paths: Paths, count: int) -> np.ndarray:
    """
    Samples on which the model changed its mind most, by the standard deviation over the epochs (Swayamdipta et al.,
    EMNLP 2020: "ambiguous"); none of a run of fewer than three traced epochs.

    Args:
        paths ([`Paths`]): of all samples.
        count (`int`): at most so many.

    Returns:
        `np.ndarray` of `int64`: places in `paths`.
    """
    if paths.probs.shape[1] < 3:
        return np.empty(0, dtype=np.int64)
    return np.argsort(-paths.deviation, kind="stable")[:count]
