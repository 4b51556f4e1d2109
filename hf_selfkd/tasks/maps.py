"""Pixels and the places of a coarser map: which pixels a place stands for, and which class."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..samples import IGNORE_INDEX


def blocks_of(pixels: int, places: int, device: torch.device) -> torch.Tensor:
    """The place `[pixels]` that is nearest to each pixel of a line, of places that are spread evenly over the line."""
    return torch.arange(pixels, device=device) * places // pixels


def counts_of(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    How many pixels of each place are true.

    Args:
        mask (`torch.BoolTensor` of shape `[B, H, W]`): of the pixels.
        size (`tuple`): height and width of the map.

    Returns:
        `torch.LongTensor` of shape `[B, h, w]`: their sum is the number of true pixels.
    """
    counts = mask.long()
    for dim, places in zip((1, 2), size, strict=True):
        pixels = mask.shape[dim]
        ends = (torch.arange(1, places + 1, device=mask.device) * pixels + places - 1) // places
        upto = counts.cumsum(dim).index_select(dim, ends - 1)  # the pixels of a place follow one another
        counts = upto.diff(dim=dim, prepend=torch.zeros_like(upto.narrow(dim, 0, 1)))
    return counts


def labels_of_blocks(labels: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """
    A class for each place: that of the pixel in its middle, or where that one does not count, the largest of its
    pixels.

    Args:
        labels (`torch.LongTensor` of shape `[B, H, W]`): of the pixels.
        counts (`torch.LongTensor` of shape `[B, h, w]`): labelled pixels of each place.

    Returns:
        `torch.LongTensor` of shape `[B, h, w]`: -100 for places without a labelled pixel.
    """
    size = counts.shape[-2:]
    lines = [
        (2 * torch.arange(places, device=labels.device) + 1) * pixels // (2 * places)
        for pixels, places in zip(labels.shape[-2:], size, strict=True)
    ]
    middle = labels[:, lines[0]][:, :, lines[1]]
    largest = F.adaptive_max_pool2d(labels.float().unsqueeze(1), size).squeeze(1).long()
    return torch.where(middle == IGNORE_INDEX, largest, middle).masked_fill(counts == 0, IGNORE_INDEX)
