"""Rotated views of images: which of them a sample is shown in an epoch, and how they are made."""

from __future__ import annotations

import numpy as np
import torch

from ..devices import compiles_shapes, to_device
from .config import ROTATIONS


def choose_rotations(ids: np.ndarray, views: int, epoch: int, seed: int) -> np.ndarray:
    """
    Which views of each sample are seen in an epoch: the upright one, then rotated ones.

    They depend on nothing but the arguments, so that they resume and do not depend on the number of processes; with
    one rotated view, a sample sees all three in three successive epochs, and starts with any of them.

    Args:
        ids (`np.ndarray` of `int64`, shape `[B]`): sample ids.
        views (`int`): rotated views, 0 to 3.
        epoch (`int`): counted from 0.
        seed (`int`): of the run.

    Returns:
        `np.ndarray` of `int64`, shape `[B, 1 + views]`: quarter turns, counter-clockwise, ascending.
    """
    mixed = (ids.astype(np.uint64) + np.uint64(seed % 2**32 + 1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    first = ((mixed >> np.uint64(33)) % np.uint64(3)).astype(np.int64)
    rotations = 1 + (first[:, None] + epoch + np.arange(views)) % 3
    return np.concatenate((np.zeros((len(ids), 1), np.int64), np.sort(rotations, axis=1)), axis=1)


def rotate(images: torch.Tensor, rotations: np.ndarray | torch.Tensor) -> torch.Tensor:
    """
    The views of a batch, one sample after the other.

    On XLA, and wherever the rotations are on the device, no shape depends on them: nothing is compiled again and the
    host waits for nothing. Elsewhere no view is made that is not shown. The values are the same.

    Args:
        images (`torch.FloatTensor` of shape `[B, C, S, S]`): upright.
        rotations (`np.ndarray` or `torch.LongTensor` of shape `[B, V]`):
            quarter turns of each view, counter-clockwise.

    Returns:
        `torch.FloatTensor` of shape `[B * V, C, S, S]`: view `v` of sample `b` is row `V * b + v`.

    Raises:
        ValueError: if the images are not square.
    """
    if images.dim() != 4 or images.shape[-1] != images.shape[-2]:
        raise ValueError(
            f"views='rotation' needs square images, and these are {list(images.shape)}: resize or crop them to "
            "squares, or set views='none'."
        )
    if isinstance(rotations, torch.Tensor) or compiles_shapes(images.device):
        return _rotate_everything(images, torch.as_tensor(rotations))
    return _rotate_chosen(images, rotations)


def _rotate_everything(images: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """All images are turned by all angles, and each view takes the one that it shows."""
    rotations = to_device(rotations, images.device)[:, :, None, None, None]
    views = images.unsqueeze(1).expand(-1, rotations.shape[1], -1, -1, -1)
    for quarter in range(1, ROTATIONS):
        turned = torch.rot90(images, quarter, dims=(-2, -1)).unsqueeze(1)
        views = torch.where(rotations == quarter, turned, views)
    return views.flatten(0, 1)


def _rotate_chosen(images: torch.Tensor, rotations: np.ndarray) -> torch.Tensor:
    """Images are turned by the angles that they are shown at."""
    count = rotations.shape[1]
    views = images.repeat_interleave(count, dim=0)
    for quarter in range(1, ROTATIONS):
        rows = np.flatnonzero(rotations.reshape(-1) == quarter)
        if len(rows):
            index = to_device(torch.from_numpy(rows), images.device)
            views[index] = torch.rot90(images[index // count], quarter, dims=(-2, -1))
    return views
